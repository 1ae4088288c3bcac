"""`rehead export`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .console import QUIET, VERBOSE, choice, print_json, progress_bars, results, size


def export(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="A model converted to mla, see --to.")
    ],
    to: Annotated[
        str,
        typer.Option(
            help="transformers: a stock class of transformers, without loss. deepseek: "
            "DeepseekV3ForCausalLM, which vLLM and SGLang have too, and gguf: llama.cpp's "
            "deepseek2, both of a model converted with --preset engine."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="What to write. [dim]Default: DIR-FORMAT or DIR.gguf, here.[/]"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="deepseek, gguf: a text as for convert. [dim]Default: rehead's own.[/]",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=2, help="deepseek, gguf: calibration sequences.")
    ] = 12,
    norm_rows: Annotated[
        int,
        typer.Option(
            min=0, help="deepseek, gguf: channels more in the latent, which steady its norm."
        ),
    ] = 16,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload it to the hub as well.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: a private repository.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the model at the output.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help=VERBOSE)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a converted model for tools that do not know rehead.

    GQA and MQA need no export: they are the family's own class already.

    For example: [bold]rehead export SmolLM2-135M-mla --to transformers[/]
    """
    with results(as_json, verbose) as console:
        from ..export import FORMATS
        from ..export import export as run

        choice("--to", to, list(FORMATS))
        with progress_bars(quiet, verbose) as progress:
            done = run(
                model,
                to=to,
                output=output or default_output(model, to),
                force=force,
                calibration=calibration,
                samples=samples,
                norm_rows=norm_rows,
                push_to_hub=push_to_hub,
                private=private,
                progress=progress,
            )
        if as_json:
            print_json(console, done.to_dict())
        else:
            _summarize(console, done)


def default_output(model: str, to: str) -> Path:
    """`llama-7b-mla-transformers` or `llama-7b-mla.gguf`, in the current folder."""
    path = Path(model)
    return Path(f"{path.name or path.resolve().name}{'.gguf' if to == 'gguf' else f'-{to}'}")


def _summarize(console: Console, done: Any) -> None:
    cache = done.kv_bytes_per_token
    console.print(f"KV cache per token: {size(cache['converted'])} -> {size(cache['exported'])}")
    if done.norm_spread:
        mean = sum(done.norm_spread) / len(done.norm_spread)
        console.print(f"What the latent's norm divides by varies by {mean:.1%} (mean of layers)")
    console.print(f"Loads as {done.architecture}; took {done.seconds:.0f} s")
    console.print(f"Written to [bold]{done.output}[/]", soft_wrap=True)
    if done.url:
        console.print(f"Uploaded to {done.url}", soft_wrap=True)
