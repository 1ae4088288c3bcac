"""What a model's cache is, and what it could be, from its config alone."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from .errors import InputError
from .families import family_of
from .recipe import Recipe
from .targets import TARGETS, Target, target_of

SHARES = (0.75, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Offer:
    """What a conversion to a form would cache.

    Args:
        kv_budget: the share of the source's cache it keeps; where it is refused, that was asked.
        dims: of a layer of mean width, by the config's names.
        kv_bytes_per_token: over all layers.
        refused: why it cannot be had, in one line; dims and bytes are then None.
    """

    form: str
    kv_budget: float
    dims: dict[str, int] | None = None
    kv_bytes_per_token: int | None = None
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


def offers(config: PretrainedConfig) -> list[Offer]:
    """Every form at every share; of a model that cannot be converted none.

    Raises:
        InputError: no form is to be had, and why.
    """
    family = family_of(config)
    itemsize = (config.dtype or torch.float32).itemsize
    found = []
    for form in TARGETS:
        # The one kind of RoPE that keys which are normalised can have.
        rope = "on-read" if family.qk_norm and form == "mla" else "decoupled"
        for share in SHARES:
            try:
                target = target_of(config, _recipe(form, share, rope))
            except InputError as error:
                found.append(Offer(form, share, refused=str(error)))
                continue
            dims = _mean_dims(target)
            size = dims.width * config.num_hidden_layers * itemsize
            offer = Offer(form, dims.width / target.source, dims.named(), size)
            if offer not in found:  # of heads there are only so many
                found.append(offer)
    return found


def _recipe(form: str, share: float, rope: str) -> Recipe:
    return Recipe("", form, rope, share, calibration="", samples=0, heal=0, seed=0)


def _mean_dims(target: Target) -> Any:
    if target.fixed is not None:
        return target.fixed[0]
    return target.dims(target.width, sorted(target.splits)[len(target.splits) // 2])
