"""MFA with key reuse (MFA-KR, 2412.19255) from any attention's maps.

The key head alone is cached, before its rotation, and values are read from it too: on-read latent
attention with one head. The paper writes v = k + (k N^T) * alpha, "*" channel by channel, trains
from scratch and starts with alpha = 0; it does not say whether k is meant before or after its
rotation. Here it is before: a value must not turn with its position. And I + N alpha, a linear map
between the latent and every head's output, is one with the output: `v_b`, or `o` of rows.

Letters: as in `mfa`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .calibration import in_precision
from .latent import LatentAttention
from .lowrank import WeightedSVD
from .maps import AttentionMaps
from .mfa import KeyHeadAttention, KeyHeadRows, MFADims, head_fields, of_groups, padded
from .moments import LatentMoments
from .on_read import side_by_side
from .rope_split import output_bias, rope_components, split_rope

# Of the regression of values, as a share of the mean energy of what they are read from.
RIDGE = 1e-4


@dataclass(frozen=True, kw_only=True)
class MFAKR(KeyHeadAttention):
    """One layer with the source's queries; `v_b` reads the unturned key head."""

    @property
    def cache_width(self) -> int:
        return self.head_dim + self.scales

    def value_head(self, x, key):
        return key

    def balanced(self) -> "MFAKR":
        scale = self.key_scale()
        return replace(self, **self.with_key_scale(scale), v_b=self.v_b / scale)

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        order = stored_order(self)
        tensors = replace(self, **in_order(self, order), v_b=self.v_b[..., order])
        return super(MFAKR, tensors).own_tensors(rope_factor)

    def as_rows(self) -> "MFAKRRows":
        """The same layer with queries and outputs of width C."""
        return MFAKRRows(**self.row_queries())


@dataclass(frozen=True, kw_only=True)
class MFAKRRows(KeyHeadRows):
    """One layer with rows of the key head's width; `o` reads the unturned key head."""

    @property
    def cache_width(self) -> int:
        return self.head_dim

    def value_head(self, x, key):
        return key

    def balanced(self) -> "MFAKRRows":
        scale = self.key_scale()
        return replace(self, **self.with_key_scale(scale), o=self.o / scale)

    def state_dict(self, rope_factor: float = 1.0) -> dict[str, Tensor]:
        order = stored_order(self)
        form = replace(self, **in_order(self, order), o=self.o[..., order])
        return super(MFAKRRows, form).state_dict(rope_factor)


def stored_order(form: MFAKR | MFAKRRows) -> list[int]:
    """The key head's dims as they are cached: both parts of each rotated pair side by side."""
    rotated = side_by_side(form.head_dim - form.free) + form.free
    return [*range(form.free), *rotated.tolist()]


def in_order(form: MFAKR | MFAKRRows, order: list[int]) -> dict[str, Any]:
    """The key head's map and bias in that order."""
    return {"k": form.k[order], "k_bias": None if form.k_bias is None else form.k_bias[order]}


def mfa_kr_builder(
    maps: AttentionMaps, moments: LatentMoments
) -> Callable[[MFADims], LatentAttention]:
    """The layer as MFA-KR of any dims, with queries of full rank.

    A singular value decomposition of position-free keys and values gives the directions beside the
    rotated components, and what it leaves of the values is then regressed on the whole latent.
    (Taking out first what the rotated components tell of the values left a 7% larger error: the
    regression does not know the weights.)
    """
    moments = in_precision(moments, maps.q.dtype)
    kronecker, phases = moments.kronecker, moments.phases
    assert phases is not None
    maps = maps.with_norm_in_keys()
    ranked = rope_components(maps, phases)
    key_maps, values = maps.k.flatten(0, 1), maps.v.flatten(0, 1)
    keys, svd = len(key_maps), WeightedSVD.of(kronecker.gradients, kronecker.inputs)
    less = svd.less(torch.cat([key_maps, values]), keys)

    def build(dims: MFADims) -> LatentAttention:
        split = split_rope(maps, phases, ranked, dims.qk_rope_head_dim // 2)
        free = dims.head_dim - dims.qk_rope_head_dim
        factors = less(split.rows.mT, split.k_rope, free)
        up, down = factors.up, factors.down
        # An invertible mix is free. Orthonormal rows keep what reads them from cancelling.
        turned, mix = torch.linalg.qr(down.mT)
        up, down = padded(up @ mix.mT, free, 1), padded(turned.mT, free, 0)
        head = head_fields(maps, split, down, up[:keys], kronecker.mean)
        # What `up` leaves is read from the whole latent; nothing where no direction is left out.
        predictor = regressed(values - up[keys:] @ down, head["k"], svd.right)
        predictor[:, :free] += up[keys:]
        v_b = of_groups(predictor, maps)
        bias = output_bias(maps, v_b @ head["k"], kronecker.mean)
        if head["k_bias"] is not None:  # values read it, and should not
            constant = (v_b @ head["k_bias"]).repeat_interleave(maps.repeats, 0)
            bias = bias - torch.einsum("dhv,hv->d", maps.o, constant)
        form = MFAKR(
            **head,
            v_b=v_b,
            o_bias=bias,
            energy=tuple(factors.energy.tolist()),
        )
        narrow = dims.head_dim < maps.qk_dim and maps.k_norm is None
        return form.as_rows() if narrow else form

    return build


def regressed(
    targets: Float[Tensor, "M D"], latent: Float[Tensor, "C D"], root: Float[Tensor, "D D"]
) -> Float[Tensor, "M C"]:
    """A linear predictor of targets x from latent x, by ridge regression.

    Args:
        root: of the inputs' moment.
    """
    seen = latent @ root
    gram = seen @ seen.mT
    # Directions the text hardly shows must not make weights that cancel each other.
    ridge = RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(ridge.clamp_min(torch.finfo(gram.dtype).tiny))
    return torch.linalg.solve(gram, seen @ (targets @ root).mT).mT
