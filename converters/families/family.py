"""How a model type's checkpoint holds its attention, as data, and the way to maps and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import InputError
from ..maps import AttentionMaps


def kv_heads(config: PretrainedConfig) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def head_dim(config: PretrainedConfig) -> int:
    given = getattr(config, "head_dim", None)
    return given or config.hidden_size // config.num_attention_heads


def partial_rotary_factor(config: PretrainedConfig) -> float:
    return (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)


def layer_kind(config: PretrainedConfig, layer: int) -> str | None:
    """What the config calls the layer, in models whose layers differ: "sliding_attention", ..."""
    kinds = getattr(config, "layer_types", None)
    return kinds[layer] if kinds else None


def window(config: PretrainedConfig, layer: int) -> int | None:
    """How many keys a query of the layer reads, its own and those before it; None for all."""
    if layer_kind(config, layer) not in (None, "sliding_attention"):
        return None
    return getattr(config, "sliding_window", None)


def window_in_use(config: PretrainedConfig) -> int | None:
    """The window of some layer that a text can outgrow; None for none."""
    sizes = [window(config, layer) for layer in range(config.num_hidden_layers)]
    least = min((size for size in sizes if size is not None), default=None)
    longest = getattr(config, "max_position_embeddings", None)
    return None if least is None or (longest and longest <= least) else least


@dataclass(frozen=True)
class Experts:
    """How a checkpoint stores what the model holds as one tensor for all experts of a layer.

    Args:
        block: what the checkpoint calls the layer's `mlp`.
        parts: for a tensor of the model, each expert's tensors whose rows it stacks.
    """

    block: str
    parts: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Family:
    """Where a model type keeps its attention, and what it cannot be converted with.

    Args:
        model_type: the `model_type` of its config.json.
        layers: path of the list of decoder layers, in the model and in tensor names.
        attention: path of the attention module in a layer.
        q, k, v, o: names of the projections in it.
        fused: the one projection that holds the rows of q, k and v; None where they are apart.
        head_by_head: its rows are every head's [q, k, v], not [all of q, all of k, all of v].
        transposed: weights are stored [in, out].
        buffers: tensors of the attention module that no weight is lost with.
        rotary: which part of a head is rotated: the "whole", the part that the config says
            ("partial"), or "none".
        qk_norm: an RMS norm of queries and of keys before their rotation, of each "head" by itself
            or of "all" together, in families that rotate whole heads; None for none.
        norms_from: what their weights are stored less of.
        scale: what scores are multiplied with.
        softcap: what scores are capped by; None for nothing.
        positions: the table of learned positions; the first is the one in row `first_position`.
        embed_scale: what embeddings are multiplied with.
        post_norm: path, in a layer, of the norm between attention and the residual stream.
        parallel: whether the MLP's output joins the residual stream together with attention's.
        experts: of a mixture of experts.
        llama_decoder: all but the attention is Llama's, so that other models' classes can hold it.
        refuse: for a config, the reason why it cannot be converted, or None.
    """

    model_type: str
    layers: str = "model.layers"
    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    o: str = "o_proj"
    fused: str | None = None
    head_by_head: bool = False
    transposed: bool = False
    buffers: frozenset[str] = frozenset({"rotary_emb.inv_freq"})
    rotary: Literal["whole", "partial", "none"] = "whole"
    qk_norm: Literal["head", "all"] | None = None
    norms_from: float = 0.0
    scale: Callable[[PretrainedConfig], float] = field(
        default=lambda config: head_dim(config) ** -0.5
    )
    softcap: Callable[[PretrainedConfig], float | None] = field(default=lambda config: None)
    positions: str | None = None
    first_position: int = 0
    embed_scale: Callable[[PretrainedConfig], float] = field(default=lambda config: 1.0)
    post_norm: str | None = None
    parallel: Callable[[PretrainedConfig], bool] = field(default=lambda config: False)
    experts: Experts | None = None
    llama_decoder: bool = False
    refuse: Callable[[PretrainedConfig], str | None] = field(default=lambda config: None)

    def prefix(self, layer: int) -> str:
        """What the names of a layer's attention tensors start with."""
        return f"{self.layers}.{layer}.{self.attention}."

    def rotary_dim(self, config: PretrainedConfig) -> int:
        """How many dims of a head are rotated."""
        if self.rotary == "none":
            return 0
        return int(head_dim(config) * partial_rotary_factor(config))

    def read(
        self,
        config: PretrainedConfig,
        tensors: Mapping[str, Tensor],
        inv_freq: Float[Tensor, " R2"],
        attention_factor: float,
        window: int | None = None,
    ) -> AttentionMaps:
        """The maps of a layer, in float64.

        A head's rotated dims come first, in two halves that make the pairs, and then the others,
        any two of which are a pair of frequency 0. The maps have all first halves before all
        second ones. `scaling` holds the attention factor, which rotated dims alone have, so the
        other dims' queries are divided by it.

        Args:
            tensors: the layer's attention tensors, by their names without the prefix.
            inv_freq: radians per position, of the rotated pairs.
            attention_factor: what the rotary embedding multiplies cos and sin with.
            window: how many keys a query reads; None for all.

        Raises:
            InputError: a tensor is left over, so the layer is not what this family describes.
        """
        left = {n: tensor.double() for n, tensor in tensors.items() if n not in self.buffers}
        found: dict[str, Tensor | None] = {}
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            for role, rows in self._take(left, kind, config).items():
                found[role + suffix] = rows
        o, o_bias = (self._pop(left, self.o, kind) for kind in ("weight", "bias"))
        norms: dict[str, Any] = {}
        if self.qk_norm:
            counts = {"q_norm": config.num_attention_heads, "k_norm": kv_heads(config)}
            for name, count in counts.items():
                weight = self._pop(left, name, "weight")
                assert weight is not None
                weight = weight + self.norms_from
                norms[name] = weight.unflatten(0, (count, -1)) if self.qk_norm == "all" else weight
            norms["norm_eps"] = config.rms_norm_eps
        if left:
            raise InputError(
                f"{config.model_type} layers hold {sorted(left)[0]}, which this conversion does "
                "not know. Nothing is dropped silently, so nothing is converted."
            )
        q = found["q"]
        assert q is not None and o is not None
        width, rotated = q.shape[1], 2 * len(inv_freq)
        order = _halves(width, rotated)
        for name in ("q", "q_bias", "k", "k_bias"):
            rows = found[name]
            if rows is not None and name[0] == "q" and rotated:
                rows = torch.cat([rows[:, :rotated], rows[:, rotated:] / attention_factor**2], 1)
            found[name] = None if rows is None else rows[:, order]
        still = inv_freq.new_zeros((width - rotated) // 2)
        return AttentionMaps(
            **found,  # type: ignore[arg-type]
            o=o.unflatten(1, (config.num_attention_heads, -1)),
            o_bias=o_bias,
            inv_freq=torch.cat([inv_freq, still]).double(),
            scaling=self.scale(config) * (attention_factor**2 if rotated else 1.0),
            window=window,
            softcap=self.softcap(config),
            **norms,
        )

    def write(self, maps: AttentionMaps, attention_factor: float) -> dict[str, Tensor]:
        """The tensors that `read` makes these maps of, by the same names."""
        width, rotated = maps.qk_dim, 2 * int(maps.inv_freq.count_nonzero())
        order = torch.tensor(_halves(width, rotated)).argsort()
        found: dict[str, Tensor | None] = {}
        for suffix, kind in (("", "weight"), ("_bias", "bias")):
            rows = {role: getattr(maps, role + suffix) for role in "qkv"}
            if rows["q"] is not None:
                q = rows["q"][:, order]
                if rotated:
                    q = torch.cat([q[:, :rotated], q[:, rotated:] * attention_factor**2], 1)
                rows["q"] = q
            rows["k"] = None if rows["k"] is None else rows["k"][:, order]
            if self.fused is None:
                for role, part in rows.items():
                    found[f"{getattr(self, role)}.{kind}"] = None if part is None else _flat(part)
            else:
                found[f"{self.fused}.{kind}"] = self._fuse(list(rows.values()))
        found[f"{self.o}.weight"], found[f"{self.o}.bias"] = maps.o.flatten(1), maps.o_bias
        for name in ("q_norm", "k_norm"):
            weight = getattr(maps, name)
            found[f"{name}.weight"] = None if weight is None else weight.flatten() - self.norms_from
        return {
            name: self._stored(tensor) if tensor.dim() == 2 else tensor
            for name, tensor in found.items()
            if tensor is not None
        }

    def _stored(self, weight: Float[Tensor, "A B"]) -> Tensor:
        """From [out, in] to the layout on disk, or back."""
        return weight.mT if self.transposed else weight

    def _pop(self, left: dict[str, Tensor], name: str, kind: str) -> Tensor | None:
        """A projection's weight as [out, in], or its bias, if there is one."""
        rows = left.pop(f"{name}.{kind}", None)
        if kind == "bias":
            return rows
        if rows is None:
            raise InputError(
                f"a {self.model_type} layer lacks {name}.weight, so the checkpoint is not whole. "
                "Download it again."
            )
        return self._stored(rows)

    def _take(
        self, left: dict[str, Tensor], kind: str, config: PretrainedConfig
    ) -> dict[str, Tensor | None]:
        """q, k and v as [heads, width, ...], taken from what is left."""
        heads, groups = config.num_attention_heads, kv_heads(config)
        if self.fused is None:
            taken = {}
            for role, count in (("q", heads), ("k", groups), ("v", groups)):
                rows = self._pop(left, getattr(self, role), kind)
                taken[role] = None if rows is None else rows.unflatten(0, (count, -1))
            return taken
        whole = self._pop(left, self.fused, kind)
        if whole is None:
            return dict.fromkeys("qkv")
        if self.head_by_head:
            parts = whole.unflatten(0, (heads, 3, -1)).unbind(1)
        else:
            parts = whole.unflatten(0, (heads + 2 * groups, -1)).split([heads, groups, groups])
        return dict(zip("qkv", parts, strict=True))

    def _fuse(self, parts: list[Tensor | None]) -> Tensor | None:
        rows = [part for part in parts if part is not None]
        if not rows:
            return None
        if self.head_by_head:
            return torch.stack(rows, 1).flatten(0, 2)
        return torch.cat([_flat(part) for part in rows])


def _flat(rows: Tensor) -> Tensor:
    return rows.flatten(0, 1)


def _halves(width: int, rotated: int) -> list[int]:
    """Where each dim of a head's maps is in the checkpoint."""
    half, rest = rotated // 2, (width - rotated) // 2
    first, second = range(half), range(half, rotated)
    still = range(rotated, rotated + rest), range(rotated + rest, width)
    return [*first, *still[0], *second, *still[1]]
