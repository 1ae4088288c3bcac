"""Writing a Hugging Face folder so that it is either there whole or not there at all.

Tensors go to disk as they come, so the memory needed is that of one tensor. The folder grows under
a hidden name beside its destination and is renamed when it is complete.
"""

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from .errors import InputError

# The format's names of the element types that are written.
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# A header comes before the data it describes and is known only after them. The format allows it
# to be padded with spaces, so this much is kept free and filled in when the shard is closed.
HEADER = 1 << 17

SUMS = "SHA256SUMS"

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Shard:
    """One safetensors file that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.size = 0
        self._sum = 0
        self._header_size = len(_encode(self.header))
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115
        self._file.write(b" " * (8 + HEADER))

    def fits(self, name: str, tensor: Tensor, limit: float) -> bool:
        """Whether the tensor may go here; the first one always may."""
        if len(self.header) == 1:
            return True
        aligned = self.size % tensor.element_size() == 0
        room = self._header_size + len(_encode({name: self._item(tensor)})) <= HEADER
        return aligned and room and self.size + tensor.nbytes <= limit

    def add(self, name: str, tensor: Tensor) -> None:
        item = self._item(tensor)
        if tensor.numel():
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            self._file.write(data)
            self._sum = zlib.crc32(data, self._sum)
        self.header[name] = item
        self.size += tensor.nbytes
        self._header_size += len(_encode({name: item}))

    def close(self) -> None:
        self._file.seek(0)
        self._file.write(HEADER.to_bytes(8, "little") + _encode(self.header).ljust(HEADER))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def read_back(self) -> str:
        """The file's SHA-256, after the bytes on the disk were found to be those given to `add`."""
        digest, found = hashlib.sha256(), 0
        with open(self.path, "rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):  # from the disk, not from the system's memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            digest.update(file.read(8 + HEADER))
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                found = zlib.crc32(chunk, found)
        if found != self._sum:
            raise InputError(
                f"{self.path} holds other bytes than were written to it. Check the disk, or give "
                "another --output."
            )
        return digest.hexdigest()

    def abandon(self) -> None:
        """Closes the file without a word: what is buffered may not find room any more."""
        try:
            self._file.close()
        except OSError:
            os.close(self._file.fileno()) if not self._file.closed else None

    def _item(self, tensor: Tensor) -> dict[str, Any]:
        span = [self.size, self.size + tensor.nbytes]
        return {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}


class Writer:
    """A model folder that appears at `output` when `finish` is called, and not before.

    Weights are read back and compared, and the checksum of every file is kept in `SHA256SUMS`.

        with Writer(Path("llama-mla"), force=False) as writer:
            writer.add("model.norm.weight", tensor)
            config.save_pretrained(writer.folder)
            writer.finish()

    Leaving the block without `finish`, by an exception or not, removes everything written. The same
    calls write the same bytes. A tied weight is added once, under the name its source has it.

    Args:
        output: the folder to be made. Its parents are made too.
        force: replace the model folder that is at `output`, when the new one is complete.
        max_shard_bytes: the most a weight file holds, unless a single tensor is larger.
        expected_bytes: what will be written; more than the disk has free is refused at once.
        protect: a folder that must survive, the source: `output` may not be it or contain it.
        folder: where the output grows, on the same disk; what a killed run has left there is
            removed. None for a hidden name beside the output.

    Raises:
        InputError: `output` is in the way, or cannot be written, or there is no space left.
    """

    def __init__(
        self,
        output: str | Path,
        *,
        force: bool = False,
        max_shard_bytes: float = 5e9,
        expected_bytes: int = 0,
        protect: str | Path | None = None,
        folder: Path | None = None,
    ) -> None:
        self.output = Path(output).expanduser()
        self.force = force
        self.max_shard_bytes = max_shard_bytes
        self._shards: list[Shard] = []
        self._names: set[str] = set()
        self._sums: dict[str, str] = {}
        self._done = False
        _put_back(self.output)
        check_output(self.output, force=force, protect=protect)
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.output.parent).free
            if expected_bytes > free:
                raise InputError(
                    f"{self.output} needs {_gib(expected_bytes)}, and the disk has {_gib(free)} "
                    "free. Make room, or give another --output."
                )
            self.folder = folder or _beside(self.output, "partial")
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
        except OSError as error:
            raise self._explain(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._done:
            return
        if self._shards:
            self._shards[-1].abandon()
        shutil.rmtree(self.folder, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise self._explain(error) from error

    def __contains__(self, name: str) -> bool:
        """Whether the tensor is written."""
        return name in self._names

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor; it is not held afterwards."""
        if name in self._names:
            raise ValueError(f"{name} is written twice")
        tensor = tensor.detach().to("cpu").contiguous()
        try:
            if not self._shards or not self._shards[-1].fits(name, tensor, self.max_shard_bytes):
                if self._shards:
                    self._shards[-1].close()
                self._shards.append(Shard(self.folder / f"shard-{len(self._shards):05d}"))
            self._shards[-1].add(name, tensor)
        except OSError as error:
            raise self._explain(error) from error
        self._names.add(name)

    def finish(self, files: Mapping[str, str | bytes | dict] | None = None) -> Path:
        """The finished folder: names the shards, writes the index and puts it all in place.

        Args:
            files: further files, name -> text, bytes, or an object to be written as JSON.
        """
        self.close()
        try:
            for name, content in (files or {}).items():
                if isinstance(content, dict):
                    content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                data = content.encode() if isinstance(content, str) else content
                (self.folder / name).write_bytes(data)
            self._write_sums()
            for file in sorted(self.folder.rglob("*")):
                _sync(file)
            _sync(self.folder)
            self._put_in_place()
            _sync(self.output.parent)
        except OSError as error:
            raise self._explain(error) from error
        return self.output

    def close(self) -> None:
        """Ends the weights: `folder` can be read from now on, and no tensor added."""
        if not self._shards:
            raise ValueError("no tensor was written")
        if self._sums:
            return
        try:
            self._shards[-1].close()
            self._name_shards()
        except OSError as error:
            raise self._explain(error) from error

    def _name_shards(self) -> None:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            if len(self._shards) == 1:
                name = "model.safetensors"
            self._sums[name] = shard.read_back()
            shard.path.rename(self.folder / name)
            weight_map.update((key, name) for key in shard.header if key != "__metadata__")
        if len(self._shards) == 1:
            return
        index = {
            "metadata": {"total_size": sum(shard.size for shard in self._shards)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / "model.safetensors.index.json").write_text(text)

    def _write_sums(self) -> None:
        """Every file's checksum, for `sha256sum -c SHA256SUMS`."""
        for file in self.folder.rglob("*"):
            name = file.relative_to(self.folder).as_posix()
            if file.is_file() and name not in self._sums:
                self._sums[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        lines = (f"{digest}  {name}\n" for name, digest in sorted(self._sums.items()))
        (self.folder / SUMS).write_text("".join(lines), encoding="utf-8")

    def _put_in_place(self) -> None:
        check_output(self.output, force=self.force)
        old = None
        if self.output.exists():
            old = _beside(self.output, "old")
            self.output.rename(old)
        try:
            self.folder.rename(self.output)
        except OSError:
            if old is not None:
                old.rename(self.output)
            raise
        self._done = True
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _explain(self, error: OSError) -> InputError:
        if error.errno in NO_SPACE:
            return InputError(
                f"no space left for {self.output}; what was written of it is removed. Make room, "
                "or give another --output."
            )
        return InputError(f"cannot write {self.output}: {error.strerror or error}.")


def check_output(output: Path, *, force: bool, protect: str | Path | None = None) -> None:
    """Raises unless a model folder may be put at `output`; an empty folder is no obstacle."""
    if not output.name or output.name == "..":
        raise InputError(f"{output} is no name for a new folder. Give another --output.")
    if protect is not None and Path(protect).resolve().is_relative_to(output.resolve()):
        raise InputError(f"{output} holds the source itself. Give another --output.")
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise InputError(f"{output} exists and is no folder. Give another --output.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not force:
        raise InputError(f"{output} exists. Give --force to replace it, or another --output.")
    if not (output / "config.json").is_file():
        raise InputError(
            f"{output} is not a model folder (no config.json), so --force does not replace it. "
            "Give another --output."
        )


def _beside(output: Path, what: str) -> Path:
    """A hidden name beside the output that nothing else has."""
    return output.with_name(f".{output.name}.{what}-{secrets.token_hex(4)}")


def _put_back(output: Path) -> None:
    """Undoes, or ends, a replacement of the output that was killed between its two renames."""
    for old in output.parent.glob(f".{glob.escape(output.name)}.old-????????"):
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(output)


def _encode(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
