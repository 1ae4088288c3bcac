"""Help texts, the documentation and the commands agree."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from rehead.cli import main
from rehead.cli.convert import FORM_NAMES
from rehead.converters import FORMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(main.app).commands
# Flags in our pages that other programs have.
STRANGERS = {"--model", "--model_args", "--include_path", "--tasks", "--metadata", "--model-impl"}
STRANGERS |= {"--config_file", "--limit", "--nproc-per-node", "--trust-remote-code"}
STRANGERS |= {"--install-completion", "--show-completion", "--version", "--help"}


def commands_in(text: str) -> list[list[str]]:
    """The words of every call of our commands in a page's console blocks."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if line.startswith("$ ") and words[0] in ("convert", "rehead"):
                found.append(words)
    return found


def parse(words: list[str]) -> None:
    """Raises what the command line would for these words, and runs nothing."""
    name, *rest = words if words[0] == "convert" else words[1:]
    COMMANDS[name].make_context(name, rest)


def flags_in(text: str) -> set[str]:
    """Long flags in code, in spans and in blocks."""
    code = " ".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    return set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*", code))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_docs_can_be_given(page):
    for words in commands_in(page.read_text()):
        parse(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_docs_exist(page):
    known = {o for c in COMMANDS.values() for p in c.params for o in p.opts + p.secondary_opts}
    scripts = " ".join(p.read_text() for p in (ROOT / "benchmarks").glob("*.py"))
    # A parameter of a benchmark's function is its flag.
    known |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    (\w+):", scripts, re.M)}
    assert not flags_in(page.read_text()) - known - STRANGERS


def test_a_wrong_command_in_the_docs_would_be_seen():
    text = "```console\n$ convert --too mla \\\n    m\n$ rehead inspect m --json  # fine\n```"
    wrong, fine = commands_in(text)
    assert wrong == ["convert", "--too", "mla", "m"]
    with pytest.raises(Exception, match="--too"):
        parse(wrong)
    parse(fine)
    assert flags_in(text + " `--no-such`") == {"--too", "--json", "--no-such"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_has_an_example_that_can_be_given(name):
    examples = re.findall(r"For example: \[bold\](.+?)\[/\]", COMMANDS[name].help)
    assert len(examples) == 1
    words = shlex.split(examples[0])
    assert name in words[:2]
    parse(words)


def test_the_page_of_the_command_line_is_that_of_the_commands():
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "command_line.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text() == made.page(), "run: python docs/command_line.py"


def test_a_shell_completes_forms_and_flags():
    assert set(FORM_NAMES) == set(FORMS)

    def offered(words: str) -> set[str]:
        at = str(len(words.split()) - 1)
        given = {"_REHEAD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": at}
        script = Path(sys.executable).with_name("rehead")
        done = subprocess.run([script], capture_output=True, text=True, env=os.environ | given)
        return set(done.stdout.split())

    assert offered("rehead convert --to m") == {"mqa", "mla", "mfa", "mfa-kr"}
    assert "--kv-budget" in offered("rehead convert --kv-")
