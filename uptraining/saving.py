"""Writing the trained model, or its adapter, so that it is there whole or not at all."""

import copy
import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..converters.checkpoint import Source, Writer, copy_side_files
from ..converters.errors import InputError
from ..converters.writer import check_output
from .config import Uptraining

RECORD = "uptraining.json"
ADAPTER_CONFIG = "adapter_config.json"


def check_place(output: Path, *, form: str, force: bool, source: Source) -> None:
    """Raises unless the result may be put at `output`."""
    replaceable = form == "adapter" and force and (output / ADAPTER_CONFIG).is_file()
    if not replaceable:
        check_output(output, force=force, protect=source.path)


def write_model(
    source: Source, changed: Mapping[str, Tensor], done: Uptraining, *, force: bool
) -> None:
    """Writes the source's folder anew, with the changed weights in the dtype they were stored in.

    Code that comes with the class, the tokenizer and all that belongs to a model folder are there;
    every other weight keeps its bytes.
    """
    config = copy.deepcopy(source.config)
    earlier = getattr(config, "uptraining", None)
    config.uptraining = _record(done) | ({"earlier": earlier} if earlier else {})
    with Writer(
        done.output, force=force, expected_bytes=source.bytes, protect=source.path
    ) as writer:
        for name in source.names():
            tensor = changed.get(name)
            if tensor is None:
                tensor = source.tensor(name)
            writer.add(name, tensor.to(source.dtype(name)))
        config.save_pretrained(writer.folder)
        copy_side_files(source, writer.folder)
        writer.finish({RECORD: _record(done), "README.md": _card(source, done)})


def write_adapter(source: Source, adapter: Path, done: Uptraining, *, force: bool) -> None:
    """Puts a finished adapter's files at the output, with the record of the run."""
    output = done.output
    check_place(output, form="adapter", force=force, source=source)
    (adapter / RECORD).write_text(json.dumps(_record(done), indent=2) + "\n", encoding="utf-8")
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    try:
        shutil.copytree(adapter, partial)
        if output.exists():
            output.rename(old)
        partial.rename(output)
    except OSError as error:
        if old.exists() and not output.exists():
            old.rename(output)
        raise InputError(f"cannot write {output}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _record(done: Uptraining) -> dict[str, Any]:
    """What is kept of a run: not where it was written, nor what the machine took for it."""
    left_out = ("output", "seconds", "tokens_per_second", "peak_rss_bytes")
    return {key: value for key, value in done.to_dict().items() if key not in left_out}


def _card(source: Source, done: Uptraining) -> str:
    """The model's README.md with a section on the training."""
    file = source.path / "README.md"
    head = file.read_text(encoding="utf-8").rstrip() if file.is_file() else _empty_card(source)
    recipe = done.recipe
    assert recipe is not None
    how = "full fine-tuning" if recipe.full else f"an adapter of rank {recipe.rank}, merged,"
    teacher = "the text alone" if recipe.teacher == "none" else f"the scores of {recipe.teacher}"
    before, after = done.before.perplexity, done.after.perplexity
    return f"""{head}

## Uptraining

Trained on {done.tokens:,} tokens of {recipe.data} by {how} ({recipe.target}), on {teacher}.
Held-out perplexity {before:.3f} -> {after:.3f}\
{f" (teacher {done.teacher_perplexity:.3f})" if done.teacher_perplexity else ""}, in \
{recipe.eval_windows} windows of {recipe.window} tokens. The whole recipe is in `{RECORD}`.
"""


def _empty_card(source: Source) -> str:
    return f"---\nlibrary_name: transformers\ntags: [rehead]\n---\n\n# {source.path.name}"
