"""The two console scripts and what becomes of errors.

Exit codes: 0 done; 2 a user's mistake or bad input, one line on stderr; 1 a fault of ours.
"""

import signal
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from .console import debugging, first_process
from .convert import convert
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .sample import sample
from .uptrain import uptrain

INTERRUPTED = 130  # what shells expect after Ctrl-C
TERMINATED = 143

_settings: dict[str, Any] = {
    "pretty_exceptions_enable": False,
    "rich_markup_mode": "rich",
    "context_settings": {"help_option_names": ["-h", "--help"]},
}

app = typer.Typer(no_args_is_help=True, **_settings)
app.command()(convert)
app.command()(evaluate)
app.command()(export)
app.command()(inspect)
app.command()(sample)
app.command()(uptrain)

convert_app = typer.Typer(**_settings)
convert_app.command()(convert)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rehead {version('rehead')}")
        raise typer.Exit


@app.callback()
def _rehead(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Give a pretrained language model new attention heads, and a smaller KV cache."""


def main() -> None:
    """The console script `rehead`."""
    _script(app, "rehead")


def convert_main() -> None:
    """The console script `convert`, which is `rehead convert`."""
    _script(convert_app, "convert")


def _script(command: typer.Typer, name: str) -> None:
    # Ends by an exception, so that what is half-written is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(run(command, name))


def run(command: typer.Typer, name: str, args: list[str] | None = None) -> int:
    """The exit code of a command, with its errors told in one line on stderr."""
    try:
        # Without typer's own error handling, which prints a usage text and a box.
        code = command(args=args, prog_name=name, standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debugging():
            raise
        return _explain(error)
    # Typer's newer versions turn the exception into the exit code themselves.
    if code == INTERRUPTED and first_process():
        _say("interrupted; --resume goes on with what was finished.")
    return code


def _explain(error: Exception) -> int:
    from ..converters.errors import InputError
    from ..converters.processes import OtherFailed

    if isinstance(error, OtherFailed):
        if first_process():
            _say("another process ended before its part was done; --resume goes on with the rest.")
        return 1
    # typer changed the base class of its usage errors between versions; all have this method.
    if hasattr(error, "format_message"):
        if first_process():  # all processes were given the same
            _say(error.format_message())
        return 2
    if isinstance(error, InputError):
        _say(str(error))
        return 2
    from ..modeling.cached_decoding import WrongDecoding

    if isinstance(error, WrongDecoding):
        _say(str(error))
        return 2
    _say(
        f"internal error: {type(error).__name__}: {error}. This is a fault of rehead, not yours; "
        "REHEAD_DEBUG=1 shows the traceback."
    )
    return 1


def _say(text: str) -> None:
    # Empty where typer has shown the help instead (no arguments).
    if text:
        print("rehead: " + " ".join(text.split()), file=sys.stderr)
