"""A transform code of what is cached: a few bits a channel, dealt out by what a channel matters.

The maps that make a cached row and those that read it hold the transform, the centres and the
steps. A row is then in units of its channels' steps, and its code is the number of the step that
each channel is in: to code is to round and to clamp, to read is to widen an integer.

B batch, T tokens, c channels of a row.
"""

from dataclasses import dataclass
from typing import Any

import torch

# The bits that a channel can have, in the order of a row's channels.
BITS = (8, 4, 2)
# An additive mask's number that leaves no weight: they are from -1e4 to -inf.
NEGLIGIBLE = -1e3


@dataclass(frozen=True)
class Code:
    """How many of a row's channels have 8, 4 and 2 bits; they lie in this order.

    A channel of b bits has 2^b steps, half of them below zero, and is read as the middle of a step:
    ..., -1.5, -0.5, 0.5, 1.5, ... steps. A byte holds channels of fewer bits that lie far apart: of
    m channels of 4 bits, byte i has channel i in its low half, channel i + m / 2 in its high one.
    """

    counts: tuple[int, ...]

    def __post_init__(self):
        whole = (len(self.counts) == len(BITS)) and all(
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
        return sum(self.segments())

    def segments(self) -> list[int]:
        """The bytes of the channels of each number of bits."""
        return [count * bits // 8 for count, bits in zip(self.counts, BITS, strict=True)]

    def halves(self, like: torch.Tensor) -> torch.Tensor:
        """Half of each channel's steps, [c]."""
        halves = torch.tensor([float(2 ** (bits - 1)) for bits in BITS])
        counts = torch.tensor(self.counts)
        return halves.repeat_interleave(counts).to(like.device, like.dtype)

    def rounded(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [..., c] as they are read from their code.

        The gradient passes straight through (1308.3432), but for what is clamped.
        """
        most = self.halves(rows) - 0.5
        within = torch.minimum(torch.maximum(rows, -most), most)
        # What is added is 0: the middle of a step is exact in any dtype, as it is when it is read.
        return within.floor().detach() + 0.5 + (within - within.detach())

    def packed(self, rows: torch.Tensor) -> torch.Tensor:
        """The code, uint8 [..., bytes], of rows [..., c]."""
        halves = self.halves(rows)
        steps = torch.minimum((rows.floor() + halves).clamp_min(0), 2 * halves - 1).to(torch.uint8)
        parts = []
        for bits, part in zip(BITS, steps.split(self.counts, dim=-1), strict=True):
            fields = part.unflatten(-1, (8 // bits, part.shape[-1] * bits // 8))
            byte = fields[..., 0, :]
            for place in range(1, 8 // bits):
                byte = byte | fields[..., place, :] << place * bits
            parts.append(byte)
        return torch.cat(parts, dim=-1)

    def widened(self, code: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows [..., c], in steps, of a code [..., bytes]."""
        parts = []
        for bits, part in zip(BITS, code.split(self.segments(), dim=-1), strict=True):
            mask = 2**bits - 1
            parts += [part >> place * bits & mask for place in range(8 // bits)]
        steps = torch.cat(parts, dim=-1)
        return steps.to(dtype) - (self.halves(steps.new_zeros(0, dtype=dtype)) - 0.5)


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
