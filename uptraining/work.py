"""The folder beside the output in which a run keeps what it needs to go on."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from ..converters.errors import InputError
from .config import UptrainConfig

RECIPE = "recipe.json"
# The Trainer writes it last.
COMPLETE = "trainer_state.json"


@dataclass(frozen=True)
class Work:
    """A run's place on disk until its output is written.

    Args:
        folder: holds the recipe, and the Trainer's checkpoints.
        checkpoint: the newest whole one, if the run is to go on from it.
    """

    folder: Path
    checkpoint: Path | None

    @property
    def start(self) -> Path:
        """Where a PiSSA adapter's start is kept."""
        return self.folder / "start"

    def begin(self, config: UptrainConfig) -> None:
        if self.checkpoint is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(config), indent=2) + "\n"
        (self.folder / RECIPE).write_text(text, encoding="utf-8")

    def end(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def work_of(output: Path, config: UptrainConfig, *, resume: bool, force: bool) -> Work:
    """The work folder of an output, with the checkpoint to go on from.

    Raises:
        InputError: an interrupted run is in the way, or was of another recipe.
    """
    folder = output.with_name(f".{output.name}.uptrain")
    found = newest(folder)
    if found is None or (force and not resume):
        return Work(folder, None)
    if not resume:
        raise InputError(
            f"{output} was begun before and interrupted at step {_step(found)}. Give --resume to "
            "go on with it, or --force to start again."
        )
    differing = config.same_run(json.loads((folder / RECIPE).read_text(encoding="utf-8")))
    if differing:
        flags = ", ".join("--" + name.replace("_", "-") for name in differing)
        raise InputError(
            f"the interrupted run of {output} had another {flags}. Give the same options, or "
            "--force without --resume to start again."
        )
    return Work(folder, found)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps that is whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
