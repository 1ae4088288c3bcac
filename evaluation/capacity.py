"""What attention can express, by the measures of the MFA paper (2412.19255), and its parameters."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..converters.inspection import attention_parameters
from ..modeling.coding import Code


@dataclass(frozen=True)
class Capacity:
    """Means over the layers.

    A head scores two tokens by a bilinear form of their inputs. Rotation leaves its rank alone.

    Args:
        frh: factorisation rank per head, the most the form's rank can be.
        slsd: shared latent subspace dimension: of what keys are read from, whichever head reads.
        ter: total effective rank, the heads' ranks together.
    """

    frh: float
    slsd: float
    ter: float


def capacity(config: PretrainedConfig) -> Capacity:
    """The capacity of the attention that a config describes, of any form."""
    layers = [_layer(config, index) for index in range(config.num_hidden_layers)]
    frh, slsd = (sum(column) / len(layers) for column in zip(*layers, strict=True))
    return Capacity(frh, slsd, frh * config.num_attention_heads)


def _layer(config: PretrainedConfig, index: int) -> tuple[int, int]:
    def width(name: str) -> int:
        widths = getattr(config, f"{name}_per_layer", None)
        return getattr(config, name) if widths is None else widths[index]

    if hasattr(config, "mfa_head_dim"):
        cached, rank = width("mfa_head_dim"), width("share_q_dim")
        return min(config.head_dim, cached, rank or cached), cached
    if hasattr(config, "kv_lora_rank"):
        latent, rotated = width("kv_lora_rank"), width("qk_rope_head_dim")
        coded = getattr(config, "cache_codes", None)
        if coded is not None:  # less the channels of the first tokens alone
            latent -= Code(tuple(coded[index][1 if rotated else 0])).first
        if coded is not None and rotated:
            # Keys have nothing but rotated components, of the frequencies that were kept.
            rank = 2 * len(set(config.layer_rope_pairs(index)))
            return min(rank, config.q_lora_rank or rank), rotated
        cached = latent if getattr(config, "rope_on_read", False) else latent + rotated
        # Queries have the source's width, whatever they read; stock classes have rows of their own.
        head = getattr(config, "head_dim", None) if hasattr(config, "rope_on_read") else None
        rank = head or min(config.qk_nope_head_dim, latent) + rotated
        return min(rank, cached, config.q_lora_rank or rank), cached
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return head_dim, min(groups * head_dim, config.hidden_size)


def parameter_counts(config: PretrainedConfig) -> tuple[int, int]:
    """All parameters of the model a config describes, and those of its attention."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sum(parameter.numel() for parameter in model.parameters()), attention_parameters(config)
