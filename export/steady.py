"""A latent whose RMSNorm is nearly constant, for engines that have the norm but no bias.

The norm divides by the root mean square of its channels. Every RMSNorm before it has left inputs of
one length, |x / gain|^2 = D, so that enough rows that read the input's principal directions would
make that mean square constant. A few of them, each with the weight that serves best, make it nearly
so; the latent's own channels, whose basis is free, help at no cost.

Letters: N tokens, D hidden size, r latent rank, e extra rows, L = r + e channels, H heads, T tokens
of a sequence, V value width, HNV and Q as in `latent`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .latent import LatentLayer

# A channel's share of the mean square is at least this part of an even one: its weight is undone
# after the norm, and must not be nothing.
LEAST_SHARE = 0.01
STEPS = 2000


@dataclass(frozen=True)
class SteadyLayer:
    """A layer without biases whose latent goes through an RMSNorm.

    Args:
        latent: rows whose mean square is about one.
        weight: of the norm; 0 for the extra rows, which are there for the norm alone.
        kv: per head [key | value] from the channels.
        spread: standard deviation over tokens of log |channels|, 0 for a perfect norm.
    """

    q: Float[Tensor, "Q D"]
    latent: Float[Tensor, "L D"]
    rope: Float[Tensor, "R D"]
    weight: Float[Tensor, " L"]
    kv: Float[Tensor, "HNV L"]
    o: Float[Tensor, "D HV"]
    spread: float


def steady(layer: LatentLayer, x: Float[Tensor, "N D"], extra: int, eps: float) -> SteadyLayer:
    """The layer with `extra` rows more, so that an RMSNorm of its latent changes little.

    Args:
        x: inputs of the layer on calibration text.
        eps: of the RMSNorm.
    """
    x = x.double()
    whitening, coloring = _whitening(x @ layer.latent.T)
    own = whitening @ layer.latent
    _, directions = torch.linalg.eigh((x / layer.gain).T @ (x / layer.gain))
    others = directions.flip(1)[:, :extra].T / layer.gain
    rows = torch.cat([own, others])
    rows = rows / (x @ rows.T).square().mean(0).sqrt()[:, None]
    rows = rows * _shares((x @ rows.T).square()).sqrt()[:, None] * len(rows) ** 0.5
    z = x @ rows.T
    rank = len(own)
    # own channels = scale * rows, so that kv c = kv coloring own x
    scale = own.norm(dim=1) / rows[:rank].norm(dim=1)
    normed = z * (z.square().mean(1, keepdim=True) + eps).rsqrt()
    weight = ((z * normed).sum(0) / normed.square().sum(0))[:rank]
    kv = layer.kv @ coloring * scale
    return SteadyLayer(
        q=layer.q,
        latent=rows,
        rope=layer.rope,
        weight=torch.cat([weight, weight.new_zeros(extra)]),
        kv=torch.cat([kv, kv.new_zeros(len(kv), extra)], dim=1),
        o=layer.o,
        spread=float(z.square().mean(1).log().std() / 2),
    )


def _whitening(c: Float[Tensor, "N r"]) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r r"]]:
    """(A, A^-1) with E[A c c' A'] = 1; directions in which c hardly varies are damped."""
    values, vectors = torch.linalg.eigh(c.T @ c / len(c))
    scale = values.clamp(min=float(values[-1]) * 1e-6).sqrt()
    return vectors.T / scale[:, None], vectors * scale


def _shares(squares: Float[Tensor, "N L"]) -> Float[Tensor, " L"]:
    """Weights of at least LEAST_SHARE / L, with which the rows of squares sum to one most nearly.

    Least squares with a bound, by accelerated projected gradient steps (Beck and Teboulle 2009).
    """
    count = squares.shape[1]
    least = LEAST_SHARE / count
    gram, moment = squares.T @ squares / len(squares), squares.mean(0)
    gram.diagonal().add_(1e-4 * gram.diagonal().mean())
    step = 1 / torch.linalg.eigvalsh(gram)[-1]
    shares = look = squares.new_full((count,), 1 / count)
    pace = 1.0
    for _ in range(STEPS):
        new = (look - step * (gram @ look - moment)).clamp(min=least)
        next_pace = (1 + (1 + 4 * pace * pace) ** 0.5) / 2
        look = new + (pace - 1) / next_pace * (new - shares)
        shares, pace = new, next_pace
    return shares


def normed_heads(
    layer: SteadyLayer,
    x: Float[Tensor, "B T D"],
    inv_freq: Float[Tensor, " P"],
    heads: int,
    eps: float,
) -> Float[Tensor, "B T HV"]:
    """What the output map reads, computed as the engine does, in x's dtype."""
    rotated, value = len(layer.rope), layer.o.shape[1] // heads
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * inv_freq.double()

    def turn(pairs: Tensor) -> Tensor:
        cos, sin = angles.cos().to(pairs.dtype), angles.sin().to(pairs.dtype)
        real, imaginary = pairs[..., 0::2], pairs[..., 1::2]
        turned = real * cos - imaginary * sin, imaginary * cos + real * sin
        return torch.stack(turned, dim=-1).flatten(-2)

    def linear(weight: Tensor, inputs: Tensor) -> Tensor:
        return inputs @ weight.to(inputs.dtype).T

    q = linear(layer.q, x).unflatten(-1, (heads, -1)).transpose(1, 2)
    q = torch.cat([q[..., :-rotated], turn(q[..., -rotated:])], dim=-1)
    z = linear(layer.latent, x)
    z = z * (z.square().mean(-1, keepdim=True) + eps).rsqrt() * layer.weight.to(z.dtype)
    kv = linear(layer.kv, z).unflatten(-1, (heads, -1)).transpose(1, 2)
    rope = turn(linear(layer.rope, x))[:, None].expand(-1, heads, -1, -1)
    k = torch.cat([kv[..., :-value], rope], dim=-1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, kv[..., -value:], is_causal=True)
    return out.transpose(1, 2).flatten(2)
