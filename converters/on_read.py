"""Multi-head latent attention that caches a latent alone and turns the rotated key on read.

The rotated key is linear in the latent. It costs no cache, but a turn for each token that is read,
so the latent is written in a basis whose last dims are the rotated key.

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
from .latent import LatentAttention, SharedKeyAttention, by_group, kept
from .lowrank import Factors, WeightedSVD
from .maps import AttentionMaps, project
from .moments import LatentMoments
from .plan import LayerDims
from .rope_split import RopeSplit, output_bias, rope_components, split_rope
from .whole_keys import centred_bias, input_mla, moments_of, whole_key_builder, whole_key_mla

# Of the largest: what a direction of the latent is given in the key at least, where the key takes
# its place. Values read from it would else be rounding: SmolLM2 at 12.5% (KL 0.314 to the source)
# is moved by 9e-5 in float32 and 7e-3 in bfloat16 by a hundredth, by 8e-8 and 7e-2 by a thousandth.
LEAST_KEY = 1e-2
# Of the rotated key's mean energy: what each of its pairs is taken to have at least.
LEAST_PAIR = 1e-6
# Of the latent's mean energy: what each of its directions is taken to have at least.
LEAST_ENERGY = 1e-3


@dataclass(frozen=True, kw_only=True)
class LatentKeyAttention(SharedKeyAttention):
    """A layer whose rotated key is read from its latent: what its two states share.

    Args:
        kv_a: what makes the latent.
        kv_b: per KV head [position-free key | value], from the latent.
        k_rope_bias: what is constant in the rotated key.
    """

    kv_a: Float[Tensor, "r D"]
    kv_b: Float[Tensor, "G B r"]
    k_rope_bias: Float[Tensor, " R"]
    kv_a_bias: Float[Tensor, " r"] | None = None
    kv_b_bias: Float[Tensor, "G B"] | None = None

    @abstractmethod
    def shared_key(self, latent: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch R"]:
        """The rotated key before it is turned, real parts then imaginary parts."""

    @property
    def cache_width(self) -> int:
        return self.kv_a.shape[0]

    def keys_and_values(self, x):
        latent, width = linear(x, self.kv_a, self.kv_a_bias), self.phase.shape[1]
        pair = project(latent, self.kv_b, self.kv_b_bias)
        return pair[..., :width], self.shared_key(latent), pair[..., width:]


@dataclass(frozen=True, kw_only=True)
class ReadKeyMLA(LatentKeyAttention):
    """A layer while it is fitted: its rotated key is a map of the latent.

    Args:
        k_rope: the rotated key [real parts | imaginary parts], from the latent.
    """

    k_rope: Float[Tensor, "R r"]

    def shared_key(self, latent):
        return linear(latent, self.k_rope, self.k_rope_bias)

    def balanced(self) -> "ReadKeyMLA":
        return self

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        raise ValueError("the rotated key has no place in the latent yet: call `stored`.")

    def stored(self, x: Float[Tensor, "N T D"]) -> "KeyInLatentMLA":
        """The same layer in a basis that is cheap to read and safe to round.

        A latent has no basis of its own. In the one taken here the rotated key needs no product: it
        is the last dims of the latent, and the dims before them are uncorrelated with it. Nor has a
        latent an origin: it is centred, so that what is constant takes none of its bits.

        Args:
            x: inputs that tell the latent's mean and covariance.
        """
        mean, covariance = moments_of(self.kv_a, x)
        key, synthesis, bias = self._with_white_pairs(covariance)
        centre = mean if self.kv_a_bias is None else mean + self.kv_a_bias
        order = side_by_side(len(key))
        there, back = with_key_last(key[order], covariance)
        return KeyInLatentMLA(
            **{k: v for k, v in vars(self).items() if k not in ("k_rope", *CHANGED)},
            synthesis=synthesis,
            kv_a=there @ self.kv_a,
            kv_a_bias=there @ -mean,
            kv_b=self.kv_b @ back,
            kv_b_bias=centred_bias(self.kv_b, self.kv_b_bias, centre),
            k_rope_bias=(bias + key @ centre)[order],
        ).balanced()

    def _with_white_pairs(
        self, covariance: Float[Tensor, "r r"]
    ) -> tuple[Float[Tensor, "R r"], Float[Tensor, "G R"], Float[Tensor, " R"]]:
        """The rotated key with white pairs of each frequency, its synthesis, and its bias.

        Such pairs turn alike, so that a complex matrix of the key's is undone by the synthesis.

        Args:
            covariance: of the latents.
        """
        parts = torch.complex(*self.k_rope.double().chunk(2))
        pairs = torch.tensor(self.rope_pairs, device=self.k_rope.device)
        moment = parts @ covariance.to(parts) @ parts.mH
        moment = moment.where(pairs[:, None] == pairs, 0)
        mean = moment.diagonal().real.mean()
        moment.diagonal().add_(LEAST_PAIR * mean.where(mean > 0, 1))
        root = torch.linalg.cholesky(moment)
        white = on_parts(torch.linalg.inv(root)).to(self.k_rope)
        factors = torch.complex(*self.synthesis.double().chunk(2, dim=-1)) @ root
        synthesis = torch.cat([factors.real, factors.imag], dim=-1).to(self.synthesis)
        return white @ self.k_rope, synthesis, white @ self.k_rope_bias


CHANGED = ("synthesis", "kv_a", "kv_a_bias", "kv_b", "kv_b_bias", "k_rope_bias")


@dataclass(frozen=True, kw_only=True)
class KeyInLatentMLA(LatentKeyAttention):
    """A layer as it is stored: its rotated key is the latent's last dims, and a bias.

    There, and in `k_rope_bias`, the two parts of each pair stand side by side.
    """

    def shared_key(self, latent):
        count = self.qk_rope_head_dim
        key = latent[..., latent.shape[-1] - count :] + self.k_rope_bias
        return key[..., side_by_side(count).argsort()]

    def balanced(self) -> "KeyInLatentMLA":
        rope = self._component_sizes()
        count = self.qk_rope_head_dim
        latent = evening(size(self.kv_a, -1), size(self.kv_b.flatten(0, 1), 0))
        tail = rope.repeat_interleave(2)
        latent = torch.cat([latent[: len(latent) - count], tail])
        return replace(
            self,
            **self._even_queries(),
            synthesis=self.synthesis / rope.repeat(2),
            kv_a=self.kv_a * latent[:, None],
            kv_a_bias=None if self.kv_a_bias is None else self.kv_a_bias * latent,
            kv_b=self.kv_b / latent,
            k_rope_bias=self.k_rope_bias * tail,
        )

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return super().own_tensors(rope_factor) | {
            "kv_a_proj_with_mqa.weight": self.kv_a,
            "kv_a_proj_with_mqa.bias": self.kv_a_bias,
            "kv_b_proj.weight": self.kv_b.flatten(0, 1),
            "kv_b_proj.bias": None if self.kv_b_bias is None else self.kv_b_bias.flatten(),
            "k_rope_bias": self.k_rope_bias,
        }


def on_read_builder(
    maps: AttentionMaps, moments: LatentMoments
) -> Callable[[LayerDims], LatentAttention]:
    """The layer of any dims, with whole keys where no component is rotated apart."""
    kronecker, phases = moments.kronecker, moments.phases
    svd = WeightedSVD.of(kronecker.gradients, kronecker.inputs)
    if phases is None:
        return whole_key_builder(maps, moments, svd)
    groups, width = maps.kv_heads, maps.qk_dim
    # Where in the gradients a group's keys as they are, its position-free keys, and values stand.
    keys = torch.arange(2 * groups * width).view(groups, 2 * width)
    whole, free = keys[:, :width].flatten(), keys[:, width:].flatten()
    rest = torch.arange(2 * groups * width, len(kronecker.gradients))
    ranked = rope_components(maps, phases)

    @cache
    def every_key() -> Factors:
        chosen = torch.cat([whole, rest])
        moment = kronecker.gradients[chosen][:, chosen]
        return svd.under(moment)(torch.cat([maps.k.flatten(0, 1), maps.v.flatten(0, 1)]))

    @cache
    def some_components(count: int) -> tuple[RopeSplit, Factors]:
        split = split_rope(maps, phases, ranked, count)
        # The rotated key's gradients are those of the keys it is part of.
        moment = kronecker.gradients
        rotated = split.rows @ moment[whole]
        others = torch.cat([free, rest])
        moment = torch.cat(
            [
                torch.cat([rotated[:, whole] @ split.rows.mT, rotated[:, others]], dim=1),
                torch.cat([rotated[:, others].mT, moment[others][:, others]], dim=1),
            ]
        )
        rows = [split.k_rope, split.k_nope.flatten(0, 1), maps.v.flatten(0, 1)]
        return split, svd.under(moment)(torch.cat(rows))

    def build(dims: LayerDims) -> LatentAttention:
        count = dims.qk_rope_head_dim // 2
        if count == 0 and dims.kv_lora_rank >= maps.hidden:
            return input_mla(maps)
        if count == 0:
            return whole_key_mla(maps, every_key(), moments, dims)
        return read_key_mla(maps, *some_components(count), moments, dims)

    return build


def read_key_mla(
    maps: AttentionMaps, split: RopeSplit, factors: Factors, moments: LatentMoments, dims: LayerDims
) -> ReadKeyMLA:
    """A latent of the given rank, which the split's rotated key is read from too."""
    rank, mean = dims.kv_lora_rank, moments.kronecker.mean
    down, rotated = factors.down[:rank], len(split.k_rope)
    k_rope, up = factors.up[:rotated, :rank], factors.up[rotated:, :rank]
    kv_b = by_group(up, maps, split)
    # What is constant over tokens costs no rank: it is a bias, rotated with its key.
    bias = (split.k_rope - k_rope @ down) @ mean
    if split.k_rope_bias is not None:
        bias = bias + split.k_rope_bias
    return ReadKeyMLA(
        **kept(maps, split),
        kv_a=down,
        kv_b=kv_b,
        kv_b_bias=kv_b.new_zeros(kv_b.shape[:2]),
        k_rope=k_rope,
        k_rope_bias=bias,
        energy=tuple(factors.energy.tolist()),
        o_bias=output_bias(maps, kv_b[:, -maps.v_dim :] @ down, mean),
    )


def with_key_last(
    key: Float[Tensor, "R r"], covariance: Float[Tensor, "r r"]
) -> tuple[Float[Tensor, "r r"], Float[Tensor, "r r"]]:
    """A basis of the latent whose last dims are the key, and its inverse.

    The other dims are uncorrelated with the key, and of unit energy.

    Args:
        covariance: of the latents.
    """
    mean = covariance.diagonal().mean()
    least = LEAST_ENERGY * mean.where(mean > 0, 1) * torch.eye(len(covariance)).to(covariance)
    root = torch.linalg.cholesky(covariance + least)
    left, sizes, right = torch.linalg.svd(key.double() @ root)  # of a latent of unit covariance
    largest = sizes.max()
    sizes = sizes.clamp_min(LEAST_KEY * largest.where(largest > 0, 1))
    count = len(key)
    white = torch.cat([right[count:], left * sizes @ right[:count]])
    there = torch.linalg.solve_triangular(root, white, upper=False, left=False)
    back = root @ torch.cat([right[count:].mT, right[:count].mT / sizes @ left.mT], dim=1)
    return there.to(key), back.to(key)


def on_parts(matrix: Tensor) -> Float[Tensor, "R R"]:
    """The real matrix that multiplies [real parts | imaginary parts] as a complex one does."""
    real, imag = matrix.real, matrix.imag
    return torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)])


def side_by_side(count: int) -> Tensor:
    """Which of [real parts | imaginary parts] come first where a pair's parts are neighbours."""
    return torch.arange(count).view(2, -1).mT.flatten()
