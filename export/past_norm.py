"""Two linear maps around an RMSNorm that stock classes force between them, as if it were not there.

One more channel carries a constant M, so large that the norm divides by M / sqrt(L) whatever the
others hold; its weight multiplies by that again. The same channel carries the second map's bias.

Letters: D inputs, L channels that are normalised, the constant among them, E outputs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Below float16's largest number, 65504, and a power of two, so that every dtype holds it exactly.
CONSTANT = 2.0**15
# The constant over the greatest length the other channels can have: the norm's divisor then varies
# by 2^-17 at the very most.
HEADROOM = 2.0**8
# The largest norm weight; float16 again.
MOST_WEIGHT = 2.0**14


@dataclass(frozen=True)
class PastNorm:
    """Weights with which up(norm(down x + bias) * weight) is what it would be without the norm.

    Args:
        down: the last row is zero.
        bias: the last entry is the constant.
        weight: of the norm.
        up: the last column is the second map's bias.
    """

    down: Float[Tensor, "L D"]
    bias: Float[Tensor, " L"]
    weight: Float[Tensor, " L"]
    up: Float[Tensor, "E L"]


def past_norm(
    down: Float[Tensor, "L1 D"],
    bias: Float[Tensor, " L1"] | None,
    up: Float[Tensor, "E L1"],
    up_bias: Float[Tensor, " E"] | None,
    gain: Float[Tensor, " D"],
    dtype: torch.dtype,
) -> PastNorm:
    """The maps x -> up (down x + bias) + up_bias around an RMSNorm, for x = gain * RMSNorm(h).

    |x / gain| is at most sqrt(D), so that a norm of `down` bounds the channels without any data;
    they are scaled down by a power of two where the constant would not outweigh them.

    Args:
        gain: weight of the norm before the first map.
        dtype: what the weights are going to be stored in; what the norm's weight loses by that is
            made up for in `up`.
    """
    count, width = down.shape
    channels = count + 1
    bias = down.new_zeros(count) if bias is None else bias
    up_bias = up.new_zeros(len(up)) if up_bias is None else up_bias
    reach = _spectral_bound(down * gain) * width**0.5 + bias.norm()
    scale = torch.floor(torch.log2(CONSTANT / HEADROOM / reach)).clamp(max=0).exp2()
    divisor = CONSTANT / channels**0.5
    weight = (divisor / scale).clamp(max=MOST_WEIGHT).to(dtype).to(down.dtype)
    # The constant leaves the norm as sqrt(L); with this weight it is 1, up to rounding.
    unit = torch.tensor(channels**-0.5, dtype=down.dtype).to(dtype).to(down.dtype)
    return PastNorm(
        down=torch.cat([down * scale, down.new_zeros(1, width)]),
        bias=torch.cat([bias * scale, bias.new_tensor([CONSTANT])]),
        weight=torch.cat([weight.expand(count), unit[None]]),
        up=torch.cat(
            [up * (divisor / scale / weight), (up_bias / (channels**0.5 * unit))[:, None]], dim=1
        ),
    )


def _spectral_bound(matrix: Float[Tensor, "L D"]) -> Tensor:
    """At least the spectral norm: the lesser of the Frobenius norm and sqrt(|A|_1 |A|_inf)."""
    magnitude = matrix.abs()
    rows, columns = magnitude.sum(1).max(), magnitude.sum(0).max()
    return torch.minimum(matrix.norm(), (rows * columns).sqrt()).clamp(min=1e-30)
