"""`accelerate launch ... -m rehead.converters --to FORM MODEL`, which is `rehead convert`."""

import sys
from importlib.metadata import entry_points

if __name__ == "__main__":
    # By its name: the command line knows the library, not the other way round.
    (script,) = entry_points(group="console_scripts", name="rehead")
    sys.argv[1:1] = ["convert"]
    script.load()()
