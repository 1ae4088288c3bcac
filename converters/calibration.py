"""What the calibration text says about one layer, as moments.

The weights of a low-rank map should count an error by what it does to the block's output y. Take
a random output direction z_t for every token and send it back through the attention: the gradients
of sum_t z_t . y_t with respect to keys and values are what one unit of error costs there. Their
second moment A and the input's second moment C, each weighted by the other's size token by token,
are the Kronecker factors of the Gauss-Newton matrix of E|y' - y|^2 (K-FAC, 1503.05671). Unlike a
weighting by softmax weights alone, the signed sums over queries keep errors that cancel apart from
errors that add, and keys and values come out in one unit, with no balance to choose.

Letters: N sequences, T tokens in each, D hidden size, H query heads, G KV heads, E query and key
width, P = E/2 pairs.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from .maps import AttentionMaps, position_angles, project, rotate

# How far the moments follow a token's importance, between 0 (not at all) and 1 (as the Kronecker
# fit asks, which a few tokens dominate). Chosen on held-out calibration text.
INPUT_POWER = 0.75
GRADIENT_POWER = 0.5


@dataclass(frozen=True)
class Attended:
    """One sequence's attention, recomputed in float32.

    Args:
        q, k: rotated. v: values. All without scaling.
        weights: softmax weights a_ts.
    """

    q: Float[Tensor, "H T E"]
    k: Float[Tensor, "G T E"]
    v: Float[Tensor, "G T V"]
    weights: Float[Tensor, "H T T"]


@dataclass(frozen=True)
class PhaseMoments:
    """What dropping the rotation of a pair would do.

    Args:
        mean_phase: mu_hf, the J-weighted mean of exp(i theta_f (t - s)): the best constant to
            multiply the query with in place of the rotation.
        query_energy: J-weighted E|q_hf|^2 scaling^2.
        inputs: J-weighted second moment of [x, 1] as keys.
    """

    mean_phase: Complex[Tensor, "H P"]
    query_energy: Float[Tensor, "H P"]
    inputs: Float[Tensor, "D1 D1"]


@dataclass(frozen=True)
class Kronecker:
    """Factors of the Gauss-Newton matrix of the stacked key and value maps.

    Args:
        gradients: A, of the stacked rows, keys first.
        inputs: C, centred.
        mean: the input's mean under C's weights; what is constant over tokens costs no rank.
    """

    gradients: Float[Tensor, "M M"]
    inputs: Float[Tensor, "D D"]
    mean: Float[Tensor, " D"]


def attend(maps: AttentionMaps, x: Float[Tensor, "T D"]) -> Attended:
    """Queries, keys, values and softmax weights of one causal sequence."""
    angles = position_angles(maps.inv_freq, len(x))[:, None].float()
    q = rotate(project(x, maps.q, maps.q_bias), angles).transpose(0, 1)
    k = rotate(project(x, maps.k, maps.k_bias), angles).transpose(0, 1)
    v = project(x, maps.v, maps.v_bias).transpose(0, 1)
    future = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
    scores = q.unflatten(0, (maps.kv_heads, -1)) @ k[:, None].mT * maps.scaling
    weights = scores.masked_fill_(future, -torch.inf).softmax(-1).flatten(0, 1)
    return Attended(q, k, v, weights)


def phase_moments(maps: AttentionMaps, x: Float[Tensor, "N T D"]) -> PhaseMoments:
    """Moments under J_ts = a_ts^2 |v_s - o_t|^2, the output's squared change per unit of score.

    `maps` and x are in float32; the moments in float64.
    """
    length = x.shape[1]
    half = maps.qk_dim // 2
    lags = torch.zeros(maps.heads, length, dtype=torch.float64, device=x.device)
    energy = torch.zeros(maps.heads, half, dtype=torch.float64, device=x.device)
    inputs = torch.zeros(maps.hidden + 1, maps.hidden + 1, dtype=torch.float64, device=x.device)
    norms = output_norms(maps)
    for sequence in x:
        seen = attend(maps, sequence)
        j = _output_change(maps, seen, norms)
        lags += _sum_by_lag(j)
        pairs = seen.q.unflatten(-1, (2, half)).square().sum(-2)  # [H, T, P], rotation-invariant
        energy += torch.einsum("ht,htp->hp", j.sum(-1), pairs).double()
        keyed = torch.cat([sequence, torch.ones_like(sequence[:, :1])], dim=1)
        inputs += ((keyed * j.sum((0, 1))[:, None]).T @ keyed).double()
    total = lags.sum(1, keepdim=True).clamp_min(1e-300)
    phases = torch.polar(
        torch.ones((), dtype=torch.float64, device=x.device),
        position_angles(maps.inv_freq.double(), length),
    )
    return PhaseMoments(
        mean_phase=(lags / total).to(phases.dtype) @ phases,
        query_energy=energy / (x.shape[0] * length) * maps.scaling**2,
        inputs=inputs / total.sum(),
    )


def output_norms(maps: AttentionMaps) -> Float[Tensor, "H V V"]:
    """o_h^T o_h: the squared length of what a change of head h's output adds to y."""
    return torch.einsum("dhv,dhw->hvw", maps.o, maps.o)


def _output_change(
    maps: AttentionMaps, seen: Attended, norms: Float[Tensor, "H V V"]
) -> Float[Tensor, "H T T"]:
    """J_ts = a_ts^2 |o_h (v_s - o_t)|^2."""
    v = seen.v.repeat_interleave(maps.repeats, 0)  # [H, T, V]
    out = seen.weights @ v
    weighed = out @ norms
    distance = (v @ norms * v).sum(-1)[:, None, :] - 2 * weighed @ v.mT
    distance += (weighed * out).sum(-1)[:, :, None]
    return distance.clamp_min_(0) * seen.weights.square()


def _sum_by_lag(j: Float[Tensor, "H T T"]) -> Float[Tensor, "H T"]:
    """Sums of j over t - s = 0, 1, ...; what has s > t is left out."""
    heads, length, _ = j.shape
    # Row t is written T - 1 - t columns further right, so that a lag is a column.
    skewed = j.new_zeros(heads, length, 2 * length)
    strides = (2 * length * length, 2 * length - 1, 1)
    skewed.as_strided(j.shape, strides, length - 1).copy_(j)
    return skewed[..., :length].sum(1).flip(-1).double()


def probe_gradients(
    maps: AttentionMaps,
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    unrotated_q: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Float[Tensor, "N T G E"], Float[Tensor, "N T G V"]]:
    """Gradients of sum_t z_t . y_t for random z, with respect to un-rotated keys, and to values.

    Args:
        unrotated_q: (weight [H, E', D], bias [H, E'] or None) of position-free queries. The key
            gradients are then those of the position-free keys these queries meet.
    """
    angles = position_angles(maps.inv_freq, x.shape[1]).float()
    keys, values = [], []
    for sequence in x:
        seen = attend(maps, sequence)
        value_grads, scores = _backward(maps, seen, generator)
        q = seen.q if unrotated_q is None else project(sequence, *unrotated_q).transpose(0, 1)
        grads = (scores.mT @ q.unflatten(0, (maps.kv_heads, -1))).sum(1) * maps.scaling
        keys.append((rotate(grads, -angles) if unrotated_q is None else grads).transpose(0, 1))
        values.append(value_grads.transpose(0, 1))
    return torch.stack(keys), torch.stack(values)


def query_gradients(
    maps: AttentionMaps, x: Float[Tensor, "N T D"], generator: torch.Generator
) -> Float[Tensor, "N T H E"]:
    """Gradients of sum_t z_t . y_t for random z, with respect to un-rotated queries."""
    angles = position_angles(maps.inv_freq, x.shape[1]).float()
    queries = []
    for sequence in x:
        seen = attend(maps, sequence)
        _, scores = _backward(maps, seen, generator)
        grads = (scores @ seen.k[:, None]).flatten(0, 1) * maps.scaling
        queries.append(rotate(grads, -angles).transpose(0, 1))
    return torch.stack(queries)


def _backward(
    maps: AttentionMaps, seen: Attended, generator: torch.Generator
) -> tuple[Float[Tensor, "G T V"], Float[Tensor, "G R T T"]]:
    """A random output direction's gradients, to values and to scores before scaling; R = H/G."""
    z = torch.randn(seen.q.shape[1], maps.hidden, generator=generator).to(seen.q.device)
    heads = torch.einsum("td,dhv->htv", z, maps.o).unflatten(0, (maps.kv_heads, -1))
    weights = seen.weights.unflatten(0, (maps.kv_heads, -1))
    values = (weights.mT @ heads).sum(1)
    scores = heads @ seen.v[:, None].mT  # the softmax's backward pass, in place
    scores -= (scores * weights).sum(-1, keepdim=True)
    scores *= weights
    return values, scores


def kronecker(x: Float[Tensor, "N T D"], gradients: Float[Tensor, "N T M"]) -> Kronecker:
    """The two factors, each weighted token by token by the size of the other."""
    x, gradients = x.flatten(0, 1), gradients.flatten(0, 1)
    importance = gradients.square().sum(1)
    importance = (importance / importance.mean().clamp_min(1e-30)) ** INPUT_POWER
    importance = importance / importance.sum().clamp_min(1e-30)
    mean = importance @ x
    centred = x - mean
    inputs = (centred * importance[:, None]).T @ centred
    size = ((centred @ inputs) * centred).sum(1).clamp_min(0) ** GRADIENT_POWER
    size = size / size.sum().clamp_min(1e-30)
    return Kronecker(
        gradients=((gradients * size[:, None]).T @ gradients).double(),
        inputs=inputs.double(),
        mean=mean.double(),
    )
