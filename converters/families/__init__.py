"""Families as data: how a model type's checkpoint names its attention.

Adding one is a row here when its attention is Llama's in other names, a file beside this one when
it is not. A model type that is not listed is refused; there is no fallback.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from torch import Tensor
from transformers import PretrainedConfig

from ..errors import InputError
from ..maps import AttentionMaps


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its attention, and what it cannot be converted with.

    Args:
        model_type: the `model_type` of its config.json.
        layers: path of the list of decoder layers, in the model and in tensor names.
        attention: path of the attention module in a layer.
        q, k, v, o: names of the projections in it.
        refuse: for a config, the reason why it cannot be converted, or None.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    refuse: Callable[[PretrainedConfig], str | None] = field(default=lambda config: None)

    def prefix(self, layer: int) -> str:
        """What the names of a layer's attention tensors start with."""
        return f"{self.layers}.{layer}.{self.attention}."

    def read(
        self,
        config: PretrainedConfig,
        tensors: Mapping[str, Tensor],
        inv_freq: Tensor,
        attention_factor: float,
    ) -> AttentionMaps:
        """The maps of a layer, in float64.

        Args:
            tensors: the layer's attention tensors, by their names without the prefix.
            inv_freq: [head_dim / 2], radians per position.
            attention_factor: what the rotary embedding multiplies cos and sin with.

        Raises:
            InputError: a tensor is left over, so the layer is not what this family describes.
        """
        left = {name: tensor.double() for name, tensor in tensors.items()}
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        maps = {}
        for role, name, count in (
            ("q", self.q, heads),
            ("k", self.k, groups),
            ("v", self.v, groups),
        ):
            maps[role] = left.pop(f"{name}.weight").unflatten(0, (count, -1))
            bias = left.pop(f"{name}.bias", None)
            maps[f"{role}_bias"] = None if bias is None else bias.unflatten(0, (count, -1))
        maps["o"] = left.pop(f"{self.o}.weight").unflatten(1, (heads, -1))
        maps["o_bias"] = left.pop(f"{self.o}.bias", None)
        if left:
            raise InputError(
                f"{config.model_type} layers hold {sorted(left)[0]}, which this conversion does "
                "not know. Nothing is dropped silently, so nothing is converted."
            )
        scaling = maps["q"].shape[1] ** -0.5 * attention_factor**2
        return AttentionMaps(**maps, inv_freq=inv_freq.double(), scaling=scaling)


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
    if reason:
        raise InputError(f"this {model_type} model {reason}, which cannot be converted.")
    return family
