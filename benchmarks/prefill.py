"""Time and memory of reading a prompt, and of training on a sequence, against its length.

    python benchmarks/prefill.py run HuggingFaceTB/SmolLM2-135M-Instruct --name smollm2 --budget 25
    python benchmarks/prefill.py run mha-32x64 --name mha-32x64 --budget 12.5 --backward
    python benchmarks/prefill.py table smollm2

The weights are random, in the shapes that a conversion to the budget has: time does not depend on
their values. All models of one row are timed in turns, in one process; read their ratios. Memory is
what a forward pass takes at most beyond the weights, the cache that it leaves included.
"""

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import decode
import torch
import typer
from rich.progress import track
from transformers import AutoConfig

RESULTS = Path(__file__).parent / "results"
ROUNDS = 3

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or mha-32x64.")],
    name: Annotated[str, typer.Option(help="Name of the results file.")],
    budget: Annotated[float, typer.Option(help="Per cent of the cache.")] = 25,
    kinds: str = "original,decoupled,on-read,mfa,mfa-kr",
    lengths: str = "1024,4096,8192",
    dtype: str = "float32",
    backward: Annotated[bool, typer.Option(help="Time the backward pass too.")] = False,
    layers: Annotated[int | None, typer.Option(help="Cut the model to so many layers.")] = None,
) -> None:
    """Times every kind at every length; the rows replace what was there of the same."""
    config = decode.SYNTHETIC.get(model) or AutoConfig.from_pretrained(model)
    if layers is not None:
        config.num_hidden_layers = layers
    torch.manual_seed(0)
    models = {
        kind: decode._build(decode._config(config, kind, budget), dtype)
        for kind in kinds.split(",")
    }
    decode._share(list(models.values()))
    for length in track([int(length) for length in lengths.split(",")], description="lengths"):
        ids = torch.randint(config.vocab_size, (1, length))
        rounds: dict[str, list[tuple[float, float, float | None]]] = {kind: [] for kind in models}
        for _ in range(ROUNDS):
            for kind, built in models.items():
                rounds[kind].append(_pass(built, ids, backward))
        for kind, taken in rounds.items():
            forward, back, memory = zip(*taken, strict=True)
            row = {
                "model": model,
                "kind": kind,
                "budget": 100.0 if kind == "original" else budget,
                "length": length,
                "layers": config.num_hidden_layers,
                "dtype": dtype,
                "backward": backward,
                "forward_s": round(statistics.median(forward), 3),
                "backward_s": round(statistics.median(back), 3) if backward else None,
                "peak_mb": None if None in memory else round(min(memory), 1),
                "machine": decode._machine(),
            }
            _keep(name, row)
            print(json.dumps(row), flush=True)


def _pass(model: Any, ids: torch.Tensor, backward: bool) -> tuple[float, float, float | None]:
    """Seconds of a forward and of a backward pass, and the megabytes that they took at most."""
    before = decode._reset_peak()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        # The head alone would hide attention: it has the vocabulary's width for every token.
        out = model.base_model(input_ids=ids, use_cache=not backward).last_hidden_state
    forward, start = time.perf_counter() - start, time.perf_counter()
    if backward:
        out.square().mean().backward()
        model.zero_grad(set_to_none=True)
    taken = time.perf_counter() - start
    peak = decode._peak()
    memory = None if before is None or peak is None else (peak - before) / 1e6
    return forward, taken, memory


def _keep(name: str, row: dict[str, Any]) -> None:
    rows = _rows(name)
    same = ("model", "kind", "budget", "length", "layers", "dtype", "backward")
    rows = [r for r in rows if any(r[key] != row[key] for key in same)] + [row]
    RESULTS.mkdir(exist_ok=True)
    text = ",\n ".join(json.dumps(r) for r in rows)
    (RESULTS / f"prefill-{name}.json").write_text(f"[{text}]\n")


def _rows(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"prefill-{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


@app.command()
def table(name: str) -> None:
    """The results as Markdown: every kind's time and memory over the original's."""
    rows = _rows(name)
    print(
        "| kind | tokens | forward | over the original | peak MB | over the original | backward |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        key = (row["length"], row["backward"], row["layers"], row["dtype"])
        own = next(
            r
            for r in rows
            if r["kind"] == "original"
            and (r["length"], r["backward"], r["layers"], r["dtype"]) == key
        )
        over = row["forward_s"] / own["forward_s"]
        memory = f"{row['peak_mb'] / own['peak_mb']:.2f}" if row["peak_mb"] else ""
        back = f"{row['backward_s'] / own['backward_s']:.2f}" if row["backward"] else ""
        cells = [row["kind"], str(row["length"]), f"{row['forward_s']:.2f} s", f"{over:.2f}"]
        print("| " + " | ".join([*cells, str(row["peak_mb"] or ""), memory, back]) + " |")


if __name__ == "__main__":
    app()
