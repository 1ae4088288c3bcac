"""A transform code of what is cached: a few bits a channel, dealt out by what a channel matters.

The maps that make a cached row and those that read it hold the transform, the centres and the
steps. A row is then in units of its channels' steps, and its code is the number of the step that
each channel is in: to code is to round and to clamp, to read is to widen an integer.

B batch, T tokens, c channels of a row.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# The bits that a channel can have, in the order of a row's channels. One of 0 bits is cached of a
# sequence's first tokens alone.
BITS = (8, 4, 2, 0)
# An additive mask's number that leaves no weight: they are from -1e4 to -inf.
NEGLIGIBLE = -1e3


@dataclass(frozen=True)
class Code:
    """How many of a row's channels have 8, 4, 2 and 0 bits.

    A channel of b bits has 2^b steps, half of them below zero, and is read as the middle of a step:
    ..., -1.5, -0.5, 0.5, 1.5, ... steps. One of 0 bits is read as zero: it is for tokens whose rows
    are kept whole.

    With n, 2 m and 4 k channels of 8, 4 and 2 bits a row takes n + m + k bytes. Its channels lie in
    the order in which they are read from whole stretches of bytes:

        n + m + k channels in the low bits of all bytes,
        m + k in the bits from the fourth on, of all bytes but the first n,
        k in the bits from the second on, and k from the sixth on, of the last k bytes,
        those of 0 bits, in none.
    """

    counts: tuple[int, ...]

    def __post_init__(self):
        whole = len(self.counts) == len(BITS) and all(
            count >= 0 and count * bits % 8 == 0
            for count, bits in zip(self.counts, BITS, strict=True)
        )
        if not whole:
            raise ValueError(
                f"a code with {list(self.counts)} channels of {list(BITS)} bits does not fill "
                "whole bytes. Give counts of 0 or more, even of 4 bits and a multiple of 4 of 2 "
                "bits."
            )

    @property
    def channels(self) -> int:
        """The channels of a row, c."""
        return sum(self.counts)

    @property
    def bytes(self) -> int:
        """The bytes that a row's code takes."""
        return sum(self._segments)

    @property
    def _segments(self) -> tuple[int, int, int]:
        """n, m, k."""
        wide, middle, narrow, _ = self.counts
        return wide, middle // 2, narrow // 4

    @property
    def coded(self) -> int:
        """The channels that have any bits: the row's first."""
        return self.channels - self.counts[-1]

    def bits(self) -> list[int]:
        """Every channel's, [c]."""
        n, m, k = self._segments
        return [8] * n + ([4] * m + [2] * k) * 2 + [2] * 2 * k + [0] * self.counts[-1]

    def places(self) -> list[int]:
        """Where in a row the channels lie that have most bits, and those that have fewer."""
        bits = self.bits()
        return sorted(range(len(bits)), key=lambda place: -bits[place])

    def rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., c] as they are read from their code.

        The gradient passes straight through (1308.3432), but for what is clamped.
        """
        none = torch.zeros_like(rows[..., self.coded :])
        rows = rows[..., : self.coded]
        most = self._half(rows) - 0.5
        within = torch.minimum(torch.maximum(rows, -most), most)
        # What is added is 0: the middle of a step is exact in any dtype, as it is when it is read.
        read = within.floor().detach() + 0.5 + (within - within.detach())
        return torch.cat((read, none), dim=-1) if self.counts[-1] else read

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        """The code, uint8 [..., bytes], of rows [..., c]."""
        rows = rows[..., : self.coded]
        half = self._half(rows)
        steps = torch.minimum(torch.maximum(rows.floor(), -half), half - 1) + half
        n, m, k = self._segments
        low, high, second, last = steps.to(torch.uint8).split([n + m + k, m + k, k, k], dim=-1)
        narrow = low[..., n + m :] | high[..., m:] << 4 | second << 2 | last << 6
        return torch.cat((low[..., :n], low[..., n : n + m] | high[..., :m] << 4, narrow), dim=-1)

    def widened(self, code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [..., c] of a code [..., bytes], less half a step, which makes them whole numbers.

        Channels of 0 bits are less by a half, too.
        """
        n, m, _ = self._segments
        narrow = code[..., n + m :]
        parts = (
            (code & self._all(255, 15, 3, code), self._all(128, 8, 2, code)),
            (code[..., n:] >> 4 & self._all(None, 15, 3, code), self._all(None, 8, 2, code)),
            (narrow >> 2 & 3, 2),
            (narrow >> 6, 2),
        )
        # In 8 bits, which are quick: 128 more or less is one and the same, and the sign is right.
        steps = [(part - half).view(torch.int8) for part, half in parts if part.shape[-1]]
        if torch.compiler.is_compiling() and steps:
            rows = torch.cat(steps, dim=-1).to(dtype)
            return torch.nn.functional.pad(rows, (0, self.counts[-1]), value=-0.5)
        rows = torch.empty(*code.shape[:-1], self.channels, dtype=dtype, device=code.device)
        start = 0
        for part in steps:  # to convert into place is less than to convert and to copy
            rows[..., start : start + part.shape[-1]] = part
            start += part.shape[-1]
        rows[..., start:] = -0.5
        return rows

    def _half(self, like: torch.Tensor) -> torch.Tensor:
        """Half of the steps of every channel that has bits."""
        return _constant(tuple(2.0 ** (bits - 1) for bits in self.bits()[: self.coded]), like)

    def _all(self, wide: int | None, middle: int, narrow: int, like: torch.Tensor) -> torch.Tensor:
        """A number for every byte, by the bits of its channels; None to leave bytes of 8 out."""
        n, m, k = self._segments
        first = () if wide is None else (wide,) * n
        return _constant(first + (middle,) * m + (narrow,) * k, like)


@cache
def _constant_on(values: tuple[float, ...], dtype: torch.dtype, device: torch.device):
    return torch.tensor(values, dtype=dtype, device=device)


def _constant(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    """A short tensor that is made once for a dtype and a device."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    return _constant_on(values, like.dtype, like.device)


def first_real(mask: Any, length: int, column: int | torch.Tensor = 0) -> torch.Tensor | None:
    """The index of each row's first new token that is no padding, [B]; None where none is padding.

    It is T where all are padding.

    Args:
        mask: the attention mask, [B, 1, T, S] or [B, S], boolean or additive, or a BlockMask.
        length: T.
        column: the place among the mask's S of the first new token.
    """
    if isinstance(mask, torch.Tensor):
        new = torch.arange(length, device=mask.device)
        own = mask[:, 0, new, new + column] if mask.dim() == 4 else mask[:, new + column]
        real = own > NEGLIGIBLE if own.is_floating_point() else own.bool()
    elif hasattr(mask, "mask_mod"):
        device = mask.kv_num_blocks.device
        batch, new = (torch.arange(count, device=device) for count in (mask.shape[0], length))
        real = mask.mask_mod(batch[:, None], new.new_zeros(()), new, new + column)
        real = real.expand(len(batch), length)
    else:
        return None
    return (real.cumsum(-1) == 0).sum(-1)
