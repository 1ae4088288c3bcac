"""The central object: attention as linear maps per head, and its naive reference.

Letters: H query heads, G KV heads (H/G query heads share one), E width of a query and key head,
V width of a value head, D hidden size, T tokens, P = E/2 pairs of a head.

Pair f of a head is the complex number z_f = x_f + i x_{f+P} (Llama's layout); rotary position
embedding (2104.09864) multiplies it by exp(i p theta_f) at position p, theta_f = `inv_freq[f]`.
A frequency of 0 means "not rotated", so full, partial and no RoPE are one case.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# Of the largest: what a weight of the keys' norm is taken to be at least.
LEAST_WEIGHT = 1e-4


@runtime_checkable
class Reader(Protocol):
    """What computes an attention layer's queries, keys and values from its inputs."""

    @property
    def o(self) -> Float[Tensor, "D H V"]: ...

    @property
    def o_bias(self) -> Float[Tensor, " D"] | None: ...

    @property
    def scaling(self) -> float: ...

    @property
    def window(self) -> int | None: ...

    @property
    def softcap(self) -> float | None: ...

    def read(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T G E"], Float[Tensor, "B T G V"]]:
        """Queries and keys, rotated by the positions 0, 1, ..., and values."""
        ...


@dataclass(frozen=True)
class AttentionMaps:
    """One attention layer: y = sum_h o_h softmax(scaling * Rot(q_h x) . Rot(k_g x)) v_g x.

    Every form expands to it, so that one reference and one error measure serve them all.

    Args:
        q: query map of every head.
        k: key map of every KV head.
        v: value map of every KV head.
        o: output map of every head.
        inv_freq: radians per position of every pair of a query or key head.
        scaling: what scores are multiplied with, a rotary attention factor included, so that a
            change of E cannot change the softmax.
        q_bias, k_bias, v_bias, o_bias: None for none.
        q_norm, k_norm: weights of an RMS norm of queries or keys, after their bias and before their
            rotation: of each head by itself, or [heads, E], of all heads together; None for none.
        norm_eps: what is added to the mean square there.
        window: how many keys a query reads, its own and those before it; None for all.
        softcap: c of the c tanh(score / c) that softmax is taken of, as in Gemma 2; None for plain
            scores.
    """

    q: Float[Tensor, "H E D"]
    k: Float[Tensor, "G E D"]
    v: Float[Tensor, "G V D"]
    o: Float[Tensor, "D H V"]
    inv_freq: Float[Tensor, " P"]
    scaling: float
    q_bias: Float[Tensor, "H E"] | None = None
    k_bias: Float[Tensor, "G E"] | None = None
    v_bias: Float[Tensor, "G V"] | None = None
    o_bias: Float[Tensor, " D"] | None = None
    q_norm: Float[Tensor, " E"] | Float[Tensor, "H E"] | None = None
    k_norm: Float[Tensor, " E"] | Float[Tensor, "G E"] | None = None
    norm_eps: float = 0.0
    window: int | None = None
    softcap: float | None = None

    def __post_init__(self) -> None:
        heads, width, hidden = self.q.shape
        groups, v_dim = self.v.shape[:2]
        if heads % groups:
            raise ValueError(f"{heads} query heads cannot share {groups} KV heads evenly.")
        expected = {
            "k": (groups, width, hidden),
            "v": (groups, v_dim, hidden),
            "o": (hidden, heads, v_dim),
            "inv_freq": (width // 2,),
            "q_bias": (heads, width),
            "k_bias": (groups, width),
            "v_bias": (groups, v_dim),
            "o_bias": (hidden,),
            "q_norm": (heads, width),
            "k_norm": (groups, width),
        }
        if width % 2:
            raise ValueError(f"qk_dim={width} is odd; pairs need an even width.")
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and name.endswith("_norm"):
                shape = shape[-tensor.dim() :]  # of each head, or of all of them
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}.")

    def queries(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch H E"]:
        """Of every head, before their rotation."""
        return normalised(project(x, self.q, self.q_bias), self.q_norm, self.norm_eps)

    def keys(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch G E"]:
        """Of every KV head, before their rotation."""
        return normalised(project(x, self.k, self.k_bias), self.k_norm, self.norm_eps)

    def read(
        self, x: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B T H E"], Float[Tensor, "B T G E"], Float[Tensor, "B T G V"]]:
        """See `Reader`."""
        angles = token_angles(self.inv_freq, x)[:, None]
        q, k = rotate(self.queries(x), angles), rotate(self.keys(x), angles)
        return q, k, project(x, self.v, self.v_bias)

    def key_scales(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch G"]:
        """The inverse RMS of each KV head's key before its norm; 1 without a norm."""
        keys = project(x, self.k, self.k_bias)
        if self.k_norm is None:
            return torch.ones_like(keys[..., 0])
        return inverse_rms(keys, self.k_norm, self.norm_eps)

    def with_norm_in_keys(self) -> "AttentionMaps":
        """The same maps with the weight of the keys' norm in the key map, where they have one.

        A key is then a number of its own, `key_scales`, times what is linear in the input.
        """
        if self.k_norm is None:
            return self
        # The norm itself is found from these keys, divided by their weight again.
        least = LEAST_WEIGHT * self.k_norm.abs().max()
        norm = self.k_norm.where(self.k_norm.abs() > least, least)
        weight = norm.expand(self.k.shape[:2])
        bias = None if self.k_bias is None else self.k_bias * weight
        return replace(self, k=self.k * weight[..., None], k_bias=bias, k_norm=norm)

    @property
    def heads(self) -> int:
        return self.q.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[0]

    @property
    def repeats(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def qk_dim(self) -> int:
        return self.q.shape[1]

    @property
    def v_dim(self) -> int:
        return self.v.shape[1]

    @property
    def hidden(self) -> int:
        return self.q.shape[2]

    def to(self, *args, **kwargs) -> "AttentionMaps":
        """The same maps with every tensor moved or cast, as `Tensor.to`."""
        moved: dict[str, Any] = {
            name: value.to(*args, **kwargs)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def visible(
    window: int | None, start: int, stop: int, device: torch.device | None = None
) -> Bool[Tensor, "B S"]:
    """Which of the keys 0 to stop - 1 each of the queries start to stop - 1 reads."""
    positions = torch.arange(stop, device=device)
    lag = positions[start:, None] - positions
    return (lag >= 0) & (lag < (stop if window is None else window))


def capped(scores: Float[Tensor, "*batch S"], softcap: float | None) -> Float[Tensor, "*batch S"]:
    """softcap tanh(scores / softcap)."""
    return scores if softcap is None else softcap * (scores / softcap).tanh()


def project(
    x: Float[Tensor, "*batch D"],
    weight: Float[Tensor, "H E D"],
    bias: Float[Tensor, "H E"] | None = None,
) -> Float[Tensor, "*batch H E"]:
    """weight x + bias for every head."""
    flat = None if bias is None else bias.flatten()
    y = torch.nn.functional.linear(x, weight.flatten(0, 1), flat)
    return y.unflatten(-1, weight.shape[:2])


def normalised(
    z: Float[Tensor, "*batch H E"],
    weight: Float[Tensor, " E"] | Float[Tensor, "H E"] | None,
    eps: float,
) -> Float[Tensor, "*batch H E"]:
    """z over its root mean square, times weight; z itself without one.

    The mean is over what the weight is for: each head's dims, or those of all heads.
    """
    if weight is None:
        return z
    dims = tuple(range(-weight.dim(), 0))
    wide = z.to(torch.promote_types(z.dtype, torch.float32))
    return (wide * (wide.square().mean(dims, keepdim=True) + eps).rsqrt() * weight).to(z.dtype)


def inverse_rms(
    z: Float[Tensor, "*batch H E"],
    weight: Float[Tensor, " E"] | Float[Tensor, "H E"],
    eps: float,
) -> Float[Tensor, "*batch H"]:
    """The inverse RMS of z: one number a head, or one for all heads."""
    dims = tuple(range(-weight.dim(), 0))
    inverse = (z.square().mean(dims, keepdim=True) + eps).rsqrt()
    return inverse[..., 0].expand(z.shape[:-1])


def augmented(
    weight: Float[Tensor, "H E D"], bias: Float[Tensor, "H E"] | None
) -> Float[Tensor, "H E D1"]:
    """The map as one of [x, 1]."""
    bias = weight.new_zeros(weight.shape[:2]) if bias is None else bias
    return torch.cat([weight, bias[..., None]], dim=-1)


def rotate(
    x: Float[Tensor, "*batch E"], angles: Float[Tensor, "*angle_batch P"]
) -> Float[Tensor, "*batch E"]:
    """Every pair of x turned by its angle; `angles` broadcasts against the leading dimensions."""
    re, im = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([re * cos - im * sin, im * cos + re * sin], dim=-1)


def rotate_tail(
    x: Float[Tensor, "*batch E"], angles: Float[Tensor, "*angle_batch P"]
) -> Float[Tensor, "*batch E"]:
    """`rotate` of the last 2 P dims of x."""
    free = x.shape[-1] - 2 * angles.shape[-1]
    return torch.cat([x[..., :free], rotate(x[..., free:], angles)], dim=-1)


def position_angles(
    inv_freq: Float[Tensor, " P"], length: int, start: int = 0
) -> Float[Tensor, "T P"]:
    """Angle of every pair at positions start, start + 1, ..."""
    positions = torch.arange(start, start + length, dtype=inv_freq.dtype, device=inv_freq.device)
    return positions[:, None] * inv_freq


def token_angles(inv_freq: Float[Tensor, " P"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "T P"]:
    """`position_angles` of the tokens of x, in float32."""
    return position_angles(inv_freq.float(), x.shape[1]).to(x.device)


def reference_attention(
    maps: AttentionMaps, x: Float[Tensor, "T D"], positions: Float[Tensor, " T"] | None = None
) -> Float[Tensor, "T D"]:
    """The layer's output for one causal sequence, head by head, as it is defined; in x's dtype.

    Slow and plain on purpose: what everything else is tested against.
    """
    maps = maps.to(x.dtype)
    length = len(x)
    if positions is None:
        positions = torch.arange(length, dtype=x.dtype)
    angles = positions[:, None] * maps.inv_freq
    unseen = ~visible(maps.window, 0, length)
    y = torch.zeros(length, maps.hidden, dtype=x.dtype)
    if maps.o_bias is not None:
        y = y + maps.o_bias
    queries, keys = (torch.stack([x @ head.T for head in heads], 1) for heads in (maps.q, maps.k))
    if maps.q_bias is not None:
        queries = queries + maps.q_bias
    if maps.k_bias is not None:
        keys = keys + maps.k_bias
    queries = normalised(queries, maps.q_norm, maps.norm_eps)
    keys = normalised(keys, maps.k_norm, maps.norm_eps)
    for h in range(maps.heads):
        g = h // maps.repeats
        v = x @ maps.v[g].T
        if maps.v_bias is not None:
            v = v + maps.v_bias[g]
        scores = rotate(queries[:, h], angles) @ rotate(keys[:, g], angles).T * maps.scaling
        scores = capped(scores, maps.softcap)
        y = y + scores.masked_fill(unseen, -torch.inf).softmax(-1) @ v @ maps.o[:, h].T
    return y


def attention(reader: Reader, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
    """The same output for a batch of causal sequences, by the fused kernel and differentiable."""
    heads = head_outputs(reader, x).flatten(2)
    return torch.nn.functional.linear(heads, reader.o.flatten(1), reader.o_bias)


def head_outputs(reader: Reader, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H V"]:
    """What the output map reads: every head's mean of its values under the softmax weights."""
    q, k, v = (part.transpose(1, 2) for part in reader.read(x))  # [B, H or G, T, E or V]
    q, k = q.to(v.dtype), k.to(v.dtype)
    length, v_dim, groups = x.shape[1], v.shape[-1], v.shape[1]
    if reader.softcap is not None:  # which the fused kernel does not know
        grouped = q.float().unflatten(1, (groups, -1))
        with torch.autocast(x.device.type, enabled=False):
            scores = grouped @ k.float()[:, :, None].mT * reader.scaling
        unseen = ~visible(reader.window, 0, length, x.device)
        scores = capped(scores, reader.softcap).masked_fill(unseen, -torch.inf)
        heads = scores.softmax(-1).to(v.dtype) @ v[:, :, None]
        return heads.flatten(1, 2).transpose(1, 2)
    # The CPU's fused kernel wants keys and values of one width.
    width = q.shape[-1] - v_dim
    if width > 0:
        v = torch.nn.functional.pad(v, (0, width))
    elif width < 0:
        q, k = (torch.nn.functional.pad(z, (0, -width)) for z in (q, k))
    slides = reader.window is not None and reader.window < length
    mask = visible(reader.window, 0, length, x.device) if slides else None
    heads = torch.nn.functional.scaled_dot_product_attention(
        *(q, k, v, mask),
        is_causal=mask is None,
        scale=reader.scaling,
        enable_gqa=q.shape[1] > groups,
    )
    return heads[..., :v_dim].transpose(1, 2)
