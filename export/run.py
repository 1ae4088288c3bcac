"""`export`: a converted checkpoint written for another tool, whole or not at all."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from ..converters.checkpoint import Writer, copy_side_files, open_source
from ..converters.convert import calibration_tokens
from ..converters.errors import InputError
from ..converters.memory import peak_rss_bytes
from ..converters.writer import check_output
from . import deepseek2
from .card import DEEPSEEK, NATIVE, stock_card
from .deepseek3 import deepseek_config, deepseek_tensors
from .engine import plain_base, steady_layers
from .hub import check_login, push
from .latent import LatentModel
from .native import planned_bytes, stock_config, stock_tensors
from .steady import SteadyLayer

Progress = Callable[[str, int, int, dict[str, Any]], None]

# Sequences that an engine's norm on the latent is fitted on, and rows that steady it.
SAMPLES = 12
NORM_ROWS = 16


@dataclass(frozen=True)
class Export:
    """What an export did.

    Args:
        architecture: the class or the engine's architecture that loads it.
        kv_bytes_per_token: of the converted model, and of the exported one in the same dtype.
        norm_spread: of an engine's norm, for every layer: standard deviation over tokens of the
            logarithm of what the latent's norm divides by; 0 would be no loss.
        url: where it is on the hub.
    """

    output: Path
    to: str
    architecture: str
    kv_bytes_per_token: dict[str, int]
    seconds: float
    peak_rss_bytes: int
    norm_spread: list[float] | None = None
    url: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self) | {"output": str(self.output)}


@dataclass(frozen=True)
class Job:
    """One export that was asked for; the arguments are those of `export`."""

    model: LatentModel
    output: Path
    force: bool
    calibration: str | None
    samples: int
    norm_rows: int
    progress: Progress

    def check_rows(self) -> None:
        """Raises unless the latent may have so many channels more."""
        most = self.model.config.hidden_size
        if not 0 <= self.norm_rows <= most:
            raise InputError(f"--norm-rows {self.norm_rows} must be at least 0 and at most {most}.")

    def result(self, to: str, architecture: str, wider: int, **found: Any) -> Export:
        """Args: wider: how many numbers more are cached for a token in a layer."""
        config = self.model.config
        width = config.kv_lora_rank + config.qk_rope_head_dim
        scale = config.num_hidden_layers * self.model.dtype.itemsize
        sizes = {"converted": width * scale, "exported": (width + wider) * scale}
        return Export(self.output, to, architecture, sizes, 0.0, peak_rss_bytes(), **found)


def export(
    model: str | Path,
    *,
    to: str,
    output: str | Path,
    force: bool = False,
    calibration: str | None = None,
    samples: int = SAMPLES,
    norm_rows: int = NORM_ROWS,
    push_to_hub: str | None = None,
    private: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Writes a converted model so that tools that do not know rehead run it.

    Args:
        model: the folder of a conversion to decoupled MLA, with `native` or, for DeepSeek and GGUF,
            with the preset "engine".
        to: one of `FORMATS`.
        output: the folder, or the `.gguf` file, to write.
        force: replace what is there.
        calibration: for DeepSeek and GGUF, a text as for `convert`.
        samples: for the same, calibration sequences.
        norm_rows: for the same, channels more in the latent, which steady its norm.
        push_to_hub: the id of a repository that is to have it too; made if there is none.
        private: make it a private one.
        progress: called as progress(stage, done, total, info).

    Raises:
        InputError: the model cannot be written so, and nothing has been; or the hub refuses it.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to} is unknown. Use {' or '.join(FORMATS)}.")
    began = time.monotonic()
    if push_to_hub is not None:
        check_login(push_to_hub)
    asked = Job(
        LatentModel(open_source(model)),
        Path(output).expanduser(),
        force,
        calibration,
        samples,
        norm_rows,
        progress or _silent,
    )
    done = FORMATS[to](asked)
    if push_to_hub is not None:
        done = replace(done, url=push(done.output, push_to_hub, private=private))
    return replace(done, seconds=time.monotonic() - began)


def _to_transformers(job: Job) -> Export:
    model = job.model
    config = stock_config(model, model.dtype)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        layers = model.config.num_hidden_layers
        for name, tensor in stock_tensors(model, model.dtype):
            yield name, tensor
            if name.endswith("self_attn.kv_b_proj.weight"):
                job.progress("layers", int(name.split(".")[2]) + 1, layers, {})

    _write_folder(job, config, tensors(), NATIVE)
    return job.result("transformers", config.architectures[0], 1)


def _to_deepseek(job: Job) -> Export:
    model = job.model
    base = plain_base(model, "DeepSeek")
    job.check_rows()
    config = deepseek_config(model, model.dtype, base, job.norm_rows)
    spreads: list[float] = []

    def layers() -> Iterator[SteadyLayer]:
        tokens = calibration_tokens(model.source, job.samples, 0, job.calibration)
        for layer in steady_layers(model, tokens, job.norm_rows, job.progress):
            spreads.append(layer.spread)
            yield layer

    _write_folder(job, config, deepseek_tensors(model, layers(), model.dtype), DEEPSEEK)
    return job.result("deepseek", config.architectures[0], job.norm_rows, norm_spread=spreads)


def _write_folder(
    job: Job,
    config: PretrainedConfig,
    tensors: Iterable[tuple[str, Tensor]],
    about: tuple[str, str],
) -> None:
    """Writes the checkpoint of a stock class, whole or not at all."""
    model, source = job.model, job.model.source
    check_output(job.output, force=job.force, protect=source.path)
    expected = planned_bytes(model, config)
    with Writer(
        job.output, force=job.force, expected_bytes=expected, protect=source.path
    ) as writer:
        for name, tensor in tensors:
            writer.add(name, tensor)
        config.save_pretrained(writer.folder)
        tokens = {k: getattr(model.config, f"{k}_token_id", None) for k in ("bos", "eos", "pad")}
        generation = GenerationConfig(**{f"{k}_token_id": v for k, v in tokens.items()})
        generation.save_pretrained(writer.folder)
        copy_side_files(source, writer.folder)  # with the source's own, if it has one
        writer.finish({"README.md": stock_card(model, job.output.name, config, about)})


def _to_gguf(job: Job) -> Export:
    model = job.model
    deepseek2.check_file(job.output, job.force)
    base = deepseek2.check_engine(model)
    job.check_rows()
    tokens = calibration_tokens(model.source, job.samples, 0, job.calibration)
    spreads = deepseek2.write_gguf(
        model, job.output, base, tokens, job.norm_rows, force=job.force, progress=job.progress
    )
    return job.result("gguf", "deepseek2", job.norm_rows, norm_spread=spreads)


FORMATS: dict[str, Callable[[Job], Export]] = {
    "transformers": _to_transformers,
    "deepseek": _to_deepseek,
    "gguf": _to_gguf,
}


def _silent(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    pass
