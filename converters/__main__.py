"""`accelerate launch ... -m rehead.converters --to FORM MODEL`, which is `rehead convert`."""

from .launched import run_command

if __name__ == "__main__":
    run_command("convert")
