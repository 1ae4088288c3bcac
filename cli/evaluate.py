"""`rehead evaluate`."""

import time
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .console import QUIET, VERBOSE, ProgressCall, print_json, progress_bars, results, size


def evaluate(
    model: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A model folder, converted or not; or as for convert."),
    ],
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE", help=".txt, .jsonl (field text), either .gz, or a hub data set."
        ),
    ],
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="How many, from the text's start.")] = 16,
    compare: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="A second model to measure on the same text."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="To compute in. [dim]Default: as stored.[/]")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure perplexity, and the bytes a token takes in the KV cache.

    The text is cut into consecutive windows of tokens without a BOS, each is seen by itself, and
    perplexity is exp of the mean negative log-likelihood of all tokens but each window's first.

    For example: [bold]rehead evaluate SmolLM2-135M-mla --text test.txt --windows 16[/]
    """
    with results(as_json, verbose) as console:
        from ..converters.text import read_text

        content = read_text(text)
        names = [model] + ([compare] if compare else [])
        with progress_bars(quiet, verbose) as progress:
            found = [_measure(n, content, window, windows, dtype, device, progress) for n in names]
        result = found[0] | ({"compare": found[1]} if compare else {})
        if as_json:
            print_json(console, result)
        else:
            _show(console, found)


def _measure(
    name: str,
    text: str,
    window: int,
    windows: int,
    dtype: str | None,
    device: str,
    progress: ProgressCall,
) -> dict[str, Any]:
    from ..converters.text import windows as cut
    from ..evaluation import kv_bytes_per_token, load_model, load_tokenizer, perplexity

    start = time.perf_counter()
    model = load_model(name, dtype=dtype, device=device)
    ids = cut(load_tokenizer(name), text, window, windows)
    progress(name, 0, len(ids), {})
    measured = perplexity(model, ids, progress=lambda d, t: progress(name, d, t, {}))
    return {
        "model": name,
        "perplexity": measured.perplexity,
        "kv_bytes_per_token": kv_bytes_per_token(model),
        "tokens": measured.tokens,
        "windows": measured.windows,
        "window": measured.window,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "seconds": time.perf_counter() - start,
    }


def _show(console: Console, found: list[dict[str, Any]]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("perplexity", "KV per token", "tokens predicted", "dtype", "seconds"):
        table.add_column(title, justify="right")
    for row in found:
        table.add_row(
            row["model"],
            f"{row['perplexity']:.4f}",
            size(row["kv_bytes_per_token"]),
            f"{row['tokens']:,}",
            row["dtype"],
            f"{row['seconds']:.1f}",
        )
    console.print(table)
