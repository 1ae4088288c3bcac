"""Multi-head latent attention (DeepSeek-V2, 2405.04434) from any attention's maps.

Decoupled: the strongest rotated components keep RoPE in one key all heads share, the rest of the
keys and all values are read from a latent of rank r, position-free. On-read: keys keep RoPE whole,
the latent is cached before rotation and rotated when it is read.

Letters: H query heads, G KV heads, E source head width, P = E/2 pairs, V value width, D hidden
size, n rotated components (2n rotated dims), r latent rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from .calibration import (
    Kronecker,
    PhaseMoments,
    kronecker,
    phase_moments,
    probe_gradients,
    query_gradients,
)
from .errors import InputError
from .lowrank import Factors, weighted_svd
from .maps import AttentionMaps
from .plan import LayerDims

# A pair that loses nothing without RoPE still needs a nonzero weight to be decomposed.
LEAST_REMOVAL = 1e-4


@dataclass(frozen=True)
class MLA:
    """The weights of one MLA layer, as its model class stores them.

    Args:
        q: per head [position-free | rotated real parts | rotated imaginary parts].
        q_down: low-rank queries: q then maps from its q_lora_rank outputs instead of from D.
        kv_a: [latent | rotated key's real parts | imaginary parts].
        kv_b: per KV head [position-free key | value], from the latent.
        o: output map.
        rope_pairs: for each rotated component the index of its frequency in `inv_freq`.
        inv_freq: the source's frequencies.
        scaling: the score multiplier, a rotary attention factor included.
        rope_on_read: keys come from the latent alone and are rotated with all of `inv_freq`.
    """

    q: Float[Tensor, "H Q Din"]
    kv_a: Float[Tensor, "A D"]
    kv_b: Float[Tensor, "G B r"]
    o: Float[Tensor, "D H V"]
    rope_pairs: tuple[int, ...]
    inv_freq: Float[Tensor, " P"]
    scaling: float
    rope_on_read: bool = False
    q_down: Float[Tensor, "L D"] | None = None
    q_bias: Float[Tensor, "H Q"] | None = None
    kv_a_bias: Float[Tensor, " A"] | None = None
    kv_b_bias: Float[Tensor, "G B"] | None = None
    o_bias: Float[Tensor, " D"] | None = None

    @property
    def kv_lora_rank(self) -> int:
        return self.kv_b.shape[2]

    @property
    def qk_rope_head_dim(self) -> int:
        return 0 if self.rope_on_read else 2 * len(self.rope_pairs)

    @property
    def v_head_dim(self) -> int:
        return self.o.shape[2]

    @property
    def qk_nope_head_dim(self) -> int:
        return self.kv_b.shape[1] - self.v_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token."""
        return self.kv_a.shape[0]

    def biases(self) -> dict[str, bool]:
        """Which projections have a bias, by the config's fields."""
        names = ("q_bias", "kv_a_bias", "kv_b_bias", "o_bias")
        return {name: getattr(self, name) is not None for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that can be fitted, by field name."""
        fixed = ("inv_freq",)
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k not in fixed}

    def expand(self) -> AttentionMaps:
        """The same attention as maps per head; position-free pairs have frequency 0."""
        r, nope = self.kv_lora_rank, self.qk_nope_head_dim
        latent, latent_bias = self.kv_a[:r], _rows(self.kv_a_bias, slice(0, r))
        kv = self.kv_b @ latent  # [G, nope + V, D]
        kv_bias = None if latent_bias is None else self.kv_b @ latent_bias
        if self.kv_b_bias is not None:
            kv_bias = self.kv_b_bias if kv_bias is None else kv_bias + self.kv_b_bias
        q = self.q if self.q_down is None else self.q @ self.q_down
        k, v = kv[:, :nope], kv[:, nope:]
        k_bias, v_bias = _rows(kv_bias, slice(0, nope), 1), _rows(kv_bias, slice(nope, None), 1)
        biases = dict(q_bias=self.q_bias, k_bias=k_bias, v_bias=v_bias, o_bias=self.o_bias)
        if self.rope_on_read:
            return AttentionMaps(q, k, v, self.o, self.inv_freq, self.scaling, **biases)
        groups = kv.shape[0]
        k = torch.cat([k, self.kv_a[r:].expand(groups, -1, -1)], dim=1)
        if self.kv_a_bias is not None:
            if k_bias is None:
                k_bias = k.new_zeros(groups, nope)
            biases["k_bias"] = torch.cat([k_bias, self.kv_a_bias[r:].expand(groups, -1)], dim=1)
        order = _half_layout(nope, len(self.rope_pairs))
        for name in ("q_bias", "k_bias"):
            bias = biases[name]
            biases[name] = None if bias is None else bias[:, order]
        chosen = self.inv_freq[list(self.rope_pairs)]
        inv_freq = torch.cat([chosen.new_zeros(nope // 2), chosen])
        return AttentionMaps(q[:, order], k[:, order], v, self.o, inv_freq, self.scaling, **biases)

    def state_dict(self, rope_factor: float = 1.0) -> dict[str, Tensor]:
        """Tensors by the names of the model class' attention module.

        Args:
            rope_factor: what `scaling` holds beyond E^-0.5, the square of the rotary embedding's
                attention factor. The class gives it to rotated dims only, so position-free queries
                take it here.
        """
        q, q_bias = self.q, self.q_bias
        if not self.rope_on_read and rope_factor != 1.0:
            scale = q.new_ones(q.shape[1])
            scale[: self.qk_nope_head_dim] = rope_factor
            q = q * scale[:, None]
            q_bias = None if q_bias is None else q_bias * scale
        tensors = {
            "q_proj.weight" if self.q_down is None else "q_b_proj.weight": q.flatten(0, 1),
            "q_a_proj.weight": self.q_down,
            "q_proj.bias" if self.q_down is None else "q_b_proj.bias": _flat(q_bias),
            "kv_a_proj_with_mqa.weight": self.kv_a,
            "kv_a_proj_with_mqa.bias": self.kv_a_bias,
            "kv_b_proj.weight": self.kv_b.flatten(0, 1),
            "kv_b_proj.bias": _flat(self.kv_b_bias),
            "o_proj.weight": self.o.flatten(1),
            "o_proj.bias": self.o_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class RopeSplit:
    """A layer whose n strongest components keep RoPE, before anything is of low rank.

    Args:
        q_rope, k_rope: the rotated components of every query head, and of the one shared key.
        q_nope: queries without RoPE, times the mean phase.
        k_nope: what the kept components leave of the keys.
        rope_pairs: frequency index of each kept component.
        removed: J-weighted squared score error that each dropped component costs, in total.
    """

    q_rope: Float[Tensor, "H R D"]
    k_rope: Float[Tensor, "R D"]
    q_nope: Float[Tensor, "H E D"]
    k_nope: Float[Tensor, "G E D"]
    rope_pairs: tuple[int, ...]
    removed: float
    q_rope_bias: Float[Tensor, "H R"] | None = None
    k_rope_bias: Float[Tensor, " R"] | None = None
    q_nope_bias: Float[Tensor, "H E"] | None = None


@dataclass(frozen=True)
class Components:
    """All G*P rotated components of a layer, by falling cost of dropping their rotation.

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
    worth: dict[tuple[int, int], float] = {}
    for components in layers:
        seen: dict[int, int] = {}
        for cost, pair in zip(components.cost.tolist(), components.pair, strict=True):
            place = seen[pair] = seen.get(pair, -1) + 1
            share = cost / max(float(components.cost.sum()), 1e-300)
            worth[pair, place] = worth.get((pair, place), 0.0) + share
    ranked = sorted(worth, key=lambda key: (-worth[key], key))
    return tuple(sorted(pair for pair, _ in ranked[:count]))


def rope_components(maps: AttentionMaps, moments: PhaseMoments) -> Components:
    """Eigenvectors, per frequency, of the keys' moment weighted by what losing RoPE would cost.

    The score error of a pair without rotation but with the best constant is |q|^2 |k|^2
    (1 - |mu|^2) under J, so with D_g the sum of E|q_hf|^2 (1 - |mu_hf|^2) over the group's heads,
    the eigenvalues of D^1/2 E[k_f k_f^H] D^1/2 are the costs themselves.
    """
    groups = maps.kv_heads
    keys = _complex(_augmented(maps.k, maps.k_bias))  # [G, P, D + 1]
    moment = moments.inputs.to(keys.dtype)
    loss = (1 - moments.mean_phase.abs().square()).clamp_min(LEAST_REMOVAL)
    weight = (moments.query_energy * loss).unflatten(0, (groups, -1)).sum(1)  # [G, P]
    weight = weight.clamp_min(weight.max() * 1e-12).clamp_min(1e-300).sqrt()
    found = []
    for pair in range(keys.shape[1]):
        k, d = keys[:, pair], weight[:, pair]
        values, vectors = torch.linalg.eigh(d[:, None] * (k @ moment @ k.mH) * d)
        for j in range(groups):
            u = vectors[:, j]
            u = u * u[u.abs().argmax()].conj().sgn()  # unique only up to a phase
            found.append((float(values[j]), pair, u.conj() * d, u / d))
    found.sort(key=lambda item: (-item[0], item[1]))
    cost, pairs, analysis, synthesis = zip(*found, strict=True)
    return Components(
        torch.tensor(cost).clamp_min(0), pairs, torch.stack(analysis), torch.stack(synthesis)
    )


def split_rope(
    maps: AttentionMaps, moments: PhaseMoments, components: Components, count: int
) -> RopeSplit:
    """Keeps the rotation of the first `count` components and removes the others'."""
    groups, repeats, half = maps.kv_heads, maps.repeats, maps.qk_dim // 2
    keys = _complex(_augmented(maps.k, maps.k_bias))
    queries = _complex(_augmented(maps.q, maps.q_bias))
    rest = keys.clone()
    k_rope, q_rope = [], []
    for j in range(count):
        pair, synthesis = components.pair[j], components.synthesis[j]
        z = components.analysis[j] @ keys[:, pair]
        rest[:, pair] -= synthesis[:, None] * z
        k_rope.append(z)
        q_rope.append(queries[:, pair] * synthesis.conj().repeat_interleave(repeats)[:, None])
    # A frequency of which every component is kept leaves nothing but rounding.
    kept = torch.bincount(torch.tensor(components.pair[:count], dtype=torch.long), minlength=half)
    rest[:, kept == groups] = 0
    empty = keys.new_zeros(0, keys.shape[-1])
    k_rot = _real(torch.stack(k_rope) if k_rope else empty)
    q_rot = _real(torch.stack(q_rope, 1) if q_rope else empty.expand(maps.heads, 0, -1))
    q_nope, q_nope_bias = position_free_queries(maps, moments)
    has_q, has_k = maps.q_bias is not None, maps.k_bias is not None
    return RopeSplit(
        q_rope=q_rot[..., :-1],
        k_rope=k_rot[..., :-1],
        q_nope=q_nope,
        k_nope=_real(rest)[..., :-1],  # its bias shifts all scores of a query alike: no effect
        rope_pairs=components.pair[:count],
        removed=float(components.cost[count:].sum()),
        q_rope_bias=q_rot[..., -1] if has_q else None,
        k_rope_bias=k_rot[..., -1] if has_k else None,
        q_nope_bias=q_nope_bias,
    )


@dataclass(frozen=True)
class MLAMoments:
    """All that the calibration text says about one layer, for either kind of RoPE.

    Args:
        kronecker: of position-free keys and values; on-read, of keys and values as they are.
        phases: None on-read, where no rotation is dropped.
    """

    kronecker: Kronecker
    phases: PhaseMoments | None = None


def mla_moments(
    maps: AttentionMaps,
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    rope_on_read: bool,
) -> MLAMoments:
    """Moments of one layer on calibration inputs x, in float32."""
    narrow = maps.to(torch.float32)
    if rope_on_read:
        keys, values = probe_gradients(narrow, x, generator)
        return MLAMoments(kronecker(x, torch.cat([keys.flatten(2), values.flatten(2)], -1)))
    phases = phase_moments(narrow, x[: (len(x) + 1) // 2])  # few numbers: half the text is plenty
    q, q_bias = position_free_queries(maps, phases)
    free = (q.float(), None if q_bias is None else q_bias.float())
    keys, values = probe_gradients(narrow, x, generator, free)
    gradients = torch.cat([keys.flatten(2), values.flatten(2)], -1)
    return MLAMoments(kronecker(x, gradients), phases)


def position_free_queries(
    maps: AttentionMaps, moments: PhaseMoments
) -> tuple[Float[Tensor, "H E D"], Float[Tensor, "H E"] | None]:
    """Queries that meet keys without RoPE: every pair times its mean phase."""
    queries = _complex(_augmented(maps.q, maps.q_bias))
    free = _real(queries * moments.mean_phase.to(queries.dtype)[..., None])
    return free[..., :-1], None if maps.q_bias is None else free[..., -1]


def to_mla(maps: AttentionMaps, moments: MLAMoments, dims: LayerDims) -> MLA:
    """The layer as MLA of the given dims; decoupled where the moments have phases."""
    if moments.phases is None:
        return on_read_mla(maps, factorise(maps.k, maps, moments.kronecker), moments, dims)
    components = rope_components(maps, moments.phases)
    if dims.rope_pairs is not None:
        components = components.first(dims.rope_pairs)
    split = split_rope(maps, moments.phases, components, dims.qk_rope_head_dim // 2)
    factors = factorise(split.k_nope, maps, moments.kronecker)
    return decoupled_mla(maps, split, factors, moments, dims)


def factorise(keys: Float[Tensor, "G E D"], maps: AttentionMaps, moments: Kronecker) -> Factors:
    """The joint latent of keys and values at every rank, under their Gauss-Newton moments."""
    stacked = torch.cat([keys.flatten(0, 1), maps.v.flatten(0, 1)])
    return weighted_svd(stacked, moments.gradients, moments.inputs)


def decoupled_mla(
    maps: AttentionMaps, split: RopeSplit, factors: Factors, moments: MLAMoments, dims: LayerDims
) -> MLA:
    """DeepSeek's MLA with the split's rotated key and a latent of the given rank."""
    nope, rank, mean = maps.qk_dim, dims.kv_lora_rank, moments.kronecker.mean
    up, down = factors.up[:, :rank], factors.down[:rank]
    kv_b = _stack_groups(up, maps, nope)
    rows = torch.cat([down, split.k_rope])
    bias = None
    if split.k_rope_bias is not None:
        bias = torch.cat([down.new_zeros(len(down)), split.k_rope_bias])
    return MLA(
        q=torch.cat([split.q_nope, split.q_rope], dim=1),
        kv_a=rows,
        kv_b=kv_b,
        o=maps.o,
        rope_pairs=split.rope_pairs,
        inv_freq=maps.inv_freq,
        scaling=maps.scaling,
        q_bias=_join_bias(split.q_nope_bias, split.q_rope_bias),
        kv_a_bias=bias,
        o_bias=_output_bias(maps, kv_b[:, nope:] @ down, mean),
    )


def on_read_mla(maps: AttentionMaps, factors: Factors, moments: MLAMoments, dims: LayerDims) -> MLA:
    """The latent that is rotated on read, at the given rank."""
    nope, rank, mean = maps.qk_dim, dims.kv_lora_rank, moments.kronecker.mean
    up, down = factors.up[:, :rank], factors.down[:rank]
    kv_b = _stack_groups(up, maps, nope)
    # What is constant over tokens costs no rank: it is a bias, rotated with its key.
    key_bias = (maps.k - kv_b[:, :nope] @ down) @ mean
    if maps.k_bias is not None:
        key_bias = key_bias + maps.k_bias
    bias = torch.cat([key_bias, key_bias.new_zeros(maps.kv_heads, maps.v_dim)], dim=1)
    return MLA(
        q=maps.q,
        kv_a=down,
        kv_b=kv_b,
        o=maps.o,
        rope_pairs=(),
        inv_freq=maps.inv_freq,
        scaling=maps.scaling,
        rope_on_read=True,
        q_bias=maps.q_bias,
        kv_b_bias=bias,
        o_bias=_output_bias(maps, kv_b[:, nope:] @ down, mean),
    )


def with_low_rank_queries(
    mla: MLA, x: Float[Tensor, "N T D"], generator: torch.Generator, rank: int
) -> MLA:
    """The same layer with DeepSeek's low-rank queries, by a weighted SVD of the stacked heads."""
    width = mla.q.shape[0] * mla.q.shape[1]
    if not 1 <= rank <= min(width, x.shape[-1]):
        raise InputError(
            f"q_lora_rank={rank} must be at least 1 and at most {min(width, x.shape[-1])}, the "
            "rank that the queries have."
        )
    gradients = query_gradients(mla.expand().to(torch.float32), x, generator)
    if not mla.rope_on_read:
        order = torch.tensor(_half_layout(mla.qk_nope_head_dim, len(mla.rope_pairs)))
        gradients = gradients[..., order.argsort()]
    moments = kronecker(x, gradients.flatten(2))
    factors = weighted_svd(mla.q.flatten(0, 1), moments.gradients, moments.inputs)
    up, down = factors.up[:, :rank], factors.down[:rank]
    bias = ((mla.q.flatten(0, 1) - up @ down) @ moments.mean).unflatten(0, mla.q.shape[:2])
    return replace(
        mla,
        q=up.unflatten(0, mla.q.shape[:2]),
        q_down=down,
        q_bias=bias if mla.q_bias is None else mla.q_bias + bias,
    )


def _stack_groups(up: Float[Tensor, "M r"], maps: AttentionMaps, nope: int) -> Tensor:
    """[G, nope + V, r] of the stacked rows, keys of all groups first."""
    keys, values = up.split([maps.kv_heads * nope, maps.kv_heads * maps.v_dim])
    return torch.cat([keys.unflatten(0, (-1, nope)), values.unflatten(0, (-1, maps.v_dim))], dim=1)


def _output_bias(
    maps: AttentionMaps, values: Float[Tensor, "G V D"], mean: Float[Tensor, " D"]
) -> Float[Tensor, " D"]:
    """Softmax weights sum to 1, so what is constant in the values passes straight to the output."""
    constant = (maps.v - values) @ mean
    if maps.v_bias is not None:
        constant = constant + maps.v_bias
    bias = torch.einsum("dhv,hv->d", maps.o, constant.repeat_interleave(maps.repeats, 0))
    return bias if maps.o_bias is None else bias + maps.o_bias


def _half_layout(nope: int, count: int) -> list[int]:
    """Order that turns [nope | real | imaginary] into [all real parts | all imaginary parts]."""
    half = nope // 2
    real, imaginary = range(nope, nope + count), range(nope + count, nope + 2 * count)
    return [*range(half), *real, *range(half, nope), *imaginary]


def _augmented(weight: Float[Tensor, "H E D"], bias: Float[Tensor, "H E"] | None) -> Tensor:
    """The map as one of [x, 1]."""
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return torch.cat([weight, bias[..., None]], dim=-1)


def _complex(weight: Float[Tensor, "*H E D"]) -> Complex[Tensor, "*H P D"]:
    return torch.complex(*(part.contiguous() for part in weight.chunk(2, dim=-2)))


def _real(weight: Complex[Tensor, "*H P D"]) -> Float[Tensor, "*H E D"]:
    return torch.cat([weight.real, weight.imag], dim=-2)


def _rows(tensor: Tensor | None, rows: slice, dim: int = 0) -> Tensor | None:
    return None if tensor is None else tensor[(slice(None),) * dim + (rows,)]


def _flat(bias: Float[Tensor, "H E"] | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


def _join_bias(nope: Tensor | None, rope: Tensor | None) -> Tensor | None:
    return None if nope is None or rope is None else torch.cat([nope, rope], dim=1)
