"""Latent attention as weights: what all its layouts have in common.

A layout says what a token leaves in the cache, and how a head reads its key and its value from it.
Queries are the source's own. Where the position-free part of a key lies in a latent and the rest in
shared rotated components, a query reads both by complex factors, pair by pair, and no wider map is
needed: with k_gf = rest + sum_j s_gj z_j the pair f of KV head g's key, z_j a component of the
frequency f(j), and mu_hf the factor in place of the rotation that `rest` has lost, a score is

    Re sum_f conj(mu_hf q_hf) rest_gf + Re sum_j conj(q_hf(j)) e^(i theta (s - t)) s_gj z_j.

A pair of which every KV head's component is rotated leaves no rest, and has none.

Letters: H query heads, G KV heads, E head width, P = E/2 pairs, V value width, D hidden size, n
rotated components, R = 2n, U their different frequencies, W = 2U, N twice the pairs that leave a
rest, Din the queries' inputs: D, or the rank of their first map.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import linear

from .balance import even_queries
from .calibration import query_factors
from .errors import InputError
from .maps import AttentionMaps, inverse_rms, normalised, project, rotate, token_angles
from .rope_split import RopeSplit, half_layout, multiplied


@dataclass(frozen=True, kw_only=True)
class LatentAttention(ABC):
    """The weights of one layer: the source's queries and output, around a layout's own maps.

    Args:
        q: query map of every head, of the source's width.
        o: output map of every head.
        inv_freq: the source's frequencies.
        scaling: the score multiplier, a rotary attention factor included.
        q_down: low-rank queries: q then maps from its outputs instead of from D.
        q_norm, k_norm, norm_eps: of queries, and of keys, before their rotation.
        window: how many keys a query reads; None for all.
        softcap: what scores are capped by; None for nothing.
        energy: the weighted squared error that leaving out each direction of the latent adds, for
            those that were left out too.
    """

    q: Float[Tensor, "H E Din"]
    o: Float[Tensor, "D H V"]
    inv_freq: Float[Tensor, " P"]
    scaling: float
    q_down: Float[Tensor, "L D"] | None = None
    q_bias: Float[Tensor, "H E"] | None = None
    o_bias: Float[Tensor, " D"] | None = None
    q_norm: Float[Tensor, " E"] | Float[Tensor, "H E"] | None = None
    k_norm: Float[Tensor, " E"] | Float[Tensor, "G E"] | None = None
    norm_eps: float = 0.0
    window: int | None = None
    softcap: float | None = None
    energy: tuple[float, ...] = ()

    @property
    @abstractmethod
    def cache_width(self) -> int:
        """Numbers cached per token."""

    @abstractmethod
    def balanced(self) -> "LatentAttention":
        """The same layer with every channel as large where it is made as where it is read."""

    def stored(self, x: Float[Tensor, "N T D"]) -> "LatentAttention":
        """The same layer in the basis that it is written in.

        Args:
            x: inputs of the layer on calibration text.
        """
        return self.balanced()

    @abstractmethod
    def expand(self) -> AttentionMaps:
        """The same attention as maps per head; position-free pairs have frequency 0."""

    @abstractmethod
    def read(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T H K"], Float[Tensor, "B T G K"], Float[Tensor, "B T G V"]]:
        """Queries, keys and values of `expand`, computed through the latent."""

    @abstractmethod
    def query_layout(self) -> Float[Tensor, "H K E"]:
        """The map from a head's stored query to its query in `expand`, head by head."""

    @abstractmethod
    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        """The layout's tensors by the names of its model class; see `state_dict`."""

    def biases(self) -> dict[str, bool]:
        """Which projections have a bias, by the config's fields."""
        names = [name for name in vars(self) if name.endswith("_bias")]
        return {name: getattr(self, name) is not None for name in names if name in CONFIG_BIASES}

    def tensors(self) -> dict[str, Tensor]:
        """Everything that can be fitted, by field name."""
        fixed = ("inv_freq",)
        return {k: v for k, v in vars(self).items() if isinstance(v, Tensor) and k not in fixed}

    def reader(self) -> "LatentAttention":
        return self

    def queries(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch H E"]:
        """Queries of all heads as they are stored, before anything is turned."""
        q = project(x if self.q_down is None else linear(x, self.q_down), self.q, self.q_bias)
        return normalised(q, self.q_norm, self.norm_eps)

    def state_dict(self, rope_factor: float = 1.0) -> dict[str, Tensor]:
        """Tensors by the names of the model class' attention module.

        Args:
            rope_factor: what `scaling` holds beyond E^-0.5, the square of the rotary embedding's
                attention factor. The class gives it to rotated dims only, so position-free queries
                take it here.
        """
        low = "q_proj" if self.q_down is None else "q_b_proj"
        tensors = {
            f"{low}.weight": self.q.flatten(0, 1),
            f"{low}.bias": None if self.q_bias is None else self.q_bias.flatten(),
            "q_a_proj.weight": self.q_down,
            "q_norm.weight": None if self.q_norm is None else self.q_norm.flatten(),
            "k_norm.weight": None if self.k_norm is None else self.k_norm.flatten(),
            **self.own_tensors(rope_factor),
            "o_proj.weight": self.o.flatten(1),
            "o_proj.bias": self.o_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def _even_queries(self) -> dict[str, Any]:
        q, q_down = even_queries(self.q, self.q_down)
        return {"q": q, "q_down": q_down}


# Biases that a config names; `k_rope_bias` is a parameter of its own.
CONFIG_BIASES = ("q_bias", "k_bias", "kv_a_bias", "kv_b_bias", "o_bias")


@dataclass(frozen=True, kw_only=True)
class SharedKeyAttention(LatentAttention):
    """A layer whose keys are position-free but for rotated components that all heads share.

    Args:
        phase: mu of every head's pairs that leave a rest, real parts then imaginary parts.
        synthesis: s of every KV head and rotated component, real parts then imaginary parts.
        rope_pairs: for each rotated component the index of its frequency in `inv_freq`.
    """

    phase: Float[Tensor, "H N"]
    synthesis: Float[Tensor, "G R"]
    rope_pairs: tuple[int, ...]

    @abstractmethod
    def keys_and_values(
        self, x: Float[Tensor, "*batch D"]
    ) -> tuple[Float[Tensor, "*batch G N"], Float[Tensor, "*batch R"], Float[Tensor, "*batch G V"]]:
        """Position-free keys, the unturned components [real | imaginary parts], and values."""

    @property
    def qk_rope_head_dim(self) -> int:
        return 2 * len(self.rope_pairs)

    @property
    def kv_heads(self) -> int:
        return len(self.synthesis)

    @property
    def resting(self) -> list[int]:
        """The pairs that leave a rest."""
        if not self.phase.shape[1]:
            return []
        return resting_pairs(self.rope_pairs, self.q.shape[1] // 2, self.kv_heads)

    @property
    def turned(self) -> list[int]:
        """The frequencies that any component has."""
        return sorted(set(self.rope_pairs))

    def own_tensors(self, rope_factor: float) -> dict[str, Tensor | None]:
        return {
            "q_phase": self.phase * rope_factor if self.phase.numel() else None,
            "k_synthesis": self.synthesis if self.rope_pairs else None,
        }

    def split_queries(
        self, q: Float[Tensor, "*batch H E"]
    ) -> tuple[Float[Tensor, "*batch H N"], Float[Tensor, "*batch H W"]]:
        """Queries for position-free keys, and those for turned ones before they are turned."""
        pairs = q.unflatten(-1, (2, -1))
        resting, turned = (pairs[..., chosen].flatten(-2) for chosen in (self.resting, self.turned))
        return multiplied(resting, self.phase), turned

    def spread(self, shared: Float[Tensor, "*batch R"]) -> Float[Tensor, "*batch G W"]:
        """Rotated components summed into every KV head's key, by frequency."""
        matrix = spreading(self.synthesis, self.rope_pairs, self.turned)
        return linear(shared, matrix.flatten(0, 1)).unflatten(-1, matrix.shape[:2])

    def read(self, x):
        free, turning = self.split_queries(self.queries(x))
        keys, shared, values = self.keys_and_values(x)
        angles = token_angles(self.inv_freq[self.turned], x)[:, None]
        q = torch.cat([free, rotate(turning, angles)], dim=-1)
        spread = self.spread(shared)
        k = torch.cat([keys, rotate(spread, angles)], dim=-1)
        if self.k_norm is not None:
            k = k * self.key_scales(keys, spread)[..., None]
        return q, k, values

    def key_scales(
        self, keys: Float[Tensor, "*batch G N"], spread: Float[Tensor, "*batch G W"]
    ) -> Float[Tensor, "*batch G"]:
        """The inverse RMS of each KV head's key. The norm's weight is part of the key map.

        It is a number that a token leaves in the cache for each KV head, or one for all.
        """
        assert self.k_norm is not None
        whole = keys.new_zeros(*keys.shape[:-1], self.q.shape[1])
        for part, pairs in ((keys, self.resting), (spread, self.turned)):
            dims = [*pairs, *(whole.shape[-1] // 2 + pair for pair in pairs)]
            whole[..., dims] = whole[..., dims] + part
        return inverse_rms(whole / self.k_norm, self.k_norm, self.norm_eps)

    @property
    def scales(self) -> int:
        """Numbers cached per token by which keys are scaled."""
        if self.k_norm is None:
            return 0
        return self.kv_heads if self.k_norm.dim() == 1 else 1

    def expand(self) -> AttentionMaps:
        if self.k_norm is not None:
            raise ValueError("a key that is scaled by a number of its own is no map of the input.")
        (k, v), (k_bias, v_bias) = affine(self._keys, self.o)
        layout = self.query_layout()
        q = layout @ (self.q if self.q_down is None else self.q @ self.q_down)
        chosen = self.inv_freq[self.turned]
        return AttentionMaps(
            q=q,
            k=k,
            v=v,
            o=self.o,
            inv_freq=torch.cat([chosen.new_zeros(self.phase.shape[1] // 2), chosen]),
            scaling=self.scaling,
            window=self.window,
            softcap=self.softcap,
            q_bias=None if self.q_bias is None else (layout @ self.q_bias[..., None])[..., 0],
            k_bias=k_bias,
            v_bias=v_bias,
            o_bias=self.o_bias,
        )

    def query_layout(self) -> Float[Tensor, "H K E"]:
        heads, width = self.q.shape[:2]
        unit = torch.eye(width, dtype=self.q.dtype, device=self.q.device)
        free, turning = self.split_queries(unit[:, None].expand(-1, heads, -1))
        return torch.cat([free, turning], dim=-1)[..., self._order()].permute(1, 2, 0)

    def _keys(self, x: Float[Tensor, "*batch D"]) -> tuple[Tensor, Tensor]:
        free, shared, values = self.keys_and_values(x)
        return torch.cat([free, self.spread(shared)], dim=-1)[..., self._order()], values

    def _order(self) -> list[int]:
        return half_layout(self.phase.shape[1], len(self.turned))

    def _component_sizes(self) -> Float[Tensor, " n"]:
        """The root mean square of each component's factors; 1 for one that nobody reads."""
        square = self.synthesis.unflatten(-1, (2, -1)).square().sum(1).mean(0)
        return square.where(square > 0, 1).sqrt()


def affine(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], o: Float[Tensor, "D H V"]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Maps and biases of what is affine in the inputs [*batch, D]; None for a bias of zeros.

    The maps are what it makes of the unit vectors, less the biases.
    """
    bias = function(torch.zeros_like(o[:, 0, 0]))
    maps = function(torch.eye(len(o), dtype=o.dtype, device=o.device))
    weights = [(a - b).movedim(0, -1) for a, b in zip(maps, bias, strict=True)]
    return weights, [b if b.any() else None for b in bias]


def spreading(
    synthesis: Float[Tensor, "G R"], rope_pairs: tuple[int, ...], turned: list[int]
) -> Float[Tensor, "G W R"]:
    """The map from rotated components to the keys' pairs of the frequencies `turned`."""
    device = synthesis.device
    of_pair: Bool[Tensor, "U n"] = torch.tensor(turned, device=device)[:, None] == torch.tensor(
        rope_pairs, device=device
    )
    real, imag = (part[:, None] * of_pair for part in synthesis.chunk(2, dim=-1))
    return torch.cat([torch.cat([real, -imag], 2), torch.cat([imag, real], 2)], dim=1)


def with_low_rank_queries(
    form: Any,
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    rank: Callable[[Float[Tensor, " C"]], int | None],
    option: str,
) -> Any:
    """The same layer with queries of low rank, by a weighted SVD of the stacked heads.

    Args:
        rank: makes the rank of every direction's energy, or None to leave the layer as it is.
        option: the name by which a user asks for a rank.

    Raises:
        InputError: the rank is not one that the queries can have.
    """
    heads, width, hidden = form.q.shape
    most = min(heads * width, hidden)
    maps, layout = form.expand().to(torch.float32), form.query_layout().to(torch.float32)
    factors, mean = query_factors(maps, form.q, x, generator, layout)
    chosen = rank(factors.energy)
    if chosen is None:
        return form
    if not 1 <= chosen <= most:
        raise InputError(
            f"{option}={chosen} must be at least 1 and at most {most}, the rank that the queries "
            "have."
        )
    up, down = factors.up[:, :chosen], factors.down[:chosen]
    bias = ((form.q.flatten(0, 1) - up @ down) @ mean).unflatten(0, (heads, width))
    return replace(
        form,
        q=up.unflatten(0, (heads, width)),
        q_down=down,
        q_bias=bias if form.q_bias is None else form.q_bias + bias,
    )


def kept(maps: AttentionMaps, split: RopeSplit) -> dict[str, Any]:
    """The fields of a layer that come from the source and its split as they are."""
    return of_source(maps) | dict(
        phase=split.phase[:, resting_dims(maps, split)],
        synthesis=split.synthesis,
        rope_pairs=split.rope_pairs,
    )


def rest_bias(
    maps: AttentionMaps,
    split: RopeSplit,
    keys: Float[Tensor, "G N D"],
    mean: Float[Tensor, " D"],
) -> Float[Tensor, "G N"] | None:
    """The constant part of position-free keys, where a norm or a cap of scores makes it matter.

    It shifts all scores of a query alike, which softmax does not see otherwise: then None.

    Args:
        keys: the position-free keys that a layer has, as maps of its input.
        mean: the input's mean.
    """
    if maps.k_norm is None and maps.softcap is None:
        return None
    dims = resting_dims(maps, split)
    return split.k_nope_bias[:, dims] + (split.k_nope[:, dims] - keys) @ mean


def resting_pairs(rope_pairs: Sequence[int], pairs: int, groups: int) -> list[int]:
    """The pairs of which fewer components are rotated than there are KV heads."""
    counts = Counter(rope_pairs)
    return [pair for pair in range(pairs) if counts[pair] < groups]


def resting_dims(maps: AttentionMaps, split: RopeSplit) -> list[int]:
    """The dims of a head's key that leave a rest, real parts then imaginary parts."""
    half = maps.qk_dim // 2
    resting = resting_pairs(split.rope_pairs, half, maps.kv_heads)
    return [*resting, *(half + pair for pair in resting)]


def of_source(maps: AttentionMaps) -> dict[str, Any]:
    """The fields of any layout that are the source's own."""
    names = ["q", "o", "q_bias", "inv_freq", "scaling", "window", "softcap"]
    names += ["q_norm", "k_norm", "norm_eps"]
    return {name: getattr(maps, name) for name in names}


def by_group(
    up: Float[Tensor, "M r"], maps: AttentionMaps, split: RopeSplit | None = None
) -> Float[Tensor, "G B r"]:
    """The stacked rows, keys of all groups first, as every group's [key | value].

    Args:
        split: what keys have left a rest of; None for whole keys.
    """
    rows = up.split([maps.kv_heads * maps.qk_dim, maps.kv_heads * maps.v_dim])
    keys, values = (part.unflatten(0, (maps.kv_heads, -1)) for part in rows)
    if split is not None:
        keys = keys[:, resting_dims(maps, split)]
    return torch.cat([keys, values], dim=1)
