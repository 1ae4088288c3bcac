"""Writes docs/command-line.md from the commands themselves: python docs/command_line.py

A test holds the page against them.
"""

import re
from pathlib import Path

import typer

from rehead.cli.main import app

PAGE = Path(__file__).with_name("command-line.md")
HEAD = """# The command line

`convert` is `rehead convert`. Results go to stdout, progress and messages to stderr. Exit codes:
0 done; 2 a mistake or bad input, with one line on stderr that says what to do; 1 a fault of
rehead's (`REHEAD_DEBUG=1` shows the traceback). `rehead --install-completion` and
`convert --install-completion` teach your shell to complete them.

(This page is written by `python docs/command_line.py`.)
"""


def page() -> str:
    group = typer.main.get_command(app)
    return HEAD + "".join(_section(name, group.commands[name]) for name in sorted(group.commands))


def _section(name: str, command) -> str:
    about = re.sub(r"\[bold\](.+?)\[/\]", r"`\1`", command.help)
    rows = "".join(_row(p) for p in command.params if not p.hidden)
    return f"\n## rehead {name}\n\n{about}\n\n| | | default |\n|---|---|---|\n{rows}"


def _row(param) -> str:
    words = re.sub(r" ?\[dim\](.+?)\[/\]", r" \1", param.help or "").replace("|", "\\|")
    default = re.search(r"Default: (.+?)\.?$", words)
    words = words.replace(default[0], "").strip() if default else words
    if default:
        shown = default[1]
    elif param.required:
        shown = "required"
    else:
        shown = "" if param.default is None or param.default is False else f"`{param.default}`"
    names = [*param.opts, *param.secondary_opts]
    if param.param_type_name == "argument":
        names = [param.metavar or param.name.upper()]
    metavar = f" {param.metavar}" if param.metavar and param.param_type_name == "option" else ""
    return f"| {', '.join(f'`{n}{metavar}`' for n in names)} | {words} | {shown} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
