"""`export`: a converted checkpoint written for another tool, whole or not at all."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from ..converters.checkpoint import Writer, copy_side_files, open_source
from ..converters.errors import InputError
from ..converters.memory import peak_rss_bytes
from ..converters.writer import check_output
from .card import native_card
from .latent import LatentModel
from .native import planned_bytes, stock_config, stock_tensors

Progress = Callable[[str, int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Export:
    """What an export did.

    Args:
        architecture: the class or the engine's architecture that loads it.
        kv_bytes_per_token: of the converted model, and of the exported one in the same dtype.
    """

    output: Path
    to: str
    architecture: str
    kv_bytes_per_token: dict[str, int]
    seconds: float
    peak_rss_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self) | {"output": str(self.output)}


def export(
    model: str | Path,
    *,
    to: str,
    output: str | Path,
    force: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Writes a converted model so that tools that do not know rehead run it.

    Args:
        model: the folder of a conversion to decoupled MLA with `native`.
        to: one of `FORMATS`.
        output: the folder to write.
        force: replace what is there.
        progress: called as progress(stage, done, total, info).

    Raises:
        InputError: the model cannot be written so; nothing has been.
    """
    if to not in FORMATS:
        raise InputError(f"--to {to} is unknown. Use {' or '.join(FORMATS)}.")
    began = time.monotonic()
    source = open_source(model)
    output = Path(output).expanduser()
    check_output(output, force=force, protect=source.path)
    found = FORMATS[to](LatentModel(source), output, force, progress or _silent)
    seconds = time.monotonic() - began
    return Export(output, to, *found, seconds=seconds, peak_rss_bytes=peak_rss_bytes())


def _to_transformers(
    model: LatentModel, output: Path, force: bool, progress: Progress
) -> tuple[str, dict[str, int]]:
    source = model.source
    dtype = source.dtype(f"{model.family.prefix(0)}o_proj.weight")
    config = stock_config(model, dtype)
    expected = planned_bytes(model, config)
    layers = model.config.num_hidden_layers
    with Writer(output, force=force, expected_bytes=expected, protect=source.path) as writer:
        for name, tensor in stock_tensors(model, dtype):
            writer.add(name, tensor)
            if name.endswith("self_attn.kv_b_proj.weight"):
                progress("layers", int(name.split(".")[2]) + 1, layers, {})
        config.save_pretrained(writer.folder)
        tokens = {k: getattr(model.config, f"{k}_token_id", None) for k in ("bos", "eos", "pad")}
        generation = GenerationConfig(**{f"{k}_token_id": v for k, v in tokens.items()})
        generation.save_pretrained(writer.folder)
        copy_side_files(
            source, writer.folder
        )  # the source's own generation config, if there is one
        writer.finish({"README.md": native_card(model, output.name, config)})
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    sizes = {"converted": width, "exported": config.kv_lora_rank + config.qk_rope_head_dim}
    architecture = config.architectures[0]
    return architecture, {key: size * layers * dtype.itemsize for key, size in sizes.items()}


FORMATS = {"transformers": _to_transformers}


def _silent(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    pass
