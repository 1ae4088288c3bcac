"""RMSNorms of queries and keys, and what they leave of a key where keys are never formed.

With the norm's weight in what makes a key, a normalised key is one number times what is linear in
the layer's input: a number for each token and KV head, or one for all heads. It is cached.

Letters as in `shared_key`.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def add_norms(attention):
    """RMSNorms of queries and keys, where the family has them, of each head or of all."""
    config = attention.config
    if config.qk_norm:
        heads = (config.num_attention_heads, config.num_key_value_heads)
        widths = [config.head_dim * (count if config.norm_all_heads else 1) for count in heads]
        attention.q_norm, attention.k_norm = (
            LlamaRMSNorm(width, eps=config.rms_norm_eps) for width in widths
        )


def normalised(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """x [B, T, h, d], of each head or of all together, as wide as the norm is."""
    width = norm.weight.numel()
    return norm(x.flatten(2).unflatten(-1, (-1, width))).reshape(x.shape)


def key_scales(norm: LlamaRMSNorm, keys: torch.Tensor, all_heads: bool) -> torch.Tensor:
    """The inverse RMS of keys [B, T, g, E], the norm's weight in them.

    Returns:
        [B, 1, T, g], or one number for all heads.
    """
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    plain = wide / norm.weight.view(-1, keys.shape[-1])
    over = (-2, -1) if all_heads else (-1,)
    inverse = (plain.square().mean(over, keepdim=True) + norm.variance_epsilon).rsqrt()
    return inverse.flatten(2).unsqueeze(1).to(keys.dtype)


def split_scales(values, count: int):
    """Cached values without their last `count` dims, and those as [B, count, S]; None for none."""
    if not count:
        return values, None
    values, scales = values.split([values.shape[-1] - count, count], dim=-1)
    return values, scales.squeeze(1).mT


def scaled_scores(free, key_bias, scales) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from scores against cached keys to scores [B, H, T, S] against whole keys.

    A constant in a key adds the same to all scores of a query, which softmax would not see, but for
    the scales, and for a cap of the scores.

    Args:
        free: queries for position-free keys, times the scores' scaling, [B, g, H / g, T, N].
        key_bias: what is constant in position-free keys, [g, N], or None.
        scales: of the cached keys, [B, g or 1, S]; None where they are not normalised.
    """
    constant: Any = 0.0
    if key_bias is not None:
        constant = torch.einsum("bgmtn,gn->bgmt", free, key_bias)[..., None]

    def normed(scores):
        scores = scores.unflatten(1, free.shape[1:3]) + constant
        scores = scores if scales is None else scores * scales[:, :, None, None]
        return scores.flatten(1, 2)

    return normed
