"""Decoupled multi-head latent attention (2405.04434) on a GQA source.

A token caches a latent, and beside it one rotated key that all heads share. Letters as in
`latent_attention`, and r the latent's width.
"""

import torch
from torch import nn

from .latent_attention import LatentAttention
from .shared_key import FoldedKeyAttention


class MLAAttention(FoldedKeyAttention):
    """Position-free keys and values read from one latent, rotated components cached beside it.

    Row t of the cache is [latent | components turned by their position]. W_uk and W_uv
    (`kv_b_proj`) are held for the g KV heads of the source; query head h reads those of KV head
    h // (H / g). There is no norm on the latent, so a conversion of full rank is exact.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_lora_rank = config.layer_width("kv_lora_rank", layer_idx)
        add_latent(self, self.kv_lora_rank + self.qk_rope_head_dim)

    def readers(self):
        yield self.kv_b_proj

    def widths(self):
        return self.kv_lora_rank, self.kv_lora_rank + self.qk_rope_head_dim

    def rows(self, hidden_states):
        row = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        # The latent serves keys and values alike, so the cache's values stay empty.
        return row, row[..., :0]

    def position_free(self, keys, values):
        return formed(self, keys[..., : self.kv_lora_rank])

    def components(self, keys):
        return keys[..., self.kv_lora_rank :]

    def weights(self):
        return folded(self)

    def read(self, free, tail, keys, values, mask, rotation, normed):
        # The whole row is the value too: equal widths take the fused kernel, and the excess is cut.
        query = torch.cat((free, tail), dim=-1)
        mixed, weights = self._attend_as_rows(query, keys, keys, mask, normed=normed)
        return mixed[..., : self.kv_lora_rank], weights


def add_latent(attention: LatentAttention, width: int):
    """`kv_a_proj_with_mqa` to a cached row of that width, and `kv_b_proj` from its latent."""
    config, groups = attention.config, attention.config.num_key_value_heads
    rank, pair = attention.kv_lora_rank, attention.nope_head_dim + attention.v_head_dim
    attention.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, width, bias=config.kv_a_bias)
    attention.kv_b_proj = nn.Linear(rank, groups * pair, bias=config.kv_b_bias)


def formed(attention: LatentAttention, latent):
    """Position-free keys [B, S, g, N] and values [B, S, g, V] of latents [B, 1, S, r].

    `kv_b_proj` is called, not read, so adapters, quantised weights and gradients all count.
    """
    pair = attention.kv_b_proj(latent.squeeze(1))
    widths = [attention.nope_head_dim, attention.v_head_dim]
    return pair.unflatten(-1, (-1, sum(widths))).split(widths, dim=-1)


def folded(attention: LatentAttention):
    """W_uk [g, N, r], W_uv [g, V, r], and the bias of each or None, of `kv_b_proj`."""
    layer, widths = attention.kv_b_proj, [attention.nope_head_dim, attention.v_head_dim]
    w_uk, w_uv = layer.weight.unflatten(0, (-1, sum(widths))).split(widths, dim=1)
    if layer.bias is None:
        return w_uk, w_uv, None, None
    return w_uk, w_uv, *layer.bias.view(-1, sum(widths)).split(widths, dim=1)
