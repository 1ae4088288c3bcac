"""`accelerate launch ... -m rehead.uptraining DIR --data FILE ...`, which is `rehead uptrain`."""

from ..converters.launched import run_command

if __name__ == "__main__":
    run_command("uptrain")
