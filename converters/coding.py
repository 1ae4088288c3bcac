"""How a budget of bits is dealt out to the channels of a transform code.

A channel of variance v, whose error weighs w in the model's loss, adds w v d(b) to it with b bits,
where d(b) is what quantising leaves of a channel of variance 1. Source coding deals bits by reverse
water-filling: the next bit goes where it takes away most (Cover and Thomas, Elements of Information
Theory, 10.3.3). Here channels have one of a few numbers of bits, and for a price per bit each takes
the number at which its error and its bits' price together are least (Everett 1963).

A step is how many standard deviations of its channel: smaller ones would clamp too much, larger
ones round too coarsely. Channels have longer tails than a normal distribution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from ..modeling.coding import BITS, Code
from .errors import InputError

# Standard deviations in a step, and the share of a channel's variance that is left as error.
STEPS = {8: 0.0625, 4: 0.44, 2: 1.1}
LEFT = {0: 1.0, 2: 0.125, 4: 0.0165, 8: 0.0004}

Counts = tuple[int, int, int]


@dataclass(frozen=True)
class Channels:
    """The channels of one code, by falling energy.

    Args:
        energy: of each unit, the error that leaving it out adds to the loss.
        unit: channels that have one number of bits and stand together: 2 of a rotated pair.
    """

    energy: Float[Tensor, " n"]
    unit: int = 1

    def counts(self, price: float, allowed: Sequence[int]) -> Counts:
        """How many channels have 8, 4 and 2 bits at a price per bit; whole bytes, and one at least.

        Args:
            allowed: the numbers of bits that a channel may have, beside none.
        """
        steps = [0, *sorted(allowed)]
        reached: dict[int, int] = {}
        for less, more in pairwise(steps):
            saved = self.energy * (LEFT[less] - LEFT[more]) / (more - less)
            reached[more] = int((saved > price).sum())
        counts = dict.fromkeys(BITS, 0)
        taken, above = 0, 0
        for bits in sorted(allowed, reverse=True):
            whole = 8 // bits  # units, so that no unit lies in two stretches of a row
            wanted = max(0, reached[bits] - taken)
            last = bits == min(allowed)
            found = round(wanted / whole) * whole
            if last and not above + found:
                found = whole
            room = (len(self.energy) - taken) // whole * whole
            counts[bits] = min(found, room) * self.unit
            taken += counts[bits] // self.unit
            above += counts[bits]
        return counts[8], counts[4], counts[2]


def deal(
    layers: Sequence[Sequence[Channels]], most_bytes: float, allowed: Sequence[int] = BITS
) -> list[tuple[Counts, ...]]:
    """The counts of every layer's codes that leave the least error in so many bytes a token.

    Args:
        layers: every layer's codes.
        most_bytes: of all layers together.
        allowed: the numbers of bits that a channel may have, beside none.

    Raises:
        InputError: the bytes do not suffice for a channel of each code.
    """

    def dealt(price: float) -> list[tuple[Counts, ...]]:
        return [tuple(codes.counts(price, allowed) for codes in layer) for layer in layers]

    def size(counts: list[tuple[Counts, ...]]) -> int:
        return sum(Code(code).bytes for layer in counts for code in layer)

    least = dealt(torch.inf)
    if size(least) > most_bytes:
        raise InputError(
            f"the budget leaves {most_bytes:.0f} bytes a token for all layers' codes, and they "
            f"need {size(least)}. Give a larger --kv-budget."
        )
    low, high = 1e-40, 1e40
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size(dealt(middle)) <= most_bytes else (middle, high)
    return dealt(high)


def steps_of(counts: Counts, like: Tensor) -> Float[Tensor, " c"]:
    """The step of every channel of a row, in the channel's standard deviations."""
    return torch.tensor([STEPS[bits] for bits in Code(counts).bits()]).to(like)


def order_of(counts: Counts) -> list[int]:
    """For every channel of a row, which it is by falling energy."""
    order = [0] * sum(counts)
    for number, place in enumerate(Code(counts).places()):
        order[place] = number
    return order
