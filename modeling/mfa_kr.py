"""MFA with key reuse (MFA-KR, 2412.19255): values are read from the cached key head too.

Letters as in `mfa`.
"""

import torch
from torch import nn

from .latent_attention import LatentAttention
from .mfa import MFARowsAttention, add_key_head, head_readers, head_weights, read_heads
from .on_read import read_turned
from .rope_slots import apart
from .shared_key import FoldedKeyAttention


class MFAKRAttention(FoldedKeyAttention):
    """On-read latent attention whose position-free keys read the first F dims of the latent.

    The latent is the key head before its rotation: [position-free | components, the two parts of
    each pair side by side]. It is turned by the token's slot when it is read. Positions given with
    a cache must then be contiguous.
    """

    on_read = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mfa_head_dim = config.layer_width("mfa_head_dim", layer_idx)
        self.free = self.mfa_head_dim - self.qk_rope_head_dim
        add_key_head(self)

    def readers(self):
        return head_readers(self)

    def widths(self):
        return self.mfa_head_dim, self.mfa_head_dim

    def rows(self, hidden_states):
        key = self.k_proj(hidden_states).unsqueeze(1)
        return key, key[..., :0]

    def position_free(self, keys, values):
        return read_heads(self, keys, keys)

    def components(self, keys):
        return apart(keys[..., self.free :])

    def weights(self):
        return head_weights(self)

    def read(self, free, tail, keys, values, mask, rotation, normed):
        return read_key_head(self, free, tail, keys, mask, rotation, normed)


class MFAKRRowsAttention(MFARowsAttention):
    """MFA-KR with a query and an output of width C for every head; the key head is the value."""

    on_read = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.v_proj

    def cached(self, hidden_states, rotation):
        key = self.k_proj(hidden_states).unsqueeze(1)
        return key, key[..., :0]

    def expanded(self, query, keys, values, rotation):
        if not self.qk_rope_head_dim:
            return query, keys, keys
        free = self.mfa_head_dim - self.qk_rope_head_dim
        tail = rotation.keys(apart(keys[..., free:]), self.rope_index)
        key = torch.cat((keys[..., :free], tail), dim=-1)
        return self.turned_query(query, rotation), key, keys

    def absorbed(self, query, keys, values, mask, rotation):
        free = self.mfa_head_dim - self.qk_rope_head_dim
        query = self.turned_query(query, rotation)
        mixed, weights = read_key_head(
            self, query[..., :free], query[..., free:], keys, mask, rotation
        )
        return mixed.transpose(1, 2), weights


def read_key_head(attention: LatentAttention, free, tail, keys, mask, rotation, normed=None):
    """The mixture [B, H, T, C] of key heads [B, 1, S, C] by queries for their two parts."""
    free = nn.functional.pad(free, (0, tail.shape[-1]))  # no key is read from the components
    bias = free.new_zeros(tail.shape[-1])
    return read_turned(attention, free, tail, keys, bias, mask, rotation, normed)
