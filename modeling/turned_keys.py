"""Latent attention that caches rotated components of keys, and a latent of values.

Components of one frequency turn alike, so a mix of the KV heads' keys at that frequency is turned
by what turns each of them. A key is then a sum of cached components, read as they lie: none is
formed, and nothing is turned, for a score.

Letters as in `shared_key`, and r the width of the values' latent, P = E / 2 pairs of a head.
"""

import torch
from torch import nn
from transformers import initialization as init

from .key_norm import split_scales
from .mla import folded, formed
from .rope_slots import apart, side_by_side
from .rows import HALF
from .shared_key import SharedKeyAttention, conjugate, local, multiplied, read_values


class TurnedKeyAttention(SharedKeyAttention):
    """Keys that are their mean and a sum of rotated components, and values read from a latent.

    Pair f of KV head g's key is e^(i theta_f s) (mean_gf + sum_j s_gj z_j) for the token that is s
    tokens behind its sequence's first, j over the components of its frequency. The components are
    cached turned, the parts of each pair side by side, without what is constant in them; that
    stands in `k_mean` [g, E]. Positions given with a cache must be contiguous.
    """

    by_slot = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_lora_rank = config.layer_width("kv_lora_rank", layer_idx)
        groups, cached = config.num_key_value_heads, self.qk_rope_head_dim + self.kv_lora_rank
        self.k_mean = nn.Parameter(torch.zeros(groups, config.head_dim))
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, cached, bias=config.kv_a_bias)
        read = groups * self.v_head_dim
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, read, bias=config.kv_b_bias)

    def init_own(self):
        super().init_own()
        init.zeros_(self.k_mean)

    def make_pairs(self):
        # A key has nothing but its mean and its components, and the mean has all frequencies.
        return [], list(range(self.config.head_dim // 2))

    def readers(self):
        yield self.kv_b_proj

    def widths(self):
        return 0, self.kv_lora_rank

    def rows(self, hidden_states):
        row = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        return row.split([self.qk_rope_head_dim, self.kv_lora_rank], dim=-1)

    def turned_rows(self, x, rotation):
        return side_by_side(rotation.new_keys(apart(x), self.rope_index))

    def position_free(self, keys, values):
        return formed(self, values)

    def components(self, keys):
        return apart(keys)

    def unturned(self, keys, values):
        return self.spread(self.components(keys)) + local(self.k_mean)

    def whole_rows(self, keys, values):
        """Rows of keys and of values with the half step they lack, and what keys are scaled by."""
        values, scales = split_scales(values, self.config.key_scales)
        return keys + HALF, values + HALF, scales

    def expanded(self, query, keys, values, rotation):
        keys, values, scales = self.whole_rows(keys, values)
        _, value = (x.transpose(1, 2) for x in self.position_free(keys, values))
        mean = local(self.k_mean)[None, :, None].expand(-1, -1, keys.shape[2], -1)
        key = self.spread(self.components(keys)).transpose(1, 2) + rotation.keys(mean)
        return rotation.query(query), key if scales is None else key * scales[..., None], value

    def absorbed(self, query, keys, values, mask, rotation):
        values, scales = split_scales(values, self.config.key_scales)
        queries = side_by_side(self.component_query(query, rotation))
        scores = queries.flatten(1, 2) @ keys.squeeze(1).mT
        # The mean's part of a score is Re(conj(q) mean_g e^(i theta (s - t))): one product with the
        # table of all slots' angles.
        factors = conjugate(local(self.k_mean)).repeat_interleave(self.num_key_value_groups, 0)
        means = rotation.query(multiplied(query, factors))
        table = torch.cat(rotation.table(keys.shape[2], keys.device), dim=-1)
        scores = scores.view(*query.shape[:3], -1) + HALF * queries.sum(-1, keepdim=True)
        scores = scores + means @ table.to(means.dtype).mT
        scores = scores * self.scaling
        if scales is not None:
            scores = (
                scores * scales.repeat_interleave(query.shape[1] // scales.shape[1], 1)[:, :, None]
            )
        weights = self._softmax(scores, mask, query.dtype)
        mixed = self._mix(weights, values) + HALF
        _, w_uv, _, bias = folded(self)
        return read_values(mixed, w_uv, bias), weights
