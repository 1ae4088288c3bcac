"""What a model's cache is, and what it could be, from its config alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from .coded import CodedDims
from .errors import InputError
from .families import FAMILIES, family_of
from .recipe import LayerReport, Recipe
from .targets import ROPES, TARGETS, Dims, MFATarget, Target, target_of

SHARES = (0.75, 0.5, 0.25, 0.125)
OFFERED_BITS = ("16", "auto")


def pays_from_tokens(
    source: int, converted: int, kv_bytes: dict[str, int], itemsize: int
) -> int | None:
    """The cached tokens from which on a conversion takes no more memory; None if it never does.

    It is 0 for one that takes no more at any context.

    Args:
        source, converted: parameters of the attention.
        kv_bytes: per token, "source" and "converted".
        itemsize: bytes of a parameter.
    """
    saved = kv_bytes["source"] - kv_bytes["converted"]
    added = (converted - source) * itemsize
    if saved < 0 or (saved == 0 and added > 0):
        return None
    return 0 if added <= 0 else -(-added // saved)


def attention_parameters(config: PretrainedConfig) -> int:
    """Parameters of the attention of the model that a config describes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    # What the families call the attention of a layer: "attn" in GPT-2, "self_attn" in most.
    calls = {f".{family.attention}." for family in FAMILIES.values()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(size for name, size in sizes.items() if any(call in name for call in calls))


@dataclass(frozen=True)
class Offer:
    """What a conversion to a form would cache.

    Args:
        kv_budget: the share of the source's cache it keeps; where it is refused, that was asked.
        kv_bits: of a cached number, as `convert` takes them. With "auto" dims are about what they
            would be: which number has how many bits is known after calibration alone.
        dims: of a layer of mean width, by the config's names.
        kv_bytes_per_token: over all layers.
        config: of such a model, all its layers with these dims.
        exact: nothing is lost: the converted model computes what the source does.
        refused: why it cannot be had, in one line; the rest is then None.
    """

    form: str
    kv_budget: float
    rope: str = "decoupled"
    kv_bits: str = "16"
    dims: dict[str, int] | None = None
    kv_bytes_per_token: int | None = None
    config: PretrainedConfig | None = None
    exact: bool = False
    refused: str | None = None


def describe(config: PretrainedConfig) -> dict[str, Any]:
    """The attention a config describes: its form, its dims, and how it was converted."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    recipe = getattr(config, "conversion", None)
    plain = "mha" if groups == heads else "mqa" if groups == 1 else "gqa"
    return {
        "model_type": config.model_type,
        "form": recipe["form"] if recipe else plain,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "conversion": recipe,
    }


def offers(config: PretrainedConfig, shares: Sequence[float] = SHARES) -> list[Offer]:
    """Every form at every share; of a model that cannot be converted none.

    Raises:
        InputError: no form is to be had, and why.
    """
    family_of(config)
    found: list[Offer] = []
    seen = set()
    ways = [
        (form, rope, bits)
        for form in TARGETS
        for rope in (ROPES if form == "mla" else ROPES[:1])
        for bits in (OFFERED_BITS if form == "mla" else OFFERED_BITS[:1])
    ]
    for way in ways:
        for share in shares:
            offer = _offer(config, *way, share)
            key = (*way, offer.refused or offer.kv_budget)
            if key not in seen:  # of heads there are only so many, and of bits
                found.append(offer)
            seen.add(key)
    return found


def _offer(config: PretrainedConfig, form: str, rope: str, bits: str, share: float) -> Offer:
    recipe = Recipe("", form, rope, share, "", samples=0, heal=0, seed=0, kv_bits=bits)
    try:
        target = target_of(config, recipe)
    except InputError as error:
        return Offer(form, share, rope, bits, refused=str(error))
    dims = _mean_dims(target)
    named = dims.named()
    size = config.num_hidden_layers * dims.bytes((config.dtype or torch.float32).itemsize)
    share = dims.width / target.source
    converted = config_of_dims(target, [dims] * config.num_hidden_layers)
    return Offer(form, share, rope, bits, named, math.ceil(size), converted, exact=target.exact)


def _mean_dims(target: Target) -> Any:
    if target.fixed is not None:
        return target.fixed[0]
    return target.dims(target.width, sorted(target.splits)[(len(target.splits) - 1) // 2])


def code_of(dims: Dims) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Counts of the keys' code and of the values' code; None where the cache is not coded."""
    return dims.codes if isinstance(dims, CodedDims) else None


def config_of_dims(target: Target, layers: Sequence[Dims]) -> PretrainedConfig:
    """The config of a model of which only each layer's dims are known, with pairs made up."""
    source, reports = target.config, []
    for layer, dim in enumerate(layers):
        dims = dim.named()
        if isinstance(target, MFATarget):
            dims = {"share_q_dim": 0} | dims
        count = dims.get("qk_rope_head_dim", 0) // 2
        pairs = tuple(index % (target.head_dim // 2) for index in range(count))
        reports.append(LayerReport(layer, dims, pairs, code=code_of(dim)))
    fields = {k: v for k, v in source.to_dict().items() if k not in ("model_type", "architectures")}
    return target.config_of(reports, fields)
