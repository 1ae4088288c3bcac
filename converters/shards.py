"""The safetensors files of a folder: which tensor lies where, checked against the files' sizes."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import InputError, one_line

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The names that the safetensors format gives to element types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# The most that is read of a header or a JSON file, in bytes. Parsed, it takes some twenty times as
# much memory at worst; the headers of the largest models are a third of this.
MAX_HEADER = 1 << 25
# Beyond any tensor's: what the format allows could take for ever to multiply.
MAX_DIMS, MAX_SIZE = 16, 1 << 62


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `start` is its first byte in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_entries(path: Path) -> dict[str, Entry]:
    """The place of every tensor of a folder, from one file or from shards with an index."""
    if (path / WEIGHTS).is_file():
        return read_header(path / WEIGHTS)
    if not (path / INDEX).is_file():
        raise InputError(_why_no_weights(path))
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path / INDEX} has no weight_map.")
    entries: dict[str, Entry] = {}
    shards = sorted({str(shard) for shard in weight_map.values()})
    for shard in shards:
        # An index is input like any other: it must not lead out of its folder.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{path / INDEX} names {shard!r}, which is no file of that folder.")
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of its {len(shards)} weight files ({missing[0]}). "
            "Download it again."
        )
    for shard in shards:
        header = read_header(path / shard)
        entries.update((name, e) for name, e in header.items() if weight_map.get(name) == shard)
    lost = [name for name in weight_map if name not in entries]
    if lost:
        raise InputError(
            f"{path / INDEX} places {lost[0]} in {weight_map[lost[0]]}, which does not hold it."
        )
    return entries


def _why_no_weights(path: Path) -> str:
    files = sorted(file.name for file in path.iterdir())
    pickled = [name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if any(name.endswith(".safetensors") for name in files):
        return f"{path} has safetensors files but neither {WEIGHTS} nor {INDEX}."
    if pickled:
        return (
            f"{path} has only pickled weights ({pickled[0]}), and reading a pickle runs code. If "
            "you trust it, load it with transformers once and call save_pretrained."
        )
    return f"{path} has no weights ({WEIGHTS} or {INDEX})."


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file: 8 bytes of header length, the header, the data."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > MAX_HEADER:
                raise InputError(f"{path} is cut short or is no safetensors file.")
            raw = file.read(length)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, 8 + length, item) for name, item in header.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} has a damaged safetensors header ({one_line(error)}).") from error
    end = max((entry.start + entry.nbytes for entry in entries.values()), default=8 + length)
    if end > size:
        raise InputError(
            f"{path} is cut short: {size} bytes, and its header names {end}. Download it again."
        )
    entries = dict(sorted(entries.items(), key=lambda pair: (pair[1].start, pair[1].nbytes)))
    place = 8 + length
    for name, entry in [*entries.items(), ("the end", None)]:
        if place != (size if entry is None else entry.start):
            raise InputError(
                f"{path} has a damaged safetensors header (bytes before {name} belong to no tensor "
                "or to two)."
            )
        place += entry.nbytes if entry else 0
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


def _entry(path: Path, offset: int, item: Mapping[str, Any]) -> Entry:
    dtype = DTYPES[item["dtype"]]
    shape = tuple(item["shape"])
    start, end = item["data_offsets"]
    numbers = (*shape, start, end)
    if len(shape) > MAX_DIMS or any(type(n) is not int or n > MAX_SIZE for n in numbers):
        raise ValueError(f"shape or place of {len(shape)} dims holds what is no size")
    nbytes = math.prod(shape) * dtype.itemsize
    if start < 0 or any(n < 0 for n in shape) or end - start != nbytes:
        raise ValueError(f"shape {list(shape)} does not fit the bytes {start} to {end}")
    return Entry(file=path, dtype=dtype, shape=shape, start=offset + start, nbytes=nbytes)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise InputError(f"{path} is larger than any file of its kind ({MAX_HEADER} bytes).")
        content = json.loads(path.read_bytes())
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({one_line(error, 100)}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object.")
    return content
