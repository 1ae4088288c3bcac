"""What the calibration text says about one layer, as moments.

The weights of a low-rank map should count an error by what it does to the block's output y. Take
a random output direction z_t for every token and send it back through the attention: the gradients
of sum_t z_t . y_t with respect to keys and values are what one unit of error costs there. Their
second moment A and the input's second moment C, each weighted by the other's size token by token,
are the Kronecker factors of the Gauss-Newton matrix of E|y' - y|^2 (K-FAC, 1503.05671). Unlike a
weighting by softmax weights alone, the signed sums over queries keep errors that cancel apart from
errors that add, and keys and values come out in one unit, with no balance to choose.

Letters: N sequences, T tokens in each, D hidden size, H query heads, G KV heads, R = H/G, E query
and key width, P = E/2 pairs. A causal sequence is attended in blocks of B queries, with the S keys
up to the block's end.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from .lowrank import Factors, gram_svd, weighted_svd
from .maps import AttentionMaps, capped, position_angles, project, rotate, visible

# How far the moments follow a token's importance, between 0 (not at all) and 1 (as the Kronecker
# fit asks, which a few tokens dominate). Chosen on held-out calibration text.
INPUT_POWER = 0.75
GRADIENT_POWER = 0.5


# Queries attended at a time: few enough to leave out most of the future and to stay in cache.
QUERIES_AT_ONCE = 256

# Tokens whose gradients are weighted at a time.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Attended:
    """A block of queries of one causal sequence, and the keys and values up to the block's end.

    Args:
        rows: where the queries stand in the sequence.
        q, k: rotated. v: values. All without scaling.
        weights: softmax weights a_ts.
        slopes: what the capped score gains per unit of the score; None where none is capped.
    """

    rows: slice
    q: Float[Tensor, "H B E"]
    k: Float[Tensor, "G S E"]
    v: Float[Tensor, "G S V"]
    weights: Float[Tensor, "H B S"]
    slopes: Float[Tensor, "H B S"] | None = None

    def per_score(self, x: Float[Tensor, "*heads B S"]) -> Float[Tensor, "*heads B S"]:
        """Changes per unit of what softmax is taken of, as those per unit of the score."""
        return x if self.slopes is None else x * self.slopes.view_as(x)


@dataclass(frozen=True)
class PhaseMoments:
    """What dropping the rotation of a pair would do.

    Args:
        mean_phase: mu_hf, the J-weighted mean of exp(i theta_f (t - s)): the best constant to
            multiply the query with in place of the rotation.
        query_energy: J-weighted E|q_hf|^2 scaling^2.
        inputs: J-weighted second moment of [x, 1] as keys, times what a norm multiplies keys with.
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


def in_precision(moments: Any, dtype: torch.dtype) -> Any:
    """The moments, a dataclass or None, with all their tensors in that precision.

    They are sums of single-precision products, and are kept in it.
    """
    if isinstance(moments, Tensor):
        return moments.to(dtype.to_complex() if moments.is_complex() else dtype)
    if not is_dataclass(moments) or isinstance(moments, type):
        return moments
    parts = ((f.name, getattr(moments, f.name)) for f in fields(moments))
    return replace(moments, **{name: in_precision(part, dtype) for name, part in parts})


def attend(maps: AttentionMaps, x: Float[Tensor, "T D"]) -> Iterator[Attended]:
    """Queries, keys, values and softmax weights of one causal sequence, block by block."""
    angles = position_angles(maps.inv_freq, len(x))[:, None].float()
    q = rotate(maps.queries(x), angles).transpose(0, 1)
    k = rotate(maps.keys(x), angles).transpose(0, 1)
    v = project(x, maps.v, maps.v_bias).transpose(0, 1)
    for start in range(0, len(x), QUERIES_AT_ONCE):
        rows = slice(start, min(start + QUERIES_AT_ONCE, len(x)))
        block, keys = q[:, rows], k[:, : rows.stop]
        scores = block.unflatten(0, (maps.kv_heads, -1)) @ keys[:, None].mT * maps.scaling
        slopes = None
        if maps.softcap is not None:
            scores = capped(scores, maps.softcap)
            slopes = (1 - (scores / maps.softcap).square()).flatten(0, 1)
        first = start if maps.window is None else 0  # where anything is hidden
        unseen = ~visible(maps.window, start, rows.stop, x.device)[:, first:]
        scores[..., first:].masked_fill_(unseen, -torch.inf)
        weights = scores.softmax(-1).flatten(0, 1)
        yield Attended(rows, block, keys, v[:, : rows.stop], weights, slopes)


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
        read = torch.zeros(length, device=x.device)
        scales = maps.key_scales(sequence).square().mT  # [G, T]
        for seen in attend(maps, sequence):
            j = score_importance(maps, seen, norms, seen.per_score(seen.weights).square())
            add_by_lag(lags, j)
            pairs = seen.q.unflatten(-1, (2, half)).square().sum(-2)  # [H, B, P], whatever the turn
            energy += torch.einsum("hb,hbp->hp", j.sum(-1), pairs).double()
            by_group = j.sum(1).unflatten(0, (maps.kv_heads, -1)).sum(1)
            read[: seen.rows.stop] += (by_group * scales[:, : seen.rows.stop]).sum(0)
        keyed = torch.cat([sequence, torch.ones_like(sequence[:, :1])], dim=1)
        inputs += ((keyed * read[:, None]).T @ keyed).double()
    total = lags.sum(1, keepdim=True).clamp_min(1e-300)
    phases = torch.polar(
        torch.ones((), dtype=torch.float64, device=x.device),
        position_angles(maps.inv_freq.double(), length),
    )
    mean_phase = (lags / total).to(phases.dtype) @ phases
    mean_phase[:, maps.inv_freq == 0] = 1  # whatever the text, and to the last digit
    return PhaseMoments(
        mean_phase=mean_phase,
        query_energy=energy / (x.shape[0] * length) * maps.scaling**2,
        inputs=inputs / total.sum(),
    )


def output_norms(maps: AttentionMaps) -> Float[Tensor, "H V V"]:
    """o_h^T o_h: the squared length of what a change of head h's output adds to y."""
    return torch.einsum("dhv,dhw->hvw", maps.o, maps.o)


def score_importance(
    maps: AttentionMaps,
    seen: Attended,
    norms: Float[Tensor, "H V V"],
    emphasis: Float[Tensor, "H B S"],
) -> Float[Tensor, "H B S"]:
    """emphasis_ts |o_h (v_s - o_t)|^2: with a_ts^2, J, the output's squared change per score."""
    v = seen.v.repeat_interleave(maps.repeats, 0)  # [H, S, V]
    out = seen.weights @ v
    weighed = out @ norms
    distance = -2 * weighed @ v.mT
    distance += (v @ norms * v).sum(-1)[:, None, :]
    distance += (weighed * out).sum(-1)[:, :, None]
    return distance.clamp_min_(0).mul_(emphasis)


def add_by_lag(lags: Float[Tensor, "H T"], j: Float[Tensor, "H B S"]) -> None:
    """Adds to lags the sums of j over t - s = 0, 1, ...; what has s > t is left out."""
    heads, rows, length = j.shape
    # Each row is written one column further left than the one before, so that a lag is a column.
    width = rows + length
    skewed = j.new_zeros(heads, rows, width)
    skewed.as_strided(j.shape, (rows * width, width - 1, 1), rows - 1).copy_(j)
    lags[:, :length] += skewed[..., :length].sum(1).flip(-1).double()


def probe_gradients(
    maps: AttentionMaps,
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    unrotated_q: Callable[[Float[Tensor, "T D"]], Float[Tensor, "T H K"]] | None = None,
    *,
    rotated_too: bool = False,
) -> tuple[Float[Tensor, "N T G E"], Float[Tensor, "N T G V"]]:
    """Gradients of sum_t z_t . y_t for random z, with respect to un-rotated keys, and to values.

    Keys are meant before their norm, where they are linear in the input.

    Args:
        unrotated_q: position-free queries of a sequence. The key gradients are then those of the
            position-free keys these queries meet.
        rotated_too: those of the keys as they are come first, and of position-free ones second.
    """
    angles = position_angles(maps.inv_freq, x.shape[1])[:, None].float()
    rotated = maps.qk_dim if unrotated_q is None or rotated_too else 0
    width = rotated + (0 if unrotated_q is None else unrotated_q(x[0, :1]).shape[-1])
    keys = x.new_zeros(len(x), maps.kv_heads, x.shape[1], width)
    values = x.new_zeros(len(x), maps.kv_heads, x.shape[1], maps.v_dim)
    for i, sequence in enumerate(x):
        free = None if unrotated_q is None else unrotated_q(sequence).transpose(0, 1)
        for seen, heads, weights, scores in _backward(maps, sequence, generator):
            q = seen.q[..., :rotated]
            if free is not None:
                q = torch.cat([q, free[:, seen.rows]], dim=-1)
            q = q.unflatten(0, (maps.kv_heads, -1))
            # Summed over a group's heads in the product itself.
            keys[i, :, : seen.rows.stop] += scores.flatten(1, 2).mT @ q.flatten(1, 2)
            values[i, :, : seen.rows.stop] += weights.flatten(1, 2).mT @ heads.flatten(1, 2)
    keys, values = keys.transpose(1, 2).mul_(maps.scaling), values.transpose(1, 2)
    if rotated:
        keys[..., :rotated] = rotate(keys[..., :rotated], -angles)
    if maps.k_norm is not None and unrotated_q is None:
        keys = before_norm(keys, project(x, maps.k, maps.k_bias), maps.k_norm, maps.norm_eps)
    return keys, values


def query_gradients(
    maps: AttentionMaps, x: Float[Tensor, "N T D"], generator: torch.Generator
) -> Float[Tensor, "N T H E"]:
    """Gradients of sum_t z_t . y_t for random z, with respect to un-rotated queries.

    They too are meant before their norm.
    """
    angles = position_angles(maps.inv_freq, x.shape[1]).float()
    queries = x.new_empty(len(x), maps.heads, x.shape[1], maps.qk_dim)
    for i, sequence in enumerate(x):
        for seen, _, _, scores in _backward(maps, sequence, generator):
            queries[i, :, seen.rows] = (scores @ seen.k[:, None]).flatten(0, 1)
    queries = rotate(queries * maps.scaling, -angles).transpose(1, 2)
    if maps.q_norm is None:
        return queries
    return before_norm(queries, project(x, maps.q, maps.q_bias), maps.q_norm, maps.norm_eps)


def before_norm(
    gradients: Float[Tensor, "*batch H E"],
    z: Float[Tensor, "*batch H E"],
    weight: Float[Tensor, " E"] | Float[Tensor, "H E"],
    eps: float,
) -> Float[Tensor, "*batch H E"]:
    """Gradients with respect to z, from those with respect to z / rms(z) * weight.

    Along z itself nothing changes but by eps: the norm has taken z's length away.
    """
    dims = tuple(range(-weight.dim(), 0))  # of a head, or of all of them
    inverse = (z.square().mean(dims, keepdim=True) + eps).rsqrt()
    weighed = gradients * weight
    along = (weighed * z).mean(dims, keepdim=True) * inverse.square()
    return (weighed - z * along) * inverse


def _backward(
    maps: AttentionMaps, x: Float[Tensor, "T D"], generator: torch.Generator
) -> Iterator[tuple[Attended, Tensor, Tensor, Tensor]]:
    """A random output direction's gradients, to a block's heads and its scores before scaling.

    Yields:
        the block, the gradients to its heads' outputs [G, R, B, V], its softmax weights
        [G, R, B, S] and the gradients to its scores [G, R, B, S].
    """
    z = torch.randn(len(x), maps.hidden, generator=generator).to(x.device)
    for seen in attend(maps, x):
        heads = torch.einsum("td,dhv->htv", z[seen.rows], maps.o).unflatten(0, (maps.kv_heads, -1))
        weights = seen.weights.unflatten(0, (maps.kv_heads, -1))
        scores = heads @ seen.v[:, None].mT  # the softmax's backward pass, in place
        out = weights @ seen.v[:, None]
        scores -= (heads * out).sum(-1, keepdim=True)  # = sum_s scores weights
        scores *= weights
        yield seen, heads, weights, seen.per_score(scores)


def kronecker(
    x: Float[Tensor, "N T D"],
    gradients: Float[Tensor, "N T M"],
    energy: Float[Tensor, "N T"] | None = None,
) -> Kronecker:
    """The two factors, each weighted token by token by the size of the other.

    Args:
        energy: the gradients' squared sizes, where those given are a linear map of them.
    """
    energy = gradients.square().sum(2) if energy is None else energy
    x, gradients, importance = x.flatten(0, 1), gradients.flatten(0, 1), energy.flatten()
    importance = (importance / importance.mean().clamp_min(1e-30)) ** INPUT_POWER
    importance = importance / importance.sum().clamp_min(1e-30)
    mean = importance @ x
    centred = x - mean
    inputs = (centred * importance[:, None]).T @ centred
    size = ((centred @ inputs) * centred).sum(1).clamp_min(0) ** GRADIENT_POWER
    size = size / size.sum().clamp_min(1e-30)
    moment = gradients.new_zeros(gradients.shape[1], gradients.shape[1])
    for rows, scale in zip(
        gradients.split(TOKENS_AT_ONCE), size.split(TOKENS_AT_ONCE), strict=True
    ):
        moment.addmm_((rows * scale[:, None]).T, rows)
    return Kronecker(moment, inputs, mean)


def query_factors(
    maps: AttentionMaps,
    q: Float[Tensor, "H Q D"],
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    layout: Float[Tensor, "H K Q"],
) -> tuple[Factors, Float[Tensor, " D"]]:
    """The stacked queries of every rank under their Gauss-Newton moments, and the input's mean.

    Args:
        maps: the attention the queries belong to, in float32.
        q: the query maps, in a layout of their own.
        layout: what takes them to those of `maps`, head by head.
    """
    weight, by_gram = q.flatten(0, 1), q.shape[0] * q.shape[1] > q.shape[2]
    felt, energy = [], []
    for sequence in x:  # all heads' gradients are the largest thing here
        gradients = query_gradients(maps, sequence[None], generator)
        gradients = torch.einsum("nthk,hkq->nthq", gradients, layout).flatten(2)
        energy.append(gradients.square().sum(2))
        felt.append((gradients.to(q.dtype) @ weight).float() if by_gram else gradients)
    moments = in_precision(kronecker(x, torch.cat(felt), torch.cat(energy)), q.dtype)
    factorise = gram_svd if by_gram else weighted_svd
    return factorise(weight, moments.gradients, moments.inputs), moments.mean
