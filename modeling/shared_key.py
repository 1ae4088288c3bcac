"""Latent attention whose heads share the rotated part of their keys.

Letters as in `latent_attention`, n rotated components, U their different frequencies, N
position-free dims of a key.
"""

from abc import abstractmethod

import torch
from torch import nn
from transformers import initialization as init

from .key_norm import add_norms, key_scales, scaled_scores, split_scales
from .latent_attention import LatentAttention


class SharedKeyAttention(LatentAttention):
    """Keys that are position-free but for n rotated components, which all heads share.

    Pair f of KV head g's key is rest_gf + sum_j s_gj z_j, j over the components of its frequency.
    `q_phase` [H, N] has the complex factor mu_hf of every head's pairs where they meet the rest,
    and `k_synthesis` [g, 2 n] the s_gj, both real parts then imaginary parts. A pair of which every
    KV head's component is rotated has no rest: N is twice the number of the others.

    With `qk_norm` a key is this, its norm's weight in it, times a number of the token and the KV
    head (or of all), which is cached as the tail of the values.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.add_queries(config.head_dim, config.query_rank(layer_idx))
        # Not saved, like rope_index: the pairs with a rest, and those with rotated components.
        self.resting, self.turned = (
            nn.Buffer(torch.tensor(pairs, dtype=torch.long), persistent=False)
            for pairs in self.make_pairs()
        )
        self.nope_head_dim = 2 * len(self.resting)
        if self.nope_head_dim:
            self.q_phase = nn.Parameter(torch.zeros(heads, self.nope_head_dim))
        if self.qk_rope_head_dim:
            self.k_synthesis = nn.Parameter(torch.zeros(groups, self.qk_rope_head_dim))
        add_norms(self)
        self.add_output(self.v_head_dim)

    def init_own(self):
        super().init_own()
        for buffer, pairs in zip((self.resting, self.turned), self.make_pairs(), strict=True):
            init.copy_(buffer, torch.tensor(pairs, dtype=torch.long))
        for name in ("q_phase", "k_synthesis"):
            if hasattr(self, name):
                factors = getattr(self, name)
                real, imag = torch.ones_like(factors).chunk(2, dim=-1)
                init.copy_(factors, torch.cat((real, 0 * imag), dim=-1))

    def make_pairs(self) -> tuple[list[int], list[int]]:
        """The pairs of a head that have a rest, and the different ones that are rotated."""
        turned = sorted(set(self.config.layer_rope_pairs(self.layer_idx)))
        return self.config.layer_resting_pairs(self.layer_idx), turned

    @abstractmethod
    def rows(self, hidden_states):
        """The cache's rows for new tokens before rotation, keys and values [B, 1, T, ...]."""

    @abstractmethod
    def position_free(self, keys, values):
        """Position-free keys [B, S, g, N] and values [B, S, g, V], from cached rows."""

    @abstractmethod
    def components(self, keys):
        """The rotated components of what is cached, [B, 1, S, 2 n], turned if they are cached so.

        Real parts, then imaginary parts.
        """

    def component_query(self, query, rotation):
        """Queries [B, H, T, 2 n] for the rotated components, turned."""
        pairs = query.unflatten(-1, (2, -1)).index_select(-1, self.rope_index).flatten(-2)
        factors = conjugate(local(self.k_synthesis)).repeat_interleave(self.num_key_value_groups, 0)
        return rotation.query(multiplied(pairs, factors), self.rope_index)

    def free_query(self, query):
        """Queries [B, H, T, N] for what rests of keys."""
        if not self.nope_head_dim:
            return query[..., :0]
        pairs = query.unflatten(-1, (2, -1)).index_select(-1, self.resting)
        return multiplied(pairs.flatten(-2), local(self.q_phase))

    def cached(self, hidden_states, rotation):
        keys, values = self.rows(hidden_states)
        if self.config.qk_norm:  # before components are turned: their weights differ in a pair
            scales = key_scales(
                self.k_norm, self.unturned(keys, values), self.config.norm_all_heads
            )
            values = torch.cat((values, scales), dim=-1)
        return keys if self.on_read else self.turned_rows(keys, rotation), values

    def unturned(self, keys, values):
        """Keys [B, T, g, E] of new tokens before their rotation, of rows that are not turned."""
        free, _ = self.position_free(keys, values)
        whole, half = free.new_zeros(*free.shape[:-1], self.head_dim), self.head_dim // 2
        whole = whole.index_copy(-1, torch.cat((self.resting, half + self.resting)), free)
        if not self.qk_rope_head_dim:
            return whole
        turned = torch.cat((self.turned, half + self.turned))
        return whole.index_add(-1, turned, self.spread(self.components(keys)))

    def expanded(self, query, keys, values, rotation):
        values, scales = split_scales(values, self.config.key_scales)
        key, value = (x.transpose(1, 2) for x in self.position_free(keys, values))
        free = self.free_query(query)
        if self.qk_rope_head_dim:
            free, key = self._with_turned(query, free, keys, key, rotation)
        return free, key if scales is None else key * scales[..., None], value

    def _with_turned(self, query, free, keys, key, rotation):
        """Queries and keys with their turned parts behind the position-free ones."""
        pairs = query.unflatten(-1, (2, -1)).index_select(-1, self.turned).flatten(-2)
        shared = self.components(keys)
        if self.on_read:
            shared = rotation.keys(shared, self.rope_index)
        turned, spread = rotation.query(pairs, self.turned), self.spread(shared).transpose(1, 2)
        return torch.cat((free, turned), dim=-1), torch.cat((key, spread), dim=-1)

    def absorbs(self, length: int, total: int) -> bool:
        # Multiply-adds of both ways. Absorbed, a score and a value cost a cached row for each head,
        # and the folds W_uk and W_uv for each query; expanded, W_uk and W_uv for each cached token
        # and KV head, but a score and a value only the head's width.
        groups = self.config.num_key_value_heads
        queries = length * self.config.num_attention_heads
        w_uk, w_uv = self.widths()
        rotated, turned = self.qk_rope_head_dim, 2 * len(self.turned)
        forming = self.nope_head_dim * w_uk + self.v_head_dim * w_uv
        width = max(self.nope_head_dim + turned, self.v_head_dim)
        expanded = total * groups * (forming + rotated * turned) + queries * total * 2 * width
        return queries * (forming + total * (w_uk + w_uv + rotated)) < expanded

    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """How many cached numbers W_uk and W_uv read."""

    def spread(self, shared):
        """Rotated components [B, 1, S, 2 n] summed into each KV head's key, [B, S, g, 2 U]."""
        rows = spreading(local(self.k_synthesis), self.rope_index, self.turned)
        spread = nn.functional.linear(shared.squeeze(1), rows)
        return spread.unflatten(-1, (-1, 2 * len(self.turned)))


class FoldedKeyAttention(SharedKeyAttention):
    """Attention whose absorbed queries have the map of position-free keys folded into them."""

    @abstractmethod
    def weights(self):
        """W_uk [g, N, k] of position-free keys and W_uv [g, V, r] of values, from what is cached.

        And the bias of each, [g, N] and [g, V], or None.
        """

    @abstractmethod
    def read(self, free, tail, keys, values, mask, rotation, normed):
        """The mixture [B, H, T, r] of cached rows by absorbed queries, and weights.

        `free` [B, H, T, k] reads what W_uk reads, `tail` [B, H, T, 2 n] is turned and reads the
        components. `normed` makes of scores what they are with normalised keys; None without.
        """

    def absorbed(self, query, keys, values, mask, rotation):
        w_uk, w_uv, key_bias, bias = self.weights()
        groups = len(w_uk)
        values, scales = split_scales(values, self.config.key_scales)
        # (W_uk c) . q = c . (W_uk' q), and sum_s a_s W_uv c_s = W_uv sum_s a_s c_s: heads share one
        # key and one value, the cached row, and nothing as large as the cache is formed or copied.
        free = self.free_query(query).unflatten(1, (groups, -1))
        normed = None
        if scales is not None or (key_bias is not None and self.softcap is not None):
            normed = scaled_scores(free * self.scaling, key_bias, scales)
        free = torch.einsum("bgmtn,gnr->bgmtr", free, w_uk).flatten(1, 2)
        tail = query[..., :0]
        if self.qk_rope_head_dim:
            tail = self.component_query(query, rotation)
        mixed, weights = self.read(free, tail, keys, values, mask, rotation, normed)
        return read_values(mixed, w_uv, bias), weights


def read_values(mixed, w_uv, bias):
    """Values [B, T, H, V], read from mixtures [B, H, T, r] of cached rows.

    Args:
        w_uv, bias: of every KV head, [g, V, r], and [g, V] or None.
    """
    output = torch.einsum("bgmtr,gvr->btgmv", mixed.unflatten(1, (len(w_uv), -1)), w_uv)
    return (output if bias is None else output + bias[:, None]).flatten(2, 3)


def spreading(synthesis, index, turned):
    """The map [g * 2 U, 2 n] from components of the pairs `index` to the keys' pairs `turned`."""
    of_pair = turned[:, None] == index  # [U, n]
    real, imag = (part[:, None] * of_pair for part in synthesis.chunk(2, dim=-1))
    rows = torch.cat((torch.cat((real, -imag), 2), torch.cat((imag, real), 2)), dim=1)
    return rows.flatten(0, 1)


def multiplied(x, factors):
    """Pairs of x [B, H, T, 2 m] times complex factors [H, 2 m], real parts then imaginary parts."""
    (a, b), (c, d) = x.chunk(2, dim=-1), factors[:, None].chunk(2, dim=-1)
    return torch.cat((a * c - b * d, a * d + b * c), dim=-1)


def conjugate(factors):
    """Complex factors [..., 2 m], real parts then imaginary parts, conjugated."""
    real, imag = factors.chunk(2, dim=-1)
    return torch.cat((real, -imag), dim=-1)


def local(parameter: torch.Tensor) -> torch.Tensor:
    """This process' part of a parameter that tensor parallelism has split by heads."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
