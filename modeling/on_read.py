"""Multi-head latent attention that caches a latent alone and turns its rotated key on read.

Letters as in `latent_attention`, and r the latent's width.
"""

import torch
from torch import nn
from transformers import initialization as init

from .mla import add_latent, folded, formed
from .read_kernel import kernel_read, kernel_serves
from .rope_slots import apart, key_pairs, side_by_side, turned_scores, with_turned
from .shared_key import FoldedKeyAttention


class KeyInLatentAttention(FoldedKeyAttention):
    """Everything read from one latent, whose last 2 n dims are the rotated components.

    They stand there unturned, the two parts of each pair side by side, without what is constant in
    them (`k_rope_bias`), and are turned by the token's slot when they are read. Positions given
    with a cache must then be contiguous.
    """

    on_read = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_lora_rank = config.layer_width("kv_lora_rank", layer_idx)
        add_latent(self, self.kv_lora_rank)
        # What is constant in the key has no place in a latent.
        self.k_rope_bias = nn.Parameter(torch.zeros(self.qk_rope_head_dim))

    def init_own(self):
        super().init_own()
        init.zeros_(self.k_rope_bias)

    def readers(self):
        yield self.kv_b_proj

    def widths(self):
        return self.kv_lora_rank, self.kv_lora_rank

    def rows(self, hidden_states):
        row = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        return row, row[..., :0]

    def position_free(self, keys, values):
        return formed(self, keys)

    def components(self, keys):
        return apart(key_pairs(self.k_rope_bias)(keys))

    def weights(self):
        return folded(self)

    def read(self, free, tail, keys, values, mask, rotation, normed):
        return read_turned(self, free, tail, keys, self.k_rope_bias, mask, rotation, normed)


def read_turned(attention, free, tail, latent, bias, mask, rotation, normed=None):
    """The mixture [B, H, T, r] of latents [B, 1, S, r], whose tail is turned on the way.

    `free` [B, H, T, r] reads the latent as it is, `tail` [B, H, T, 2 n] its last dims and `bias`
    [2 n] turned by their slot.
    """
    if not tail.shape[-1]:
        return attention._attend_as_rows(free, latent, latent, mask, normed=normed)
    pairs, index, scaling = key_pairs(bias), attention.rope_index, attention.scaling
    implementation = attention.config._attn_implementation
    plain = attention.softcap is None and normed is None
    if plain and kernel_serves(implementation, free):
        turning = (mask, index, rotation.angles, scaling)
        return kernel_read(free, tail, latent, bias, *turning), None
    tail, turned, key = side_by_side(tail), None, latent
    if attention._scores_apart(free):
        turned = turned_scores(tail, latent, pairs, index, rotation.angles, scaling)
    else:
        key = with_turned(latent, latent.shape[-1], pairs, index, rotation.angles)
        free = torch.cat((free, tail), dim=-1)
    # The whole row is the value too: equal widths take the fused kernel, and the excess is cut off.
    mixed, weights = attention._attend_as_rows(free, key, key, mask, turned, normed)
    return mixed[..., : latent.shape[-1]], weights
