"""That a checkpoint's folder leads nowhere but into itself."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError
from .shards import read_json

# Everything beside the weights that a folder needs to be used. Never weights, never code.
SIDE_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)


def check_folder(folder: Path) -> None:
    """Raises if a link, or a name in a config, would have a file outside the folder read.

    What is read may be copied into the output, and so be published: a stranger's folder must not
    reach for a private file. The hub's cache is made of links too, into the blobs it keeps beside
    its snapshots.
    """
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parents[1] / "blobs")

    def leads_out(file: Path) -> bool:
        try:
            target = file.resolve()
            with contextlib.suppress(FileNotFoundError):  # it leads nowhere
                file.stat()  # from Python 3.13 on, this alone tells of a link to itself
        except (OSError, RuntimeError):  # a link to itself
            return True
        return not any(target.is_relative_to(place) for place in allowed)

    for pattern in ("*.json", "*.safetensors", *SIDE_FILES):
        for file in folder.glob(pattern):
            if leads_out(file):
                raise InputError(
                    f"{file} is a link that leads out of its folder. If you trust it, put the file "
                    "itself there."
                )
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        for key, value in _named_files(read_json(folder / name)):
            # Folders often name places of the machine they were made on; those lead nowhere here.
            if os.path.isfile(folder / value) and leads_out(folder / value):
                raise InputError(
                    f"{folder / name} names a file outside its folder ({key}: {value}). If you "
                    "trust it, put the file there and name it without a path."
                )


def _named_files(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if key.endswith(("_file", "_files")):
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str):
                    yield key, item
