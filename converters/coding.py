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
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from ..modeling.coding import BITS, BYTES, Code, channels_in
from .errors import InputError

# What a channel can have that is coded.
CODED = BITS[:-1]
# A channel's step with each number of bits, in its standard deviations. They are wider than those
# that lose least of a normal distribution (Max 1960): of a text unlike the calibration text the
# tails are longer than what was seen, and a number that is clamped is far off. 8 bits reach 10
# deviations, 4 bits 4.5.
STEPS = {8: 0.08, 6: 0.20, 5: 0.35, 4: 0.56, 3: 0.84, 2: 1.2}
# What leaves a channel out is alike for tokens that are alike, and adds up where attention takes
# their mean; rounding differs from token to token. So much dearer is an error of the first kind.
COHERENT = 3.0
# The most channels of 0 bits, which are for the first tokens alone. What these tokens leave in the
# channels that are left out is nearly the same in every text, so that few directions hold it.
FIRST_CHANNELS = 16

# What counts as nothing beside the largest of its kind.
SMALLEST = 1e-3
# The kind of bytes with a channel fewer that a kind of bytes gives way to where channels are few.
FEWER = {5: 4, 4: 2, 3: 0, 2: 0, 1: 0}

# Numbers of tokens, and gradients with respect to them.
Tokens = tuple[Float[Tensor, "N c"], Float[Tensor, "N c"]]


@dataclass(frozen=True)
class Dealt:
    """The code of a row, and which channel lies where in it.

    Args:
        code: how the channels share its bytes.
        order: for every place of the row that has bits, the channel that lies there.
        steps: for each of these places, in units of the channel.
    """

    code: Code = field(default_factory=Code)
    order: tuple[int, ...] = ()
    steps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Channels:
    """The channels of one code, and what every number of bits leaves of their error.

    Args:
        left: of each unit, the error with each number of `BITS`.
        steps: the quantiser's step with each of them above 0.
        unit: channels that have one number of bits and one step, and stand together: 2 of a pair.
        first: the most channels of 0 bits that a row is to have for the first tokens.
    """

    left: Float[Tensor, "n b"]
    steps: Float[Tensor, "n b-1"]
    unit: int = 1
    first: int = 0

    @classmethod
    def measured(cls, tokens: Tokens, *, unit: int = 1, first: int = 0) -> "Channels":
        """Channels with the errors that each number of bits leaves on calibration tokens.

        Args:
            tokens: numbers, of mean zero, and the gradients with respect to them.
            unit, first: the fields of that name.
        """
        numbers, gradients = tokens
        size = numbers.square().mean(0).unflatten(0, (-1, unit)).mean(-1).sqrt()  # [n]
        # A channel that is nearly constant, of a text with few words, gets no finer steps for that.
        size = size.clamp_min(SMALLEST * size.max().clamp_min(torch.finfo(size.dtype).tiny ** 0.5))
        wide, weights = size.repeat_interleave(unit), gradients.square().mean(0)

        def error(wrong: Float[Tensor, "N c"]) -> Float[Tensor, " n"]:
            return (weights * wrong.square().mean(0)).unflatten(0, (-1, unit)).sum(-1)

        left, steps = [], []
        for bits in CODED:
            most, step = 2 ** (bits - 1) - 0.5, STEPS[bits] * wide
            found = (numbers / step).floor().add(0.5).clamp(-most, most)
            left.append(error(found * step - numbers))
            steps.append(STEPS[bits] * size)
        left.append(error(numbers) * COHERENT)
        return cls(torch.stack(left, 1), torch.stack(steps, 1), unit, first)

    def code(self, price: float, allowed: Sequence[int]) -> tuple[Code, Float[Tensor, " n"]]:
        """The cheapest code at a price per bit, and the bits that each unit would have by itself.

        A code has whole bytes, and one at least. So it has room for a few bits more than its units
        would have, or for a few less where there are no channels to fill the bytes.

        Args:
            allowed: the numbers of bits that a channel may have, beside none.
        """
        bits = torch.tensor(BITS, dtype=self.left.dtype)
        # What no number of bits is allowed for costs without end.
        barred = torch.tensor([b not in (*allowed, 0) for b in BITS])
        cost = (self.left + price * self.unit * bits).masked_fill(barred, torch.inf)
        chosen = bits[cost.argmin(1)]
        counts = bytes_for([int((chosen == b).sum()) for b in BITS], allowed)
        first = min(self.first, len(chosen) - channels_in(counts))
        return Code(tuple(count * self.unit for count in (*counts, first))), chosen

    def dealt(self, price: float, allowed: Sequence[int]) -> Dealt:
        """The cheapest code at a price per bit, with a channel for each of its places."""
        code, chosen = self.code(price, allowed)
        # Of channels with equal bits, the first are those that would lose most by fewer.
        need = self.left[:, -1] - self.left[:, :-1].min(1).values
        ranked = sorted(range(len(need)), key=lambda i: (-float(chosen[i]), -float(need[i])))
        bits, order, steps = code.bits(), [0] * code.coded, [0.0] * code.coded
        for index, place in enumerate(code.places()[: code.coded]):
            unit, part = divmod(index, self.unit)
            order[place] = ranked[unit] * self.unit + part
            steps[place] = float(self.steps[ranked[unit], BITS.index(bits[place])])
        return Dealt(code, tuple(order), tuple(steps))


def bytes_for(wanted: Sequence[int], allowed: Sequence[int]) -> list[int]:
    """The number of bytes of each kind in `BYTES` that hold the wanted channels.

    The bytes never have more places than there are channels. So channels of 4 bits alone are an
    even number, and where channels are few, some have other bits than were wanted.

    Args:
        wanted: the number of channels with each number of `BITS`.
        allowed: the numbers of bits that a channel may have, beside none.
    """
    of = dict(zip(BITS, wanted, strict=True))
    threes = max(0, of[3] - of[5])  # the others share a byte with a channel of 5 bits
    pairs = -(-threes // 2)
    twos = max(0, of[2] - of[6] - pairs)
    counts = [of[8], of[6], of[5], -(-of[4] // 2), pairs, -(-twos // 4)]
    if not any(counts):
        counts[max(k for k, kind in enumerate(BYTES) if {*kind} <= {*allowed})] = 1
    # First those that share a byte with a channel that nobody wanted.
    alone = [(1, of[6] - of[2]), (2, of[5] - of[3])]
    for kind, most in alone + [(kind, sum(wanted)) for kind in sorted(FEWER, reverse=True)]:
        many = max(0, channels_in(counts) - sum(wanted))
        given = max(0, min(many, most, counts[kind]))
        counts[kind] -= given
        if 8 in allowed:
            counts[FEWER[kind]] += given
    counts[0] = min(counts[0], sum(wanted))
    return counts


def deal(
    layers: Sequence[Sequence[Channels]], most_bytes: float, allowed: Sequence[int] = CODED
) -> list[tuple[Dealt, ...]]:
    """Every layer's codes that leave the least error in so many bytes a token.

    Args:
        layers: every layer's channels.
        most_bytes: of all layers together.
        allowed: the numbers of bits that a channel may have, beside none.

    Raises:
        InputError: the bytes do not suffice for a channel of each code.
    """

    def size(price: float) -> int:
        return sum(part.code(price, allowed)[0].bytes for layer in layers for part in layer)

    least = size(torch.inf)
    if least > most_bytes:
        raise InputError(
            f"the budget leaves {most_bytes:.0f} bytes a token for all layers' codes, and they "
            f"need {least}. Give a larger --kv-budget."
        )
    low, high = 1e-30, 1e30
    while high / low > 1 + 1e-6:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if size(middle) <= most_bytes else (middle, high)
    return [tuple(part.dealt(high, allowed) for part in layer) for layer in layers]


def first_channels(
    numbers: Float[Tensor, "N c"], weights: Float[Tensor, " c"], count: int
) -> tuple[Float[Tensor, "n c"], Float[Tensor, "c n"]]:
    """Maps to and from the few channels that hold most of a token's numbers in many others.

    Args:
        numbers: of each token, in each of the many channels.
        weights: how much an error of each of these matters, 1 for the layer's most important one.
        count: the number of channels to make, n.
    """
    weights = weights.clamp_min(SMALLEST)
    _, sizes, basis = torch.linalg.svd(numbers * weights, full_matrices=False)
    # The largest is of about unit size, if it is large enough for that to matter.
    scale = (sizes[0] / len(numbers) ** 0.5).clamp_min(SMALLEST)
    return basis[:count] * weights / scale, (basis[:count] / weights).mT * scale
