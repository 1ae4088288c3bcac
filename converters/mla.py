"""Decoupled multi-head latent attention (DeepSeek-V2, 2405.04434) from any attention's maps.

The strongest rotated components keep RoPE in one key that all heads share, which is cached turned;
the rest of the keys and all values are read from a latent of rank r, position-free.

Letters: as in `latent`, and r latent rank, A = r + R.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from .balance import evening, size
from .calibration import in_precision
from .latent import LatentAttention, SharedKeyAttention, by_group, kept, rest_bias
from .lowrank import Factors, WeightedSVD
from .maps import AttentionMaps, project
from .moments import LatentMoments
from .on_read import on_read_builder
from .plan import LayerDims
from .rope_split import RopeSplit, output_bias, rope_components, split_rope


@dataclass(frozen=True, kw_only=True)
class MLA(SharedKeyAttention):
    """One decoupled layer.

    Args:
        kv_a: [latent | rotated key's real parts | imaginary parts].
        kv_b: per KV head [position-free key | value], from the latent.
    """

    kv_a: Float[Tensor, "A D"]
    kv_b: Float[Tensor, "G B r"]
    kv_a_bias: Float[Tensor, " A"] | None = None
    kv_b_bias: Float[Tensor, "G B"] | None = None

    @property
    def kv_lora_rank(self) -> int:
        return self.kv_b.shape[2]

    @property
    def cache_width(self) -> int:
        return self.kv_a.shape[0] + self.scales

    def keys_and_values(self, x):
        latent, shared = linear(x, self.kv_a, self.kv_a_bias).split(
            [self.kv_lora_rank, self.qk_rope_head_dim], dim=-1
        )
        width = self.phase.shape[1]
        pair = project(latent, self.kv_b, self.kv_b_bias)
        return pair[..., :width], shared, pair[..., width:]

    def balanced(self) -> "MLA":
        latent = evening(size(self.kv_a[: self.kv_lora_rank], -1), size(self.kv_b.flatten(0, 1), 0))
        rope = self._component_sizes().repeat(2)
        cached = torch.cat([latent, rope])
        return replace(
            self,
            **self._even_queries(),
            synthesis=self.synthesis / rope,
            kv_a=self.kv_a * cached[:, None],
            kv_a_bias=None if self.kv_a_bias is None else self.kv_a_bias * cached,
            kv_b=self.kv_b / latent,
        )

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return super().own_tensors(rope_factor) | {
            "kv_a_proj_with_mqa.weight": self.kv_a,
            "kv_a_proj_with_mqa.bias": self.kv_a_bias,
            "kv_b_proj.weight": self.kv_b.flatten(0, 1),
            "kv_b_proj.bias": None if self.kv_b_bias is None else self.kv_b_bias.flatten(),
        }


def to_mla(maps: AttentionMaps, moments: LatentMoments, dims: LayerDims) -> LatentAttention:
    """The layer as MLA of the given dims, with the moments' kind of RoPE."""
    return mla_builder(maps, moments)(dims)


def mla_builder(
    maps: AttentionMaps, moments: LatentMoments
) -> Callable[[LayerDims], LatentAttention]:
    """`to_mla` for many dims, with what they have in common done once."""
    moments = in_precision(moments, maps.q.dtype)
    if moments.rope_on_read:
        return on_read_builder(maps, moments)
    maps = maps.with_norm_in_keys()
    kronecker, phases = moments.kronecker, moments.phases
    assert phases is not None
    svd = WeightedSVD.of(kronecker.gradients, kronecker.inputs)
    keys, values = maps.k.flatten(0, 1), maps.v.flatten(0, 1)
    less = svd.less(torch.cat([keys, values]), len(keys))
    ranked = rope_components(maps, phases)

    def build(dims: LayerDims) -> MLA:
        components = ranked if dims.rope_pairs is None else ranked.first(dims.rope_pairs)
        split = split_rope(maps, phases, components, dims.qk_rope_head_dim // 2)
        factors = less(split.rows.mT, split.k_rope, dims.kv_lora_rank)
        return decoupled_mla(maps, split, factors, moments, dims)

    return build


def decoupled_mla(
    maps: AttentionMaps, split: RopeSplit, factors: Factors, moments: LatentMoments, dims: LayerDims
) -> MLA:
    """MLA with the split's rotated key and a latent of the given rank."""
    rank, mean = dims.kv_lora_rank, moments.kronecker.mean
    up, down = factors.up[:, :rank], factors.down[:rank]
    kv_b = by_group(up, maps, split)
    bias = None
    if split.k_rope_bias is not None:
        bias = torch.cat([down.new_zeros(len(down)), split.k_rope_bias])
    kv_b_bias = rest_bias(maps, split, kv_b[:, : -maps.v_dim] @ down, mean)
    if kv_b_bias is not None:
        kv_b_bias = torch.nn.functional.pad(kv_b_bias, (0, maps.v_dim))
    return MLA(
        **kept(maps, split),
        kv_a=torch.cat([down, split.k_rope]),
        kv_b=kv_b,
        kv_a_bias=bias,
        kv_b_bias=kv_b_bias,
        energy=tuple(factors.energy.tolist()),
        o_bias=output_bias(maps, kv_b[:, -maps.v_dim :] @ down, mean),
    )
