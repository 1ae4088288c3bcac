"""`rehead inspect`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .console import print_json, results, size

if TYPE_CHECKING:
    from ..converters.inspection import Offer

CONTEXTS = (4096, 32768, 131072)
# Gigabytes of a GPU, and sequences at once, for which the longest context is told.
MEMORIES, BATCHES = (8, 24, 80), (1, 32)
WIDE = 140
LEGEND = (
    "[dim]in 24 GB: tokens a sequence beside the weights, one sequence / 32 at once. weights: "
    "attention's. pays: cached tokens of all sequences from which on weights and cache "
    "take less memory than now. FRH, SLSD, TER: rank of a head, of what keys are read from, "
    "and of all heads together (2412.19255). coded: --kv-bits auto; ~ is about, for only "
    "calibration tells how many bits each number gets.[/]"
)
ADVICE = (
    "When to take which: [bold]mla[/] decodes fast and has DeepSeek's layout, which engines know; "
    "[bold]mla --rope on-read[/] is nearest to the original at every size and takes a little more "
    "time; [bold]gqa[/] and [bold]mqa[/] stay the family's own class, which everything loads; "
    "[bold]mfa-kr[/] is nearer than mla at the same cache for more parameters; [bold]mfa[/] is the "
    "simplest to serve. [bold]coded[/] (mla --kv-bits auto) keeps most of the original in a small "
    "cache, and runs in transformers with rehead's classes alone."
)


def inspect(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A hub id, a folder, or a .gguf file.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show what MODEL's KV cache takes, how it was converted, and what it could be converted to.

    Reads the config alone: no weights are loaded.

    For example: [bold]rehead inspect HuggingFaceTB/SmolLM2-135M[/]
    """
    with results(as_json) as console:
        found = _inspect(model)
        if as_json:
            print_json(console, found)
        else:
            _show(console, found)


def _inspect(model: str) -> dict[str, Any]:
    import torch

    from ..converters import InputError
    from ..converters.inspection import describe, offers
    from ..evaluation import (
        cache_bytes_of_config,
        capacity,
        exact_bytes,
        load_config,
        parameter_counts,
    )

    config = load_config(model)
    found = {"model": model} | describe(config)
    found["kv_bytes_per_token"] = cache_bytes_of_config(config)
    total, attention = parameter_counts(config)
    itemsize = getattr(torch, found["dtype"]).itemsize
    found |= {
        "parameters": total,
        "attention_parameters": attention,
        "capacity": asdict(capacity(config)),
        "exact_bytes": exact_bytes(config),
        "contexts": _contexts(total * itemsize, found["kv_bytes_per_token"], exact_bytes(config)),
        "recommended": None,
        "refused": None,
        "forms": [],
    }
    try:
        found["forms"] = [_offer(offer, found, itemsize) for offer in offers(config)]
    except InputError as error:
        found["refused"] = str(error)
    if found["forms"]:
        found["recommended"] = _recommended(model, found)
    return found


def _offer(offer: "Offer", found: dict[str, Any], itemsize: int) -> dict[str, Any]:
    """An offer as JSON, with what its config says beside what was found of the source."""
    from ..converters.inspection import pays_from_tokens
    from ..evaluation import capacity, exact_bytes, parameter_counts

    fields = {k: v for k, v in vars(offer).items() if k != "config"}
    if offer.config is None or offer.kv_bytes_per_token is None:
        return fields
    attention, before = parameter_counts(offer.config)[1], found["attention_parameters"]
    rest = found["parameters"] - before
    kv_bytes = {"source": found["kv_bytes_per_token"], "converted": offer.kv_bytes_per_token}
    whole = exact_bytes(offer.config)
    return fields | {
        "exact_bytes": whole,
        "attention_parameters": attention,
        "pays_from_tokens": pays_from_tokens(before, attention, kv_bytes, itemsize),
        "capacity": asdict(capacity(offer.config)),
        "contexts": _contexts((rest + attention) * itemsize, offer.kv_bytes_per_token, whole),
    }


def _contexts(weights: int, per_token: int, exact: int) -> list[dict[str, int]]:
    """How many tokens' cache fits beside the weights, for every memory and batch.

    Args:
        exact: bytes of the first tokens of each sequence, where they are kept whole.
    """
    return [
        {
            "memory_gb": memory,
            "batch": batch,
            "tokens": max(0, int(memory * 1e9 - weights) // batch - exact) // per_token,
        }
        for memory in MEMORIES
        for batch in BATCHES
    ]


def _recommended(model: str, found: dict[str, Any]) -> str:
    ropes = {o["rope"] for o in found["forms"] if o["form"] == "mla" and not o["refused"]}
    rope = "" if "decoupled" in ropes else " --rope on-read"
    command = f"convert --to mla{rope} {model} --kv-bits auto --kv-budget"
    engines = "for engines, which read no codes, leave out --kv-bits"
    if found["num_key_value_heads"] == found["num_attention_heads"]:
        return f"{command} 25%  (a KV head for every query head has much to spare; {engines})"
    return (
        f"{command} 33%  (query heads share KV heads already, so there is less to spare; {engines} "
        "and keep 50%)"
    )


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
    # What a narrow terminal has no room for is left out whole.
    wide = console.width >= WIDE
    memories = MEMORIES if wide else MEMORIES[1:2]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("form")
    fits = [f"in {memory} GB" for memory in memories]
    for title in ("cache", "a token", *fits, "weights", "pays", "FRH", "SLSD", "TER"):
        table.add_column(title, justify="right")
    if wide:
        table.add_column("dims of a layer")
    now = found | {"form": f"now ({found['form']})", "kv_budget": 1.0, "rope": "", "dims": {}}
    now |= {"kv_bits": "16"}
    for offer in (now, *found["forms"]):
        if offer["refused"] is None:
            table.add_row(*_cells(offer, memories)[: len(table.columns)])
    console.print(table)
    console.print(LEGEND)
    console.print(ADVICE)
    console.print(f"Recommended: [bold]{found['recommended']}[/]", soft_wrap=True)


def _cells(offer: dict[str, Any], memories: Sequence[int]) -> list[str]:
    coded = offer["kv_bits"] != "16"
    on_read = offer["rope"] == "on-read"
    form = offer["form"] + (" on-read" if on_read else "")
    if coded:  # short enough for a terminal of 80 columns
        form = "on-read coded" if on_read else "mla coded"
    tokens = {(c["memory_gb"], c["batch"]): _short(c["tokens"]) for c in offer["contexts"]}
    fits = [" / ".join(tokens[memory, batch] for batch in BATCHES) for memory in memories]
    measures = [f"{offer['capacity'][name]:.0f}" for name in ("frh", "slsd", "ter")]
    dims = ", ".join(f"{name} {value}" for name, value in offer["dims"].items())
    dims = f"about {dims}" if coded else dims
    exact = " exact" if offer.get("exact") else ""
    share, each = f"{100 * offer['kv_budget']:.3g}%{exact}", size(offer["kv_bytes_per_token"])
    weights = ("~" if coded else "") + _short(offer["attention_parameters"])
    pays = offer.get("pays_from_tokens")
    pays = "" if offer["kv_budget"] == 1 else "never" if pays is None else _short(pays)
    return [form, share, each, *fits, weights, pays, *measures, dims]


def _short(number: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
