"""Commands by `accelerate launch -m`, which starts modules and no console scripts."""

import sys
from importlib.metadata import entry_points


def run_command(name: str) -> None:
    """Runs `rehead NAME` with this process's arguments."""
    # By its name: the command line knows the library, not the other way round.
    (script,) = entry_points(group="console_scripts", name="rehead")
    sys.argv[1:1] = [name]
    script.load()()
