"""A transform code of what is cached: a few bits a channel, dealt out by what a channel matters.

The maps that make a cached row and those that read it hold the transform, the centres and the
steps. A row is then in units of its channels' steps, and its code is the number of the step that
each channel is in: to code is to round and to clamp, to read is to widen an integer.

B batch, T tokens, c channels of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

# The kinds of bytes: how many bits each channel in one has, the first in the byte's low bits.
BYTES = ((8,), (6, 2), (5, 3), (4, 4), (3, 3, 2), (2, 2, 2, 2))
# The bits that a channel can have. One of 0 bits is cached of a sequence's first tokens alone.
BITS = (8, 6, 5, 4, 3, 2, 0)
# An additive mask's number that leaves no weight: they are from -1e4 to -inf.
NEGLIGIBLE = -1e3


@dataclass(frozen=True)
class Plane:
    """One channel from each byte of a row's code, from byte `start` on.

    Args:
        bits: each channel's number of bits.
        shifts: the lowest of the byte's bits that each channel has.
    """

    start: int
    bits: tuple[int, ...]
    shifts: tuple[int, ...]


@dataclass(frozen=True)
class Code:
    """How a row's channels share the bytes of its code.

    A channel of b bits has 2^b steps, half of them below zero, and is read as the middle of a step:
    ..., -1.5, -0.5, 0.5, 1.5, ... steps. One of 0 bits is read as zero: it is for tokens whose rows
    are kept whole.

    The bytes lie by their kinds, those that more channels share behind the others. The channels lie
    in the order in which they are read from whole stretches of bytes: the first channel of every
    byte, the second of every byte that has one, and so on; those of 0 bits are the last.

    Args:
        counts: how many bytes of each kind in `BYTES` a row has, and how many channels of 0 bits.
    """

    counts: tuple[int, ...] = (0,) * (len(BYTES) + 1)
    planes: tuple[Plane, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        if len(self.counts) != len(BYTES) + 1 or min(self.counts) < 0:
            raise ValueError(
                f"a code has {list(self.counts)} bytes and channels. Give {len(BYTES) + 1} counts "
                f"of 0 or more: of bytes that hold channels of "
                f"{', '.join('+'.join(map(str, kind)) for kind in BYTES)} bits, and of channels "
                "that have none."
            )
        planes = tuple(_plane(self.counts, number) for number in range(max(map(len, BYTES))))
        object.__setattr__(self, "planes", tuple(plane for plane in planes if plane.bits))

    @property
    def bytes(self) -> int:
        """The number of bytes of a row's code."""
        return sum(self.counts[:-1])

    @property
    def first(self) -> int:
        """The number of channels of 0 bits, which only a sequence's first tokens use."""
        return self.counts[-1]

    @property
    def coded(self) -> int:
        """The number of channels that have bits. They are the first of a row."""
        return channels_in(self.counts[:-1])

    @property
    def channels(self) -> int:
        """The number of channels of a row, c."""
        return self.coded + self.first

    def bits(self) -> tuple[int, ...]:
        """The number of bits of every channel, [c]."""
        coded = tuple(bits for plane in self.planes for bits in plane.bits)
        return coded + (0,) * self.first

    def by_bits(self) -> tuple[int, ...]:
        """The number of channels that have each number of bits in `BITS`."""
        return tuple(self.bits().count(bits) for bits in BITS)

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
        return torch.cat((read, none), dim=-1) if self.first else read

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        """The code, uint8 [..., bytes], of rows [..., c]."""
        rows = rows[..., : self.coded]
        half = self._half(rows)
        steps = torch.minimum(torch.maximum(rows.floor(), -half), half - 1) + half
        parts = steps.to(torch.uint8).split([len(plane.bits) for plane in self.planes], dim=-1)
        code = torch.zeros_like(steps[..., : self.bytes], dtype=torch.uint8)
        for plane, part in zip(self.planes, parts, strict=True):
            added = code[..., plane.start :] | part << _constant(plane.shifts, part)
            code = torch.cat((code[..., : plane.start], added), dim=-1)
        return code

    def widened(self, code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [..., c] of a code [..., bytes], less half a step, which makes them whole numbers.

        Channels of 0 bits are less by a half, too.
        """
        steps = []
        for plane in self.planes:
            part = code[..., plane.start :]
            if any(plane.shifts):
                part = part >> _constant(plane.shifts, code)
            mask = tuple(2**bits - 1 for bits in plane.bits)
            half = tuple(2 ** (bits - 1) for bits in plane.bits)
            # In 8 bits, which are quick: 128 more or less is one and the same, and the sign is
            # right.
            part = (part & _constant(mask, code)) - _constant(half, code)
            steps.append(part.view(torch.int8))
        if torch.compiler.is_compiling() and self.coded:
            rows = torch.cat(steps, dim=-1).to(dtype)
            return torch.nn.functional.pad(rows, (0, self.first), value=-0.5)
        rows = torch.empty(*code.shape[:-1], self.channels, dtype=dtype, device=code.device)
        start = 0
        for part in steps:  # to convert into place is less than to convert and to copy
            rows[..., start : start + part.shape[-1]] = part
            start += part.shape[-1]
        rows[..., start:] = -0.5
        return rows

    def _half(self, like: torch.Tensor) -> torch.Tensor:
        """Half the number of steps of each channel that has bits."""
        return _constant(tuple(2 ** (bits - 1) for bits in self.bits() if bits), like)


def channels_in(counts: Sequence[int]) -> int:
    """The number of channels in `counts` bytes of each kind in `BYTES`."""
    return sum(len(kind) * count for kind, count in zip(BYTES, counts, strict=True))


def _plane(counts: tuple[int, ...], number: int) -> Plane:
    """The plane of every byte's channel `number`, counted from 0, in bytes that have one."""
    sharing = [(kind, n) for kind, n in zip(BYTES, counts, strict=False) if len(kind) > number]
    bits = tuple(kind[number] for kind, n in sharing for _ in range(n))
    shifts = tuple(sum(kind[:number]) for kind, n in sharing for _ in range(n))
    return Plane(sum(counts[:-1]) - len(bits), bits, shifts)


@cache
def _constant_on(values: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    return torch.tensor(values, dtype=dtype, device=device)


def _constant(values: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
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
