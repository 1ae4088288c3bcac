"""How a layer's rows go into a cache, and what attention then reads of them.

A row is what a layout caches of a token: keys and values [B, 1, T, ...]. B batch, T new tokens, S
tokens in the cache.
"""

from typing import Any

import torch

from .coded_cache import coded_layer
from .coding import Code, first_real

# What the whole number of a step is below the step's middle.
HALF = 0.5


class PlainRows:
    """Rows that are cached as they are."""

    def alone(self, keys, values, mask):
        """Keys and values as attention reads them without a cache."""
        return keys, values

    def update(self, cache, layer_idx: int, keys, values, mask, kwargs: dict[str, Any]):
        """Keys and values [B, 1, S, ...] of all cached tokens, new ones among them."""
        return cache.update(keys, values, layer_idx, kwargs=kwargs)


class CodedRows:
    """Rows that are cached as codes, but for each sequence's first tokens.

    What is read is the same with a cache and without one: every row by its code, also in the
    forward pass that made it.

    Args:
        keys, values: the codes of both. What values have beyond theirs is cached as it is.
        exact: how many first tokens of a sequence are kept whole. Their keys and values are like
            no others', and all later tokens read them (attention sinks, 2309.17453).
        halves: whether half a step is missing from what is read. Who reads it by a linear map adds
            that to what comes of it, which is smaller.
    """

    def __init__(self, keys: Code, values: Code, exact: int, halves: bool = False):
        self.keys, self.values, self.exact = keys, values, exact
        self.missing = HALF if halves else 0.0

    def alone(self, keys, values, mask):
        rows, rest = self._rows(keys, values)
        starts = self.starts(None, 0, mask, rows.shape[1])
        keys, values = self._read_back(rows, 0, starts)
        return keys, torch.cat((values, rest), dim=-1) if rest.shape[-1] else values

    def starts(self, cache, layer_idx: int, mask, length: int) -> torch.Tensor | None:
        """The slot of each sequence's first token, after its padding, [B]; None for no padding.

        The `length` new tokens are not in the cache yet. A sequence of which there was nothing but
        padding so far begins among them or behind them.
        """
        if cache is None:
            return first_real(mask, length)
        layer, seen = coded_layer(cache, layer_idx), cache.get_seq_length(layer_idx)
        if layer.first is None:
            return first_real(mask, length)
        if layer.starts is None:
            return None
        found = first_real(mask, length, seen - cache.get_mask_sizes(length, layer_idx)[1])
        if found is None:
            return layer.starts
        return torch.where(layer.starts < seen, layer.starts, seen + found)

    def update(self, cache, layer_idx, keys, values, mask, kwargs):
        rows, rest = self._rows(keys, values)
        layer = coded_layer(cache, layer_idx)
        seen, length = cache.get_seq_length(layer_idx), rows.shape[1]
        if isinstance(seen, torch.Tensor):
            seen = seen.clone()  # a static cache counts it up in place
        starts = self.starts(cache, layer_idx, mask, length)
        layer.keep_first(rows.detach() - self.missing, seen, self.exact, starts)
        packed = torch.cat([code.packed(part) for code, part in self._each(rows)], dim=-1)
        codes, rest = cache.update(packed.unsqueeze(1), rest, layer_idx, kwargs=kwargs)
        read: list[torch.Tensor] = []
        channel = 0
        for code, part in self._each(codes.squeeze(1), of_bytes=True):
            part = code.widened(part, rows.dtype)
            if not self.missing:
                part = part.add_(HALF)
            layer.put_first(part, channel, seen + length)
            channel += code.channels
            read.append(part.unsqueeze(1))
        if rows.requires_grad:  # the new tokens' own take part in the gradient
            # Where they lie: a static cache has room behind them, a sliding one has dropped some.
            last = torch.arange(length, device=rows.device) + read[0].shape[2] - length
            slots = torch.minimum(torch.arange(length, device=rows.device) + seen, last)
            new = self._read_back(rows, seen, starts)
            read = [part.index_copy(2, slots, own) for part, own in zip(read, new, strict=True)]
        return read[0], torch.cat((read[1], rest), dim=-1) if rest.shape[-1] else read[1]

    def _rows(self, keys, values):
        """Rows [B, T, c], and what is not coded of values."""
        coded, rest = values.split(
            [self.values.channels, values.shape[-1] - self.values.channels], dim=-1
        )
        return torch.cat((keys, coded), dim=-1).squeeze(1), rest

    def _read_back(self, rows, seen, starts):
        """Keys and values [B, 1, T, ...] as they are read of rows [B, T, c] after `seen` others."""
        read = torch.cat([code.rounded(part) for code, part in self._each(rows)], dim=-1)
        since = torch.arange(rows.shape[1], device=rows.device) + seen
        if starts is not None:
            since = since - starts[:, None]
        whole = (since >= 0) & (since < self.exact)
        read = torch.where(whole[..., None], rows, read) - self.missing
        return read.unsqueeze(1).split([self.keys.channels, self.values.channels], dim=-1)

    def _each(self, rows, of_bytes: bool = False):
        """Both codes with their part of rows [..., c], or of their codes [..., bytes]."""
        codes = self.keys, self.values
        widths = [code.bytes if of_bytes else code.channels for code in codes]
        return zip(codes, rows.split(widths, dim=-1), strict=True)
