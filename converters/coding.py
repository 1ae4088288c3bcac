"""How a budget of bits is dealt out to the channels of a transform code.

To code a channel with b bits adds about E[g^2] E[e^2] / 2 to the model's loss, where e is a token's
error and g the gradient of the log-likelihood with respect to the channel's number. Both means are
over tokens of calibration text. The error is that of the quantiser itself on these tokens: a
channel with long tails loses more than a normal distribution would.

Source coding deals bits by reverse water-filling: the next bit goes where it takes away most (Cover
and Thomas, Elements of Information Theory, 10.3.3). Here channels have one of a few numbers of
bits, and for a price per bit each takes the number at which its error and its bits' price together
are least (Everett 1963).

Letters: N tokens, c channels, n units of channels that have one number of bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..modeling.coding import BITS, Code
from .errors import InputError

# A channel's step with each number of bits, in its standard deviations. The tails of a text unlike
# the calibration text are longer than what is seen, so 8 bits reach 8 deviations.
STEPS = {8: 0.0625, 4: 0.44, 2: 1.1}
# What leaves a channel out is alike for tokens that are alike, and adds up where attention takes
# their mean; rounding differs from token to token. So much dearer is an error of the first kind.
COHERENT = 4.0
# The weight of what the first tokens, which all others read, lose in channels of no bits.
FIRST = 1.0

Counts = tuple[int, int, int]
# Numbers of tokens, and gradients with respect to them.
Tokens = tuple[Float[Tensor, "N c"], Float[Tensor, "N c"]]


@dataclass(frozen=True)
class Dealt:
    """The code of a row, and which channel lies where in it.

    Args:
        counts: how many channels have 8, 4 and 2 bits.
        order: for every place of the row the channel that lies there.
        steps: for every place, in units of the channel.
    """

    counts: Counts = (0, 0, 0)
    order: tuple[int, ...] = ()
    steps: tuple[float, ...] = ()

    @property
    def bytes(self) -> int:
        return Code(self.counts).bytes


@dataclass(frozen=True)
class Channels:
    """The channels of one code, and what every number of bits leaves of their error.

    Args:
        left: of each unit, the error with 0 bits and with each number of `BITS`.
        steps: the quantiser's step with each number of `BITS`.
        unit: channels that have one number of bits and one step, and stand together: 2 of a pair.
    """

    left: Float[Tensor, "n 4"]
    steps: Float[Tensor, "n 3"]
    unit: int = 1

    @classmethod
    def measured(cls, tokens: Tokens, first: Tokens | None = None, *, unit: int = 1) -> "Channels":
        """The channels of which tokens have these numbers.

        Args:
            tokens: numbers, of mean zero, and the gradients with respect to them.
            first: the same of tokens that are kept whole, but for channels of no bits.
            unit: how many channels side by side have one number of bits.
        """
        numbers, gradients = tokens
        size = numbers.square().mean(0).unflatten(0, (-1, unit)).mean(-1).sqrt()  # [n]
        size = size.clamp_min(torch.finfo(size.dtype).tiny ** 0.5)
        wide, weights = size.repeat_interleave(unit), gradients.square().mean(0)

        def error(wrong: Float[Tensor, "N c"]) -> Float[Tensor, " n"]:
            return (weights * wrong.square().mean(0)).unflatten(0, (-1, unit)).sum(-1)

        lost = error(numbers) * COHERENT
        if first is not None:
            lost = lost + (
                (first[0] * first[1]).square().sum(0).unflatten(0, (-1, unit)).sum(-1)
                * (FIRST / len(numbers))
            )
        left, steps = [lost], []
        for bits in BITS:
            most, step = 2 ** (bits - 1) - 0.5, STEPS[bits] * wide
            found = (numbers / step).floor().add(0.5).clamp(-most, most)
            left.append(error(found * step - numbers))
            steps.append(STEPS[bits] * size)
        return cls(torch.stack(left, 1), torch.stack(steps, 1), unit)

    def dealt(self, price: float, allowed: Sequence[int]) -> Dealt:
        """The code that a price per bit leaves, of whole bytes and of one at least.

        Args:
            allowed: the numbers of bits that a channel may have, beside none.
        """
        bits = torch.tensor([0, *BITS], dtype=self.left.dtype)
        # What no number of bits is allowed for costs without end.
        barred = torch.tensor([False, *(b not in allowed for b in BITS)])
        cost = (self.left + price * self.unit * bits).masked_fill(barred, torch.inf)
        chosen = bits[cost.argmin(1)]
        # Of those with equal bits, the first are those that would lose most by fewer.
        need = self.left[:, 0] - self.left[:, 1:].min(1).values
        ranked = sorted(range(len(need)), key=lambda i: (-float(chosen[i]), -float(need[i])))
        counts, start = [], 0
        for number in BITS:
            whole = 8 // number  # units, so that no unit lies in two stretches of a row
            wanted = int((chosen >= number).sum()) - start
            found = max(0, -(-wanted // whole)) * whole
            if number == min(allowed) and not start + found:
                found = whole
            room = (len(ranked) - start) // whole * whole
            counts.append(min(found, room) if number in allowed else 0)
            start += counts[-1]
        code = Code(tuple(count * self.unit for count in counts))
        order, steps = [0] * code.channels, [0.0] * code.channels
        for index, place in enumerate(code.places()):
            unit, part = divmod(index, self.unit)
            order[place] = ranked[unit] * self.unit + part
            column = BITS.index(code.bits()[place])
            steps[place] = float(self.steps[ranked[unit], column])
        wide, middle, narrow = code.counts
        return Dealt((wide, middle, narrow), tuple(order), tuple(steps))


def deal(
    layers: Sequence[Sequence[Channels]], most_bytes: float, allowed: Sequence[int] = BITS
) -> list[tuple[Dealt, ...]]:
    """Every layer's codes that leave the least error in so many bytes a token.

    Args:
        layers: every layer's channels.
        most_bytes: of all layers together.
        allowed: the numbers of bits that a channel may have, beside none.

    Raises:
        InputError: the bytes do not suffice for a channel of each code.
    """

    def dealt(price: float) -> list[tuple[Dealt, ...]]:
        return [tuple(codes.dealt(price, allowed) for codes in layer) for layer in layers]

    def size(found: list[tuple[Dealt, ...]]) -> int:
        return sum(code.bytes for layer in found for code in layer)

    least = size(dealt(torch.inf))
    if least > most_bytes:
        raise InputError(
            f"the budget leaves {most_bytes:.0f} bytes a token for all layers' codes, and they "
            f"need {least}. Give a larger --kv-budget."
        )
    low, high = 1e-30, 1e30
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size(dealt(middle)) <= most_bytes else (middle, high)
    return dealt(high)
