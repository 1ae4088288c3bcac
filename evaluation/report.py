"""A conversion as one HTML page: no script, no network, nothing beside it."""

import base64
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from ..converters.convert import FORMS
from ..converters.errors import InputError
from ..converters.recipe import Conversion, LayerReport, channel_words
from .comparison import Comparison

CONTEXTS = (4096, 32768, 131072)
# A browser asks nobody for anything, whatever is in the texts that are shown.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem;
       color: #222; background: #fff; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 44rem; } .note { color: #555; font-size: .9rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
          gap: 0 2rem; }
.charts > section { min-width: 0; } img { display: block; width: 100%; max-width: 34rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0;
         border-bottom: 1px solid #ddd; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; margin: 1rem 0 .5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr));
        gap: .5rem 1.5rem; }
.pair > div, blockquote { min-width: 0; background: #f5f5f5; border-radius: .4rem; margin: 0;
                          padding: .6rem .8rem; white-space: pre-wrap; }
blockquote { background: none; padding: .6rem 0; font-style: italic; }
"""


def check_report(path: str | Path, *, force: bool = False) -> Path:
    """The path, if a report can be written there; asked before the work and not after it.

    Raises:
        InputError: matplotlib is missing, or the path cannot be written or holds something already.
    """
    path = Path(path).expanduser()
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            f"a report ({path}) is drawn with matplotlib, which is not installed. "
            "Run: pip install matplotlib"
        )
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        what = "is a folder" if path.is_dir() else "is in no folder that can be written to"
        raise InputError(f"the report {path} {what}. Give the path of a file, such as report.html.")
    if path.exists() and not force:
        raise InputError(
            f"the report {path} exists already. Use --force, or give another --report."
        )
    return path


def write_report(path: str | Path, done: Conversion, comparison: Comparison | None = None) -> None:
    """Writes the page of a conversion, or of a dry run, which has no errors to show.

    Args:
        comparison: adds perplexity and what both models say.

    Raises:
        InputError: the file cannot be written.
    """
    page = report_page(done, comparison)
    path = Path(path).expanduser()
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}.") from error


def report_page(done: Conversion, comparison: Comparison | None = None) -> str:
    """The page's HTML."""
    name = escape(Path(done.recipe.source).name or done.recipe.source)
    title = f"{name} with {escape(FORMS[done.form])}"
    measured = "" if comparison is None else _perplexity(comparison)
    samples = "" if comparison is None else _samples(comparison)
    warnings = "".join(f"<p><strong>Warning:</strong> {escape(w)}</p>" for w in done.warnings)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>{_summary(done)}</p>
{warnings}
{measured}
<div class="charts">
{"".join(_charts(done))}
</div>
{samples}
<h2>What it takes</h2>
{_sizes(done)}
<h2>Recipe</h2>
{_recipe(done)}
{_layers(done.layers)}
</body>
</html>
"""


def _summary(done: Conversion) -> str:
    before, after = (done.kv_bytes_per_token[key] for key in ("source", "converted"))
    parts = [
        f"A token takes {after:,} bytes of KV cache instead of {before:,} ({after / before:.1%})."
    ]
    if done.coded is not None:
        parts.append(f"What it caches is coded: {done.coded}.")
    errors = [layer.error for layer in done.layers if layer.error is not None]
    if errors:
        parts.append(
            f"Mean relative error of a layer's attention: {sum(errors) / len(errors):.3g}."
        )
    if done.output is None:
        parts.append("A dry run: nothing was written, and no error measured.")
    else:
        minutes, seconds = divmod(round(done.seconds), 60)
        memory = done.peak_rss_bytes / 2**30
        parts.append(f"It took {minutes} min {seconds} s and {memory:.1f} GiB of memory.")
    return escape(" ".join(parts))


def _charts(done: Conversion) -> list[str]:
    from . import charts

    layers = done.layers
    found = [
        _chart(
            "KV cache",
            "Bytes that every token adds, over all layers.",
            charts.svg(charts.cache, done),
        ),
        _chart(
            "Dims",
            "What each layer was given. Layers whose output suffers more from a small cache get "
            "more of it.",
            charts.svg(charts.dims, layers),
        ),
    ]
    if any(layer.error is not None for layer in layers):
        note = "Squared error over the squared output, on calibration text that was held out."
        found.insert(1, _chart("Error of each layer", note, charts.svg(charts.errors, layers)))
    if done.channels is not None:
        note = (
            "The channels that each layer caches, by the bits that calibration gave them, and the "
            "channels that only a sequence's first tokens have."
        )
        found.append(_chart("Bits of the cache", note, charts.svg(charts.bits, layers)))
    if any(layer.rope_pairs for layer in layers):
        note = "Components of keys that keep RoPE, by frequency; the others are free of position."
        if done.channels is not None:
            note = "Components of keys that are cached, by frequency; the others are left out."
        found.append(_chart("Rotated components", note, charts.svg(charts.rotated, layers)))
    if all(layer.energy for layer in layers):
        note = (
            "What a latent of each rank would leave out, a line a layer; dots are the ranks taken."
        )
        found.append(_chart("Spectra of the latent", note, charts.svg(charts.spectra, layers)))
    return found


def _chart(title: str, note: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode()
    return (
        f'<section>\n<h2>{title}</h2>\n<p class="note">{note}</p>\n'
        f'<img alt="{title}: {note}" src="data:image/svg+xml;base64,{data}">\n</section>\n'
    )


def _sizes(done: Conversion) -> str:
    cache = done.kv_bytes_per_token
    rows = [
        (f"KV cache of {tokens:,} tokens", *(f"{_gib(cache[k] * tokens)} GiB" for k in cache))
        for tokens in CONTEXTS
    ]
    if done.attention_parameters:
        counts = done.attention_parameters
        rows.append(("attention's parameters", *(f"{counts[key]:,}" for key in cache)))
    return _table(("", "before", "after"), rows)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"


def _recipe(done: Conversion) -> str:
    set_ = {k: v for k, v in asdict(done.recipe).items() if v not in (None, False)}
    if done.channels is None:
        set_.pop("exact_tokens", None)
    set_["kv_budget"] = f"{done.recipe.kv_budget:.2%} asked for, {done.kv_budget:.2%} used"
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>"
        for name, value in set_.items()
    )
    return f'<div class="wide"><table>{rows}</table></div>'


def _layers(layers: Sequence[LayerReport]) -> str:
    names = [*layers[0].dims, *layers[0].codes]
    rows = [
        (
            *(layer.layer, *layer.dims.values(), *map(channel_words, layer.codes.values())),
            *(_short(layer.closed_form_error), _short(layer.error)),
        )
        for layer in layers
    ]
    table = _table(("layer", *names, "closed form", "error"), rows)
    return f"<details><summary>Every layer in numbers</summary>{table}</details>"


def _perplexity(comparison: Comparison) -> str:
    models = {"before": comparison.source, "after": comparison.converted}
    rows = [
        (name, f"{m.perplexity.perplexity:.3f}", f"{m.kv_bytes_per_token:,}")
        for name, m in models.items()
    ]
    read = comparison.source.perplexity
    return f"""<h2>Perplexity</h2>
<p class="note">On {escape(comparison.text)}: {read.windows} windows of {read.window} tokens.</p>
{_table(("", "perplexity", "cached bytes a token"), rows)}"""


def _samples(comparison: Comparison) -> str:
    both = comparison.source.continuations, comparison.converted.continuations
    samples = "".join(
        f"<blockquote>{escape(prompt.strip())}</blockquote>"
        f'<div class="pair"><div><strong>before</strong>\n{escape(before.strip())}</div>'
        f"<div><strong>after</strong>\n{escape(after.strip())}</div></div>"
        for prompt, before, after in zip(comparison.prompts, *both, strict=True)
    )
    return f"""<h2>What the two say</h2>
<p class="note">Greedy continuations of the text's own words.</p>
{samples}"""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The first column names, the others are numbers."""
    titles = "".join(f"<th{' class=n' if i else ''}>{escape(t)}</th>" for i, t in enumerate(head))
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if i else ''}>{escape(str(c))}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{titles}</tr>{body}</table></div>'


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
