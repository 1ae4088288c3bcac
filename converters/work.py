"""What is done of a conversion, kept on disk until it is whole.

The folder lies beside the output under a name that the next run finds again:

    .OUTPUT.work/recipe.json        what was asked for, of what, with which versions; locked by the
                                    run that is at work
    .OUTPUT.work/moments-0000.pt    a layer's survey
    .OUTPUT.work/input-0000.pt      a layer's input, until its importance is known
    .OUTPUT.work/fitted-0000.pt     a layer's fitted form
    .OUTPUT.work/model/             the output as it grows; started anew by every run
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..modeling.coding import Code, Plane
from .calibration import Kronecker, PhaseMoments
from .coded import CodedDims, CodedMLA, CodedWholeKeyMLA, TurnedKeyMLA
from .coding import Channels, Dealt
from .errors import InputError
from .gqa import GQA, GQAMoments
from .mfa import MFA, MFARows
from .mfa_kr import MFAKR, MFAKRRows
from .mla import MLA
from .moments import CodingMoments, CodingTokens, LatentMoments
from .on_read import KeyInLatentMLA, ReadKeyMLA
from .processes import OtherFailed
from .rope_split import Components
from .whole_keys import InputMLA, WholeKeyMLA
from .writer import NO_SPACE

KEPT: list[Any] = [
    *(CodingMoments, CodingTokens, Components, GQA, GQAMoments),
    *(Kronecker, LatentMoments, PhaseMoments),
    *(Channels, Code, Plane, CodedDims, CodedMLA, CodedWholeKeyMLA, Dealt, TurnedKeyMLA),
    *(MLA, ReadKeyMLA, KeyInLatentMLA, WholeKeyMLA, InputMLA, MFA, MFARows, MFAKR, MFAKRRows),
]

MARKER = "recipe.json"
OURS = re.compile(r"recipe\.json|(moments|input|fitted)-\d+\.(pt|partial)|model")


@contextlib.contextmanager
def work_folder(folder: Path, note: Mapping[str, Any], resume: bool) -> Iterator[Path]:
    """A folder for what is done of a conversion; it is left behind by an interruption alone.

    Args:
        note: what was asked for; only a run that was asked for the same is resumed. Without
            `resume`, what an interrupted run has left is removed.

    Raises:
        InputError: the folder is somebody else's, or in use, or holds another conversion.
    """
    marker = folder / MARKER
    if folder.is_symlink() or (folder.exists() and not _is_ours(folder)):
        raise InputError(
            f"{folder} is in the way: convert works there, and has not made it. Move it away, or "
            "give another --output."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(marker, "ab")  # noqa: SIM115
    except OSError as error:
        raise InputError(f"cannot write {folder.parent}: {error.strerror or error}.") from error
    with lock:
        _take(lock.fileno(), folder)
        left = [item for item in folder.iterdir() if item != marker]
        resumed = resume and bool(left)
        if resumed:
            _check_same(folder, note)
        try:
            if not resumed:
                for item in left:
                    shutil.rmtree(item) if item.is_dir() else item.unlink()
                with open(marker, "w", encoding="utf-8") as opened:
                    opened.write(json.dumps(note, sort_keys=True))
                    opened.flush()
                    os.fsync(opened.fileno())
            yield folder
        except OtherFailed:
            raise  # it may have been killed: what is done stays
        except Exception as error:
            # What an earlier run has done is not lost to this one's fault.
            if not resumed:
                shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise InputError(
                    f"no space left for {folder}, where the conversion is kept until it is whole. "
                    "Make room, or give another --output."
                ) from error
            raise
        # Ctrl-C and kills are no Exception: what is done stays for --resume.
        shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and all(OURS.fullmatch(item.name) for item in folder.iterdir())


def _take(handle: int, folder: Path) -> None:
    """Locks the marker for as long as this process lives."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return  # a file system without locks
        raise InputError(
            f"another conversion is at work in {folder}. Wait for it, or give another --output."
        ) from error


def _check_same(folder: Path, note: Mapping[str, Any]) -> None:
    """Raises unless the run that left the folder was asked for the same."""
    try:
        before = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except ValueError:
        before = {}
    now = json.loads(json.dumps(note))
    differing = [name for name in now if before.get(name) != now[name]]
    if differing:
        name = differing[0]
        raise InputError(
            f"{folder} holds an interrupted conversion with another recipe: {name} was "
            f"{before.get(name)} and is {now[name]}. Give the same options to resume it, or leave "
            "out --resume to start anew."
        )


def save(file: Path, item: object) -> None:
    """Whole or not at all, so that a resumed conversion never reads half a layer."""
    partial = file.with_suffix(".partial")
    with open(partial, "wb") as opened:
        try:
            torch.save(item, opened)
        except RuntimeError as error:
            # torch's writer covers the file's own error with one of its own.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
        opened.flush()
        os.fsync(opened.fileno())  # or a power cut could leave the name without its content
    partial.rename(file)


def load(file: Path, device: torch.device) -> Any:
    """What was saved, on that device: another process, with another one, may have saved it."""
    # Written by this program a moment ago, or by the run that is resumed. Mapped: what is not asked
    # for is not read.
    with torch.serialization.safe_globals(KEPT):
        return torch.load(file, map_location=device, weights_only=True, mmap=True)
