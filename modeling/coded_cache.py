"""Layers of transformers' caches that hold coded rows.

The codes are a layer's keys and the numbers that are not coded its values, so that all that a cache
does with tokens, such as to crop, to reorder and to offload, it does with these. Beside them are
the rows of each sequence's first tokens, which are kept whole.

B batch, T new tokens, S tokens in the cache, K tokens that are kept whole, c channels of a row.
"""

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

# A buffer that is full grows by this share of what it holds, and by so many tokens at least.
GROWTH, LEAST_GROWTH = 8, 64


class FirstTokens(CacheLayerMixin):
    """What a cache layer of coded rows has beside its codes: the first tokens' rows.

    `starts` [B] has the slot of each sequence's first token, after its padding; None where all
    begin at slot 0. `first` [B, K, c] has the rows.
    """

    first: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    def keep_first(self, rows: torch.Tensor, seen, count: int, starts: torch.Tensor | None):
        """Keeps what is to be kept of new tokens' rows [B, T, c].

        Args:
            seen: tokens in the cache before them.
            count: K.
            starts: of the sequences.
        """
        self.starts = None if starts is None else starts.expand(len(rows))
        if self.first is None:
            self.first = rows.new_zeros(len(rows), count, rows.shape[-1])
        elif _is_frozen(self.first):
            self.first = self.first.clone()
        if isinstance(seen, int) and self.starts is None:
            new = rows[:, : max(0, count - seen)]
            self.first[:, seen : seen + new.shape[1]] = new
            return
        length = rows.shape[1]
        index = self._starts(rows) + torch.arange(count, device=rows.device) - seen
        taken = _taken(rows, index.clamp(0, length - 1))
        new = (index >= 0) & (index < length)
        self.first.copy_(torch.where(new[..., None], taken, self.first))

    def put_first(self, rows: torch.Tensor, channel: int, seen) -> None:
        """Puts the first tokens among rows [B, S, w] that were read from codes.

        Args:
            channel: the first of the rows' channels.
            seen: all tokens that were given to the cache, of which it may have dropped the first.
        """
        assert self.first is not None
        first = self.first[..., channel : channel + rows.shape[-1]]
        total, count = rows.shape[1], first.shape[1]
        if isinstance(seen, int) and self.starts is None:
            gone = max(0, seen - total)
            kept = first[:, gone : min(count, seen)]
            rows[:, : kept.shape[1]] = kept
            return
        # A window of slots that begins where the first token is, if that is there still.
        dropped = seen - total
        dropped = max(0, dropped) if isinstance(dropped, int) else dropped.clamp_min(0)
        begin = self._starts(rows) - dropped
        slots = begin.clamp(0, max(0, total - count))
        slots = slots + torch.arange(min(count, total), device=rows.device)
        number = slots - begin
        there = (number >= 0) & (number < count) & (slots + dropped < seen)
        kept = _taken(first, number.clamp(0, max(0, count - 1)))
        place = slots[..., None].expand(-1, -1, rows.shape[-1])
        rows.scatter_(1, place, torch.where(there[..., None], kept, rows.gather(1, place)))

    def _starts(self, rows: torch.Tensor) -> torch.Tensor:
        """[B, 1]"""
        if self.starts is None:
            return torch.zeros(len(rows), 1, dtype=torch.long, device=rows.device)
        return self.starts[:, None]

    def _select(self, batch: torch.Tensor):
        self.first = None if self.first is None else self.first[batch.to(self.first.device)]
        self.starts = None if self.starts is None else self.starts[batch.to(self.starts.device)]

    def reset(self):
        super().reset()
        self.first = self.starts = None

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(torch.as_tensor(indices))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        if self.first is not None:
            self._select(torch.arange(len(self.first)).repeat_interleave(repeats))


def _taken(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of rows [B, S, c] those of index [B, K]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def _is_frozen(held: torch.Tensor) -> bool:
    """Whether a tensor was made in inference mode, and cannot be written to now."""
    if torch.compiler.is_compiling():
        return False
    return held.is_inference() and not torch.is_inference_mode_enabled()


class CodedLayer(FirstTokens, DynamicLayer):
    """A growing cache of coded rows, which does not copy what it holds for every new token."""

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (x[:, :, :0] for x in (key_states, value_states))
            self._buffers = [self.keys, self.values]
        self.keys = self._grown(0, self.keys, key_states)
        self.values = self._grown(1, self.values, value_states)
        return self.keys, self.values

    def offload(self):
        super().offload()
        if self.is_initialized:
            self._buffers = [self.keys, self.values]  # else they would stay on the device

    def _grown(self, number: int, held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # a compiler cannot compare addresses
            return torch.cat((held, new), dim=2)
        length, total = held.shape[2], held.shape[2] + new.shape[2]
        buffer = self._buffers[number]
        # Other tensors were put in their place, by a choice of sequences or a move to the CPU.
        moved = held.data_ptr() != buffer.data_ptr() or held.shape[:2] != buffer.shape[:2]
        if moved or total > buffer.shape[2] or _is_frozen(buffer):
            room = total + max(LEAST_GROWTH, total // GROWTH)
            buffer = new.new_empty(*new.shape[:2], room, new.shape[3])
            buffer[:, :, :length] = held
            self._buffers[number] = buffer
        buffer[:, :, length:total] = new
        return buffer[:, :, :total]


class CodedSlidingLayer(FirstTokens, DynamicSlidingWindowLayer):
    """A cache of coded rows that keeps a window of them."""


class CodedStaticLayer(FirstTokens, StaticLayer):
    """A cache of coded rows of a fixed size."""

    values: torch.Tensor

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        if self.values.dtype != value_states.dtype:  # transformers 5.16 gives both that of keys
            self.values = self.values.to(value_states.dtype)
            torch._dynamo.mark_static_address(self.values)


class CodedStaticSlidingLayer(CodedStaticLayer, StaticSlidingWindowLayer):
    """A cache of coded rows of a fixed size that keeps a window of them."""


CODED: dict[type, type[FirstTokens]] = {
    DynamicLayer: CodedLayer,
    DynamicSlidingWindowLayer: CodedSlidingLayer,
    StaticLayer: CodedStaticLayer,
    StaticSlidingWindowLayer: CodedStaticSlidingLayer,
}


def coded_layer(cache: Cache, layer_idx: int) -> FirstTokens:
    """The cache's layer of that number, made one of coded rows while it is empty.

    Raises:
        ValueError: the cache is of a kind that cannot hold codes.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, FirstTokens):
        return layer
    kind = CODED.get(type(layer))
    if kind is None:
        raise ValueError(
            f"{type(cache).__name__} with a {type(layer).__name__} cannot hold what this model "
            "caches, which is coded already. Give a DynamicCache or a StaticCache, or none."
        )
    if layer.is_initialized:
        raise ValueError(
            f"This {type(cache).__name__} holds what another model cached, or room for it, and "
            "this model caches codes. Give an empty one, or none."
        )
    coded = kind.__new__(kind)
    coded.__dict__.update(layer.__dict__)
    cache.layers[layer_idx] = coded
    return coded
