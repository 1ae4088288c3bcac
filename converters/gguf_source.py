"""A `.gguf` file as a Hugging Face folder, made once and kept in the user's cache.

The weights go through transformers' own GGUF loader, which undoes the quantisation and llama.cpp's
permutation of the query and key rows. What that loader passes over, the scaling of the rotary
frequencies, is read here, or refused when it cannot be carried over exactly.
"""

import hashlib
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .errors import InputError, one_line
from .writer import Writer

# Part of the cached folder's name: raised whenever the same file gives another folder.
VERSION = 2

# The format's numbers for the kinds of values, and the bytes of those of one width.
STRING, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
# Of all lists together; the largest vocabularies have a third of it.
MAX_ITEMS = 1 << 22


def gguf_folder(path: Path, *, cache_dir: str | Path | None = None) -> Path:
    """The folder of that file's content, made on first use.

    Weights are kept in float32: a quantised value is scale * integer + minimum and needs more
    digits than a half-precision number has.
    """
    digest = _check_and_hash(path)
    base = Path(cache_dir) if cache_dir else default_cache()
    folder = base / "gguf" / f"{path.stem}-{digest[:16]}-v{VERSION}"
    if not (folder / "config.json").is_file():
        _build(path, folder)
    return folder


def default_cache() -> Path:
    """`$REHEAD_CACHE`, or `rehead` in the user's cache folder."""
    if os.environ.get("REHEAD_CACHE"):
        return Path(os.environ["REHEAD_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "rehead"


def _check_and_hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise InputError(f"{path} is not a GGUF file.")
            _check_header(path, file)
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _check_header(path: Path, file: BinaryIO) -> None:
    """Raises unless every count and length that the header names lies within the file.

    The reader believes them: a list said to be 2^60 long makes it take memory until there is none.
    """
    size, left = os.fstat(file.fileno()).st_size, MAX_ITEMS

    def skip(count: int) -> None:
        if count > size - file.tell():
            raise InputError(
                f"{path} cannot be read as a GGUF model: its header names more than the file holds."
            )
        file.seek(count, os.SEEK_CUR)

    def number(width: int) -> int:
        skip(width)
        file.seek(-width, os.SEEK_CUR)
        return int.from_bytes(file.read(width), "little")

    def value(kind: int, depth: int = 0) -> None:
        nonlocal left
        if kind == STRING:
            skip(number(8))
        elif kind in WIDTHS:
            skip(WIDTHS[kind])
        elif kind == ARRAY and depth < 2:
            inner, count = number(4), number(8)
            left -= count
            if left < 0:
                raise InputError(
                    f"{path} cannot be read as a GGUF model: its lists have more than {MAX_ITEMS} "
                    "items."
                )
            if inner in WIDTHS:
                skip(count * WIDTHS[inner])
                return
            for _ in range(count):
                value(inner, depth + 1)
        else:
            raise InputError(f"{path} cannot be read as a GGUF model: a value of kind {kind}.")

    file.seek(4)
    if number(4) not in (2, 3):
        raise InputError(f"{path} cannot be read as a GGUF model: version 2 and 3 are known.")
    tensors, fields = number(8), number(8)
    for _ in range(fields):
        skip(number(8))
        value(number(4))
    for _ in range(tensors):
        skip(number(8))
        skip(8 * number(4) + 4 + 8)


def _build(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"gguf_file": path.name, "local_files_only": True}
    try:
        rope = _rope_parameters(path)
        model = AutoModelForCausalLM.from_pretrained(
            str(path.parent), **place, trust_remote_code=False, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(path.parent), **place, trust_remote_code=False
        )
    except InputError:
        raise
    # The reader trusts the file's counts and offsets, so a damaged file fails in any way.
    except Exception as error:
        raise InputError(f"{path} cannot be read as a GGUF model: {one_line(error)}") from error
    _check_tokenizer(path, tokenizer)
    config = model.config
    # The weights are plain numbers now. Older versions of transformers do not mark them.
    vars(config).pop("quantization_config", None)
    config.name_or_path = ""
    if rope:
        config.rope_parameters = {**config.rope_parameters, **rope}
    state = model.state_dict()
    for name in model.all_tied_weights_keys:
        state.pop(name)
    expected = sum(tensor.nbytes for tensor in state.values())
    with Writer(folder, force=True, expected_bytes=expected) as writer:
        for name, tensor in state.items():
            writer.add(name, tensor)
        config.save_pretrained(writer.folder)
        model.generation_config.save_pretrained(writer.folder)
        tokenizer.save_pretrained(writer.folder)
        writer.finish()


def _check_tokenizer(path: Path, tokenizer: Any) -> None:
    """Raises if the tokenizer cuts the words of its own vocabulary into pieces.

    So does one whose merges are not in the file and were made again wrongly, as by transformers
    5.16 of Gemma's.
    """
    from transformers import __version__

    ids = range(0, len(tokenizer), max(1, len(tokenizer) // 4000))
    words = [tokenizer.decode([i], skip_special_tokens=True) for i in ids]
    words = [word for word in words if word.isascii() and word.isalpha() and len(word) >= 4]
    pieces = sum(len(tokenizer(word, add_special_tokens=False).input_ids) for word in words)
    if pieces > 1.5 * len(words):
        raise InputError(
            f"{path} has a tokenizer that transformers {__version__} cannot rebuild: it cuts words "
            "of its own into pieces. Give the Hugging Face folder of the model, or update "
            "transformers."
        )


def _rope_parameters(path: Path) -> dict[str, Any]:
    """The file's scaling of the rotary frequencies as `rope_parameters`; empty for none.

    llama.cpp writes linear and YaRN scaling as metadata, and Llama 3's as one divisor a frequency
    in the tensor `rope_freqs.weight`.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def value(key: str) -> Any:
        known = reader.get_field(key)
        return None if known is None else known.contents()

    arch = value("general.architecture")
    factors = [t.data for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
    if len(factors) == 1:
        divisors = torch.tensor(factors[0], dtype=torch.float64).flatten()
        base = value(f"{arch}.rope.freq_base") or 10000.0
        return _llama3(path, divisors, base)
    kind = value(f"{arch}.rope.scaling.type")
    factor = value(f"{arch}.rope.scaling.factor")
    original = value(f"{arch}.rope.scaling.original_context_length")
    if not factors and kind in (None, "none"):
        return {}
    if not factors and kind == "linear" and factor:
        return {"rope_type": "linear", "factor": float(factor)}
    if not factors and kind == "yarn" and factor and original:
        return {
            "rope_type": "yarn",
            "factor": float(factor),
            "original_max_position_embeddings": int(original),
        }
    raise InputError(
        f"{path} scales its rotary frequencies in a way that cannot be read ({kind or 'factors'}). "
        "Give the Hugging Face folder of the model."
    )


def _llama3(path: Path, divisors: torch.Tensor, base: float) -> dict[str, Any]:
    """Llama 3's rule with the published constants, if it gives these divisors.

    The largest divisor is the factor; the thresholds 1 and 4 and the 8,192 positions of the
    original context are those of every Llama 3.1 to 3.3.
    """
    # The file's divisors are float32: rounded, the factor is the 8 or 32 that it was.
    factor, low, high, context = round(float(divisors.max()), 4), 1.0, 4.0, 8192
    pairs = torch.arange(len(divisors), dtype=torch.float64) / len(divisors)
    wavelength = 2 * math.pi * float(base) ** pairs
    smooth = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / ((1 - smooth) / factor + smooth), divisors, rtol=1e-4):
        raise InputError(
            f"{path} carries rotary frequencies of its own that are not Llama 3's. Give the "
            "Hugging Face folder of the model."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
