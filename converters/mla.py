"""Multi-head latent attention (DeepSeek-V2, 2405.04434) from any attention's maps.

Decoupled: the strongest rotated components keep RoPE in one key all heads share, the rest of the
keys and all values are read from a latent of rank r, position-free. On-read: keys keep RoPE whole,
the latent is cached before rotation and rotated when it is read.

Letters: H query heads, G KV heads, E source head width, P = E/2 pairs, V value width, D hidden
size, n rotated components (2n rotated dims), r latent rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .calibration import (
    Kronecker,
    PhaseMoments,
    kronecker,
    phase_moments,
    probe_gradients,
    query_factors,
)
from .errors import InputError
from .lowrank import Factors, WeightedSVD
from .maps import AttentionMaps
from .plan import LayerDims
from .rope_split import (
    RopeSplit,
    half_layout,
    output_bias,
    position_free_queries,
    rope_components,
    split_rope,
)


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
        q_norm, k_norm, norm_eps: of queries, and of keys once they are formed; on-read alone.
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
    q_norm: Float[Tensor, " E"] | None = None
    k_norm: Float[Tensor, " E"] | None = None
    norm_eps: float = 0.0

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
        biases: dict[str, Any] = dict(
            q_bias=self.q_bias, k_bias=k_bias, v_bias=v_bias, o_bias=self.o_bias
        )
        if self.rope_on_read:
            norms: dict[str, Any] = dict(
                q_norm=self.q_norm, k_norm=self.k_norm, norm_eps=self.norm_eps
            )
            return AttentionMaps(q, k, v, self.o, self.inv_freq, self.scaling, **biases, **norms)
        groups = kv.shape[0]
        k = torch.cat([k, self.kv_a[r:].expand(groups, -1, -1)], dim=1)
        if self.kv_a_bias is not None:
            if k_bias is None:
                k_bias = k.new_zeros(groups, nope)
            biases["k_bias"] = torch.cat([k_bias, self.kv_a_bias[r:].expand(groups, -1)], dim=1)
        order = half_layout(nope, len(self.rope_pairs))
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
            "q_norm.weight": self.q_norm,
            "k_norm.weight": self.k_norm,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


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
    phases = phase_moments(narrow, x[: (len(x) + 2) // 3])  # few numbers: a third is plenty
    q, q_bias = position_free_queries(maps, phases)
    free = (q.float(), None if q_bias is None else q_bias.float())
    keys, values = probe_gradients(narrow, x, generator, free)
    gradients = torch.cat([keys.flatten(2), values.flatten(2)], -1)
    return MLAMoments(kronecker(x, gradients), phases)


def to_mla(maps: AttentionMaps, moments: MLAMoments, dims: LayerDims) -> MLA:
    """The layer as MLA of the given dims; decoupled where the moments have phases."""
    return mla_builder(maps, moments)(dims)


def mla_builder(maps: AttentionMaps, moments: MLAMoments) -> Callable[[LayerDims], MLA]:
    """`to_mla` for many dims, with what they have in common done once."""
    kronecker, phases = moments.kronecker, moments.phases
    svd = WeightedSVD.of(kronecker.gradients, kronecker.inputs)

    def factorise(keys: Float[Tensor, "G E D"]) -> Factors:
        """The joint latent of keys and values at every rank."""
        return svd(torch.cat([keys.flatten(0, 1), maps.v.flatten(0, 1)]))

    if phases is None:
        factors = factorise(maps.k)
        return lambda dims: on_read_mla(maps, factors, moments, dims)
    ranked = rope_components(maps, phases)

    def build(dims: LayerDims) -> MLA:
        components = ranked if dims.rope_pairs is None else ranked.first(dims.rope_pairs)
        split = split_rope(maps, phases, components, dims.qk_rope_head_dim // 2)
        return decoupled_mla(maps, split, factorise(split.k_nope), moments, dims)

    return build


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
        o_bias=output_bias(maps, kv_b[:, nope:] @ down, mean),
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
        o_bias=output_bias(maps, kv_b[:, nope:] @ down, mean),
        q_norm=maps.q_norm,
        k_norm=maps.k_norm,
        norm_eps=maps.norm_eps,
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
    order = None
    if not mla.rope_on_read:
        order = torch.tensor(half_layout(mla.qk_nope_head_dim, len(mla.rope_pairs))).argsort()
    factors, mean = query_factors(mla.expand().to(torch.float32), mla.q, x, generator, order)
    up, down = factors.up[:, :rank], factors.down[:rank]
    bias = ((mla.q.flatten(0, 1) - up @ down) @ mean).unflatten(0, mla.q.shape[:2])
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


def _rows(tensor: Tensor | None, rows: slice, dim: int = 0) -> Tensor | None:
    return None if tensor is None else tensor[(slice(None),) * dim + (rows,)]


def _flat(bias: Float[Tensor, "H E"] | None) -> Tensor | None:
    return None if bias is None else bias.flatten()


def _join_bias(nope: Tensor | None, rope: Tensor | None) -> Tensor | None:
    return None if nope is None or rope is None else torch.cat([nope, rope], dim=1)
