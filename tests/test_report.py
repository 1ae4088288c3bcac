"""The page that `convert --report` writes: its figures, and how a browser shows it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import browser
import numpy as np
import pytest

from rehead.cli import main
from rehead.converters import Conversion, InputError, LayerReport, Recipe
from rehead.evaluation import (
    Comparison,
    Measured,
    Perplexity,
    charts,
    check_report,
    report_page,
    write_report,
)

HOSTILE = "<script>console.error('run')</script>"
TEXT = "The quick brown fox jumps over the lazy dog. " * 100


def layer(index: int, rank: int, pairs: tuple[int, ...]) -> LayerReport:
    energy = tuple(0.5**i for i in range(40))
    dims = {"kv_lora_rank": rank, "qk_rope_head_dim": 2 * len(pairs)}
    return LayerReport(index, dims, pairs, 0.02, 0.01 * (index + 1), (100, 90), 8, energy=energy)


@pytest.fixture(scope="module")
def done() -> Conversion:
    recipe = Recipe("a/llama-7b", "mla", "decoupled", 0.5, "default", samples=8, heal=0, seed=0)
    return Conversion(
        output=Path("llama-7b-mla"),
        form="mla",
        kv_budget=0.49,
        kv_bytes_per_token={"source": 23040, "converted": 11520},
        seconds=61.0,
        peak_rss_bytes=3 << 30,
        recipe=recipe,
        attention_parameters={"source": 300, "converted": 270},
        layers=[layer(0, 12, (0, 0, 3)), layer(1, 10, (1, 7)), layer(2, 14, ())],
    )


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    def measured(value: float, says: str) -> Measured:
        return Measured(Perplexity(value, 2046, 2, 1024), 11520, (says, HOSTILE))

    prompts = ("Once upon", "Rome " + "x" * 300)
    return Comparison(f"{HOSTILE}.txt", prompts, measured(20.25, "a time"), measured(23.5, "a tim"))


@pytest.fixture(scope="module")
def page(done, comparison) -> str:
    return report_page(done, comparison)


def test_no_browser_is_a_failure(monkeypatch):
    monkeypatch.setattr(browser, "NAMES", ("no-such-browser",))
    with pytest.raises(pytest.fail.Exception, match="no browser: none of no-such-browser"):
        browser.find()


@pytest.mark.browser
def test_a_browser_draws_the_page_on_a_phone(page, tmp_path):
    seen = browser.look_at(page, tmp_path)
    assert (seen["width"], seen["console"]) == (browser.PHONE, [])
    assert seen["scroll"] <= browser.PHONE
    assert seen["drawn"] == seen["images"] == 5
    assert seen["narrowest"] > 300
    for words in ("llama-7b", "50.0%", "20.250", "23.500", "a time", HOSTILE, "0.49"):
        assert words in seen["text"].replace("49.00%", "0.49")


@pytest.mark.browser
def test_a_broken_page_would_be_seen(page, tmp_path):
    page = re.sub(r'(base64,.{200})[^"]+', r"\1", page, count=1)  # a drawing cut short
    page = page.replace("</body>", "<p style='width:500px'>x</p></body>")
    page = re.sub("<meta http-equiv=.*", "", page).replace("</body>", HOSTILE + "</body>")
    seen = browser.look_at(page, tmp_path)
    assert seen["scroll"] > browser.PHONE
    assert seen["drawn"] == seen["images"] - 1
    assert "run" in seen["console"][0]


def test_the_page_asks_the_network_for_nothing(page):
    assert len(page) < 300_000
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    # An SVG's namespaces are names, not addresses to fetch.
    assert not re.search(r"https?://", re.sub(r"base64,[^\"]+", "", page))


def test_charts_show_the_conversion(done):
    axes = charts.errors(done.layers).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.01, 0.02, 0.03]
    lines = {
        line.get_label(): list(line.get_ydata()) for line in charts.dims(done.layers).axes[0].lines
    }
    assert lines == {"kv_lora_rank": [12, 10, 14], "qk_rope_head_dim": [6, 4, 0]}
    image = charts.rotated(done.layers).axes[0].images[0].get_array()
    expected = np.zeros((8, 3))
    expected[0, 0], expected[3, 0], expected[1, 1], expected[7, 1] = 2, 1, 1, 1
    assert (image == expected).all()
    bars = charts.cache(done).axes[0].patches
    assert [bar.get_width() for bar in bars] == [22.5, 11.25]
    dots = [
        line for line in charts.spectra(done.layers).axes[0].lines if len(line.get_xdata()) == 1
    ]
    assert [dot.get_xdata()[0] for dot in dots] == [12, 10, 14]


def test_what_a_rank_leaves_out_is_the_energy_beyond_it():
    left = charts.left_out((4.0, 2.0, 1.0, 1.0))
    assert left.tolist() == [1.0, 0.5, 0.25, 0.125, 0.0]


def test_the_same_conversion_makes_the_same_page(done, comparison, page):
    assert report_page(done, comparison) == page


def test_a_page_of_what_has_nothing_to_rotate(done):
    """GQA's layers have neither components nor a latent; a dry run has no errors."""
    plain = [LayerReport(i, {"num_key_value_heads": 1}) for i in range(2)]
    page = report_page(replace(done, layers=plain, output=None, attention_parameters={}))
    assert page.count("<img") == 2
    assert "A dry run" in page


def test_mistakes_are_told_before_the_work(tmp_path, monkeypatch):
    there = tmp_path / "there.html"
    there.write_text("mine")
    for path, message in (
        (there, "--force"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "r.html", "no folder"),
    ):
        with pytest.raises(InputError, match=message):
            check_report(path)
    assert check_report(there, force=True) == there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install matplotlib"):
        check_report(tmp_path / "r.html")


def test_a_report_that_cannot_be_written_is_told(done, tmp_path, monkeypatch):
    monkeypatch.setattr("rehead.evaluation.report.report_page", lambda *_: "")
    with pytest.raises(InputError, match="cannot write"):
        write_report(tmp_path, done)


def run(capsys, *args):
    return main.run(main.convert_app, "convert", [str(arg) for arg in args]), *capsys.readouterr()


def test_convert_writes_a_report(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    asked = [saved, "--heal", 0, "--samples", 4, "--calibration", "text.txt", "--output", "out"]
    report = ["--report", "r.html", "--eval-text", "text.txt"]
    for args, message in (
        (["--to", "mla", "--eval-text", "text.txt"], "--report"),
        (["--to", "mla", *report, "--dry-run"], "--dry-run"),
        (["--to", "mla", "--report", "r.html", "--eval-text", "no.txt"], "no such file"),
    ):
        code, out, err = run(capsys, *asked, *args)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]

    code, out, _ = run(capsys, *asked, "--to", "mla", *report, "--json")
    assert code == 0
    found = json.loads(out)
    assert "energy" not in found["layers"][0]
    page = Path("r.html").read_text()
    assert page.count("<img") == 5
    assert f"{found['layers'][0]['error']:.4g}" in page
    assert f">{found['kv_bytes_per_token']['converted']:,}<" in page
    assert "16 windows of 128 tokens" in page

    code, _, _ = run(capsys, *asked, "--to", "mfa-kr", "--report", "r.html", "--force")
    assert code == 0
    assert Path("r.html").read_text().count("<img") == 5
