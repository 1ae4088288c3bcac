"""The one exception that means "the user asked for something that cannot be done"."""

from difflib import get_close_matches
from pathlib import Path


class InputError(ValueError):
    """A user's mistake or bad input, told in one line: what was asked, what is true, what to do.

    The command line prints it on stderr and leaves with exit code 2; everything else that is
    raised is a fault of ours. What the message quotes may come from a stranger's file: line breaks
    and a terminal's control characters become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in message).split()))


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error from another library, on one line and not endless."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def near_path(path: Path) -> str:
    """ " Did you mean X?" where something of nearly that name lies in the same folder; else ""."""
    try:
        names = [item.name for item in path.parent.iterdir()]
    except OSError:
        return ""
    near = get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f" Did you mean {path.with_name(near[0])}?" if near else ""
