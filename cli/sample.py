"""`rehead sample`."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from .console import QUIET, VERBOSE, print_json, progress_bars, results
from .convert import default_output


def sample(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or a .gguf file.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The .jsonl file to write. [dim]Default: MODEL-words.jsonl, here.[/]"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="To write, or a few more.")] = 50_000,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a text, at most.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the sampling.")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Of the sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Same seed, same texts.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="To compute in. [dim]Default: as stored.[/]")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Have MODEL write texts of its own, to calibrate a conversion on or to uptrain with.

    For example: [bold]rehead sample MODEL --output own.jsonl[/], and then
    [bold]convert --to mla MODEL --calibration default --calibration own.jsonl[/]
    """
    with results(as_json, verbose) as console:
        from ..converters.errors import InputError
        from ..evaluation import load_model, load_tokenizer, own_texts

        began = time.monotonic()
        place = (output or Path(f"{default_output(model, 'words')}.jsonl")).expanduser()
        if place.exists() and not (force and place.is_file()):
            raise InputError(f"{place} exists. Give another --output, or --force to replace it.")
        if not place.parent.is_dir():
            raise InputError(f"{place.parent} is no folder to write {place.name} in.")
        tokenizer = load_tokenizer(model)
        loaded = load_model(model, dtype=dtype, device=device)
        part = place.with_name(f".{place.name}.partial")
        lines = done = 0
        try:
            with (
                progress_bars(quiet, verbose) as progress,
                part.open("w", encoding="utf-8") as file,
            ):
                progress("tokens", 0, tokens, {})
                texts = own_texts(
                    loaded,
                    tokenizer,
                    tokens,
                    length=length,
                    batch=batch,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                    progress=lambda drawn: progress("tokens", min(drawn, tokens), tokens, {}),
                )
                for text, size in texts:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    lines, done = lines + 1, done + size
            part.replace(place)
        except OSError as error:
            raise InputError(f"cannot write {place}: {error.strerror or error}.") from error
        finally:
            part.unlink(missing_ok=True)
        found = {"output": str(place), "texts": lines, "tokens": done}
        found["seconds"] = time.monotonic() - began
        if as_json:
            print_json(console, found)
        else:
            console.print(f"{lines} texts, {done:,} tokens, written to {place}", soft_wrap=True)
