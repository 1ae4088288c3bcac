"""Families as data: how a model type's checkpoint names its attention, and what is refused, why.

Adding one is a row of `FAMILIES` where a `Family` can say what is special about it. A model type
that is not listed is refused; there is no fallback.
"""

from difflib import get_close_matches

from transformers import PretrainedConfig

from ..errors import InputError
from .family import Experts, Family, head_dim, kv_heads, partial_rotary_factor

__all__ = ["FAMILIES", "Experts", "Family", "family_of", "head_dim", "kv_heads"]


def _sliding_window(config: PretrainedConfig) -> str | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or []
    used = "sliding_attention" in kinds or (window is not None and not kinds)
    if used and window < config.max_position_embeddings:
        return f"attends through a sliding window of {window} tokens"
    return None


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("mistral", refuse=_sliding_window),
        Family("qwen2", refuse=_sliding_window),
    )
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a checkpoint's config.

    Raises:
        InputError: the model type is unknown, or the model uses what its conversion cannot carry.
    """
    model_type = config.model_type
    if model_type.startswith("rehead_"):
        raise InputError(f"this checkpoint is converted already ({model_type}). Give its source.")
    if model_type not in FAMILIES:
        near = get_close_matches(model_type, FAMILIES, n=1)
        hint = f" ({near[0]} is the nearest)" if near else ""
        raise InputError(
            f"model_type {model_type!r} is not supported{hint}. Supported: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    reason = family.refuse(config)
    if family.rotary == "whole" and partial_rotary_factor(config) != 1:
        reason = f"rotates a part of its heads ({partial_rotary_factor(config)})"
    if reason:
        raise InputError(f"this {model_type} model {reason}, which cannot be converted.")
    return family
