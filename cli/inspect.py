"""`rehead inspect`."""

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .console import print_json, results, size

CONTEXTS = (4096, 32768, 131072)
ADVICE = (
    "When to take which: [bold]mla[/] decodes fast and has DeepSeek's layout, which engines know; "
    "[bold]mla --rope on-read[/] is nearest to the original at every size and costs more compute "
    "a token; [bold]gqa[/] and [bold]mqa[/] stay the family's own class, which everything loads; "
    "[bold]mfa-kr[/] is nearer than mla at the same cache for more parameters; [bold]mfa[/] is the "
    "simplest to serve."
)


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or a .gguf file.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what MODEL's KV cache takes, how it was converted, and what it could be converted to.

    Reads the config alone: no weights are loaded.
    """
    with results(as_json) as console:
        found = _inspect(model)
        if as_json:
            print_json(console, found)
        else:
            _show(console, found)


def _inspect(model: str) -> dict[str, Any]:
    from ..converters import InputError
    from ..converters.inspection import describe, offers
    from ..evaluation import cache_bytes_of_config, load_config

    config = load_config(model)
    found = {"model": model} | describe(config)
    found["kv_bytes_per_token"] = cache_bytes_of_config(config)
    found["refused"], found["forms"] = None, []
    try:
        found["forms"] = [asdict(offer) for offer in offers(config)]
    except InputError as error:
        found["refused"] = str(error)
    return found


def _show(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"[bold]{found['model']}[/]: {found['model_type']}, {found['form']}, {found['layers']} "
        f"layers, {found['num_attention_heads']} query and {found['num_key_value_heads']} KV heads "
        f"of {found['head_dim']}, {found['dtype']}",
        soft_wrap=True,
    )
    each = found["kv_bytes_per_token"]
    contexts = ", ".join(f"{n // 1024}k tokens {size(n * each)}" for n in CONTEXTS)
    console.print(f"KV cache: [bold]{size(each)}[/] a token; {contexts}")
    recipe = found["conversion"]
    if recipe:
        errors = recipe.get("layer_errors") or [0.0]
        console.print(
            f"Converted from {recipe['source']} by rehead {recipe['rehead_version']}: "
            f"{recipe['form']}, rope {recipe['rope']}, {recipe['heal']} healing steps, mean layer "
            f"error {sum(errors) / len(errors):.4f}",
            soft_wrap=True,
        )
    if found["refused"]:
        console.print(f"Not convertible: {found['refused']}", soft_wrap=True)
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("form", "budget", "KV per token", "dims of a layer"):
        table.add_column(title)
    for offer in found["forms"]:
        if offer["refused"] is None:
            dims = ", ".join(f"{name} {value}" for name, value in offer["dims"].items())
            cells = (f"{offer['kv_budget']:.1%}", size(offer["kv_bytes_per_token"]), dims)
            table.add_row(offer["form"], *cells)
    console.print(table)
    console.print(ADVICE)
