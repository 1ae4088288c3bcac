"""Which of a layer's key pairs keep RoPE, and what the others become without it.

Letters: H query heads, G KV heads, E head width, P = E/2 pairs, V value width, D hidden size,
C = G P components, n of them rotated, R = 2n rotated dims.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from .calibration import PhaseMoments
from .errors import InputError
from .maps import AttentionMaps, augmented

# A pair that loses nothing without RoPE still needs a nonzero weight to be decomposed.
LEAST_REMOVAL = 1e-4


@dataclass(frozen=True)
class RopeSplit:
    """A layer whose n strongest components keep RoPE, before anything is of low rank.

    Args:
        phase: what every head's pairs are multiplied with where they meet keys without RoPE, real
            parts then imaginary parts.
        synthesis: what the rotated components are multiplied with in every KV head's key, likewise.
        k_rope: the rotated components of the one shared key.
        k_nope: what the kept components leave of the keys.
        k_nope_bias: the same of the keys' bias. It shifts all scores of a query alike, which no
            softmax sees, unless keys are normalised or scores capped.
        rope_pairs: frequency index of each kept component.
        removed: J-weighted squared score error that each dropped component costs, in total.
        rows: the rotated key's part in all keys, whose transpose takes their gradients to its.
    """

    phase: Float[Tensor, "H E"]
    synthesis: Float[Tensor, "G R"]
    k_rope: Float[Tensor, "R D"]
    k_nope: Float[Tensor, "G E D"]
    k_nope_bias: Float[Tensor, "G E"]
    rope_pairs: tuple[int, ...]
    removed: float
    rows: Float[Tensor, "R GE"]
    k_rope_bias: Float[Tensor, " R"] | None = None


@dataclass(frozen=True)
class Components:
    """All rotated components of a layer, G of every frequency, by falling cost of dropping theirs.

    A pair of frequency 0 has no rotation to keep: its components are position-free as they are.
    Component j of frequency f is z = analysis[j] . k_f over KV heads, and k_f = sum_j synthesis[j]
    z_j: any complex-linear mix of pairs of one frequency commutes with RoPE.
    """

    cost: Float[Tensor, " C"]
    pair: tuple[int, ...]
    analysis: Complex[Tensor, "C G"]
    synthesis: Complex[Tensor, "C G"]

    def first(self, pairs: tuple[int, ...]) -> "Components":
        """The same components with the best ones of the given frequencies first."""
        left: dict[int, list[int]] = {}
        for index, pair in enumerate(self.pair):
            left.setdefault(pair, []).append(index)
        chosen = [left[pair].pop(0) for pair in pairs]
        order = chosen + sorted(index for rest in left.values() for index in rest)
        return Components(
            self.cost[order],
            tuple(self.pair[index] for index in order),
            self.analysis[order],
            self.synthesis[order],
        )


def shared_rope_pairs(layers: Sequence[Components], count: int) -> tuple[int, ...]:
    """The frequencies of the `count` components that are worth most over all layers together.

    A layer's costs count as shares of its own total, so that no layer decides alone. Stock classes
    hold one list of frequencies for the whole model.
    """
    worth = _worth(layers)
    ranked = sorted(worth, key=lambda key: (-worth[key], key))
    return tuple(sorted(pair for pair, _ in ranked[:count]))


def standard_rope_pairs(
    layers: Sequence[Components], count: int, inv_freq: Float[Tensor, " P"]
) -> tuple[int, ...]:
    """The pairs 0, s, 2s, ... whose `count` frequencies are base^(-j / count) and worth most.

    Engines compute their frequencies from a base, one component for each. Taking every s-th of the
    source's is a list of that kind, with another base.

    Raises:
        InputError: no list of that length is.
    """
    worth = _worth(layers)
    best, most = None, -1.0
    for step in range(1, (len(inv_freq) - 1) // max(1, count - 1) + 1):
        pairs = tuple(range(0, step * count, step))
        value = sum(worth[pair, 0] for pair in pairs)
        if value > most and rope_base(inv_freq[list(pairs)]) is not None:
            best, most = pairs, value
    if best is None:
        raise InputError(
            f"--preset engine needs {count} of the source's rotary frequencies to be powers of one "
            "base, and its rope_parameters scale them otherwise. Use --native."
        )
    return best


def rope_base(inv_freq: Float[Tensor, " n"]) -> float | None:
    """The base b whose n frequencies b^(-j / n), j = 0, 1, ..., these are; None for none."""
    count = len(inv_freq)
    last = float(inv_freq[-1])
    base = last ** (-count / (count - 1)) if count > 1 else 10000.0
    places = torch.arange(count, dtype=torch.float64) / count
    same = torch.allclose(base**-places, inv_freq.double(), rtol=1e-5, atol=0)
    return base if same else None


def _worth(layers: Sequence[Components]) -> dict[tuple[int, int], float]:
    """(pair, which of its components) -> the share of all layers' costs that it carries."""
    worth: dict[tuple[int, int], float] = {}
    for components in layers:
        seen: dict[int, int] = {}
        for cost, pair in zip(components.cost.tolist(), components.pair, strict=True):
            place = seen[pair] = seen.get(pair, -1) + 1
            share = cost / max(float(components.cost.sum()), 1e-300)
            worth[pair, place] = worth.get((pair, place), 0.0) + share
    return worth


def rope_components(maps: AttentionMaps, moments: PhaseMoments) -> Components:
    """Eigenvectors, per frequency, of the keys' moment weighted by what losing RoPE would cost.

    The score error of a pair without rotation but with the best constant is |q|^2 |k|^2
    (1 - |mu|^2) under J, so with D_g the sum of E|q_hf|^2 (1 - |mu_hf|^2) over the group's heads,
    the eigenvalues of D^1/2 E[k_f k_f^H] D^1/2 are the costs themselves.
    """
    groups = maps.kv_heads
    keys = _complex(augmented(maps.k, maps.k_bias))  # [G, P, D + 1]
    # The moment is real: half the products, and all pairs' at once.
    moment = moments.inputs.to(maps.k.dtype)
    seen = torch.complex(keys.real @ moment, keys.imag @ moment)
    loss = (1 - moments.mean_phase.abs().square()).clamp_min(LEAST_REMOVAL)
    weight = (moments.query_energy * loss).unflatten(0, (groups, -1)).sum(1)  # [G, P]
    weight = weight.clamp_min(weight.max() * 1e-12)
    weight = weight.where(weight > torch.finfo(weight.dtype).tiny, 1).sqrt()  # 1 if all are 0
    found = []
    for pair in maps.inv_freq.nonzero().flatten().tolist():
        k, d = keys[:, pair], weight[:, pair]
        values, vectors = torch.linalg.eigh(d[:, None] * (seen[:, pair] @ k.mH) * d)
        for j in range(groups):
            u = vectors[:, j]
            u = u * u[u.abs().argmax()].conj().sgn()  # unique only up to a phase
            found.append((float(values[j]), pair, u.conj() * d, u / d))
    if not found:
        none = keys.new_zeros(0, groups)
        return Components(moment.new_zeros(0), (), none, none)
    found.sort(key=lambda item: (-item[0], item[1]))
    cost, pairs, analysis, synthesis = zip(*found, strict=True)
    return Components(
        torch.tensor(cost).clamp_min(0), pairs, torch.stack(analysis), torch.stack(synthesis)
    )


def split_rope(
    maps: AttentionMaps, moments: PhaseMoments, components: Components, count: int
) -> RopeSplit:
    """Keeps the rotation of the first `count` components and removes the others'."""
    groups, width = maps.kv_heads, maps.qk_dim
    keys = _complex(augmented(maps.k, maps.k_bias))
    rest = keys.clone()
    k_rope = keys.new_empty(count, keys.shape[-1])
    for j in range(count):
        pair = components.pair[j]
        k_rope[j] = components.analysis[j] @ keys[:, pair]
        rest[:, pair] -= components.synthesis[j][:, None] * k_rope[j]
    # A frequency of which every component is kept leaves nothing but rounding.
    kept = torch.bincount(
        torch.tensor(components.pair[:count], dtype=torch.long), minlength=width // 2
    )
    rest[:, kept == groups] = 0
    k_rot = _real(k_rope)
    synthesis, phase = components.synthesis[:count].mT, moments.mean_phase
    return RopeSplit(
        phase=torch.cat([phase.real, phase.imag], dim=-1).to(maps.q),
        synthesis=torch.cat([synthesis.real, synthesis.imag], dim=-1).to(maps.q),
        k_rope=k_rot[..., :-1],
        k_nope=_real(rest)[..., :-1],
        k_nope_bias=_real(rest)[..., -1],
        rope_pairs=components.pair[:count],
        removed=float(components.cost[count:].sum()),
        rows=_synthesis(components, count, width // 2),
        k_rope_bias=None if maps.k_bias is None else k_rot[..., -1],
    )


def _synthesis(components: Components, count: int, half: int) -> Float[Tensor, "R GE"]:
    """Row j: how much of each head's real and imaginary parts the rotated dim j is."""
    kept, groups = components.synthesis[:count], components.synthesis.shape[1]
    found = kept.real.new_zeros(2, count, groups, 2, half)
    for j, pair in enumerate(components.pair[:count]):
        found[0, j, :, 0, pair], found[0, j, :, 1, pair] = kept[j].real, kept[j].imag
        found[1, j, :, 0, pair], found[1, j, :, 1, pair] = -kept[j].imag, kept[j].real
    return found.flatten(2).flatten(0, 1)


def multiplied(
    x: Float[Tensor, "*batch H E"], factors: Float[Tensor, "H E"]
) -> Float[Tensor, "*batch H E"]:
    """Pairs of x times complex factors, both [real parts | imaginary parts]."""
    (a, b), (c, d) = x.chunk(2, dim=-1), factors.chunk(2, dim=-1)
    return torch.cat([a * c - b * d, a * d + b * c], dim=-1)


def output_bias(
    maps: AttentionMaps, values: Float[Tensor, "G V D"], mean: Float[Tensor, " D"]
) -> Float[Tensor, " D"]:
    """Softmax weights sum to 1, so what is constant in the values passes straight to the output."""
    constant = (maps.v - values) @ mean
    if maps.v_bias is not None:
        constant = constant + maps.v_bias
    bias = torch.einsum("dhv,hv->d", maps.o, constant.repeat_interleave(maps.repeats, 0))
    return bias if maps.o_bias is None else bias + maps.o_bias


def half_layout(nope: int, count: int) -> list[int]:
    """Order that turns [nope | real | imaginary] into [all real parts | all imaginary parts]."""
    half = nope // 2
    real, imaginary = range(nope, nope + count), range(nope + count, nope + 2 * count)
    return [*range(half), *real, *range(half, nope), *imaginary]


def _complex(weight: Float[Tensor, "*H E D"]) -> Complex[Tensor, "*H P D"]:
    return torch.complex(*(part.contiguous() for part in weight.chunk(2, dim=-2)))


def _real(weight: Complex[Tensor, "*H P D"]) -> Float[Tensor, "*H E D"]:
    return torch.cat([weight.real, weight.imag], dim=-2)
