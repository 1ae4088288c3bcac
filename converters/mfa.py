"""Multi-matrix factorization attention (MFA, 2412.19255) from any attention's maps.

A token caches one key head and one value head of width C for all query heads. The key head holds
the rotated components that lose most without RoPE, each with its own frequency, and the best
position-free directions; the value head the best C directions of all values. What is special to a
head goes into its query and output. Where C is the wider, they are the source's own, behind maps of
a KV head from E to C and from C to V: decoupled latent attention whose keys and values have latents
of their own. Where C is below the head's width, rows of width C are the smaller (`MFARows`).

Letters: as in `latent`, and C width of the key head, F = C - R position-free directions in it.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from .balance import evening, paired, size
from .calibration import in_precision
from .latent import LatentAttention, SharedKeyAttention, kept, rest_bias, resting_dims
from .lowrank import Factors, WeightedSVD
from .maps import AttentionMaps, project, rotate_tail, token_angles
from .moments import LatentMoments
from .rope_split import (
    RopeSplit,
    half_layout,
    multiplied,
    output_bias,
    rope_components,
    split_rope,
)


@dataclass(frozen=True)
class MFADims:
    """One layer's key head of width `head_dim`, an even number, `qk_rope_head_dim` of it rotated.

    Args:
        key_reuse: MFA-KR, whose cache is the key head alone.
        scales: numbers beside it, by which keys are scaled where they are normalised.
    """

    head_dim: int
    qk_rope_head_dim: int
    key_reuse: bool = False
    scales: int = 0

    @property
    def width(self) -> int:
        return (self.head_dim if self.key_reuse else 2 * self.head_dim) + self.scales

    def bytes(self, itemsize: int) -> int:
        return self.width * itemsize

    def named(self) -> dict[str, int]:
        return {"head_dim": self.head_dim, "qk_rope_head_dim": self.qk_rope_head_dim}


@dataclass(frozen=True, kw_only=True)
class KeyHeadAttention(SharedKeyAttention):
    """A layer with one cached key head, with the source's queries.

    Args:
        k: the key head [position-free | rotated real parts | rotated imaginary parts].
        k_b: position-free keys of every KV head, from those of the key head.
        v_b: values of every KV head, from the value head.
        k_b_bias: what is constant in position-free keys; None where no norm makes it matter.
    """

    k: Float[Tensor, "C D"]
    k_b: Float[Tensor, "G N F"]
    v_b: Float[Tensor, "G V C"]
    k_b_bias: Float[Tensor, "G N"] | None = None
    k_bias: Float[Tensor, " C"] | None = None

    @property
    def head_dim(self) -> int:
        return len(self.k)

    @property
    def free(self) -> int:
        """Position-free dims of the key head."""
        return self.k_b.shape[2]

    @abstractmethod
    def value_head(
        self, x: Float[Tensor, "*batch D"], key: Float[Tensor, "*batch C"]
    ) -> Float[Tensor, "*batch C"]:
        """The one value head, from the inputs or from the unturned key head."""

    def keys_and_values(self, x):
        key = linear(x, self.k, self.k_bias)
        values = project(self.value_head(x, key), self.v_b)
        keys = project(key[..., : self.free], self.k_b, self.k_b_bias)
        return keys, key[..., self.free :], values

    def value_reader(self) -> "ValueReader":
        """The same attention with one map of the value head for every head."""
        v_b = self.v_b.repeat_interleave(len(self.q) // self.kv_heads, 0)
        wide = torch.einsum("dhv,hvc->dhc", self.o, v_b)
        return ValueReader(self, wide, self.o_bias, self.scaling, self.window, self.softcap)

    def key_scale(self) -> Float[Tensor, " C"]:
        """Factors that make the key head as large where it is made as where it is read."""
        made, read = size(self.k[: self.free], -1), size(self.k_b.flatten(0, 1), 0)
        return torch.cat([evening(made, read), self._component_sizes().repeat(2)])

    def with_key_scale(self, scale: Float[Tensor, " C"]) -> dict[str, Any]:
        """The fields that change where the key head's dims are made `scale` times as large."""
        return self._even_queries() | dict(
            synthesis=self.synthesis / scale[self.free :],
            k=self.k * scale[:, None],
            k_bias=None if self.k_bias is None else self.k_bias * scale,
            k_b=self.k_b / scale[: self.free],
        )

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        bias = self.k_b_bias if self.k_b.shape[1] else None
        return super().own_tensors(rope_factor) | {
            "k_proj.weight": self.k,
            "k_proj.bias": self.k_bias,
            "k_b_proj.weight": self.k_b.flatten(0, 1) if self.k_b.shape[1] else None,
            "k_b_proj.bias": None if bias is None else bias.flatten(),
            "v_b_proj.weight": self.v_b.flatten(0, 1),
        }

    def row_queries(self) -> dict[str, Any]:
        """Queries and output as rows of the key head's width, and what stays beside them."""
        repeats = len(self.q) // self.kv_heads
        k_b, v_b = (part.repeat_interleave(repeats, 0) for part in (self.k_b, self.v_b))
        synthesis = self.synthesis.repeat_interleave(repeats, 0)

        def rows(q: Float[Tensor, "H E K"]) -> Float[Tensor, "H C K"]:
            by_dim = q.movedim(-1, 0)  # [K, H, E]
            free = torch.einsum("khn,hnf->khf", self.split_queries(by_dim)[0], k_b)
            pairs = by_dim.unflatten(-1, (2, -1))[..., list(self.rope_pairs)].flatten(-2)
            conjugate = torch.cat([synthesis.chunk(2, -1)[0], -synthesis.chunk(2, -1)[1]], -1)
            return torch.cat([free, multiplied(pairs, conjugate)], dim=-1).movedim(0, -1)

        same = ("inv_freq", "scaling", "q_down", "o_bias", "window", "softcap", "energy")
        return {name: getattr(self, name) for name in (*same, "rope_pairs", "k", "k_bias")} | dict(
            q=rows(self.q),
            q_bias=None if self.q_bias is None else rows(self.q_bias[..., None])[..., 0],
            o=torch.einsum("dhv,hvc->dhc", self.o, v_b),
        )


@dataclass(frozen=True)
class ValueReader:
    """A layer whose output is taken from the value head itself, by maps of its width.

    Args:
        o: what every head's `o` and `v_b` make of the value head.
    """

    form: KeyHeadAttention
    o: Float[Tensor, "D H C"]
    o_bias: Float[Tensor, " D"] | None
    scaling: float
    window: int | None
    softcap: float | None

    def read(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T G K"], Float[Tensor, "B T G C"]]:
        """See `Reader`."""
        q, k, _ = self.form.read(x)
        value = self.form.value_head(x, linear(x, self.form.k, self.form.k_bias))
        return q, k, value[:, :, None].expand(-1, -1, k.shape[2], -1)


@dataclass(frozen=True, kw_only=True)
class MFA(KeyHeadAttention):
    """One layer with the source's queries.

    Args:
        v: the value head.
    """

    v: Float[Tensor, "C D"]

    @property
    def cache_width(self) -> int:
        return 2 * self.head_dim + self.scales

    def value_head(self, x, key):
        return linear(x, self.v)

    def balanced(self) -> "MFA":
        value = evening(size(self.v, -1), size(self.v_b.flatten(0, 1), 0))
        values: dict[str, Any] = dict(v=self.v * value[:, None], v_b=self.v_b / value)
        return replace(self, **self.with_key_scale(self.key_scale()), **values)

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return super().own_tensors(rope_factor) | {"v_proj.weight": self.v}

    def as_rows(self) -> "MFARows":
        """The same layer with queries and outputs of width C."""
        return MFARows(**self.row_queries(), v=self.v)


@dataclass(frozen=True, kw_only=True)
class KeyHeadRows(LatentAttention):
    """A layer with one cached key head, with a query row of width C for every head.

    `q` is per head [position-free | rotated real parts | rotated imaginary parts], of width C, and
    `o` reads the value head.
    """

    k: Float[Tensor, "C D"]
    rope_pairs: tuple[int, ...]
    k_bias: Float[Tensor, " C"] | None = None

    @property
    def head_dim(self) -> int:
        return len(self.k)

    @property
    def free(self) -> int:
        return self.head_dim - 2 * len(self.rope_pairs)

    @abstractmethod
    def value_head(
        self, x: Float[Tensor, "*batch D"], key: Float[Tensor, "*batch C"]
    ) -> Float[Tensor, "*batch C"]:
        """The one value head, from the inputs or from the unturned key head."""

    def read(self, x):
        key = linear(x, self.k, self.k_bias)
        value, angles = self.value_head(x, key), token_angles(self.inv_freq[[*self.rope_pairs]], x)
        q = rotate_tail(self.queries(x), angles[:, None])
        return q, rotate_tail(key, angles)[:, :, None], value[:, :, None]

    def expand(self) -> AttentionMaps:
        order, layout = self._order(), self.query_layout()
        eye = torch.eye(self.o.shape[0]).to(self.k)
        bias = torch.zeros_like(self.k[:, 0]) if self.k_bias is None else self.k_bias
        v_bias = self.value_head(torch.zeros_like(eye[0]), bias)
        v = (self.value_head(eye, self.k.mT + bias) - v_bias).mT
        chosen = self.inv_freq[[*self.rope_pairs]]
        return AttentionMaps(
            q=layout @ (self.q if self.q_down is None else self.q @ self.q_down),
            k=self.k[None, order],
            v=v[None],
            o=self.o,
            inv_freq=torch.cat([chosen.new_zeros(self.free // 2), chosen]),
            scaling=self.scaling,
            window=self.window,
            softcap=self.softcap,
            q_bias=None if self.q_bias is None else self.q_bias[:, order],
            k_bias=None if self.k_bias is None else self.k_bias[None, order],
            v_bias=v_bias[None] if v_bias.any() else None,
            o_bias=self.o_bias,
        )

    def query_layout(self) -> Float[Tensor, "H K E"]:
        return torch.eye(self.head_dim).to(self.q)[self._order()].expand(len(self.q), -1, -1)

    def _order(self) -> list[int]:
        return half_layout(self.free, len(self.rope_pairs))

    def key_scale(self) -> Float[Tensor, " C"]:
        """Factors that make the key head's dims as large where they are made as in the queries."""
        made, read, free = size(self.k, -1), size(self.q, (0, 2)), self.free
        rotated = evening(paired(made[free:]), paired(read[free:]))
        return torch.cat([evening(made[:free], read[:free]), rotated])

    def with_key_scale(self, scale: Float[Tensor, " C"]) -> dict[str, Any]:
        """The fields that change where the key head's dims are made `scale` times as large."""
        even = replace(self, q=self.q / scale[:, None])._even_queries()
        return even | dict(
            q_bias=None if self.q_bias is None else self.q_bias / scale,
            k=self.k * scale[:, None],
            k_bias=None if self.k_bias is None else self.k_bias * scale,
        )

    def state_dict(self, rope_factor: float = 1.0) -> dict[str, Tensor]:
        scale = self.q.new_ones(self.head_dim)
        scale[: self.free] = rope_factor
        bias = None if self.q_bias is None else self.q_bias * scale
        form = replace(self, q=self.q * scale[:, None], q_bias=bias)
        return super(KeyHeadRows, form).state_dict(rope_factor)

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return {"k_proj.weight": self.k, "k_proj.bias": self.k_bias}


@dataclass(frozen=True, kw_only=True)
class MFARows(KeyHeadRows):
    """One layer with rows of the value head's width.

    Args:
        v: the value head.
    """

    v: Float[Tensor, "C D"]

    @property
    def cache_width(self) -> int:
        return 2 * self.head_dim

    def value_head(self, x, key):
        return linear(x, self.v)

    def balanced(self) -> "MFARows":
        value = evening(size(self.v, -1), size(self.o, (0, 1)))
        values: dict[str, Any] = dict(v=self.v * value[:, None], o=self.o / value)
        return replace(self, **self.with_key_scale(self.key_scale()), **values)

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return super().own_tensors(rope_factor) | {"v_proj.weight": self.v}


def to_mfa(maps: AttentionMaps, moments: LatentMoments, dims: MFADims) -> LatentAttention:
    """The layer as MFA of the given dims, with queries of full rank."""
    return mfa_builder(maps, moments)(dims)


def mfa_builder(
    maps: AttentionMaps, moments: LatentMoments
) -> Callable[[MFADims], LatentAttention]:
    """`to_mfa` for many dims, with what they have in common done once.

    Keys and values come from two latents, so the Gauss-Newton moments' two diagonal blocks serve
    them.
    """
    moments = in_precision(moments, maps.q.dtype)
    kronecker, phases = moments.kronecker, moments.phases
    assert phases is not None
    maps = maps.with_norm_in_keys()
    ranked = rope_components(maps, phases)
    key_maps, values = maps.k.flatten(0, 1), maps.v.flatten(0, 1)
    keys, svd = len(key_maps), WeightedSVD.of(kronecker.gradients, kronecker.inputs)

    @cache
    def less_keys() -> Callable[..., Factors]:
        return svd.under(kronecker.gradients[:keys, :keys]).less(key_maps, keys)

    @cache
    def value_factors() -> Factors:
        return svd.under(kronecker.gradients[keys:, keys:])(values)

    def build(dims: MFADims) -> LatentAttention:
        split = split_rope(maps, phases, ranked, dims.qk_rope_head_dim // 2)
        free = dims.head_dim - dims.qk_rope_head_dim
        factors = less_keys()(split.rows.mT, split.k_rope, free)
        v_b = of_groups(padded(value_factors().up, dims.head_dim, 1), maps)
        v = padded(value_factors().down, dims.head_dim, 0)
        form = MFA(
            **head_fields(
                *(maps, split, padded(factors.down, free, 0), padded(factors.up, free, 1)),
                kronecker.mean,
            ),
            v=v,
            v_b=v_b,
            o_bias=output_bias(maps, v_b @ v, kronecker.mean),
        )
        # Rows of width C are linear in the input, and normalised queries are not.
        narrow = dims.head_dim < maps.qk_dim and maps.k_norm is None
        return form.as_rows() if narrow else form

    return build


def head_fields(
    maps: AttentionMaps,
    split: RopeSplit,
    down: Float[Tensor, "F D"],
    up: Float[Tensor, "GE F"],
    mean: Float[Tensor, " D"],
) -> dict[str, Any]:
    """The fields about queries and keys: position-free directions, and rotated components.

    Args:
        down: the position-free directions.
        up: position-free keys of all KV heads, from them.
        mean: the input's mean.
    """
    bias = None
    if split.k_rope_bias is not None:
        bias = torch.cat([down.new_zeros(len(down)), split.k_rope_bias])
    fields = kept(maps, split) | {"k": torch.cat([down, split.k_rope]), "k_bias": bias}
    k_b = of_groups(up, maps)[:, resting_dims(maps, split)]
    k_b_bias = rest_bias(maps, split, k_b @ down, mean)
    if not len(down) and maps.k_norm is None:  # nothing position-free is read
        fields["phase"], k_b, k_b_bias = fields["phase"][:, :0], k_b[:, :0], None
    return fields | {"k_b": k_b, "k_b_bias": k_b_bias}


def of_groups(up: Float[Tensor, "GE F"], maps: AttentionMaps) -> Float[Tensor, "G E F"]:
    """Stacked rows of all KV heads, head by head."""
    return up.unflatten(0, (maps.kv_heads, -1))


def padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """The first `size` along dim, with zeros where there are fewer."""
    missing = max(0, size - tensor.shape[dim])
    tensor = tensor.narrow(dim, 0, min(size, tensor.shape[dim]))
    return torch.nn.functional.pad(tensor, (0, missing) if dim == 1 else (0, 0, 0, missing))
