"""Multi-matrix factorization attention (2412.19255): one wide key and one wide value for all heads.

Letters as in `latent_attention`, C the width of the key head and of the value head, F = C - 2 n.
"""

import torch
from torch import nn

from .latent_attention import LatentAttention
from .shared_key import FoldedKeyAttention, SharedKeyAttention


class MFAAttention(FoldedKeyAttention):
    """Decoupled latent attention whose keys and values have latents of their own.

    A token caches the key head [position-free | components turned by their position] and the value
    head. `k_b_proj` reads position-free keys of the g KV heads from the one, `v_b_proj` values from
    the other.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mfa_head_dim = config.layer_width("mfa_head_dim", layer_idx)
        self.free = self.mfa_head_dim - self.qk_rope_head_dim
        add_key_head(self)
        self.v_proj = nn.Linear(config.hidden_size, self.mfa_head_dim, bias=False)

    def readers(self):
        return head_readers(self)

    def widths(self):
        return self.free, self.mfa_head_dim

    def rows(self, hidden_states):
        return self.k_proj(hidden_states).unsqueeze(1), self.v_proj(hidden_states).unsqueeze(1)

    def position_free(self, keys, values):
        return read_heads(self, keys, values)

    def components(self, keys):
        return keys[..., self.free :]

    def weights(self):
        return head_weights(self)

    def read(self, free, tail, keys, values, mask, rotation, normed):
        query = torch.cat((free, tail), dim=-1)
        return self._attend_as_rows(query, keys, values, mask, normed=normed)


class MFARowsAttention(LatentAttention):
    """MFA with a query and an output of width C for every head.

    They are smaller than the source's where C is below the head's width. Queries and the key are
    [position-free | real parts | imaginary parts].
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.num_key_value_groups = config.num_attention_heads
        self.mfa_head_dim = config.layer_width("mfa_head_dim", layer_idx)
        self.add_queries(self.mfa_head_dim, config.query_rank(layer_idx))
        self.k_proj = nn.Linear(config.hidden_size, self.mfa_head_dim, bias=config.k_bias)
        self.v_proj = nn.Linear(config.hidden_size, self.mfa_head_dim, bias=False)
        self.add_output(self.mfa_head_dim)

    def cached(self, hidden_states, rotation):
        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        key, value = key.unsqueeze(1), value.unsqueeze(1)
        return self.turned_rows(key, rotation), value

    def turned_query(self, query, rotation):
        """Queries with their tail turned."""
        if not self.qk_rope_head_dim:
            return query
        free = self.mfa_head_dim - self.qk_rope_head_dim
        tail = rotation.query(query[..., free:], self.rope_index)
        return torch.cat((query[..., :free], tail), dim=-1)

    def expanded(self, query, keys, values, rotation):
        return self.turned_query(query, rotation), keys, values

    def absorbed(self, query, keys, values, mask, rotation):
        query = self.turned_query(query, rotation)
        mixed, weights = self._attend_as_rows(query, keys, values, mask)
        return mixed.transpose(1, 2), weights

    def absorbs(self, length: int, total: int) -> bool:
        # With more queries, the key's copies for each head are no larger than they are.
        return length * self.config.num_attention_heads < total


def add_key_head(attention: SharedKeyAttention):
    """`k_proj` to the key head, and what reads the g KV heads' keys and values."""
    config, groups = attention.config, attention.config.num_key_value_heads
    width = attention.mfa_head_dim
    attention.k_proj = nn.Linear(config.hidden_size, width, bias=config.k_bias)
    if attention.nope_head_dim:
        free, keys = attention.free, groups * attention.nope_head_dim
        # Elsewhere softmax does not see what is constant in a key.
        biased = config.qk_norm or config.softcap is not None
        attention.k_b_proj = nn.Linear(free, keys, bias=biased)
    attention.v_b_proj = nn.Linear(width, groups * attention.v_head_dim, bias=False)


def read_heads(attention: SharedKeyAttention, keys, values):
    """Position-free keys [B, S, g, N] and values [B, S, g, V] of one key and one value head."""
    value = attention.v_b_proj(values.squeeze(1)).unflatten(-1, (-1, attention.v_head_dim))
    if not attention.nope_head_dim:
        return value[..., :0], value
    key = attention.k_b_proj(keys[..., : attention.free].squeeze(1))
    return key.unflatten(-1, (-1, attention.nope_head_dim)), value


def head_readers(attention: SharedKeyAttention):
    """The linear layers from the cached heads to the KV heads' keys and values."""
    if attention.nope_head_dim:
        yield attention.k_b_proj
    yield attention.v_b_proj


def head_weights(attention: SharedKeyAttention):
    """W_uk [g, N, F], W_uv [g, V, C], and the bias of each or None."""
    w_uv = attention.v_b_proj.weight.unflatten(0, (-1, attention.v_head_dim))
    if not attention.nope_head_dim:
        return w_uv[:, :0, : attention.free], w_uv, None, None
    layer, width = attention.k_b_proj, attention.nope_head_dim
    bias = None if layer.bias is None else layer.bias.view(-1, width)
    return layer.weight.unflatten(0, (-1, width)), w_uv, bias, None
