"""Multi-head latent attention (DeepSeek-V2, 2405.04434) from any attention's maps.

Decoupled: the strongest rotated components keep RoPE in one key all heads share, the rest of the
keys and all values are read from a latent of rank r, position-free. On-read: the latent alone is
cached, and what is rotated is rotated when it is read: the same components, which cost no cache
now but a product with the latent for each token that is read, or every key, whole.

Letters: H query heads, G KV heads, E source head width, P = E/2 pairs, V value width, D hidden
size, n rotated components (2n rotated dims), r latent rank.
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
from .calibration import (
    Kronecker,
    PhaseMoments,
    in_precision,
    kronecker,
    phase_moments,
    probe_gradients,
    query_factors,
)
from .errors import InputError
from .lowrank import Factors, WeightedSVD
from .maps import AttentionMaps, normalised, project, rotate, rotate_tail, token_angles
from .plan import LayerDims
from .rope_split import (
    RopeSplit,
    half_layout,
    output_bias,
    position_free_queries,
    rope_components,
    split_rope,
)

# Of the largest: what a direction of the latent is given in the key at least, where the key takes
# its place. Values read from it would else be rounding: SmolLM2 at 12.5% (KL 0.314 to the source)
# is moved by 9e-5 in float32 and 7e-3 in bfloat16 by a hundredth, by 8e-8 and 7e-2 by a thousandth.
LEAST_KEY = 1e-2
# Of the rotated key's mean energy: what each of its pairs is taken to have at least.
LEAST_PAIR = 1e-6
# Of the latent's mean energy: what each of its directions is taken to have at least.
LEAST_ENERGY = 1e-3


@dataclass(frozen=True)
class MLA:
    """The weights of one MLA layer, as its model class stores them.

    Args:
        q: per head [position-free | rotated real parts | rotated imaginary parts].
        q_down: low-rank queries: q then maps from its q_lora_rank outputs instead of from D.
        kv_a: [latent | rotated key's real parts | imaginary parts]; on-read the latent alone.
        kv_b: per KV head [position-free key | value], from the latent.
        k_rope: on-read, the rotated key [real parts | imaginary parts], from the latent; None once
            it stands in the latent (`settled`), as the last of its dims, the two parts of each pair
            side by side.
        o: output map.
        rope_pairs: for each rotated component the index of its frequency in `inv_freq`.
        inv_freq: the source's frequencies.
        scaling: the score multiplier, a rotary attention factor included.
        rope_on_read: keys come from the latent alone. Without `rope_pairs` they are rotated whole,
            with all of `inv_freq`.
        q_norm, k_norm, norm_eps: of queries, and of keys once they are formed; of keys that are
            rotated whole alone.
        window: how many keys a query reads; None for all.
        softcap: what scores are capped by; None for nothing.
        energy: the weighted squared error that leaving out each direction of the latent adds, for
            those that were left out too.
    """

    q: Float[Tensor, "H Q Din"]
    kv_a: Float[Tensor, "A D"]
    kv_b: Float[Tensor, "G B r"]
    o: Float[Tensor, "D H V"]
    rope_pairs: tuple[int, ...]
    inv_freq: Float[Tensor, " P"]
    scaling: float
    rope_on_read: bool = False
    k_rope: Float[Tensor, "R r"] | None = None
    k_rope_bias: Float[Tensor, " R"] | None = None
    q_down: Float[Tensor, "L D"] | None = None
    q_bias: Float[Tensor, "H Q"] | None = None
    kv_a_bias: Float[Tensor, " A"] | None = None
    kv_b_bias: Float[Tensor, "G B"] | None = None
    o_bias: Float[Tensor, " D"] | None = None
    q_norm: Float[Tensor, " E"] | Float[Tensor, "H E"] | None = None
    k_norm: Float[Tensor, " E"] | Float[Tensor, "G E"] | None = None
    norm_eps: float = 0.0
    window: int | None = None
    softcap: float | None = None
    energy: tuple[float, ...] = ()

    @property
    def kv_lora_rank(self) -> int:
        return self.kv_b.shape[2]

    @property
    def qk_rope_head_dim(self) -> int:
        return 2 * len(self.rope_pairs)

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

    @property
    def whole_keys(self) -> bool:
        """Every key is formed and rotated whole when it is read."""
        return self.rope_on_read and not self.rope_pairs

    @property
    def key_in_latent(self) -> bool:
        """The rotated key is the latent's last dims."""
        return self.rope_on_read and self.k_rope is None and len(self.rope_pairs) > 0

    def settled(self, x: Float[Tensor, "N T D"]) -> "MLA":
        """The same layer with a latent that is as cheap to read, and as safe to round, as can be.

        A latent has no basis of its own. In the one taken here the rotated key needs no product: it
        is the last dims of the latent, and the dims before them are uncorrelated with it. Nor has a
        latent an origin: it is centred, so that what is constant takes none of its bits.

        Args:
            x: inputs that tell the latent's mean and covariance.
        """
        if not self.rope_on_read:
            return self
        latents = torch.cat([row.to(self.kv_a) @ self.kv_a.mT for row in x])
        mean = latents.mean(0)
        centre = mean if self.kv_a_bias is None else mean + self.kv_a_bias
        kv_b_bias = self.kv_b @ centre
        if self.kv_b_bias is not None:
            kv_b_bias = kv_b_bias + self.kv_b_bias
        centred = replace(self, kv_a_bias=-mean, kv_b_bias=kv_b_bias)
        if self.k_rope is None:
            return centred
        latents = (latents - mean).double()
        covariance = latents.mT @ latents / len(latents)
        mla, order = centred._with_white_pairs(covariance), _side_by_side(len(self.k_rope))
        assert mla.k_rope is not None
        k_rope_bias = mla.k_rope @ centre
        if mla.k_rope_bias is not None:
            k_rope_bias = k_rope_bias + mla.k_rope_bias
        there, back = _with_key_last(mla.k_rope[order], covariance)
        return replace(
            mla,
            kv_a=there @ self.kv_a,
            kv_a_bias=there @ -mean,
            kv_b=self.kv_b @ back,
            k_rope=None,
            k_rope_bias=k_rope_bias[order],
        )

    def _with_white_pairs(self, covariance: Float[Tensor, "r r"]) -> "MLA":
        """The same layer, where the rotated key's pairs of one frequency are white.

        Such pairs turn alike, so that a complex matrix of the key's is undone by the queries'.

        Args:
            covariance: of the latents.
        """
        key = self.k_rope
        assert key is not None
        parts = torch.complex(*key.double().chunk(2))
        pairs = torch.tensor(self.rope_pairs, device=key.device)
        moment = parts @ covariance.to(parts) @ parts.mH
        moment = moment.where(pairs[:, None] == pairs, 0)
        mean = moment.diagonal().real.mean()
        moment.diagonal().add_(LEAST_PAIR * mean.where(mean > 0, 1))
        root = torch.linalg.cholesky(moment)
        white = _on_parts(torch.linalg.inv(root)).to(key)
        nope = self.qk_nope_head_dim

        def read(rows: Float[Tensor, "H Q ..."]) -> Float[Tensor, "H Q ..."]:
            turned = torch.tensordot(rows[:, nope:], _on_parts(root).to(rows), ([1], [0]))
            return torch.cat([rows[:, :nope], turned.movedim(-1, 1)], dim=1)

        return replace(
            self,
            q=read(self.q),
            q_bias=None if self.q_bias is None else read(self.q_bias),
            k_rope=white @ key,
            k_rope_bias=None if self.k_rope_bias is None else white @ self.k_rope_bias,
        )

    def balanced(self) -> "MLA":
        """The same layer with every channel as large where it is made as where it is read."""
        r, nope, groups = self.kv_lora_rank, self.qk_nope_head_dim, self.kv_b.shape[0]
        q, o = self.q.unflatten(0, (groups, -1)), self.o.unflatten(1, (groups, -1))
        rope_made = self.kv_a[r:] if self.k_rope is None else self.k_rope
        key = size(self.kv_b[:, :nope], -1), size(q[:, :, :nope], (1, 3))  # each [G, nope]
        value = evening(size(self.kv_b[:, nope:], -1), size(o, (0, 2)))  # [G, V]
        if self.key_in_latent:
            rope = self._tail_scale()
        else:
            rope = evening(paired(size(rope_made, -1)), paired(size(q[:, :, nope:], (0, 1, 3))))
        if self.k_norm is not None:
            key_scale = value.new_ones(key[0].shape)
        elif self.whole_keys:
            key_scale = evening(*map(paired, key))
        else:
            key_scale = evening(*key)

        repeats = q.shape[1]
        pair = torch.cat([key_scale, value], 1)  # [G, B]
        query = torch.cat([key_scale, rope.expand(groups, -1)], 1).repeat_interleave(repeats, 0)
        kv_b = self.kv_b * pair[..., None]
        k_rope = None if self.k_rope is None else self.k_rope * rope[:, None]
        readers = kv_b.flatten(0, 1) if k_rope is None else torch.cat([kv_b.flatten(0, 1), k_rope])
        latent = evening(size(self.kv_a[:r], -1), size(readers, 0))  # [r]
        rope_bias = rope
        if self.key_in_latent:
            rope_bias = rope[_side_by_side(len(rope))]
            latent = torch.cat([latent[: r - len(rope)], rope_bias])
        cached = latent if self.rope_on_read else torch.cat([latent, rope])
        new_q, q_down = even_queries(self.q / query[..., None], self.q_down)
        return replace(
            self,
            q=new_q,
            q_down=q_down,
            q_bias=None if self.q_bias is None else self.q_bias / query,
            kv_a=self.kv_a * cached[:, None],
            kv_a_bias=None if self.kv_a_bias is None else self.kv_a_bias * cached,
            kv_b=kv_b / latent,
            kv_b_bias=None if self.kv_b_bias is None else self.kv_b_bias * pair,
            k_rope=None if k_rope is None else k_rope / latent,
            k_rope_bias=None if self.k_rope_bias is None else self.k_rope_bias * rope_bias,
            o=self.o / value.repeat_interleave(repeats, 0),
        )

    def _read_key(self, latent: Float[Tensor, "r ..."]) -> Float[Tensor, "R ..."]:
        """Of what makes the latent, what makes the rotated key, without its bias."""
        if self.k_rope is not None:
            return self.k_rope @ latent
        count = 2 * len(self.rope_pairs)
        return latent[len(latent) - count :][_side_by_side(count).argsort()]

    def _tail_scale(self) -> Float[Tensor, " R"]:
        """What evens the rotated key within the latent, with the queries and `kv_b` as readers."""
        count = 2 * len(self.rope_pairs)
        apart = _side_by_side(count).argsort()
        made = size(self.kv_a[-count:], -1)[apart]
        by_queries = self.q[:, -count:].square().mean((0, 2))
        by_values = self.kv_b[:, :, -count:].square().mean((0, 1))[apart]
        return evening(paired(made), paired((by_queries + by_values).sqrt()))

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
        fixed: dict[str, Any] = dict(scaling=self.scaling, window=self.window, softcap=self.softcap)
        if self.whole_keys:
            norms: dict[str, Any] = dict(
                q_norm=self.q_norm, k_norm=self.k_norm, norm_eps=self.norm_eps
            )
            return AttentionMaps(q, k, v, self.o, self.inv_freq, **fixed, **biases, **norms)
        groups = kv.shape[0]
        half, count = nope // 2, len(self.rope_pairs)
        if self.rope_on_read:
            rope, rope_bias = self._read_key(latent), self.k_rope_bias
            if self.key_in_latent and rope_bias is not None:
                rope_bias = rope_bias[_side_by_side(2 * count).argsort()]
            if latent_bias is not None:
                read = self._read_key(latent_bias)
                rope_bias = read if rope_bias is None else rope_bias + read
        else:
            rope, rope_bias = self.kv_a[r:], _rows(self.kv_a_bias, slice(r, None))
        rope = rope.expand(groups, -1, -1)
        k = torch.cat([k[:, :half], rope[:, :count], k[:, half:], rope[:, count:]], dim=1)
        if rope_bias is not None:
            if k_bias is None:
                k_bias = k.new_zeros(groups, nope)
            biases["k_bias"] = torch.cat([k_bias, rope_bias.expand(groups, -1)], dim=1)
        order = half_layout(nope, count)
        for name in ("q_bias", "k_bias"):
            bias = biases[name]
            biases[name] = None if bias is None else bias[:, order]
        chosen = self.inv_freq[list(self.rope_pairs)]
        inv_freq = torch.cat([chosen.new_zeros(nope // 2), chosen])
        return AttentionMaps(q[:, order], k, v, self.o, inv_freq, **fixed, **biases)

    def reader(self) -> "MLA":
        return self

    def read(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T G E"], Float[Tensor, "B T G V"]]:
        """What `expand` gives, by way of the latent: [position-free | rotated] queries and keys."""
        r, nope = self.kv_lora_rank, self.qk_nope_head_dim
        q = project(x if self.q_down is None else linear(x, self.q_down), self.q, self.q_bias)
        cached = linear(x, self.kv_a, self.kv_a_bias)
        pair = project(cached[..., :r], self.kv_b, self.kv_b_bias)
        k, v = pair.split([nope, self.v_head_dim], dim=-1)
        if self.whole_keys:
            angles = token_angles(self.inv_freq, x)[:, None]
            q = normalised(q, self.q_norm, self.norm_eps)
            k = normalised(k, self.k_norm, self.norm_eps)
            return rotate(q, angles), rotate(k, angles), v
        if not self.rope_on_read:
            rope = cached[..., r:]
        elif self.k_rope is not None:
            rope = linear(cached, self.k_rope, self.k_rope_bias)
        else:
            rope = cached[..., r - self.qk_rope_head_dim :]
            rope = rope if self.k_rope_bias is None else rope + self.k_rope_bias
            rope = rope[..., _side_by_side(self.qk_rope_head_dim).argsort()]
        angles = token_angles(self.inv_freq[list(self.rope_pairs)], x)
        shared = rotate(rope, angles)[:, :, None].expand(-1, -1, k.shape[2], -1)
        return rotate_tail(q, angles[:, None]), torch.cat([k, shared], dim=-1), v

    def state_dict(self, rope_factor: float = 1.0) -> dict[str, Tensor]:
        """Tensors by the names of the model class' attention module.

        Args:
            rope_factor: what `scaling` holds beyond E^-0.5, the square of the rotary embedding's
                attention factor. The class gives it to rotated dims only, so position-free queries
                take it here.
        """
        q, q_bias = self.q, self.q_bias
        if not self.whole_keys and rope_factor != 1.0:
            scale = q.new_ones(q.shape[1])
            scale[: self.qk_nope_head_dim] = rope_factor
            q = q * scale[:, None]
            q_bias = None if q_bias is None else q_bias * scale
        if self.k_rope is not None:
            raise ValueError("the rotated key does not stand in the latent yet: settled.")
        tensors = {
            "q_proj.weight" if self.q_down is None else "q_b_proj.weight": q.flatten(0, 1),
            "q_a_proj.weight": self.q_down,
            "q_proj.bias" if self.q_down is None else "q_b_proj.bias": _flat(q_bias),
            "kv_a_proj_with_mqa.weight": self.kv_a,
            "kv_a_proj_with_mqa.bias": self.kv_a_bias,
            "kv_b_proj.weight": self.kv_b.flatten(0, 1),
            "kv_b_proj.bias": _flat(self.kv_b_bias),
            "k_rope_bias": self.k_rope_bias,
            "o_proj.weight": self.o.flatten(1),
            "o_proj.bias": self.o_bias,
            "q_norm.weight": None if self.q_norm is None else self.q_norm.flatten(),
            "k_norm.weight": None if self.k_norm is None else self.k_norm.flatten(),
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@dataclass(frozen=True)
class MLAMoments:
    """All that the calibration text says about one layer, for either kind of RoPE.

    Args:
        kronecker: of position-free keys and values; on-read, of each KV head's [keys as they are |
            position-free keys], and of values.
        phases: what it costs to drop a rotation. None where keys are normalised, and none can be;
            there are then no position-free keys.
    """

    kronecker: Kronecker
    phases: PhaseMoments | None
    rope_on_read: bool = False


def mla_moments(
    maps: AttentionMaps,
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    rope_on_read: bool,
) -> MLAMoments:
    """Moments of one layer on calibration inputs x, in float32."""
    narrow = maps.to(torch.float32)
    if maps.k_norm is not None:
        whole, values = probe_gradients(narrow, x, generator)
        gradients = torch.cat([whole.flatten(2), values.flatten(2)], -1)
        return MLAMoments(kronecker(x, gradients), None, rope_on_read)
    phases = phase_moments(narrow, x[: (len(x) + 2) // 3])  # few numbers: a third is plenty
    q, q_bias = position_free_queries(maps, phases)
    free = (q.float(), None if q_bias is None else q_bias.float())
    keys, values = probe_gradients(narrow, x, generator, free, rotated_too=rope_on_read)
    gradients = torch.cat([keys.flatten(2), values.flatten(2)], -1)
    return MLAMoments(kronecker(x, gradients), phases, rope_on_read)


def to_mla(maps: AttentionMaps, moments: MLAMoments, dims: LayerDims) -> MLA:
    """The layer as MLA of the given dims, with the moments' kind of RoPE."""
    return mla_builder(maps, moments)(dims)


def mla_builder(maps: AttentionMaps, moments: MLAMoments) -> Callable[[LayerDims], MLA]:
    """`to_mla` for many dims, with what they have in common done once."""
    moments = in_precision(moments, maps.q.dtype)
    if moments.rope_on_read:
        return _on_read_builder(maps, moments)
    kronecker, phases = moments.kronecker, moments.phases
    assert phases is not None
    svd = WeightedSVD.of(kronecker.gradients, kronecker.inputs)
    keys, values = maps.k.flatten(0, 1), maps.v.flatten(0, 1)
    less = svd.less(torch.cat([keys, values]), len(keys))
    ranked = rope_components(maps, phases)

    def build(dims: LayerDims) -> MLA:
        components = ranked if dims.rope_pairs is None else ranked.first(dims.rope_pairs)
        split = split_rope(maps, phases, components, dims.qk_rope_head_dim // 2)
        factors = less(split.synthesis.mT, split.k_rope, dims.kv_lora_rank)
        return decoupled_mla(maps, split, factors, moments, dims)

    return build


def _on_read_builder(maps: AttentionMaps, moments: MLAMoments) -> Callable[[LayerDims], MLA]:
    kronecker, phases = moments.kronecker, moments.phases
    svd = WeightedSVD.of(kronecker.gradients, kronecker.inputs)
    if phases is None:
        factors = svd(torch.cat([maps.k.flatten(0, 1), maps.v.flatten(0, 1)]))
        return lambda dims: whole_key_mla(maps, factors, moments, dims)
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
        rotated = split.synthesis @ moment[whole]
        others = torch.cat([free, rest])
        moment = torch.cat(
            [
                torch.cat([rotated[:, whole] @ split.synthesis.mT, rotated[:, others]], dim=1),
                torch.cat([rotated[:, others].mT, moment[others][:, others]], dim=1),
            ]
        )
        rows = [split.k_rope, split.k_nope.flatten(0, 1), maps.v.flatten(0, 1)]
        return split, svd.under(moment)(torch.cat(rows))

    def build(dims: LayerDims) -> MLA:
        count = dims.qk_rope_head_dim // 2
        if count == 0:
            return whole_key_mla(maps, every_key(), moments, dims)
        return read_key_mla(maps, *some_components(count), moments, dims)

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
        q=split.q,
        kv_a=rows,
        kv_b=kv_b,
        o=maps.o,
        rope_pairs=split.rope_pairs,
        inv_freq=maps.inv_freq,
        scaling=maps.scaling,
        window=maps.window,
        softcap=maps.softcap,
        q_bias=split.q_bias,
        kv_a_bias=bias,
        energy=tuple(factors.energy.tolist()),
        o_bias=output_bias(maps, kv_b[:, nope:] @ down, mean),
    )


def read_key_mla(
    maps: AttentionMaps, split: RopeSplit, factors: Factors, moments: MLAMoments, dims: LayerDims
) -> MLA:
    """A latent of the given rank, which the split's rotated key is read from too."""
    nope, rank, mean = maps.qk_dim, dims.kv_lora_rank, moments.kronecker.mean
    down, rotated = factors.down[:rank], len(split.k_rope)
    k_rope, up = factors.up[:rotated, :rank], factors.up[rotated:, :rank]
    kv_b = _stack_groups(up, maps, nope)
    # What is constant over tokens costs no rank: it is a bias, rotated with its key.
    bias = (split.k_rope - k_rope @ down) @ mean
    if split.k_rope_bias is not None:
        bias = bias + split.k_rope_bias
    return MLA(
        q=split.q,
        kv_a=down,
        kv_b=kv_b,
        o=maps.o,
        rope_pairs=split.rope_pairs,
        inv_freq=maps.inv_freq,
        scaling=maps.scaling,
        window=maps.window,
        softcap=maps.softcap,
        rope_on_read=True,
        k_rope=k_rope,
        k_rope_bias=bias,
        q_bias=split.q_bias,
        kv_b_bias=kv_b.new_zeros(kv_b.shape[:2]),
        energy=tuple(factors.energy.tolist()),
        o_bias=output_bias(maps, kv_b[:, nope:] @ down, mean),
    )


def whole_key_mla(
    maps: AttentionMaps, factors: Factors, moments: MLAMoments, dims: LayerDims
) -> MLA:
    """A latent of the given rank, from which every key is read and rotated whole."""
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
        window=maps.window,
        softcap=maps.softcap,
        rope_on_read=True,
        q_bias=maps.q_bias,
        kv_b_bias=bias,
        energy=tuple(factors.energy.tolist()),
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
    if mla.rope_pairs:
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


def _with_key_last(
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


def _on_parts(matrix: Tensor) -> Float[Tensor, "2*n 2*n"]:
    """What a complex matrix [n, n] does to [real parts | imaginary parts]."""
    real, imag = matrix.real, matrix.imag
    return torch.cat([torch.cat([real, -imag], 1), torch.cat([imag, real], 1)])


def _side_by_side(count: int) -> Tensor:
    """Which of [real parts | imaginary parts] come first where a pair's parts are neighbours."""
    return torch.arange(count).view(2, -1).mT.flatten()


def _flat(bias: Float[Tensor, "H E"] | None) -> Tensor | None:
    return None if bias is None else bias.flatten()
