"""How far converted models are from their original, on texts of several kinds.

    python benchmarks/divergence.py ORIGINAL DIR [DIR ...] --text test.txt --text stories.jsonl

For every text the mean over tokens of the KL divergence from the original's next-token
distribution to the converted model's, in nats, and both perplexities. Where a file holds several
texts (`.jsonl`, field `text`), the first `--count` of them are seen one by one, with what the
tokenizer adds to a text; one text in the first `--windows` consecutive windows of `--window`
tokens, as `rehead evaluate` sees it.
"""

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from rehead.converters.text import read_texts, windows
from rehead.evaluation import load_model, load_tokenizer


def main(
    original: str,
    converted: Annotated[list[str], typer.Argument()],
    text: Annotated[list[str], typer.Option()],
    window: int = 1024,
    windows: int = 8,
    count: int = 150,
) -> None:
    """Prints a table: a row for every model, a column for every text."""
    tokenizer = load_tokenizer(original)
    texts = {Path(name).name: _sequences(tokenizer, name, window, windows, count) for name in text}
    first = load_model(original, dtype="float32")
    table = Table("model", *texts, box=None)
    for place in converted:
        second = load_model(place, dtype="float32")
        cells = []
        for name, rows in texts.items():
            kl, before, after = _measure(first, second, rows, f"{place}, {name}")
            cells.append(f"{kl:.4f} ({before:.2f} -> {after:.2f})")
        table.add_row(place, *cells)
    Console(width=200).print(table)


def _sequences(tokenizer: Any, name: str, window: int, number: int, count: int) -> list[Any]:
    texts = read_texts(name)
    if len(texts) == 1:
        return [*windows(tokenizer, texts[0], window, number)]
    return [torch.tensor(tokenizer(text).input_ids[:window]) for text in texts[:count]]


@torch.no_grad()
def _measure(first: Any, second: Any, rows: list[Any], title: str) -> tuple[float, float, float]:
    """Mean KL divergence, and the perplexities of the first model and the second."""
    sums, tokens = torch.zeros(3), 0
    for row in track(rows, title):
        p, q = (model(row[None]).logits[0, :-1].log_softmax(-1) for model in (first, second))
        says = [-log.gather(1, row[1:, None]).sum() for log in (p, q)]
        sums += torch.stack([(p.exp() * (p - q)).sum(), *says])
        tokens += len(row) - 1
    kl, before, after = (sums / tokens).tolist()
    return kl, math.exp(before), math.exp(after)


if __name__ == "__main__":
    typer.run(main)
