"""Text for calibration and evaluation, and its cutting into windows of tokens."""

import gzip
import json
import zlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, near_path, one_line

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")

JOINED_BY = "\n\n"

# Of a hub data set, which may be endless, this many characters are read (about 5M tokens).
HUB_CHARACTERS = 20_000_000

# Text is tokenised from its start, as much as the windows asked for are guessed to need.
CHARACTERS_PER_TOKEN = 8
# Tokens near a cut may differ from those of the whole text; they are not used.
SLACK = 256


def read_text(spec: str | Path) -> str:
    """All texts of a file, or of a data set on the hub, joined by blank lines; see `read_texts`."""
    return JOINED_BY.join(read_texts(spec))


def read_texts(spec: str | Path) -> list[str]:
    """The texts of a file, or of a data set on the hub, one by one.

    Args:
        spec: a `.txt` file, a `.jsonl` file whose objects have the field `text`, either with
            `.gz`, or a hub data set's id, `ID` or `ID:CONFIGURATION`.

    Raises:
        InputError: there is no such text, it is not readable as UTF-8, or it is empty.
    """
    path = Path(spec).expanduser()
    name = path.name.lower()
    if path.is_file():
        if not name.endswith(SUFFIXES):
            raise InputError(f"{path}: text is read from {', '.join(SUFFIXES)} files.")
        content = _decode(path, _read(path))
        lines = name.removesuffix(".gz").endswith(".jsonl")
        texts = _texts(path, content) if lines else [content]
    elif path.is_dir():
        raise InputError(f"{path} is a folder. Give a .txt or .jsonl file.")
    elif name.endswith(SUFFIXES) or str(spec).startswith((".", "/", "~")):
        raise InputError(f"{path}: no such file.{near_path(path)}")
    else:
        texts = _from_hub(str(spec))
    if not any(text.strip() for text in texts):
        raise InputError(f"{spec} holds no text.")
    return texts


def default_calibration_text() -> str:
    """What ships with the package: articles, stories, problems and code, see data/README.md."""
    return _packaged("calibration.jsonl.gz")


def evaluation_text() -> str:
    """Articles that ship with the package and are not among the calibration text's."""
    return _packaged("evaluation.jsonl.gz")


def windows(tokenizer: Any, text: str, length: int, count: int | None = None) -> Tensor:
    """The text's tokens in consecutive windows, LongTensor [windows, length]; no BOS is added.

    Args:
        tokenizer: a Hugging Face tokenizer.
        length: tokens in a window.
        count: at most this many windows, the first ones; None for all. A shorter text gives fewer.

    Raises:
        InputError: the text is shorter than one window.
    """
    if length < 2 or (count is not None and count < 1):
        raise InputError(f"{count} windows of {length} tokens: at least 1 of at least 2 is needed.")
    ids = _tokenize(tokenizer, text, None if count is None else length * count)
    if len(ids) < length:
        raise InputError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}. Give a longer "
            "text or a shorter window."
        )
    rows = len(ids) // length if count is None else min(count, len(ids) // length)
    return torch.tensor(ids[: rows * length], dtype=torch.long).view(rows, length)


def _tokenize(tokenizer: Any, text: str, wanted: int | None) -> list[int]:
    """The first `wanted` token ids or a few more, without tokenising a whole library for them."""

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]

    if wanted is None:
        return encode(text)
    characters = CHARACTERS_PER_TOKEN * (wanted + SLACK)
    while characters < len(text):
        ids = encode(text[:characters])
        if len(ids) >= wanted + SLACK:
            return ids[:wanted]
        characters *= 2
    return encode(text)


def _packaged(name: str) -> str:
    content = resources.files("rehead.data").joinpath(name).read_bytes()
    return JOINED_BY.join(_texts(Path(name), gzip.decompress(content).decode()))


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path} is not a whole gzip file ({one_line(error, 100)}).") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _decode(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path} is not UTF-8 text (line {line}). Convert it first.") from error


def _texts(path: Path, content: str) -> list[str]:
    """The texts of a .jsonl file's lines."""
    texts = []
    # Not splitlines: a text may hold U+2028 and the like unescaped.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}, is not valid JSON ({one_line(error, 80)})."
            ) from error
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise InputError(f"{path}, line {number}, has no field `text` with a string.")
        texts.append(item["text"])
    return texts


def _from_hub(spec: str) -> list[str]:
    import datasets
    from huggingface_hub import HfApi

    name, _, configuration = spec.partition(":")
    try:
        # Asked first because it answers at once; the library tries half a minute for nothing.
        HfApi().dataset_info(name)
        found = datasets.load_dataset(name, configuration or None, streaming=True)
        rows = found["train"] if "train" in found else next(iter(found.values()))
        texts, size = [], 0
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise InputError(f"the data set {name} has no field `text` with a string.")
            texts.append(row["text"])
            size += len(row["text"]) + 2
            if size >= HUB_CHARACTERS:
                break
    except InputError:
        raise
    # The library raises the errors of the network, of the file formats and its own alike.
    except Exception as error:
        raise InputError(
            f"{spec} is no file here, and no data set could be read from the hub under that name "
            f"({one_line(error, 160)})."
        ) from error
    return texts
