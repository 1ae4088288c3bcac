"""Layers of latent attention whose cached numbers are coded.

The transform is the Karhunen-Loeve transform under the importance: the channels are uncorrelated,
and an error of one adds to the loss what errors of others do not change. With A the importance of
keys and values W x and C the covariance of x, it comes from the singular value decomposition of
A^1/2 W C^1/2, and the squared singular values are the channels' energies.

Letters: as in `latent`, and c channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.nn.functional import linear

from ..modeling.coding import Code
from .coding import FIRST_CHANNELS, Channels, Dealt, first_channels
from .latent import LatentAttention, SharedKeyAttention, of_source
from .lowrank import Factors, WeightedSVD, square_roots
from .maps import AttentionMaps, normalised, project, rotate, token_angles
from .mla import MLA
from .moments import CodingMoments, CodingTokens
from .rope_split import output_bias
from .whole_keys import WholeKeyMLA

# The largest weight of what makes a channel, in its steps.
LARGEST = 1e4


@dataclass(frozen=True)
class CodedDims:
    """One layer's codes.

    Args:
        keys, values: the code of each.
        exact_tokens: first tokens of a sequence that are kept whole.
        rotated: whether keys are rotated components, and not read from one latent with values.
        scales: numbers beside them of 16 bits, by which keys are scaled where they are normalised.
    """

    keys: Dealt
    values: Dealt
    exact_tokens: int
    rotated: bool = True
    scales: int = 0

    @property
    def width(self) -> float:
        """The numbers of 16 bits that a token's row takes as much as."""
        return (self.keys.code.bytes + self.values.code.bytes) / 2 + self.scales

    def bytes(self, itemsize: int) -> float:
        """A token's bytes, with the numbers that are not coded of so many bytes each."""
        return self.keys.code.bytes + self.values.code.bytes + self.scales * itemsize

    @property
    def codes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The counts of the keys' code and of the values' code, as the config has them."""
        return self.keys.code.counts, self.values.code.counts

    def named(self) -> dict[str, int]:
        """The dims by the config's names."""
        keys, values = self.keys.code.channels, self.values.code.channels
        rotated = {"kv_lora_rank": values, "qk_rope_head_dim": keys}
        return rotated if self.rotated else {"kv_lora_rank": keys, "qk_rope_head_dim": 0}


@dataclass(frozen=True, kw_only=True)
class Coded(LatentAttention):
    """A layer whose cached channels are coded with a few bits each.

    Its maps give and read channels in units of their quantiser's steps, and `read` rounds them as a
    cache does.
    """

    dims: CodedDims

    @property
    def cache_width(self) -> int:
        return sum(self.dims.named().values()) + self.dims.scales

    def decoded(self, rows: Float[Tensor, "B T c"], code: Code) -> Float[Tensor, "B T c"]:
        """Rows of whole sequences as they are read from a cache."""
        exact = self.dims.exact_tokens
        return torch.cat([rows[:, :exact], code.rounded(rows[:, exact:])], dim=1)

    def balanced(self) -> Any:
        return replace(self, **self._even_queries())  # channels keep their steps

    def stored(self, x):
        return self.balanced()


@dataclass(frozen=True, kw_only=True)
class CodedWholeKeyMLA(Coded, WholeKeyMLA):
    """A coded latent from which keys are formed, turned whole when they are read, and values."""

    def read(self, x):
        pair = project(self.decoded(self.latent(x), self.dims.keys.code), self.kv_b, self.kv_b_bias)
        width = self.q.shape[1]
        k = normalised(pair[..., :width], self.k_norm, self.norm_eps)
        angles = token_angles(self.inv_freq, x)[:, None]
        return rotate(self.queries(x), angles), rotate(k, angles), pair[..., width:]


@dataclass(frozen=True, kw_only=True)
class CodedMLA(Coded, MLA):
    """A coded latent from which keys and values are read, of models without RoPE."""

    def read(self, x):
        latent = self.decoded(linear(x, self.kv_a, self.kv_a_bias), self.dims.keys.code)
        pair = project(latent, self.kv_b, self.kv_b_bias)
        free, _ = self.split_queries(self.queries(x))
        width = self.phase.shape[1]
        return free, pair[..., :width], pair[..., width:]


@dataclass(frozen=True, kw_only=True)
class TurnedKeyMLA(Coded, SharedKeyAttention):
    """A layer that codes components of keys after their rotation, and a latent of values.

    Args:
        kv_a: [components, the two parts of each pair side by side | latent of the values].
        k_mean: what is constant in keys, before their rotation.
        kv_b: values of every KV head, from the latent.
    """

    kv_a: Float[Tensor, "c D"]
    kv_a_bias: Float[Tensor, " c"]
    k_mean: Float[Tensor, "G E"]
    kv_b: Float[Tensor, "G V r"]

    @property
    def turned(self) -> list[int]:
        return list(range(self.q.shape[1] // 2))

    @property
    def resting(self) -> list[int]:
        return []

    def rows(self, x: Float[Tensor, "*batch D"]) -> tuple[Tensor, Tensor]:
        """Components, real parts then imaginary parts, before they are turned, and latents."""
        row = linear(x, self.kv_a, self.kv_a_bias)
        keys, latent = row.split([self.qk_rope_head_dim, self.kv_b.shape[2]], dim=-1)
        return torch.cat([keys[..., ::2], keys[..., 1::2]], dim=-1), latent

    def keys_and_values(self, x):
        components, latent = self.rows(x)
        return (
            latent.new_zeros(*latent.shape[:-1], len(self.kv_b), 0),
            components,
            project(latent, self.kv_b),
        )

    def spread(self, shared):
        return super().spread(shared) + self.k_mean

    def read(self, x):
        components, latent = self.rows(x)
        angles = token_angles(self.inv_freq, x)
        turned = rotate(components, angles[:, list(self.rope_pairs)])
        pairs = turned.unflatten(-1, (2, -1)).mT.flatten(-2)  # side by side, as they are coded
        pairs = self.decoded(pairs, self.dims.keys.code).to(latent.dtype)
        turned = torch.cat([pairs[..., ::2], pairs[..., 1::2]], dim=-1)
        angles = angles[:, None]
        k = super().spread(turned) + rotate(self.k_mean.expand(len(angles), -1, -1), angles)
        if self.k_norm is not None:
            plain = self.spread(components)
            k = k * self.key_scales(plain[..., :0], plain)[..., None]
        v = project(self.decoded(latent, self.dims.values.code), self.kv_b)
        return rotate(self.queries(x), angles), k, v

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return super().own_tensors(rope_factor) | {
            "k_mean": self.k_mean,
            "kv_a_proj_with_mqa.weight": self.kv_a,
            "kv_a_proj_with_mqa.bias": self.kv_a_bias,
            "kv_b_proj.weight": self.kv_b.flatten(0, 1),
        }


@dataclass(frozen=True)
class JointTransform:
    """One transform of keys and values together; keys before their norm and rotation.

    Args:
        maps: of the source.
        moments: of its keys and values.
    """

    maps: AttentionMaps
    moments: CodingMoments

    @cached_property
    def factors(self) -> Factors:
        rows = torch.cat([self.maps.k.flatten(0, 1), self.maps.v.flatten(0, 1)])
        return WeightedSVD.of(self.moments.importance, self.moments.covariance)(rows)

    def channels(self, seen: CodingTokens) -> tuple[Channels, ...]:
        """What each channel of the latent adds to the model's loss with each number of bits.

        Args:
            seen: the layer's tokens on calibration text.
        """
        return (Channels.measured(self._felt(seen), first=most_first_channels(self.moments)),)

    def _felt(self, seen: CodingTokens) -> tuple[Float[Tensor, "N c"], Float[Tensor, "N c"]]:
        """Every token's numbers in the latent's channels, and their gradients."""
        numbers = (seen.inputs - self.moments.mean) @ self.factors.down.mT
        return numbers, seen.gradients @ self.factors.up

    def build(self, dims: CodedDims) -> Coded:
        """The converted layer, whose latent has the channels that `dims` names, in their steps."""
        maps, groups, mean = self.maps, self.maps.kv_heads, self.moments.mean
        first = None if self.moments.first is None else self._felt(self.moments.first)[0]
        down, up = in_steps(self.factors, dims.keys, first)
        split = [groups * maps.qk_dim, groups * maps.v_dim]
        key_rows, value_rows = (part.unflatten(0, (groups, -1)) for part in up.split(split))
        key_bias = maps.k @ mean
        key_bias = key_bias if maps.k_bias is None else key_bias + maps.k_bias
        shared = of_source(maps) | dict(
            dims=dims,
            kv_a=down,
            kv_a_bias=-(down @ mean),
            kv_b=torch.cat([key_rows, value_rows], dim=1),
            kv_b_bias=torch.nn.functional.pad(key_bias, (0, maps.v_dim)),
            o_bias=output_bias(maps, torch.zeros_like(maps.v), mean),
            energy=tuple(self.factors.energy.tolist()),
        )
        if maps.inv_freq.any():
            return CodedWholeKeyMLA(**shared)
        rest = maps.q.new_zeros(maps.heads, maps.qk_dim)
        rest[:, : maps.qk_dim // 2] = 1
        none = maps.q.new_zeros(groups, 0)
        return CodedMLA(**shared, phase=rest, synthesis=none, rope_pairs=())


def most_first_channels(moments: CodingMoments) -> int:
    """How many channels the first tokens alone can use: at most one for each of them."""
    return 0 if moments.first is None else min(FIRST_CHANNELS, len(moments.first.inputs))


def steps_of(dealt: Dealt, rows: Float[Tensor, "c D"], unit: int = 1) -> Float[Tensor, " c"]:
    """The steps of a code's channels, [c], large enough for weights that float16 can hold.

    Only channels that the calibration text hardly shows need larger steps than they were dealt.

    Args:
        rows: what makes the channels that have bits.
        unit: how many channels side by side have one step.
    """
    large = rows.abs().amax(1).unflatten(0, (-1, unit)).amax(1).repeat_interleave(unit)
    return torch.tensor(dealt.steps).to(rows).maximum(large / LARGEST)


def in_steps(
    factors: Factors, dealt: Dealt, first: Float[Tensor, "N _"] | None
) -> tuple[Float[Tensor, "c _"], Float[Tensor, "_ c"]]:
    """The maps to and from a row's channels, in units of their steps.

    Args:
        factors: the maps to and from all channels.
        dealt: the code of the row.
        first: the first tokens' numbers in all channels, which say what channels of 0 bits hold.
    """
    order = list(dealt.order)
    step = steps_of(dealt, factors.down[order])
    down, up = factors.down[order] / step[:, None], factors.up[:, order] * step
    if first is None or not dealt.code.first:
        return down, up
    without = sorted(set(range(len(factors.down))) - set(order))
    weights = (factors.energy[without] / factors.energy.max()).clamp_min(0).sqrt()
    to, back = first_channels(first[:, without], weights, dealt.code.first)
    down = torch.cat([down, to @ factors.down[without]])
    return down, torch.cat([up, factors.up[:, without] @ back], dim=1)


@dataclass(frozen=True)
class TurnedTransform:
    """Two transforms: of keys across KV heads, frequency by frequency, and of all values.

    Args:
        maps: of the source, the weight of the keys' norm in its key map.
        moments: of its keys and values.
    """

    maps: AttentionMaps
    moments: CodingMoments

    @classmethod
    def of(cls, maps: AttentionMaps, moments: CodingMoments) -> "TurnedTransform":
        """The transforms of a layer of the source.

        Args:
            maps: the source's own, without its norm's weight in the key map.
            moments: of its keys and values.
        """
        weighed = maps.with_norm_in_keys()
        if weighed.k_norm is not None:
            weight = weighed.k_norm.expand(maps.k.shape[:2]).flatten()
            size = torch.cat([1 / weight, weight.new_ones(maps.v[..., 0].numel())])
            moments = replace(moments, importance=moments.importance * size.outer(size))
        return cls(weighed, moments)

    @cached_property
    def values(self) -> Factors:
        keys = self.maps.kv_heads * self.maps.qk_dim
        importance = self.moments.importance[keys:, keys:]
        rows = self.maps.v.flatten(0, 1)
        return WeightedSVD.of(importance, self.moments.covariance)(rows)

    @cached_property
    def components(self) -> "KeyComponents":
        return key_components(self.maps, self.moments)

    def channels(self, seen: CodingTokens) -> tuple[Channels, ...]:
        """What each key component and value channel adds to the loss with each number of bits.

        Args:
            seen: the layer's tokens on calibration text.
        """
        keys, values = self._felt(seen)
        most = most_first_channels(self.moments)
        return Channels.measured(keys, unit=2), Channels.measured(values, first=most)

    def _felt(self, seen: CodingTokens) -> Any:
        """Numbers and gradients of every token: of its turned key components, and of its values."""
        x = seen.inputs - self.moments.mean
        keys = self.maps.kv_heads * self.maps.qk_dim
        slopes = seen.gradients[:, :keys].unflatten(1, (self.maps.kv_heads, -1))
        if self.maps.k_norm is not None:  # of keys without their norm's weight
            slopes = slopes / self.maps.k_norm
        found, turns = self.components, seen.positions[:, None] * self.maps.inv_freq
        turns = torch.polar(torch.ones_like(turns), turns)[:, list(found.pairs)]

        def side_by_side(z: Complex[Tensor, "N n"]) -> Float[Tensor, "N 2n"]:
            return torch.view_as_real(z * turns).flatten(1)

        made = side_by_side(linear(x.to(self.rows.dtype), self.rows))
        felt = self._of_components(torch.complex(*slopes.chunk(2, dim=-1)))
        values = x @ self.values.down.mT
        return (made, side_by_side(felt)), (values, seen.gradients[:, keys:] @ self.values.up)

    @cached_property
    def rows(self) -> Complex[Tensor, "n D"]:
        """The map from the layer's input to components of keys."""
        keys = torch.complex(*self.maps.k.chunk(2, dim=1))  # [G, P, D]
        made = keys.new_empty(len(self.components.pairs), keys.shape[-1])
        for pair, mine in self.components.of_pairs():
            made[mine] = self.components.analysis[mine] @ keys[:, pair]
        return made

    def _of_components(self, slopes: Complex[Tensor, "N G P"]) -> Complex[Tensor, "N n"]:
        """Gradients with respect to components, of those with respect to keys."""
        felt = slopes.new_empty(len(slopes), len(self.components.pairs))
        for pair, mine in self.components.of_pairs():
            felt[:, mine] = slopes[..., pair] @ self.components.synthesis[mine].mH
        return felt

    def build(self, dims: CodedDims) -> TurnedKeyMLA:
        """The converted layer, with the key components and value channels that `dims` names."""
        maps, mean = self.maps, self.moments.mean
        chosen = [index // 2 for index in dims.keys.order[::2]]
        found = self.components.of(chosen)
        rows = torch.view_as_real(self.rows[chosen])
        rows = rows.movedim(-1, 1).flatten(0, 1)  # parts side by side
        step = steps_of(dims.keys, rows, unit=2)
        first = None if self.moments.first is None else self._felt(self.moments.first)[1][0]
        down, up = in_steps(self.values, dims.values, first)
        kv_a = torch.cat([rows / step[:, None], down])
        synthesis = found.synthesis.mT * step[::2]
        key_mean = maps.k @ mean
        return TurnedKeyMLA(
            **of_source(maps),
            dims=dims,
            phase=maps.q.new_zeros(maps.heads, 0),
            synthesis=torch.cat([synthesis.real, synthesis.imag], dim=-1),
            rope_pairs=found.pairs,
            kv_a=kv_a,
            kv_a_bias=-(kv_a @ mean),
            k_mean=key_mean if maps.k_bias is None else key_mean + maps.k_bias,
            kv_b=up.unflatten(0, (maps.kv_heads, -1)),
            o_bias=output_bias(maps, torch.zeros_like(maps.v), mean),
            energy=tuple(self.values.energy.tolist()),
        )


@dataclass(frozen=True)
class KeyComponents:
    """Components of keys, of one frequency each, by falling energy.

    Component j is z = analysis[j] . k_f over KV heads, its parts' mean variance 1, and k_f = sum_j
    synthesis[j] z_j.

    Args:
        energy: of each part of a component, the error that leaving it out adds to the loss.
        pairs: every component's frequency.
    """

    energy: Float[Tensor, " n"]
    pairs: tuple[int, ...]
    analysis: Complex[Tensor, "n G"]
    synthesis: Complex[Tensor, "n G"]

    def of_pairs(self) -> Iterator[tuple[int, list[int]]]:
        """Pairs of a frequency's index and the indices of its components."""
        for pair in sorted(set(self.pairs)):
            yield pair, [index for index, other in enumerate(self.pairs) if other == pair]

    def of(self, chosen: list[int]) -> "KeyComponents":
        return KeyComponents(
            self.energy[chosen],
            tuple(self.pairs[index] for index in chosen),
            self.analysis[chosen],
            self.synthesis[chosen],
        )


def key_components(maps: AttentionMaps, moments: CodingMoments) -> KeyComponents:
    """The Karhunen-Loeve transform of each frequency's keys over KV heads, as complex numbers.

    Any complex-linear mix of pairs of one frequency turns as each of them does.
    """
    groups, width = maps.kv_heads, maps.qk_dim
    keys = maps.k.flatten(0, 1)
    covariance = (keys @ moments.covariance @ keys.mT).unflatten(0, (groups, width))
    importance = moments.importance[: len(keys), : len(keys)].unflatten(0, (groups, width))

    def of_pair(moment: Float[Tensor, "G E GE"], pair: int) -> Complex[Tensor, "G G"]:
        """E[z z*] of the pair's parts as one complex number for each KV head, halved."""
        parts = moment.unflatten(2, (groups, width))
        re, im = pair, pair + width // 2
        even = parts[:, re, :, re] + parts[:, im, :, im]
        odd = parts[:, im, :, re] - parts[:, re, :, im]
        return torch.complex(even, odd) / 2

    energies: list[Tensor] = []
    pairs: list[int] = []
    analysis, synthesis = [], []
    for pair in range(width // 2):
        weight, spread = (of_pair(moment, pair) for moment in (importance, covariance))
        root, inverse = square_roots(weight)
        variance, vectors = torch.linalg.eigh(root @ spread @ root)
        variance = variance.flip(0).clamp_min(torch.finfo(variance.dtype).tiny)
        vectors = vectors.flip(1)
        size = variance.sqrt().to(vectors)
        analysis.append((vectors.mH @ root) / size[:, None])
        synthesis.append(((inverse @ vectors) * size).mT)
        energies.append(variance)
        pairs += [pair] * groups
    energy = torch.cat(energies)
    order = energy.argsort(descending=True, stable=True).tolist()
    found = KeyComponents(energy, tuple(pairs), torch.cat(analysis), torch.cat(synthesis))
    return found.of(order)
