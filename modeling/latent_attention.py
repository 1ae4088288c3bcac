"""Latent attention: a token leaves a latent in the cache, and heads read keys and values from it.

The skeleton that every layout shares. A layout says what is cached, and how a head's key and value
are read from it: in one product with the cache itself (absorbed), or formed for every token that is
cached (expanded).

B batch, T query tokens, S tokens in the cache, H query heads, g KV heads, E the source's head_dim,
V v_head_dim.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .converted_attention import NO_ROPE, ConvertedAttention
from .key_norm import normalised
from .rope_slots import Rotation, SlotAngles


class LatentAttention(ConvertedAttention, ABC):
    """Queries of the source's width over what a layout caches.

    A layout is a subclass with `cached`, `expanded`, `absorbed`, `absorbs` and `readers`.
    """

    # Keys are cached before their rotation, and turned by their slot when they are read.
    on_read = False
    # Keys are turned when they are cached, by their distance from the sequence's first token.
    by_slot = False
    # What reads a latent, in layouts that have one for keys and values.
    kv_lora_rank: int
    kv_a_proj_with_mqa: nn.Linear
    kv_b_proj: nn.Linear
    q_norm: LlamaRMSNorm
    k_norm: LlamaRMSNorm
    # The same of a key head and a value head, and the key head's position-free dims.
    mfa_head_dim: int
    free: int
    k_proj: nn.Linear
    k_b_proj: nn.Linear
    v_b_proj: nn.Linear

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.v_head_dim = self.head_dim = self.nope_head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.stored = config.layer_rows(layer_idx)

    def add_queries(self, width: int, q_lora_rank: int | None):
        """Projections of H queries of that width, through a low rank if one is given."""
        config, heads = self.config, self.config.num_attention_heads
        self.query_width = width
        if q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=config.q_bias)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(q_lora_rank, heads * width, bias=config.q_bias)

    def add_output(self, width: int):
        """The projection of H values of that width."""
        config = self.config
        heads = config.num_attention_heads
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=config.o_bias)

    def init_own(self):
        super().init_own()
        if self.config.qk_norm:  # some families begin their own norms at zero
            init.ones_(self.q_norm.weight)
            init.ones_(self.k_norm.weight)

    def queries(self, hidden_states):
        """Queries of all heads [B, H, T, E], before their rotation."""
        if hasattr(self, "q_proj"):
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_proj(hidden_states))
        query = query.unflatten(-1, (-1, self.query_width))
        if self.config.qk_norm:
            query = normalised(self.q_norm, query)
        return query.transpose(1, 2)

    @abstractmethod
    def cached(self, hidden_states, rotation):
        """The cache's rows for new tokens, as keys and values [B, 1, T, ...]."""

    @abstractmethod
    def expanded(self, query, keys, values, rotation):
        """Query [B, H, T, K], key [B, g, S, K] and value [B, g, S, V] for an attention function."""

    @abstractmethod
    def absorbed(self, query, keys, values, mask, rotation):
        """Attention [B, T, H, V] with every head's query against the cache itself, and weights."""

    @abstractmethod
    def absorbs(self, length: int, total: int) -> bool:
        """Whether absorbed attention of T query tokens over S cached ones is the cheaper."""

    def readers(self) -> Iterator[nn.Module]:
        """The linear layers that absorbed attention folds into queries and outputs."""
        yield from ()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, SlotAngles] = NO_ROPE,
        attention_mask: torch.Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's output [B, T, hidden], and the attention weights where they were made."""
        batch, length = hidden_states.shape[:2]
        cache = self._take_cache(cache, kwargs)
        query = self.queries(hidden_states)
        rotation = Rotation.at_positions(position_embeddings)
        slots = starts = None
        if cache is not None and (self.on_read or self.by_slot):
            # Before the update: a static cache's length is a tensor that it counts up in place.
            seen = cache.get_seq_length(self.layer_idx)
            slots = positions = torch.arange(length, device=hidden_states.device) + seen
            if self.by_slot:
                starts = self.stored.starts(cache, self.layer_idx, attention_mask, length)
                positions = slots if starts is None else slots - starts[:, None, None]
            rotation = Rotation.at_slots(position_embeddings, positions)
        elif self.by_slot:
            starts = self.stored.starts(None, self.layer_idx, attention_mask, length)
            positions = since_first(kwargs.get("position_ids"), starts, hidden_states)
            rotation = Rotation.at_slots(position_embeddings, positions, alone=True)
        keys, values = self.cached(hidden_states, rotation)
        if cache is None:
            keys, values = self.stored.alone(keys, values, attention_mask)
        else:
            keys, values = self.stored.update(
                cache, self.layer_idx, keys, values, attention_mask, kwargs
            )
            if self.on_read:
                slots = self._slots_in(keys, slots)
                rotation = Rotation.at_slots(position_embeddings, slots)
            elif self.by_slot and (starts is not None or self.sliding_window is not None):
                dropped = (slots - self._slots_in(keys, slots))[-1]
                first = dropped if starts is None else dropped - starts[:, None, None]
                rotation = rotation.beginning_at(first)
        if cache is not None and self._can_absorb(length, keys, attention_mask):
            output, weights = self.absorbed(query, keys, values, attention_mask, rotation)
        else:
            query, key, value = self.expanded(query, keys, values, rotation)
            output, weights = self._attend(
                query, key, value, attention_mask, self.scaling, **kwargs
            )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _can_absorb(self, length: int, keys: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether what reads the latent may, and should, be folded into queries and outputs."""
        return (
            self._heads_may_be_rows(length, mask)
            and all(_is_plain(layer, keys) for layer in self.readers())
            and self.absorbs(length, keys.shape[2])
        )


def since_first(positions, starts, hidden_states):
    """Positions [B, 1, T] counted from that of each sequence's first token.

    Args:
        positions: position ids, [B or 1, T]; None for 0 to T - 1.
        starts: the index of the first token, [B]; None where there is no padding.
        hidden_states: of the same tokens, [B, T, hidden].
    """
    batch, length = hidden_states.shape[:2]
    if positions is None:
        positions = torch.arange(length, device=hidden_states.device)[None]
    if starts is None:
        first = positions[:, :1]
    else:  # a row may be all padding
        first = positions.expand(batch, -1).gather(1, starts.clamp_max(length - 1)[:, None])
    return (positions - first)[:, None]


def _is_plain(layer: nn.Module, cached: torch.Tensor) -> bool:
    """Whether layer(x) is a product with the layer's weight, in the cache's dtype.

    It is not with an adapter, a quantised, sharded or offloaded weight, autocast or a hook.
    """
    weight = layer.weight if type(layer) is nn.Linear else None
    if type(weight) is not nn.Parameter or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return (weight.dtype, weight.device) == (cached.dtype, cached.device)
