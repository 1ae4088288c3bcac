"""Merged heads whose queries and keys are normalised: their maps, and the weights of their norms.

A key is k = w n with n = W x / rms(W x), and a query likewise. Phases of pairs, which align heads,
pass through such a norm. But a merged key z = Y k is a sum of keys that have a number 1 / rms each,
and these vary from token to token, while the class makes w' L x / rms(L x) of a linear map. So two
things are fitted. Keys are first replaced by linear maps times one number a token, which the norm
takes away whatever it is: a regression, with the geometric mean of the heads' numbers for it. And
the weights w' are such that z / w' has the mean energy of n, pair by pair, so that rms(L x) is
about the number that is meant. Where the heads' numbers are in step, as they are if all heads are
normalised together, and the weights of a pair's two dims are equal, nothing is lost of heads that
differ by phases; and by complex multiples, if all are normalised together.

Letters: H query heads, G source KV heads, K target KV heads, S source KV heads of one group, E
query and key width, D hidden size, D1 = D + 1, M = G E.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .grouping import Group
from .maps import AttentionMaps, augmented
from .shared_key import SharedKey

# Of the mean energy of an input: keeps a regression from following the text where that is short.
# Errors differ by less than 1% from 0.01 to 0.1.
RIDGE = 0.03
# The same for `shared_key`. Large numbers where there is little energy are free there, and not in a
# norm: a trained layer's error is 1% less than with next to no ridge.
KEY_RIDGE = 0.1
# Of the largest: a weight below it counts as this much where something is divided by it.
LEAST = 1e-6


@dataclass(frozen=True)
class MergedHeads:
    """Maps of [x, 1], query heads side by side by group, and the weights of the norms they meet."""

    q: Float[Tensor, "H E D1"]
    k: Float[Tensor, "K E D1"]
    q_norm: Float[Tensor, " E"] | Float[Tensor, "H E"] | None = None
    k_norm: Float[Tensor, " E"] | Float[Tensor, "K E"] | None = None


def linear_keys(
    maps: AttentionMaps, cross: Float[Tensor, "M D1"], inputs: Float[Tensor, "D1 D1"]
) -> Float[Tensor, "G E D1"]:
    """Maps of [x, 1] that are nearest to the normalised keys, up to one number a token.

    Every head's own map times a factor, and a ridge regression of what that leaves.

    Args:
        cross: second moment of the stacked keys and of [x, 1] times that number.
        inputs: second moment of [x, 1] times that number.
    """
    assert maps.k_norm is not None
    own = augmented(maps.k, maps.k_bias) * maps.k_norm.expand(maps.k.shape[:2])[..., None]
    wanted = cross.view_as(own)
    energy = (own @ inputs * own).sum((1, 2)).clamp_min(torch.finfo(own.dtype).tiny)
    own = own * ((wanted * own).sum((1, 2)) / energy)[:, None, None]
    damped = inputs.clone()
    damped.diagonal().add_((RIDGE * inputs.diagonal().mean()).clamp_min(1e-30))
    missing = (wanted - own @ inputs).flatten(0, 1)
    return own + torch.linalg.solve(damped, missing.mT).mT.view_as(own)


def merge_normalised(
    maps: AttentionMaps,
    linear: Float[Tensor, "G E D1"],
    inputs: Float[Tensor, "D1 D1"],
    queries: Float[Tensor, "H E E"],
    shared: Sequence[SharedKey],
    partition: Sequence[Group],
) -> MergedHeads:
    """The merged heads of all groups.

    Args:
        linear, inputs: the `linear_keys`, and what they were made with.
        queries: second moment of every query head, its norm included, times what its scores count.
        shared: each group's key.
    """
    assert maps.q_norm is not None and maps.k_norm is not None
    weight = maps.k_norm.expand(maps.k.shape[:2])
    keys, squares = [], []
    for key, group in zip(shared, partition, strict=True):
        heads = list(group)
        made = linear[heads].flatten(0, 1)
        key, square = _sized(key, made @ inputs @ made.mT, weight[heads])
        keys.append(key)
        squares.append(square)
    k_norm = torch.stack(squares)
    if maps.k_norm.dim() == 1:  # one weight for all heads
        k_norm = k_norm.mean(0).expand_as(k_norm)
    k_norm = k_norm.sqrt()
    merged = [
        key.analysis @ linear[list(group)].flatten(0, 1)
        for key, group in zip(keys, partition, strict=True)
    ]
    by_group = torch.arange(maps.heads).unflatten(0, (maps.kv_heads, -1))
    order = torch.cat([by_group[list(group)].flatten() for group in partition])
    synthesis = torch.cat([key.synthesis for key in keys])
    weight = maps.q_norm.expand(maps.q.shape[:2])[order]
    own = augmented(maps.q, maps.q_bias)[order] * weight[..., None]
    q_norm = _query_weights(queries[order], synthesis, weight, together=maps.q_norm.dim() == 2)
    return MergedHeads(
        q=synthesis.mT @ own / _divisor(q_norm)[..., None],
        k=torch.stack(merged) / _divisor(k_norm)[..., None],
        q_norm=q_norm if maps.q_norm.dim() == 2 else q_norm[0],
        k_norm=k_norm if maps.k_norm.dim() == 2 else k_norm[0],
    )


def _sized(
    key: SharedKey, moment: Float[Tensor, "SE SE"], weight: Float[Tensor, "S E"]
) -> tuple[SharedKey, Float[Tensor, " E"]]:
    """A group's key with every pair as large as its weight asks for, and the weights' squares.

    A pair may be made larger where its queries are made smaller. A pair's weight is the mean of its
    heads', so that heads with one weight, which a norm of each head has, keep it.

    Args:
        moment: second moment of the group's stacked keys.
        weight: of their norm.
    """
    energy = moment.diagonal().view_as(weight) / _divisor(weight).square()
    before = _paired(energy).mean(0)
    after = _paired((key.analysis @ moment * key.analysis).sum(1))
    pairs = _paired(weight.square()).mean(0)
    used = (before > LEAST * before.max()) & (after > LEAST * after.max()) & (pairs > 0)
    factor = torch.where(used, pairs * before / after.where(used, 1), 1).sqrt()
    maps = key.analysis.unflatten(1, weight.shape).transpose(0, 1)  # [S, E, E]
    square = pairs * _share(_turned(maps, weight.square()).sum(0))
    return SharedKey(key.analysis * factor[:, None], key.synthesis / factor), square


def _query_weights(
    moments: Float[Tensor, "H E E"],
    synthesis: Float[Tensor, "H E E"],
    weight: Float[Tensor, "H E"],
    *,
    together: bool,
) -> Float[Tensor, "H E"]:
    """Weights of the norm by which queries have the energy that the merged key asks for.

    Pair by pair, of every head, or of all heads where they have one weight. A norm of each head
    makes all queries of one length there, whatever is asked for: one last factor makes the energy
    of all heads right.

    Args:
        moments: of the source's queries.
        weight: the source's.
        together: whether all heads are normalised together.
    """
    plain = moments.diagonal(dim1=1, dim2=2) / _divisor(weight).square()
    wanted = (synthesis.mT @ moments @ synthesis).diagonal(dim1=1, dim2=2)
    counts = plain.mean(1, keepdim=True)  # what a head's scores count
    mixed = _turned(synthesis.mT, weight.square()) * counts
    tiny = torch.finfo(plain.dtype).tiny
    if together:
        return (_paired(wanted) / _paired(plain).clamp_min(tiny) * _share(mixed)).sqrt()
    square = _paired(wanted.sum(0)) / _paired(plain.sum(0)).clamp_min(tiny) * _share(mixed.sum(0))
    length = (wanted / _divisor(square.sqrt()).square()).mean(1, keepdim=True).clamp_min(tiny)
    energy = wanted.sum(1, keepdim=True)
    factor = energy.sum() / (counts * energy / length).sum().clamp_min(tiny)
    return (square * factor).sqrt().expand_as(plain)


def _paired(values: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
    """The mean of a pair's two numbers, for both."""
    halves = values.unflatten(-1, (2, -1))
    return halves.mean(-2, keepdim=True).expand_as(halves).flatten(-2)


def _turned(maps: Float[Tensor, "H E E"], square: Float[Tensor, "H E"]) -> Float[Tensor, "H E"]:
    """Variances of what the maps make of dims of these variances, by their complex multiples alone.

    They say which dim of a pair went where. The rest of a map may hold large numbers of no effect.
    """
    half = maps.shape[1] // 2
    (rr, ri), (ir, ii) = (
        [block.diagonal(dim1=1, dim2=2) for block in row.split(half, 2)]
        for row in maps.split(half, 1)
    )
    re, im = (rr + ii).square(), (ir - ri).square()
    first, second = square.split(half, 1)
    return torch.cat([re * first + im * second, im * first + re * second], 1)


def _share(values: Float[Tensor, "*batch E"]) -> Float[Tensor, "*batch E"]:
    """Each dim's number over the mean of its pair's; 1 where both are 0."""
    mean = _paired(values)
    return torch.where(mean > 0, values / mean.where(mean > 0, 1), 1)


def _divisor(weight: Tensor) -> Tensor:
    """The weight, without numbers near 0."""
    least = (LEAST * weight.abs().max()).clamp_min(1e-30)
    return weight.where(weight.abs() > least, least)
