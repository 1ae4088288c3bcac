"""What the commands share: where output goes, progress bars, and choices with a near-miss hint.

Results go to stdout, everything else to stderr. With `--json`, stdout carries one JSON object.
"""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET = "No progress: the result, warnings and errors alone."
VERBOSE = "A line for every step, and the libraries' own messages."

ProgressCall = Callable[[str, int, int, dict], None]


def debugging() -> bool:
    """Whether tracebacks and the libraries' own messages are wanted."""
    return os.environ.get("REHEAD_DEBUG", "0") not in ("", "0")


@contextlib.contextmanager
def results(as_json: bool, verbose: bool = False) -> Iterator[Console]:
    """A console on stdout for the result; what anything else prints meanwhile goes to stderr."""
    console = Console(file=sys.stdout, highlight=False)
    if not verbose:
        _quiet_libraries()
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield console


def first_process() -> bool:
    """Whether this process is the one that speaks, of those that accelerate may have started."""
    return os.environ.get("RANK", "0") == "0"


def print_json(console: Console, result: dict[str, Any]) -> None:
    """One JSON object; what JSON has no number for (infinity, not a number) becomes null."""
    text = json.dumps(_finite(result), indent=2, ensure_ascii=False, default=str)
    console.file.write(text + "\n")


def _finite(item: Any) -> Any:
    if isinstance(item, float) and not math.isfinite(item):
        return None
    if isinstance(item, dict):
        return {str(key): _finite(value) for key, value in item.items()}
    if isinstance(item, (list, tuple)):
        return [_finite(value) for value in item]
    return item


def _quiet_libraries() -> None:
    """Stops other libraries' bars and warnings from running into ours, unless debugging."""
    if debugging():
        return
    warnings.filterwarnings("ignore")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextlib.contextmanager
def progress_bars(quiet: bool = False, verbose: bool = False) -> Iterator[ProgressCall]:
    """A function (stage, done, total, info) that draws one bar a stage on stderr.

    Args:
        quiet: it does nothing.
        verbose: it writes a line for every step instead, with the time.
    """
    if quiet and verbose:
        raise typer.BadParameter("--quiet and --verbose ask for opposites. Give one of them.")
    if quiet:
        yield lambda stage, done, total, info: None
        return
    if verbose:
        yield _write_line
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=Console(stderr=True, highlight=False),
    )
    tasks: dict[str, Any] = {}

    def show(stage: str, done: int, total: int, info: dict) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, note="")
        bars.update(tasks[stage], completed=done, total=total, note=_note(info))

    with bars:
        yield show


def _write_line(stage: str, done: int, total: int, info: dict) -> None:
    now = time.strftime("%H:%M:%S")
    print(f"{now} {stage} {done}/{total} {_note(info)}".rstrip(), file=sys.stderr, flush=True)


def _note(info: dict | None) -> str:
    return "  ".join(f"{key} {_short(value)}" for key, value in (info or {}).items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def choice(option: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`; otherwise a usage error that names the nearest."""
    if value in allowed:
        return value
    near = get_close_matches(value.lower(), allowed, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Use {' or '.join(allowed)}."
    raise typer.BadParameter(f"{option} {value} is unknown. {hint}")


def completing(*values: str) -> Callable[[str], list[str]]:
    """What a shell offers for an option with these values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def size(count: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
