"""What is done of a conversion, kept on disk until it is whole."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .calibration import Kronecker, PhaseMoments
from .errors import InputError
from .gqa import GQA, GQAMoments
from .mfa import MFA
from .mla import MLA, MLAMoments

KEPT: list[Any] = [GQA, GQAMoments, Kronecker, MFA, MLA, MLAMoments, PhaseMoments]


@contextlib.contextmanager
def work_folder(folder: Path, note: str, resume: bool) -> Iterator[Path]:
    """A folder for what is done of a conversion; it is left behind by an interruption alone.

    Args:
        note: what was asked for; only a run that was asked for the same is resumed.
    """
    marker = folder / "recipe.json"
    if folder.exists() and not (resume and marker.exists() and marker.read_text() == note):
        if resume and marker.exists():
            raise InputError(
                f"{folder} holds an interrupted conversion with another recipe. Give the same "
                "options to resume it, or leave out --resume to start anew."
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(note)
    except OSError as error:
        raise InputError(f"cannot write {folder.parent}: {error.strerror or error}.") from error
    try:
        yield folder
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # Ctrl-C and kills are no Exception: what is done stays for --resume.
    shutil.rmtree(folder, ignore_errors=True)


def save(file: Path, item: object) -> None:
    """Whole or not at all, so that a resumed conversion never reads half a layer."""
    partial = file.with_suffix(".partial")
    torch.save(item, partial)
    partial.rename(file)


def load(file: Path) -> Any:
    # Written by this program a moment ago, or by the run that is resumed.
    with torch.serialization.safe_globals(KEPT):
        return torch.load(file, weights_only=True)
