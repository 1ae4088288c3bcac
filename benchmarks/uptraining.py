"""Held-out perplexity against tokens trained on, and the speed beside a plain Trainer.

    python benchmarks/uptraining.py run healed=DIR closed=DIR --data train.jsonl.gz \\
        --eval-text eval.jsonl --name enwiki --tokens 1000000
    python benchmarks/uptraining.py plot enwiki --output docs/images/uptraining.png
    python benchmarks/uptraining.py speed DIR --data train.jsonl.gz

Every method trains every converted checkpoint, named by how it was converted. A curve that is in
the results already is not measured again.
"""

import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from rehead.converters.text import read_text, windows
from rehead.evaluation import load_model, load_tokenizer
from rehead.uptraining import UptrainConfig, uptrain
from rehead.uptraining.data import Windows

RESULTS = Path(__file__).parent / "results"
METHODS: dict[str, dict[str, Any]] = {
    "LoRA, KL and cross-entropy": {},
    "LoRA, KL": {"ce_weight": 0.0},
    "LoRA, cross-entropy": {"teacher": "none"},
    "full, KL and cross-entropy": {"full": True},
    "full, KL": {"full": True, "ce_weight": 0.0},
}

app = typer.Typer(pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command()
def run(
    checkpoints: Annotated[list[str], typer.Argument(help="NAME=FOLDER of each checkpoint.")],
    data: Annotated[str, typer.Option()],
    eval_text: Annotated[str, typer.Option()],
    name: Annotated[str, typer.Option(help="The results file's name.")],
    tokens: int = 1_000_000,
    eval_windows: int = 64,
    methods: str = ";".join(METHODS),
    learning_rate: float | None = None,
    rank: int = 128,
) -> None:
    """Trains what is not in the results yet."""
    logging.disable_progress_bar()
    rows = _read(name)
    for pair in checkpoints:
        start, _, folder = pair.partition("=")
        for method in methods.split(";"):
            key = {"start": start, "method": method, "tokens": tokens, "rank": rank}
            key["learning_rate"] = learning_rate
            if any(all(row.get(k) == v for k, v in key.items()) for row in rows):
                continue
            config = UptrainConfig(
                folder,
                data,
                eval_text=eval_text,
                tokens=tokens,
                eval_windows=eval_windows,
                learning_rate=learning_rate,
                rank=rank,
            )
            with tempfile.TemporaryDirectory() as place:
                done = uptrain(
                    replace(config, **METHODS[method]), output=Path(place) / "out", progress=_show
                ).to_dict()
            kept = ("curve", "teacher_perplexity", "tokens_per_second", "peak_rss_bytes")
            rows.append(key | {k: done[k] for k in kept} | {"trained": done["trained_parameters"]})
            _write(name, rows)
            console.print(f"{start}, {method}: {done['after']['perplexity']:.3f}")


@app.command()
def plot(name: str, output: Annotated[Path, typer.Option()]) -> None:
    """Draws every curve of a results file; the source model is a dashed line."""
    from matplotlib import pyplot

    rows = _read(name)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    colours = {method: f"C{index}" for index, method in enumerate(METHODS)}
    styles = dict(zip(dict.fromkeys(row["start"] for row in rows), ("-", "--", ":"), strict=False))
    for row in rows:
        axes.plot(
            [point["tokens"] / 1e6 for point in row["curve"]],
            [point["perplexity"] for point in row["curve"]],
            color=colours[row["method"]],
            linestyle=styles[row["start"]],
            label=f"{row['start']}, {row['method']}",
        )
    original = next((r["teacher_perplexity"] for r in rows if r["teacher_perplexity"]), None)
    if original is not None:
        axes.axhline(original, color="0.5", linewidth=1, label="original")
    axes.set(xlabel="million tokens", ylabel="held-out perplexity", yscale="log")
    for ticks in ("major", "minor"):
        getattr(axes.yaxis, f"set_{ticks}_formatter")("{x:.4g}")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160)


class PlainDistiller(Trainer):
    """What one would write in ten lines: both models' scores, and torch's own divergence."""

    teacher: Any = None

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        scores = model(**inputs, use_cache=False).logits.flatten(0, 1)
        enabled = bool(self.args.bf16)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            likely = self.teacher(**inputs, use_cache=False).logits.flatten(0, 1)
        return kl_div(
            log_softmax(scores.float(), -1),
            log_softmax(likely.float(), -1),
            log_target=True,
            reduction="batchmean",
        )


@app.command()
def speed(
    folder: str,
    data: Annotated[str, typer.Option()],
    steps: int = 4,
    rounds: int = 2,
    window: int = 512,
    batch: int = 8,
    micro_batch: int = 4,
    dtype: str = "bfloat16",
) -> None:
    """Tokens per second of ours and of a plain Trainer with peft, the same batch, in turns."""
    logging.disable_progress_bar()
    config = UptrainConfig(
        folder,
        data,
        tokens=steps * batch * window,
        window=window,
        batch=batch,
        micro_batch=micro_batch,
        eval_windows=1,
        evaluations=1,
        ce_weight=0.0,
        dtype=dtype,
    )
    found: dict[str, list[float]] = {"rehead": [], "plain": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            done = uptrain(config, output=Path(place) / "out")
            found["rehead"].append(done.tokens_per_second)
        found["plain"].append(_plain(config, steps))
    for name, measured in found.items():
        each = ", ".join(f"{speed:.0f}" for speed in measured)
        console.print(f"{name}: {max(measured):.0f} tokens/s at best of {each}")


def _plain(config: UptrainConfig, steps: int) -> float:
    student = load_model(config.model, dtype="float32")
    names = {n.split(".")[-1] for n, m in student.named_modules() if ".self_attn." in n and _is(m)}
    settings = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=sorted(names))
    rows = windows(
        load_tokenizer(config.model), read_text(config.data), config.window, steps * config.batch
    )
    with tempfile.TemporaryDirectory() as place:
        trainer = PlainDistiller(
            get_peft_model(student, settings),
            TrainingArguments(
                place,
                per_device_train_batch_size=config.micro_batch,
                gradient_accumulation_steps=config.batch // config.micro_batch,
                max_steps=steps,
                learning_rate=1e-3,
                bf16=config.dtype == "bfloat16",
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Windows(rows),
        )
        trainer.teacher = load_model(student.config.conversion["source"], dtype="float32")
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return len(rows) * config.window / seconds


def _is(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear)


def _show(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    if done % max(1, total // 8) == 0:
        console.print(f"  {done}/{total} {info}", style="dim")


def _read(name: str) -> list[dict[str, Any]]:
    path = RESULTS / f"uptraining-{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"uptraining-{name}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    app()
