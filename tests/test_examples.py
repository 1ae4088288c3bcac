"""The examples, executed."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "first_conversion.ipynb"


def executed(notebook, folder: Path):
    """The notebook after a run in its own kernel; raises what a cell raises."""
    place = {"metadata": {"path": folder}}
    return nbclient.NotebookClient(
        notebook, timeout=900, resources=place, extra_arguments=["--log-level=ERROR"]
    ).execute()


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def perplexities(text: str) -> dict[str, float]:
    """The rows of its table that end in a share and a perplexity."""
    rows = [line.split() for line in text.splitlines()]
    return {" ".join(r[:-2]): float(r[-1]) for r in rows if len(r) > 2 and r[-2].endswith("%")}


def test_the_notebook_runs_and_says_what_is_saved(tmp_path):
    saved = nbformat.read(NOTEBOOK, as_version=4)
    assert all(cell.outputs for cell in saved.cells[2:] if cell.cell_type == "code")
    before = perplexities(printed(saved))
    after = perplexities(printed(executed(nbformat.read(NOTEBOOK, as_version=4), tmp_path)))
    assert list(after) == list(before)
    assert {"original", "mla", "mla on-read", "gqa by the mean"} <= set(after)
    for name, value in after.items():
        # The same text and seed; another machine rounds otherwise while the model is trained.
        assert value == pytest.approx(before[name], rel=0.1)
        assert value >= 0.99 * after["original"]
    assert after["mla"] < after["gqa by the mean"]


def test_a_broken_notebook_would_be_seen(tmp_path):
    cell = nbformat.v4.new_code_cell("1 / 0")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        executed(nbformat.v4.new_notebook(cells=[cell]), tmp_path)


def test_compare_forms(saved):
    script = [sys.executable, EXAMPLES / "compare_forms.py", saved, "--samples", "4"]
    script += ["--window", "64", "--count", "2"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[:12].strip() for line in lines] == [
        *("original", "mla", "mla on-read", "mfa", "mfa-kr", "gqa")
    ]
    assert all("of the cache" in line for line in lines[1:])


def test_the_demo_finds_its_model_and_measures_it(saved, monkeypatch):
    """On a tiny model in place of the one it converts, which takes minutes."""
    demo = runpy.run_path(str(EXAMPLES / "demo.py"))
    monkeypatch.setitem(demo["measure"].__globals__, "WINDOW", 64)
    measured = demo["measure"](saved)
    assert measured["KV bytes per token"] == "256"
    assert float(measured["perplexity"]) > 1


def test_examples_are_few():
    assert len([*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")]) <= 6
    assert shutil.which("convert", path=str(Path(sys.executable).parent))
