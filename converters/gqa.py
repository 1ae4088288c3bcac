"""Grouped-query and multi-query attention (2305.13245, 1911.02150) from any attention's maps.

The KV heads of a target group become one. Mean pooling averages them as they are. Aligning uses
what an attention layer does not care about. Values may be any mix of the group's, since every query
head has its own output map: a group keeps the best V directions of all its values together. Keys
may be any complex multiple, frequency by frequency, since that commutes with RoPE and every query
head has its own query map: a group keeps, of every frequency, the best single complex component of
all its keys. From there keys and queries are fitted in turn, and now pairs of different frequency
may help each other out as far as they stay in phase over the lags that attention spans. Queries and
keys that are normalised are merged likewise, see `shared_norm`.

Letters: H query heads, G source KV heads, K target KV heads, S source KV heads of one group
(S = G/K), R query heads of a source KV head, E query and key width, P = E/2 pairs, V value width,
D hidden size, N sequences, T tokens in each.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .calibration import (
    Attended,
    Kronecker,
    add_by_lag,
    attend,
    in_precision,
    kronecker,
    output_norms,
    probe_gradients,
    score_importance,
)
from .errors import InputError
from .grouping import Group, best_partition
from .lowrank import weighted_svd
from .maps import AttentionMaps, augmented, position_angles, rotate
from .shared_key import RIDGE, KeyProblem, SharedKey, commuting_moment, shared_key
from .shared_norm import KEY_RIDGE, MergedHeads, linear_keys, merge_normalised

POOLINGS = ("aligned", "mean")

# Scores are off by much where a whole head is replaced, so an error counts as well at keys that are
# hardly attended: where it lifts them. The softmax weights of the moments are tempered by this.
TEMPER = 0.5


@dataclass(frozen=True)
class GQA:
    """The weights of one attention layer with fewer KV heads, as the family's own class has them.

    Args:
        q, o: query heads in the order of their groups, which need not be the source's.
        k, v: one map a group.
        inv_freq: the source's frequencies.
        scaling: the score multiplier, a rotary attention factor included.
        q_bias, k_bias, v_bias, o_bias: there exactly where the source has them, for a stock config
            has one flag for all.
        q_norm, k_norm, norm_eps: of queries, and of keys, before their rotation, as in the maps.
        window: how many keys a query reads; None for all.
        softcap: what scores are capped by; None for nothing.
    """

    q: Float[Tensor, "H E D"]
    k: Float[Tensor, "K E D"]
    v: Float[Tensor, "K V D"]
    o: Float[Tensor, "D H V"]
    inv_freq: Float[Tensor, " P"]
    scaling: float
    q_bias: Float[Tensor, "H E"] | None = None
    k_bias: Float[Tensor, "K E"] | None = None
    v_bias: Float[Tensor, "K V"] | None = None
    o_bias: Float[Tensor, " D"] | None = None
    q_norm: Float[Tensor, " E"] | Float[Tensor, "H E"] | None = None
    k_norm: Float[Tensor, " E"] | Float[Tensor, "K E"] | None = None
    norm_eps: float = 0.0
    window: int | None = None
    softcap: float | None = None

    @property
    def num_key_value_heads(self) -> int:
        return self.k.shape[0]

    @property
    def cache_width(self) -> int:
        """Numbers cached per token."""
        return self.k.shape[0] * (self.k.shape[1] + self.v.shape[1])

    def biases(self) -> dict[str, bool]:
        """Which projections have a bias, by field name."""
        names = ("q_bias", "k_bias", "v_bias", "o_bias")
        return {name: getattr(self, name) is not None for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that can be fitted, by field name."""
        fixed = ("inv_freq",)
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k not in fixed}

    def balanced(self) -> "GQA":
        """Itself: its heads are the source's, or made of them, and as large."""
        return self

    def expand(self) -> AttentionMaps:
        """The same attention as maps per head."""
        return AttentionMaps(**vars(self))

    def reader(self) -> AttentionMaps:
        return self.expand()

    def state_dict(self, rope_factor: float = 1.0) -> dict[str, Tensor]:
        """Tensors by the names of the family's own attention module, its norms' weights whole.

        Args:
            rope_factor: what other forms need; the stock class gives it to every pair.
        """
        tensors: dict[str, Tensor | None] = {"o_proj.weight": self.o.flatten(1)}
        tensors["o_proj.bias"] = self.o_bias
        for name in "qkv":
            tensors[f"{name}_proj.weight"] = getattr(self, name).flatten(0, 1)
            bias = getattr(self, f"{name}_bias")
            tensors[f"{name}_proj.bias"] = None if bias is None else bias.flatten()
        for name in ("q_norm", "k_norm"):
            norm = getattr(self, name)
            tensors[f"{name}.weight"] = None if norm is None else norm.flatten()
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class GQAMoments:
    """All that the calibration text says about one layer.

    Args:
        queries: second moment of every head's un-rotated queries, times what their scores count.
        lags: share of t - s = 0, 1, ... in what the scores of a head count.
        key_inputs: second moment of [x, 1] as keys, under the same weights; where keys are
            normalised, of [x, 1] times the geometric mean of the heads' inverse RMS.
        values: Gauss-Newton factors of the value maps.
        keys: where they are normalised, their second moment with the same; None elsewhere.
    """

    queries: Float[Tensor, "H E E"]
    lags: Float[Tensor, "H T"]
    key_inputs: Float[Tensor, "D1 D1"]
    values: Kronecker
    keys: Float[Tensor, "M D1"] | None = None


def gqa_moments(
    maps: AttentionMaps, x: Float[Tensor, "N T D"], generator: torch.Generator
) -> GQAMoments:
    """Moments of one layer on calibration inputs x, in float32.

    Values reach the output linearly, so their weights are the Gauss-Newton matrix' factors.
    Keys do not: the Gauss-Newton weight of a score is J_ts = a_ts^2 |o_h (v_s - o_t)|^2, which
    vanishes wherever the original does not look, and a key that is far off there draws attention
    that it must not have. Here a_ts^2 gives way to a_ts^1/2 / sum_s a_ts^1/2. Measured at 6 heads
    to 1, keys alone: perplexity 55.5 -> 82 with these weights, 95 with all scores counting
    alike, 870 with Gauss-Newton's.
    """
    narrow, length = maps.to(torch.float32), x.shape[1]
    norms, angles = output_norms(narrow), position_angles(narrow.inv_freq, length)
    queries = torch.zeros(
        maps.heads, maps.qk_dim, maps.qk_dim, dtype=torch.float64, device=x.device
    )
    lags = torch.zeros(maps.heads, length, dtype=torch.float64, device=x.device)
    inputs = torch.zeros(maps.hidden + 1, maps.hidden + 1, dtype=torch.float64, device=x.device)
    keys: Any = 0.0
    total = 0.0
    for sequence in x:
        read = torch.zeros(length, device=x.device)
        for seen in attend(narrow, sequence):
            weights = score_weights(narrow, seen, norms)
            q = rotate(seen.q, -angles[seen.rows])
            queries += ((q * weights.sum(-1, keepdim=True)).mT @ q).double()
            add_by_lag(lags, weights)
            read[: seen.rows.stop] += weights.sum((0, 1))
        keyed = torch.cat([sequence, torch.ones_like(sequence[:, :1])], dim=1)
        total += float(read.sum())
        if maps.k_norm is not None:
            keyed = keyed * narrow.key_scales(sequence).log().mean(1, keepdim=True).exp()
            weighed = narrow.keys(sequence).flatten(1) * read[:, None]
            keys = keys + (weighed.T @ keyed).double()
        inputs += ((keyed * read[:, None]).T @ keyed).double()
    total = max(total, 1e-300)
    gradients = probe_gradients(narrow, x, generator)[1]
    return GQAMoments(
        queries=queries * maps.scaling**2 / (x.shape[0] * length),
        lags=lags / lags.sum(1, keepdim=True).clamp_min(1e-300),
        key_inputs=inputs / total,
        values=kronecker(x, gradients.flatten(2)),
        keys=None if maps.k_norm is None else keys / total,
    )


def score_weights(
    maps: AttentionMaps, seen: Attended, norms: Float[Tensor, "H V V"]
) -> Float[Tensor, "H B S"]:
    """a_ts^1/2 / sum_s a_ts^1/2 times |o_h (v_s - o_t)|^2."""
    spread = seen.weights**TEMPER  # 0 for what is to come
    spread = spread / spread.sum(-1, keepdim=True)
    return score_importance(maps, seen, norms, seen.per_score(seen.per_score(spread)))


def to_gqa(
    maps: AttentionMaps,
    moments: GQAMoments | None,
    num_key_value_heads: int,
    pooling: str = "aligned",
) -> GQA:
    """The layer with `num_key_value_heads` KV heads; the source's own number is the identity.

    Args:
        moments: only "aligned" needs them.
        pooling: one of `POOLINGS`.

    Raises:
        InputError: the number does not divide the source's KV heads, or the pooling is unknown.
    """
    groups = maps.kv_heads
    if num_key_value_heads < 1 or groups % num_key_value_heads:
        divisors = ", ".join(str(n) for n in range(1, groups + 1) if groups % n == 0)
        raise InputError(
            f"num_key_value_heads={num_key_value_heads} does not divide the source's {groups} KV "
            f"heads. Use one of {divisors}."
        )
    if pooling not in POOLINGS:
        raise InputError(f"pooling {pooling!r} is unknown. Use one of {', '.join(POOLINGS)}.")
    moments = in_precision(moments, maps.q.dtype)
    if num_key_value_heads == groups:
        return GQA(**_as_they_are(maps))
    if pooling == "mean":
        return mean_pooled(maps, num_key_value_heads)
    if moments is None:
        raise ValueError("aligned pooling needs moments.")
    return aligned(maps, moments, similar_heads(maps, moments, num_key_value_heads))


def mean_pooled(maps: AttentionMaps, num_key_value_heads: int) -> GQA:
    """Neighbouring KV heads averaged, the start of the GQA paper (2305.13245, section 2.1)."""

    def mean(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.unflatten(0, (num_key_value_heads, -1)).mean(1)

    pooled = {name: mean(getattr(maps, name)) for name in ("k", "v", "k_bias", "v_bias")}
    if maps.k_norm is not None and maps.k_norm.dim() == 2:  # a weight for every head
        pooled["k_norm"] = mean(maps.k_norm)
    return GQA(**_as_they_are(maps) | pooled)


def _as_they_are(maps: AttentionMaps) -> dict[str, Any]:
    return {name: getattr(maps, name) for name in GQA.__dataclass_fields__}


@dataclass(frozen=True)
class MergedValues:
    """v_s ~ up[s] down x for every source head s of a group."""

    up: Float[Tensor, "S V V"]
    down: Float[Tensor, "V D1"]


def merge_values(maps: AttentionMaps, moments: GQAMoments, group: Group) -> MergedValues:
    """The best V directions of the group's values together, under their Gauss-Newton moments.

    Softmax weights sum to 1, so a constant passes straight to the output: where o has a bias it
    takes it, and only what varies needs directions. Where it has none, constants are like the rest.
    """
    rows = _rows_of(group, maps.v_dim)
    weight, inputs = _value_problem(maps, moments.values)
    factors = weighted_svd(weight[rows], moments.values.gradients[rows][:, rows], inputs)
    # Free as well: an invertible mix. With orthogonal columns values keep their own size.
    up, mix = torch.linalg.qr(factors.up[:, : maps.v_dim])
    size = len(group) ** 0.5
    down = mix @ factors.down[: maps.v_dim] / size
    missing = maps.v_dim - len(down)  # where the input has fewer dims than a head
    down = torch.nn.functional.pad(down, (0, maps.hidden + 1 - down.shape[1], 0, missing))
    up = torch.nn.functional.pad(up, (0, missing))
    return MergedValues(up=(up * size).unflatten(0, (len(group), -1)), down=down)


def aligned(maps: AttentionMaps, moments: GQAMoments, partition: tuple[Group, ...]) -> GQA:
    """The layer with every group of source KV heads merged, its query heads side by side."""
    outputs = maps.o.unflatten(1, (maps.kv_heads, maps.repeats))  # [D, G, R, V]
    problem = key_problem(maps, moments)
    ridge = RIDGE if maps.k_norm is None else KEY_RIDGE
    shared = [shared_key(problem.of_group(group), ridge=ridge) for group in partition]
    merged = merge_heads(maps, moments, shared, partition)
    v, o = [], []
    for group in partition:
        found = merge_values(maps, moments, group)
        v.append(found.down)
        o.append(torch.einsum("dsrv,svw->dsrw", outputs[:, list(group)], found.up).flatten(1, 2))
    queries, keys, values = merged.q, merged.k, torch.stack(v)
    gqa = GQA(
        q=queries[..., :-1],
        k=keys[..., :-1],
        v=values[..., :-1],
        o=torch.cat(o, dim=1),
        inv_freq=maps.inv_freq,
        scaling=maps.scaling,
        q_norm=merged.q_norm,
        k_norm=merged.k_norm,
        norm_eps=maps.norm_eps,
        window=maps.window,
        softcap=maps.softcap,
        q_bias=None if maps.q_bias is None else queries[..., -1],
        k_bias=None if maps.k_bias is None else keys[..., -1],
        v_bias=None if maps.v_bias is None else values[..., -1],
        o_bias=maps.o_bias,
    )
    return _with_constants(gqa, maps, moments.values.mean)


def merge_heads(
    maps: AttentionMaps,
    moments: GQAMoments,
    shared: list[SharedKey],
    partition: tuple[Group, ...],
) -> MergedHeads:
    """Queries and keys of all groups, the query heads of each side by side."""
    keys = source_keys(maps, moments)
    if maps.k_norm is not None:
        return merge_normalised(maps, keys, moments.key_inputs, moments.queries, shared, partition)
    queries = augmented(maps.q, maps.q_bias).unflatten(0, (maps.kv_heads, -1))
    q, k = [], []
    for key, group in zip(shared, partition, strict=True):
        q.append(key.synthesis.mT @ queries[list(group)].flatten(0, 1))
        k.append(key.analysis @ keys[list(group)].flatten(0, 1))
    return MergedHeads(q=torch.cat(q), k=torch.stack(k))


def _with_constants(gqa: GQA, maps: AttentionMaps, mean: Float[Tensor, " D"]) -> GQA:
    """The form with the mean value's way to the output restored, as far as its biases can."""
    if maps.o_bias is None and maps.v_bias is None:
        return gqa
    missing = _constant_output(maps, mean) - _constant_output(gqa.expand(), mean)
    if gqa.o_bias is not None:
        return replace(gqa, o_bias=gqa.o_bias + missing)
    assert gqa.v_bias is not None
    through = gqa.o.unflatten(1, (gqa.num_key_value_heads, -1)).sum(2).flatten(1)  # [D, K V]
    bias = torch.linalg.lstsq(through, missing[:, None], driver="gelsd").solution
    return replace(gqa, v_bias=gqa.v_bias + bias.view_as(gqa.v_bias))


def _constant_output(maps: AttentionMaps, mean: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    values = augmented(maps.v, maps.v_bias) @ torch.cat([mean, mean.new_ones(1)])
    return torch.einsum("dhv,hv->d", maps.o, values.repeat_interleave(maps.repeats, 0))


def _value_problem(
    maps: AttentionMaps, moments: Kronecker
) -> tuple[Float[Tensor, "M D0"], Float[Tensor, "D0 D0"]]:
    """The stacked value maps and their input's moment; of [x, 1] where v alone has a bias."""
    weight, inputs, mean = maps.v.flatten(0, 1), moments.inputs, moments.mean
    if maps.o_bias is not None:
        return weight, inputs
    if maps.v_bias is not None:
        weight = torch.cat([weight, maps.v_bias.flatten()[:, None]], dim=1)
        inputs = torch.nn.functional.pad(inputs, (0, 1, 0, 1))
        mean = torch.cat([mean, mean.new_ones(1)])
    return weight, inputs + torch.outer(mean, mean)


def key_problem(maps: AttentionMaps, moments: GQAMoments) -> KeyProblem:
    """What a key shared by all heads would have to serve; groups are parts of it."""
    stacked = source_keys(maps, moments).flatten(0, 1)
    second = stacked @ moments.key_inputs @ stacked.mT
    return KeyProblem.of(second, moments.queries, moments.lags, maps.inv_freq)


def source_keys(maps: AttentionMaps, moments: GQAMoments) -> Float[Tensor, "G E D1"]:
    """Every KV head's key as a map of [x, 1]; the nearest one where keys are normalised."""
    if moments.keys is None:
        return augmented(maps.k, maps.k_bias)
    return linear_keys(maps, moments.keys, moments.key_inputs)


def similar_heads(
    maps: AttentionMaps, moments: GQAMoments, num_key_value_heads: int
) -> tuple[Group, ...]:
    """Which source KV heads share a target head: the partition of least predicted error."""
    cost = merging_cost(maps, moments)
    return best_partition(cost, maps.kv_heads, maps.kv_heads // num_key_value_heads)


def merging_cost(maps: AttentionMaps, moments: GQAMoments) -> Callable[[Group], float]:
    """The error that merging a group of KV heads leaves, of keys and values, as a function.

    Keys count by what their best commuting key leaves. All errors are eigenvalues of the group's
    part of matrices that are made once.
    """
    _, keys = commuting_moment(key_problem(maps, moments))  # [P, G, G]
    weight, inputs = _value_problem(maps, moments.values)
    values = weight @ inputs @ weight.mT  # [G V, G V]
    gradients = moments.values.gradients
    # Sums in single precision may have made it slightly indefinite.
    floor = gradients.abs().sum(1).max().clamp_min(1e-200) * 1e-7
    gradients = gradients + floor * torch.eye(len(gradients)).to(gradients)

    @cache
    def cost(group: Group) -> float:
        heads, rows = list(group), _rows_of(group, maps.v_dim)
        left = torch.linalg.eigvalsh(keys[:, heads][:, :, heads])[:, :-1].sum()
        root = torch.linalg.cholesky(gradients[rows][:, rows])
        lost = torch.linalg.eigvalsh(root.mT @ values[rows][:, rows] @ root)[: -maps.v_dim].sum()
        return float(left) + float(lost)

    return cost


def _rows_of(group: Group, width: int) -> list[int]:
    """Rows of the group's heads in the stacked maps."""
    return [head * width + row for head in group for row in range(width)]
