"""Multi-matrix factorization attention (MFA and MFA-KR, 2412.19255) from any attention's maps.

MFA has one key head and one value head of width C for all query heads, which come from a shared
down-projection. The key head holds the rotated components that lose most without RoPE, each with
its own frequency, and the best position-free directions; the value head the best C directions of
all values. What is special to a head goes into its query and output maps.

MFA-KR caches the key head alone, before its rotation, and reads values from it: the paper's
v = k + (k N^T) * alpha, "*" channel by channel. The paper trains from scratch and starts with
alpha = 0; it does not say whether k is meant before or after its rotation. Here it is before: a
value must not turn with its position. And here alpha and N are fitted: alpha = 1, and I + N takes
the latent to the best predictor of the values, written in orthonormal directions.

Letters: H query heads, G KV heads, E source head width, V its value width, D hidden size, C width
of the key head, n rotated components in it, L share_q_dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from .balance import even_queries, evening, paired, size
from .calibration import Kronecker, in_precision, query_factors
from .errors import InputError
from .lowrank import Factors, WeightedSVD
from .maps import AttentionMaps, project, rotate_tail, token_angles
from .mla import MLAMoments, mla_moments
from .rope_split import RopeSplit, half_layout, output_bias, rope_components, split_rope

# Queries may lose, by their low rank, this share of the error that the layer has anyway.
QUERY_SHARE = 0.02
ROUNDING = 1e-8
# Of MFA-KR's regressions, as a share of the mean energy of what they read.
RIDGE = 1e-4


@dataclass(frozen=True)
class MFADims:
    """One layer's key head of width `head_dim`, an even number, `qk_rope_head_dim` of it rotated.

    Args:
        key_reuse: MFA-KR, whose cache is the key head alone.
    """

    head_dim: int
    qk_rope_head_dim: int
    key_reuse: bool = False

    @property
    def width(self) -> int:
        return self.head_dim if self.key_reuse else 2 * self.head_dim

    def named(self) -> dict[str, int]:
        return {"head_dim": self.head_dim, "qk_rope_head_dim": self.qk_rope_head_dim}


@dataclass(frozen=True)
class MFA:
    """The weights of one MFA or MFA-KR layer, as its model class stores them.

    Args:
        q: per head [position-free | rotated real parts | rotated imaginary parts].
        q_down: the shared down-projection q maps from; None while q maps from D.
        k: the key head, in the same layout.
        o: output map, from H heads of width C.
        rope_pairs: for each rotated component the index of its frequency in `inv_freq`.
        inv_freq: the source's frequencies.
        scaling: the score multiplier, a rotary attention factor included.
        v: the value head; None in MFA-KR.
        reuse, reuse_gate: N and alpha of MFA-KR; None in MFA.
        window: how many keys a query reads; None for all.
        softcap: what scores are capped by; None for nothing.
        energy: of MFA-KR, the weighted squared error that leaving out each position-free direction
            adds, for those that were left out too.
    """

    q: Float[Tensor, "H C Din"]
    k: Float[Tensor, "C D"]
    o: Float[Tensor, "D H C"]
    rope_pairs: tuple[int, ...]
    inv_freq: Float[Tensor, " P"]
    scaling: float
    v: Float[Tensor, "C D"] | None = None
    reuse: Float[Tensor, "C C"] | None = None
    reuse_gate: Float[Tensor, " C"] | None = None
    q_down: Float[Tensor, "L D"] | None = None
    q_bias: Float[Tensor, "H C"] | None = None
    k_bias: Float[Tensor, " C"] | None = None
    o_bias: Float[Tensor, " D"] | None = None
    window: int | None = None
    softcap: float | None = None
    energy: tuple[float, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.k.shape[0]

    @property
    def share_q_dim(self) -> int:
        return self.q.shape[2]

    @property
    def cache_width(self) -> int:
        """Numbers cached per token."""
        return self.head_dim if self.v is None else 2 * self.head_dim

    def biases(self) -> dict[str, bool]:
        """Which projections have a bias, by the config's fields."""
        names = ("q_bias", "k_bias", "o_bias")
        return {name: getattr(self, name) is not None for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that can be fitted, by field name."""
        fixed = ("inv_freq",)
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k not in fixed}

    def balanced(self) -> "MFA":
        """The same layer with every channel as large where it is made as where it is read.

        MFA-KR's channels are evened between key and queries alone: its values have one more reader.
        """
        free = self.head_dim - 2 * len(self.rope_pairs)
        made, read = size(self.k, -1), size(self.q, (0, 2))
        key = torch.cat(
            [evening(made[:free], read[:free]), evening(paired(made[free:]), paired(read[free:]))]
        )
        q, q_down = even_queries(self.q / key[:, None], self.q_down)
        values: dict[str, Any] = {}
        if self.v is None:
            reading = self._reading() / key
            values["reuse"] = reading - torch.eye(self.head_dim).to(reading)
            values["reuse_gate"] = reading.new_ones(self.head_dim)
        else:
            value = evening(size(self.v, -1), size(self.o, (0, 1)))
            values = {"v": self.v * value[:, None], "o": self.o / value}
        return replace(
            self,
            q=q,
            q_down=q_down,
            q_bias=None if self.q_bias is None else self.q_bias / key,
            k=self.k * key[:, None],
            k_bias=None if self.k_bias is None else self.k_bias * key,
            **values,
        )

    def expand(self) -> AttentionMaps:
        """The same attention as maps of one KV head; position-free pairs have frequency 0."""
        order = half_layout(self.head_dim - 2 * len(self.rope_pairs), len(self.rope_pairs))
        q = self.q if self.q_down is None else self.q @ self.q_down
        v, v_bias = self.v, None
        if v is None:
            read = self._reading()
            v = read @ self.k
            v_bias = None if self.k_bias is None else (read @ self.k_bias)[None]
        chosen = self.inv_freq[list(self.rope_pairs)]
        return AttentionMaps(
            q=q[:, order],
            k=self.k[None, order],
            v=v[None],
            o=self.o,
            inv_freq=torch.cat([chosen.new_zeros(self.head_dim // 2 - len(chosen)), chosen]),
            scaling=self.scaling,
            window=self.window,
            softcap=self.softcap,
            q_bias=None if self.q_bias is None else self.q_bias[:, order],
            k_bias=None if self.k_bias is None else self.k_bias[None, order],
            v_bias=v_bias,
            o_bias=self.o_bias,
        )

    def reader(self) -> "MFA":
        return self

    def read(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T H C"], Float[Tensor, "B T 1 C"], Float[Tensor, "B T 1 C"]]:
        """What `expand` gives, by the shared projection, as [position-free | rotated]."""
        q = project(x if self.q_down is None else linear(x, self.q_down), self.q, self.q_bias)
        k = linear(x, self.k, self.k_bias)
        v = linear(k, self._reading()) if self.v is None else linear(x, self.v)
        angles = token_angles(self.inv_freq[list(self.rope_pairs)], x)
        return rotate_tail(q, angles[:, None]), rotate_tail(k, angles)[:, :, None], v[:, :, None]

    def _reading(self) -> Float[Tensor, "C C"]:
        """What takes the latent of MFA-KR to its value."""
        assert self.reuse is not None and self.reuse_gate is not None
        eye = torch.eye(self.head_dim, dtype=self.k.dtype, device=self.k.device)
        return eye + self.reuse_gate[:, None] * self.reuse

    def state_dict(self, rope_factor: float = 1.0) -> dict[str, Tensor]:
        """Tensors by the names of the model class' attention module.

        Args:
            rope_factor: the square of the rotary embedding's attention factor. The class gives it
                to rotated dims only, so position-free queries take it here.
        """
        if self.q_down is None:
            raise ValueError("queries have no shared down-projection yet: with_shared_queries.")
        scale = self.q.new_ones(self.head_dim)
        scale[: self.head_dim - 2 * len(self.rope_pairs)] = rope_factor
        tensors = {
            "q_proj.weight": self.q_down,
            "wq.weight": (self.q * scale[:, None]).flatten(0, 1),
            "wq.bias": None if self.q_bias is None else (self.q_bias * scale).flatten(),
            "k_proj.weight": self.k,
            "k_proj.bias": self.k_bias,
            "v_proj.weight": self.v,
            "kr_proj.weight": self.reuse,
            "kr_alpha": self.reuse_gate,
            "o_proj.weight": self.o.flatten(1),
            "o_proj.bias": self.o_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def mfa_moments(
    maps: AttentionMaps, x: Float[Tensor, "N T D"], generator: torch.Generator
) -> MLAMoments:
    """Moments of one layer on calibration inputs x: what decoupled MLA asks for."""
    return mla_moments(maps, x, generator, rope_on_read=False)


def to_mfa(maps: AttentionMaps, moments: MLAMoments, dims: MFADims) -> MFA:
    """The layer as MFA or MFA-KR of the given dims, with queries of full rank."""
    return mfa_builder(maps, moments)(dims)


def mfa_builder(maps: AttentionMaps, moments: MLAMoments) -> Callable[[MFADims], MFA]:
    """`to_mfa` for many dims, with what they have in common done once.

    Keys and values of MFA come from two latents, so the Gauss-Newton moments' two diagonal blocks
    serve them. MFA-KR has one: a singular value decomposition of position-free keys and values
    gives the directions beside the rotated components, and what it leaves of the values is then
    regressed on the whole latent. (Taking out first what the rotated components tell of the values
    left a 7% larger error: the regression does not know the weights.)
    """
    moments = in_precision(moments, maps.q.dtype)
    kronecker, phases = moments.kronecker, moments.phases
    assert phases is not None
    ranked = rope_components(maps, phases)
    key_maps, values = maps.k.flatten(0, 1), maps.v.flatten(0, 1)
    keys, svd = len(key_maps), WeightedSVD.of(kronecker.gradients, kronecker.inputs)

    @cache
    def less_keys() -> Callable[..., Factors]:
        return svd.under(kronecker.gradients[:keys, :keys]).less(key_maps, keys)

    @cache
    def value_factors() -> Factors:
        return svd.under(kronecker.gradients[keys:, keys:])(values)

    @cache
    def less_both() -> Callable[..., Factors]:
        return svd.less(torch.cat([key_maps, values]), keys)

    def build(dims: MFADims) -> MFA:
        split = split_rope(maps, phases, ranked, dims.qk_rope_head_dim // 2)
        free = dims.head_dim - dims.qk_rope_head_dim
        rotated = split.synthesis.mT, split.k_rope
        if not dims.key_reuse:
            factors = less_keys()(*rotated, free)
            up, down = _padded(factors.up, free, 1), _padded(factors.down, free, 0)
            v_up, v = (
                _padded(value_factors().up, dims.head_dim, 1),
                _padded(value_factors().down, dims.head_dim, 0),
            )
            return _assemble(maps, split, kronecker, up, down, v_up, v=v)
        factors = less_both()(*rotated, free)
        up, down = factors.up, factors.down
        # Free as well: an invertible mix. v = k + ... must not cancel channels of very large k.
        turned, mix = torch.linalg.qr(down.mT)
        up, down = _padded(up @ mix.mT, free, 1), _padded(turned.mT, free, 0)
        latent = torch.cat([down, split.k_rope])
        # What `up` leaves is read from the whole latent; nothing where no direction is left out.
        predictor = _regressed(values - up[keys:] @ down, latent, svd.right)
        predictor[:, :free] += up[keys:]
        # Orthonormal directions of the values' predictor, and what takes the latent there.
        v_up, reading = torch.linalg.qr(predictor)
        v_up, reading = _padded(v_up, dims.head_dim, 1), _padded(reading, dims.head_dim, 0)
        gate = reading.new_ones(dims.head_dim)
        reuse = reading - torch.eye(dims.head_dim).to(reading)
        reused = dict(reuse=reuse, reuse_gate=gate)
        form = _assemble(maps, split, kronecker, up[:keys], down, v_up, **reused)
        return replace(form, energy=tuple(factors.energy.tolist()))

    return build


def _assemble(
    maps: AttentionMaps,
    split: RopeSplit,
    moments: Kronecker,
    up: Float[Tensor, "GE F"],
    down: Float[Tensor, "F D"],
    v_up: Float[Tensor, "GV C"],
    **values: Any,
) -> MFA:
    """The layer with key directions `down`, its heads' queries and outputs folded."""
    k_up = up.unflatten(0, (maps.kv_heads, -1)).repeat_interleave(maps.repeats, 0)  # [H, E, F]
    outputs = v_up.unflatten(0, (maps.kv_heads, -1)).repeat_interleave(maps.repeats, 0)
    k_bias = q_bias = None
    if split.k_rope_bias is not None:
        k_bias = torch.cat([down.new_zeros(len(down)), split.k_rope_bias])
    rotated = slice(maps.qk_dim, None)
    if split.q_bias is not None:
        free = torch.einsum("hef,he->hf", k_up, split.q_bias[:, : maps.qk_dim])
        q_bias = torch.cat([free, split.q_bias[:, rotated]], dim=1)
    form = MFA(
        q=torch.cat([k_up.mT @ split.q[:, : maps.qk_dim], split.q[:, rotated]], dim=1),
        k=torch.cat([down, split.k_rope]),
        o=torch.einsum("dhv,hvc->dhc", maps.o, outputs),
        rope_pairs=split.rope_pairs,
        inv_freq=maps.inv_freq,
        scaling=maps.scaling,
        window=maps.window,
        softcap=maps.softcap,
        q_bias=q_bias,
        k_bias=k_bias,
        **values,
    )
    read = form.expand()
    restored = v_up.unflatten(0, (maps.kv_heads, -1)) @ read.v[0]
    bias = output_bias(maps, restored, moments.mean)
    if read.v_bias is not None:  # a latent's bias that its values read, and should not
        bias = bias - torch.einsum("dhc,c->d", form.o, read.v_bias[0])
    return replace(form, o_bias=bias)


def _regressed(
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


def _padded(tensor: Tensor, size: int, dim: int) -> Tensor:
    """The first `size` along dim, with zeros where there are fewer."""
    missing = max(0, size - tensor.shape[dim])
    tensor = tensor.narrow(dim, 0, min(size, tensor.shape[dim]))
    return torch.nn.functional.pad(tensor, (0, missing) if dim == 1 else (0, 0, 0, missing))


def with_shared_queries(
    mfa: MFA,
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    *,
    share_q_dim: int | None = None,
    error: float = 0.0,
) -> MFA:
    """The layer with all heads' queries through one down-projection, by a weighted SVD.

    Args:
        share_q_dim: its width; None for the smallest at which the error stays what it is.
        error: the layer's relative output error.
    """
    heads, width, hidden = mfa.q.shape
    most = min(heads * width, hidden)
    if share_q_dim is not None and not 1 <= share_q_dim <= most:
        raise InputError(
            f"share_q_dim={share_q_dim} must be at least 1 and at most {most}, the rank that the "
            "queries have."
        )
    maps, free = mfa.expand().to(torch.float32), mfa.head_dim - 2 * len(mfa.rope_pairs)
    order = torch.tensor(half_layout(free, len(mfa.rope_pairs))).argsort()
    factors, mean = query_factors(maps, mfa.q, x, generator, order)
    if share_q_dim is None:
        left = factors.energy.flip(0).cumsum(0).flip(0) / factors.energy.sum().clamp_min(
            torch.finfo(factors.energy.dtype).tiny
        )
        # A layer that is exact but for rounding stays so, on text that was never seen too.
        exact = error < ROUNDING
        share_q_dim = most if exact else max(1, int((left > QUERY_SHARE * error).sum()))
    up, down = factors.up[:, :share_q_dim], factors.down[:share_q_dim]
    bias = ((mfa.q.flatten(0, 1) - up @ down) @ mean).unflatten(0, (heads, width))
    return replace(
        mfa,
        q=up.unflatten(0, (heads, width)),
        q_down=down,
        q_bias=bias if mfa.q_bias is None else mfa.q_bias + bias,
    )
