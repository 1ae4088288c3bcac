"""Multi-head latent attention whose keys are formed and turned whole when they are read.

The latent alone is cached. Keys of all heads come from it by a product, may be normalised, and take
the source's own rotation.

Letters: as in `latent`, and r latent rank.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from .balance import evening, size
from .latent import LatentAttention, affine, by_group, of_source
from .lowrank import Factors, WeightedSVD
from .maps import AttentionMaps, normalised, project, rotate, token_angles
from .moments import LatentMoments
from .plan import LayerDims
from .rope_split import output_bias


@dataclass(frozen=True, kw_only=True)
class FormedKeyAttention(LatentAttention):
    """A layer whose keys are formed and turned whole: what its two kinds share.

    Args:
        kv_b: per KV head [key | value], from what is cached.
    """

    kv_b: Float[Tensor, "G B r"]
    kv_b_bias: Float[Tensor, "G B"] | None = None
    rope_pairs: tuple[int, ...] = ()

    @abstractmethod
    def latent(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch r"]:
        """The row that a token leaves in the cache."""

    @property
    def cache_width(self) -> int:
        return self.kv_b.shape[2]

    def keys_and_values(
        self, x: Float[Tensor, "*batch D"]
    ) -> tuple[Float[Tensor, "*batch G E"], Float[Tensor, "*batch G V"]]:
        """Keys before their norm and their rotation, and values."""
        pair = project(self.latent(x), self.kv_b, self.kv_b_bias)
        return pair[..., : self.q.shape[1]], pair[..., self.q.shape[1] :]

    def read(self, x):
        k, v = self.keys_and_values(x)
        k = normalised(k, self.k_norm, self.norm_eps)
        angles = token_angles(self.inv_freq, x)[:, None]
        return rotate(self.queries(x), angles), rotate(k, angles), v

    def expand(self) -> AttentionMaps:
        (k, v), (k_bias, v_bias) = affine(self.keys_and_values, self.o)
        return AttentionMaps(
            q=self.q if self.q_down is None else self.q @ self.q_down,
            k=k,
            v=v,
            o=self.o,
            inv_freq=self.inv_freq,
            scaling=self.scaling,
            window=self.window,
            softcap=self.softcap,
            q_bias=self.q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            o_bias=self.o_bias,
            q_norm=self.q_norm,
            k_norm=self.k_norm,
            norm_eps=self.norm_eps,
        )

    def query_layout(self) -> Float[Tensor, "H K E"]:
        return torch.eye(self.q.shape[1]).to(self.q).expand(len(self.q), -1, -1)

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return {
            "kv_b_proj.weight": self.kv_b.flatten(0, 1),
            "kv_b_proj.bias": None if self.kv_b_bias is None else self.kv_b_bias.flatten(),
        }


@dataclass(frozen=True, kw_only=True)
class WholeKeyMLA(FormedKeyAttention):
    """One layer with a latent of its own.

    Args:
        kv_a: what makes the latent.
    """

    kv_a: Float[Tensor, "r D"]
    kv_a_bias: Float[Tensor, " r"] | None = None

    def latent(self, x):
        return linear(x, self.kv_a, self.kv_a_bias)

    def stored(self, x: Float[Tensor, "N T D"]) -> "WholeKeyMLA":
        """The same layer with a centred latent, of which no constant takes any bits.

        Args:
            x: inputs that tell the latent's mean.
        """
        mean, _ = moments_of(self.kv_a, x)
        centre = mean if self.kv_a_bias is None else mean + self.kv_a_bias
        kv_b_bias = centred_bias(self.kv_b, self.kv_b_bias, centre)
        return replace(self, kv_a_bias=-mean, kv_b_bias=kv_b_bias).balanced()

    def balanced(self) -> "WholeKeyMLA":
        latent = evening(size(self.kv_a, -1), size(self.kv_b.flatten(0, 1), 0))
        return replace(
            self,
            **self._even_queries(),
            kv_a=self.kv_a * latent[:, None],
            kv_a_bias=None if self.kv_a_bias is None else self.kv_a_bias * latent,
            kv_b=self.kv_b / latent,
        )

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return super().own_tensors(rope_factor) | {
            "kv_a_proj_with_mqa.weight": self.kv_a,
            "kv_a_proj_with_mqa.bias": self.kv_a_bias,
        }


@dataclass(frozen=True, kw_only=True)
class InputMLA(FormedKeyAttention):
    """One layer that caches its own input: the source's keys and values, exactly.

    Where a latent is as wide as the layer's input, the input is the best one. It loses nothing and
    adds no weight.
    """

    def latent(self, x):
        return x

    def balanced(self) -> "InputMLA":
        return replace(self, **self._even_queries())


def whole_key_builder(
    maps: AttentionMaps, moments: LatentMoments, svd: WeightedSVD
) -> Callable[[LayerDims], FormedKeyAttention]:
    """The layer of any rank, with what they have in common done once."""

    @cache
    def factors() -> Factors:
        return svd(torch.cat([maps.k.flatten(0, 1), maps.v.flatten(0, 1)]))

    def build(dims: LayerDims) -> FormedKeyAttention:
        if dims.kv_lora_rank >= maps.hidden:
            return input_mla(maps)
        return whole_key_mla(maps, factors(), moments, dims)

    return build


def input_mla(maps: AttentionMaps) -> InputMLA:
    """The source's attention with its own input as what is cached."""
    # Beside layers with latents, whose biases a config asks for, it has all of them too.
    parts = ((maps.k, maps.k_bias), (maps.v, maps.v_bias))
    bias = [w.new_zeros(w.shape[:2]) if b is None else b for w, b in parts]
    return InputMLA(
        **of_source(maps),
        kv_b=torch.cat([maps.k, maps.v], dim=1),
        kv_b_bias=torch.cat(bias, dim=1),
        o_bias=maps.o.new_zeros(maps.hidden) if maps.o_bias is None else maps.o_bias,
    )


def whole_key_mla(
    maps: AttentionMaps, factors: Factors, moments: LatentMoments, dims: LayerDims
) -> WholeKeyMLA:
    """A latent of the given rank, from which every key is read and rotated whole."""
    rank, mean, width = dims.kv_lora_rank, moments.kronecker.mean, maps.qk_dim
    up, down = factors.up[:, :rank], factors.down[:rank]
    kv_b = by_group(up, maps)
    # What is constant over tokens costs no rank: it is a bias, rotated with its key.
    key_bias = (maps.k - kv_b[:, :width] @ down) @ mean
    if maps.k_bias is not None:
        key_bias = key_bias + maps.k_bias
    bias = torch.cat([key_bias, key_bias.new_zeros(maps.kv_heads, maps.v_dim)], dim=1)
    return WholeKeyMLA(
        **of_source(maps),
        kv_a=down,
        kv_b=kv_b,
        kv_b_bias=bias,
        energy=tuple(factors.energy.tolist()),
        o_bias=output_bias(maps, kv_b[:, width:] @ down, mean),
    )


def moments_of(
    kv_a: Float[Tensor, "r D"], x: Float[Tensor, "N T D"]
) -> tuple[Float[Tensor, " r"], Float[Tensor, "r r"]]:
    """Mean and covariance of the latents that inputs make, without their bias."""
    latents = torch.cat([row.to(kv_a) @ kv_a.mT for row in x])
    mean = latents.mean(0)
    latents = (latents - mean).double()
    return mean, latents.mT @ latents / len(latents)


def centred_bias(
    kv_b: Float[Tensor, "G B r"], bias: Float[Tensor, "G B"] | None, centre: Float[Tensor, " r"]
) -> Float[Tensor, "G B"]:
    """The bias that reads the same from latents whose mean, `centre`, was taken out."""
    constant = kv_b @ centre
    return constant if bias is None else bias + constant
