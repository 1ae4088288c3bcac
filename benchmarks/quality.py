"""Perplexity against cache: converts, evaluates, and keeps every figure with its recipe.

    python benchmarks/quality.py run MODEL --calibration valid.txt --text test.txt \\
        --name smollm2 --ropes decoupled,on-read --budgets 75,50,33,25 --heal 0
    python benchmarks/quality.py table smollm2
    python benchmarks/quality.py pivot smollm2
    python benchmarks/quality.py plot smollm2 --output docs/images/quality.png

A figure that is in the results already is not measured again. Calibration and evaluation must be
different texts.
"""

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from rehead.converters.text import read_text, windows
from rehead.evaluation import kv_bytes_per_token, load_model, load_tokenizer, perplexity

RESULTS = Path(__file__).parent / "results"
# Measured from the peers' own code on the same model, texts and windows (no training).
TRANSMLA = {75: 24.02, 50: 31.24, 33: 47.07, 25: 67.86, 12.5: 186.6}
PLOTTED = [("mla", "decoupled"), ("mla", "on-read"), ("mfa-kr", ""), ("mfa", ""), ("gqa", "")]

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def run(
    model: str,
    calibration: Annotated[str, typer.Option()],
    text: Annotated[str, typer.Option()],
    name: Annotated[str, typer.Option(help="The results file's name.")],
    forms: str = "mla",
    ropes: str = "decoupled",
    budgets: str = "75,50,33,25",
    heal: int | None = None,
    window: int = 1024,
    count: int = 16,
    label: Annotated[str, typer.Option(help="Sets these figures apart from others.")] = "",
    options: Annotated[str, typer.Option(help="More options of convert, in one string.")] = "",
    keep: Annotated[Path | None, typer.Option(help="Leave the models in this folder.")] = None,
) -> None:
    """Measures what is not in the results yet."""
    rows = _read(name)
    source = load_tokenizer(model)
    ids = windows(source, read_text(text), window, count)
    if not any(row["form"] == "original" for row in rows):
        original = load_model(model, dtype="float32")
        rows.append(
            {
                "form": "original",
                "perplexity": perplexity(original, ids).perplexity,
                "kv_bytes_per_token": kv_bytes_per_token(original),
                "text": Path(text).name,
                "windows": [count, window],
            }
        )
        _append(name, rows[-1])
    wanted = [
        (form, rope if form == "mla" else "", float(budget))
        for form in forms.split(",")
        for rope in (ropes.split(",") if form == "mla" else [""])
        for budget in budgets.split(",")
    ]
    for form, rope, budget in track(wanted, description="conversions"):
        key = {"form": form, "rope": rope, "budget": budget, "heal": heal, "label": label}
        if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            healed = "" if heal is None else f"heal-{heal}"
            parts = filter(None, [form, rope, f"{budget:g}", healed, label])
            output = (keep or Path(scratch)) / "-".join(parts)
            done = _convert(model, form, output, budget, calibration, heal, rope, options)
            converted = load_model(done["output"], dtype="float32")
            rows.append(
                key
                | {
                    "perplexity": perplexity(converted, ids).perplexity,
                    "kv_bytes_per_token": kv_bytes_per_token(converted),
                    "calibration": Path(calibration).name,
                    "samples": done["recipe"]["samples"],
                    "steps": done["recipe"]["heal"],
                    "seed": done["recipe"]["seed"],
                    "seconds": round(done["seconds"]),
                    "peak_rss_gb": round(done["peak_rss_bytes"] / 1e9, 2),
                }
            )
        _append(name, rows[-1])
        print(json.dumps(rows[-1]), flush=True)


def _convert(
    model: str,
    form: str,
    output: Path,
    budget: float,
    calibration: str,
    heal: int | None,
    rope: str,
    options: str,
) -> dict:
    """What `convert --json` says; a process of its own, so that its peak memory is its own."""
    command = [str(Path(sys.executable).with_name("convert")), "--to", form, model, "--json"]
    command += ["--output", str(output), "--kv-budget", f"{budget}%"]
    command += ["--calibration", calibration]
    command += [] if heal is None else ["--heal", str(heal)]
    command += ["--rope", rope] if rope else []
    command += shlex.split(options)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@app.command()
def table(name: str) -> None:
    """The results as Markdown."""
    rows = _read(name)
    original = next(row for row in rows if row["form"] == "original")
    print(f"original: {original['perplexity']:.2f}, {original['kv_bytes_per_token']:,} bytes\n")
    print("| form | rope | KV budget | healing steps | perplexity | ratio | seconds | peak GB |")
    print("|---|---|---|---|---|---|---|---|")
    order = sorted(
        (row for row in rows if row["form"] != "original"),
        key=lambda row: (row["form"], row["rope"], row["label"], -row["budget"], row["steps"]),
    )
    for row in order:
        ratio = row["perplexity"] / original["perplexity"]
        form = f"{row['form']} {row['label']}".strip()
        seconds, memory = (row[k] if row[k] is not None else "" for k in ("seconds", "peak_rss_gb"))
        print(
            f"| {form} | {row['rope']} | {row['budget']:g}% | {row['steps']} | "
            f"{row['perplexity']:.2f} | {ratio:.3f} | {seconds} | {memory} |"
        )


@app.command()
def pivot(name: str) -> None:
    """Budgets against forms as Markdown: perplexity of the closed form / after healing."""
    rows = _read(name)
    converted = [row for row in rows if row["form"] != "original"]
    order = {kind: place for place, kind in enumerate(PLOTTED)}
    columns = sorted(
        {(row["form"], row["rope"], row["label"]) for row in converted},
        key=lambda column: (column[2], order[column[:2]]),
    )
    peers = {"TransMLA": TRANSMLA} if name == "smollm2" else {}
    titles = [*peers, *(" ".join(filter(None, column)) for column in columns)]
    print("| KV cache kept | " + " | ".join(titles) + " |")
    print("|---" * (len(titles) + 1) + "|")
    for budget in sorted({row["budget"] for row in converted}, reverse=True):
        cells = [f"{peer[budget]:.2f}" if budget in peer else "" for peer in peers.values()]
        for form, rope, label in columns:
            found = {
                bool(row["steps"]): f"{row['perplexity']:.2f}"
                for row in converted
                if (row["form"], row["rope"], row["label"], row["budget"])
                == (form, rope, label, budget)
            }
            both = f"{found.get(False, '–')} / {found[True]}" if True in found else None
            cells.append(both or found.get(False, ""))
        print(f"| {budget:g}% | " + " | ".join(cells) + " |")


@app.command()
def plot(name: str, output: Annotated[Path, typer.Option()]) -> None:
    """Perplexity against the share of the cache kept, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _read(name)
    original = next(row for row in rows if row["form"] == "original")["perplexity"]
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    if name == "smollm2":
        axes.plot(TRANSMLA.keys(), TRANSMLA.values(), "x--", color="grey", label="TransMLA")
    converted = [row for row in rows if row["form"] != "original" and not row["label"]]
    kinds = sorted({(row["form"], row["rope"]) for row in converted}, key=PLOTTED.index)
    for number, (form, rope) in enumerate(kinds):
        for healed in (False, True):
            points = sorted(
                (row["budget"], row["perplexity"])
                for row in converted
                if (row["form"], row["rope"]) == (form, rope) and bool(row["steps"]) == healed
            )
            if points:
                style = "o-" if healed else "o:"
                label = f"{form} {rope}".strip() + (", healed" if healed else ", closed form")
                axes.plot(*zip(*points, strict=True), style, color=f"C{number}", label=label)
    axes.axhline(original, color="black", linewidth=0.8, label="original")
    axes.set(yscale="log", xlabel="KV cache kept, %", ylabel="perplexity")
    low, high = axes.get_ylim()
    ticks = [n for n in (1, 2, 5, 10, 15, 20, 25, 30, 40, 50, 70, 100, 150, 200) if low < n < high]
    axes.minorticks_off()
    axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(output)


def _read(name: str) -> list[dict]:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else []


def _append(name: str, row: dict) -> None:
    """Reads the file again: another run may have added to it."""
    RESULTS.mkdir(exist_ok=True)
    rows = [*_read(name), row]
    (RESULTS / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app()
