"""The folder beside the output in which a run keeps what it needs to go on."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..converters.errors import InputError
from .config import UptrainConfig

RECIPE = "recipe.json"
# The recipe's further entry, the digest of the tokens.
TEXT = "text_sha256"
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

    def check_text(self, config: UptrainConfig, digest: str) -> None:
        """Raises if the run to go on with read other tokens, under the same file names."""
        if self.checkpoint is not None and _read(self.folder)[TEXT] != digest:
            raise InputError(
                f"the text of {config.data}, or the held-out one, has changed since the "
                "interrupted run. Give --force without --resume to start again."
            )

    def begin(self, config: UptrainConfig, digest: str) -> None:
        if self.checkpoint is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(config) | {TEXT: digest}, indent=2) + "\n"
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
    differing = config.same_run(_read(folder))
    if differing:
        flags = ", ".join("--" + name.replace("_", "-") for name in differing)
        raise InputError(
            f"the interrupted run of {output} had another {flags}. Give the same options, or "
            "--force without --resume to start again."
        )
    return Work(folder, found)


def _read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECIPE).read_text(encoding="utf-8"))


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps that is whole."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(whole, key=_step, default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
