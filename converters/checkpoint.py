"""Reading a Hugging Face checkpoint one tensor at a time, whatever form it comes in.

A source is a folder, a hub id or a `.gguf` file. Opening it reads only the headers of its
safetensors files and checks them against the files' sizes, the index and the config, so that a
broken checkpoint is told at once and not after an hour. A tensor is read with plain `read` calls
into its own memory: nothing is mapped, so the resident memory is that of the tensors asked for.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .errors import InputError, near_path, one_line
from .folder import SIDE_FILES, check_folder
from .shards import Entry, read_entries, read_json
from .writer import Writer

__all__ = ["Source", "Writer", "copy_side_files", "locate", "open_source"]

# Counts that transformers makes as many things of when it reads a config, and their limit.
COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_labels")
MOST = 10_000


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk whose tensors are read one at a time.

    Args:
        path: the Hugging Face folder (of a hub id or a `.gguf` file: where it was put).
        config: its configuration, by transformers' own class.
        entries: name -> place of every tensor, in the order of the files.
    """

    path: Path
    config: PretrainedConfig
    entries: Mapping[str, Entry] = field(repr=False)

    def names(self) -> list[str]:
        return list(self.entries)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).dtype

    @property
    def bytes(self) -> int:
        """The size of all tensors together, in bytes."""
        return sum(entry.nbytes for entry in self.entries.values())

    def fingerprint(self) -> str:
        """Another one for another config, and after any weight file has been written anew."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for file in sorted({entry.file for entry in self.entries.values()}):
            status = file.stat()
            digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, in its stored dtype, in memory of its own.

        Raises:
            InputError: there is none, or it cannot be read, or holds what is no number.
        """
        entry = self._entry(name)
        data = torch.empty(entry.nbytes, dtype=torch.uint8)
        try:
            with open(entry.file, "rb", buffering=0) as file:
                file.seek(entry.start)
                view = data.numpy().data
                while view:
                    count = file.readinto(view)
                    if not count:
                        raise InputError(f"{entry.file} ends inside {name}: it changed while read.")
                    view = view[count:]
        except OSError as error:
            raise InputError(f"cannot read {entry.file}: {error.strerror or error}.") from error
        tensor = data.view(entry.dtype).reshape(entry.shape)
        numbers = tensor.numel() and tensor.is_floating_point() and entry.dtype.itemsize > 1
        if numbers and not all(end.isfinite() for end in tensor.aminmax()):  # NaN is both ends
            raise InputError(
                f"{entry.file}: {name} holds values that are not finite. The checkpoint is "
                "damaged; download it again."
            )
        return tensor

    def _entry(self, name: str) -> Entry:
        try:
            return self.entries[name]
        except KeyError:
            raise InputError(f"{self.path} has no tensor {name}.") from None


def open_source(
    model: str | Path,
    *,
    cache_dir: str | Path | None = None,
    accept: Callable[[PretrainedConfig], object] = lambda config: None,
) -> Source:
    """The checkpoint that `model` names, checked whole.

    Args:
        model: a folder, a hub id or a `.gguf` file.
        cache_dir: where a `.gguf` file's folder and the hub's files are kept; None for
            `$REHEAD_CACHE`, or `rehead` under the user's cache folder, and the hub's own cache.
        accept: is shown the config before the weights are looked at, and may raise.

    Raises:
        InputError: there is no such model, or it cannot be read as it stands.
    """
    path = locate(model, cache_dir=cache_dir)
    config = read_config(path)
    accept(config)
    source = Source(path=path, config=config, entries=read_entries(path))
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(source.entries):
        raise InputError(
            f"{path / 'config.json'} asks for {layers} layers, and there are "
            f"{len(source.entries)} tensors. They do not belong together."
        )
    return _checked(source)


def locate(model: str | Path, *, cache_dir: str | Path | None = None) -> Path:
    """The Hugging Face folder of a folder, a hub id or a `.gguf` file."""
    path = Path(model).expanduser()
    if path.is_dir():
        check_folder(path)
        return path
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            from .gguf_source import gguf_folder

            return gguf_folder(path, cache_dir=cache_dir)
        raise InputError(f"{path} is a file but no .gguf. Give a folder, a .gguf file or a hub id.")
    name = str(model)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) or path.suffix.lower() == ".gguf":
        raise InputError(f"{name}: no such file or folder.{near_path(path)}")
    return _download(name, cache_dir)


def _download(name: str, cache_dir: str | Path | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    # Not the pickled twins of the weights, and no sub-folders (other formats, originals).
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
    try:
        folder = snapshot_download(
            name,
            allow_patterns=wanted,
            ignore_patterns=["*/*", "consolidated*"],
            cache_dir=Path(cache_dir) / "hub" if cache_dir else None,
        )
    except GatedRepoError as error:
        raise InputError(
            f"{name} is gated on the hub. Accept its terms there, then run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name} is neither a file or folder here nor a model on the hub (or it is private)."
            f"{near_path(Path(name))}"
        ) from error
    # The hub's client raises the errors of its HTTP library as they are; whatever went wrong,
    # the model could not be had.
    except Exception as error:
        raise InputError(
            f"{name} is no file or folder here, and the hub could not be reached for it "
            f"({one_line(error, 120)}). Give a folder or a .gguf file.{near_path(Path(name))}"
        ) from error
    check_folder(Path(folder))
    return Path(folder)


def read_config(path: Path) -> PretrainedConfig:
    """A folder's configuration, by transformers' own class or one of ours.

    Raises:
        InputError: it has none, or one that cannot be converted or read.
    """
    file = path / "config.json"
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path} is an adapter, not a model. Merge it into its model first.")
        raise InputError(f"{path} has no config.json, so it is not a Hugging Face model folder.")
    content = read_json(file)
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        raise InputError(f"{file} names no model_type, so the model's family is unknown.")
    for part in _objects(content):
        for name in COUNTS:
            if isinstance(part.get(name), (int, float)) and not part[name] <= MOST:
                raise InputError(f"{file} asks for {name}={part[name]}, beyond any model's.")
    if content.get("quantization_config"):
        method = re.search(r'"quant_method": "(\w+)"', json.dumps(content["quantization_config"]))
        raise InputError(
            f"{path} is quantised ({method[1] if method else 'in some way'}). Give the unquantised "
            "model, or a .gguf file."
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        if f"`{model_type}`" in str(error) or "auto_map" in content:
            near = get_close_matches(model_type, CONFIG_MAPPING_NAMES, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"{path} is of the model type {model_type!r}, which the installed transformers "
                f"does not know; code that comes with a checkpoint is not run.{hint}"
            ) from error
        raise InputError(f"{file} does not describe a model: {one_line(error)}") from error


def _objects(content: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in one."""
    todo = [content]  # not by recursion: nesting is a stranger's choice
    while todo:
        item = todo.pop()
        if isinstance(item, dict):
            yield item
            todo += item.values()
        elif isinstance(item, list):
            todo += item


def _checked(source: Source) -> Source:
    """The source with its weights by the names of its language model's.

    The model of the config is built without memory. A checkpoint of the base model alone, whose
    head is tied to the embeddings, lacks the prefix that the language model gives it.

    Raises:
        InputError: the weights are not those of the config.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config = source.config
    if get_checkpoint_conversion_mapping(config.model_type) is not None:
        return source  # transformers puts such a family's weights together as it loads them
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{source.path} does not describe a causal language model: {one_line(error)}"
        ) from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    if not any(name.startswith(prefix) for name in source.entries):
        entries = {n if n in expected else prefix + n: e for n, e in source.entries.items()}
        source = replace(source, entries=entries)
    for target, origin in dict(model.all_tied_weights_keys).items():
        # A tied pair may be stored under either name or under both.
        expected.pop(origin if target in source and origin not in source else target)
    _compare(renamed(source, type(model).__name__), expected)
    return source


def renamed(source: Source, model_class: str) -> Source:
    """The source with its tensors by the names that transformers loads them under."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    found = {}
    for name, entry in source.entries.items():
        for rename in get_checkpoint_conversion_mapping(model_class) or []:
            name = re.sub(rename.source_patterns[0], rename.target_patterns[0], name)
        found[name] = entry
    return replace(source, entries=found)


def _compare(source: Source, expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in source]
    if missing:
        raise InputError(
            f"{source.path} lacks {len(missing)} of the {len(expected)} tensors that its "
            f"config.json asks for ({_some(missing)})."
        )
    for name, shape in expected.items():
        if source.shape(name) != shape:
            raise InputError(
                f"{source.path}: {name} has the shape {list(source.shape(name))}, and config.json "
                f"asks for {list(shape)}."
            )
        if not source.dtype(name).is_floating_point or source.dtype(name).itemsize < 2:
            raise InputError(
                f"{source.path}: {name} is stored as {source.dtype(name)}, so the model is "
                "quantised. Give the unquantised model, or a .gguf file."
            )


def _some(names: Iterable[str], count: int = 2) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


def copy_side_files(source: Source | Path, dest: Path) -> list[str]:
    """The names of the files copied: tokenizer, chat template, generation config and licence."""
    path = source.path if isinstance(source, Source) else Path(source)
    copied = []
    for pattern in SIDE_FILES:
        for file in sorted(path.glob(pattern)):
            name = file.relative_to(path)
            if not file.is_file() or file.suffix == ".py" or str(name) in copied:
                continue
            (dest / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, dest / name)
            copied.append(str(name))
    return copied
