"""Rotation of keys when they are read: angles by cache slot, and scores without a stored key.

S slots in the cache, T query tokens, H query heads, g KV heads, d head_dim, f = d / 2 frequencies.
"""

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any

import torch
from torch import nn

# Keys formed at a time while decoding. On a CPU they stay in its cache from the product that forms
# them to the one that reads them; a GPU is bound by launches and takes more.
CPU_CHUNK, GPU_CHUNK = 1024, 16384


class SlotAngles:
    """cos and sin of slot * inv_freq, made once a forward pass and shared by its layers.

    RoPE depends on differences of positions alone, and the tokens of a sequence are contiguous in
    the cache whatever the padding to their left, so the slot serves as position.
    """

    STEP = 256

    def __init__(self, inv_freq: torch.Tensor, attention_scaling: float):
        self.inv_freq = inv_freq
        # RoPE types such as YaRN multiply both the query and the key by it.
        self.score_scaling = attention_scaling**2
        self._tables: dict[tuple, Any] = {}  # by length and device

    def at(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [..., f] at slots [...]."""
        # fp32 leaves 4e-4 rad of error in the angles of a context of 16k.
        precise = torch.float32 if slots.device.type == "mps" else torch.float64
        angles = slots[..., None].to(precise) * self.inv_freq.to(slots.device, precise)
        return angles.cos().float(), angles.sin().float()

    def table(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [length, f] at slots 0 to length - 1: two short tables and the sum formulas."""
        # As a key, a length would be a constant to a compiler, and each longer cache another graph.
        if torch.compiler.is_compiling():
            return self._make_table(length, device)
        key = (length, device)
        if key not in self._tables:
            self._tables[key] = self._make_table(length, device)
        return self._tables[key]

    def _make_table(self, length, device):
        step = 64
        cos_o, sin_o = (x[:, None] for x in self.at(torch.arange(0, length, step, device=device)))
        cos_i, sin_i = self.at(torch.arange(step, device=device))
        cos = (cos_o * cos_i - sin_o * sin_i).flatten(0, 1)[:length]
        sin = (sin_o * cos_i + cos_o * sin_i).flatten(0, 1)[:length]
        return cos, sin

    def short_tables(self, length: int, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(i angle) at every STEP-th slot before `length`, and at 0 to STEP - 1, each [..., n].

        Of the n frequencies `index`; slot STEP a + b has the product of rows a and b.
        """
        key = (length, index.device, "steps")
        if key not in self._tables:
            slots = torch.arange(0, length, self.STEP), torch.arange(self.STEP)
            self._tables[key] = [torch.complex(*self.at(part.to(index.device))) for part in slots]
        outer, inner = (table.index_select(-1, index) for table in self._tables[key])
        return outer, inner

    def selected_phases(self, length: int, index: torch.Tensor) -> torch.Tensor:
        """exp(i angle) [length, n] at slots 0 to length - 1, of the n frequencies `index`.

        To pick n columns of one long table takes longer than to multiply two short ones.
        """
        outer, inner = self.short_tables(length, index)
        return (outer[:, None] * inner).flatten(0, 1)[:length]

    def phases(self, length: int, groups: int, device: torch.device) -> torch.Tensor:
        """exp(i angle) [length, g, f] at slots 0 to length - 1, laid out for every KV head."""
        key = (length, groups, device)
        if key not in self._tables:
            phase = torch.complex(*self.table(length, device))
            self._tables[key] = phase[:, None].expand(-1, groups, -1).contiguous()
        return self._tables[key]


class Rotation:
    """How one layer's queries are turned, and its keys where they are cached unturned.

    Args:
        query: cos and sin [..., T, f] of all frequencies, for queries.
        new: the same for the keys of the same tokens.
        keys: the same [..., S, f] for the keys of all slots; None to find them by their slots.
        slots: the queries' slots in the cache, [T]; None without a cache.
        angles: of the forward pass.
    """

    # Where the first of the cached tokens stands, a number or [B, 1, 1]; None for 0.
    first: torch.Tensor | None = None

    def __init__(self, query, new, keys, slots=None, angles: SlotAngles | None = None):
        self._query, self._new, self._keys = query, new, keys
        self.slots, self.angles = slots, angles

    @classmethod
    def at_positions(cls, position_embeddings) -> "Rotation":
        """By the positions that the model was given, queries and keys alike."""
        cos, sin, angles = position_embeddings
        if cos is None:
            return cls(None, None, None)
        query = keys = tuple(x[:, None, :, : x.shape[-1] // 2] for x in (cos, sin))
        factor = angles.score_scaling**0.5
        if factor != 1:  # of RoPE types such as YaRN, for queries and keys: queries take it all
            query, keys = (tuple(x * by for x in query) for by in (factor, 1 / factor))
        return cls(query, keys, keys, None, angles)

    @classmethod
    def at_slots(cls, position_embeddings, slots: torch.Tensor, alone: bool = False) -> "Rotation":
        """By the slots of the cache, [T] or [B, 1, T]; `alone` if there are no other keys."""
        angles = position_embeddings[2]
        if angles is None:
            return cls(None, None, None)
        # The factor of RoPE types such as YaRN stands on both sides of a score.
        new = angles.at(slots)
        query = tuple(x * angles.score_scaling for x in new)
        return cls(query, new, new if alone else None, slots, angles)

    def beginning_at(self, first: torch.Tensor) -> "Rotation":
        """The same for a cache whose first token stands at `first`, a number or [B, 1, 1].

        That is above 0 where the cache has dropped tokens, below it where it begins with padding.
        """
        moved = copy(self)
        moved.first = first
        return moved

    def query(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Queries [B, H, T, 2 m] turned; of m frequencies, those of `index` or all."""
        return rotate(x, *_selected(self._query, index))

    def new_keys(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Keys of the same tokens [B, g, T, 2 m] turned, likewise."""
        return rotate(x, *_selected(self._new, index))

    def keys(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Keys of all slots [B, g, S, 2 m] turned, likewise."""
        return rotate(x, *_selected(self.table(x.shape[2], x.device), index))

    def table(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin [..., S, f] of all slots."""
        if self._keys is not None:
            return self._keys
        assert self.angles is not None
        if self.first is None:
            return self.angles.table(length, device)
        return self.angles.at(torch.arange(length, device=device) + self.first)


def _selected(angles, index):
    return angles if index is None else tuple(x.index_select(-1, index) for x in angles)


def hand_over_angles(rotary: Any, args: tuple, output: tuple) -> tuple:
    """A forward hook on a family's rotary embedding: cos and sin, and its frequencies beside them.

    They are those of this forward pass, where the RoPE type lets them change with the length. Where
    a part of the head is rotated, the other pairs follow with frequency 0.
    """
    kind = f"{args[2]}_" if len(args) > 2 else ""  # of layer, where each has its own
    cos, sin = output
    inv_freq, scaling = (getattr(rotary, kind + x) for x in ("inv_freq", "attention_scaling"))
    still = rotary.config.head_dim // 2 - len(inv_freq)
    if still:
        inv_freq = nn.functional.pad(inv_freq, (0, still))
        cos, sin = (
            nn.functional.pad(x.unflatten(-1, (2, -1)), (0, still), value=at_rest).flatten(-2)
            for x, at_rest in ((cos, scaling), (sin, 0.0))
        )
    return cos, sin, SlotAngles(inv_freq, scaling)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., 2n], real parts then imaginary parts, turned by the angles of cos, sin [..., n]."""
    real, imag = x.chunk(2, dim=-1)
    return torch.cat((real * cos - imag * sin, imag * cos + real * sin), dim=-1).to(x.dtype)


def _chunks(total: int, device: torch.device) -> tuple[int, torch.Tensor]:
    """Slots to a chunk, and the first slot of each."""
    size = min(total, CPU_CHUNK if device.type == "cpu" else GPU_CHUNK)
    return size, torch.arange(0, total, size, device=device)


def slot_scores(
    query: torch.Tensor,
    latent: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slots: torch.Tensor,
    angles: SlotAngles,
    norm: Any = None,
) -> torch.Tensor:
    """Unscaled scores [B, H * T, S] of query [B, H, T, d] at `slots` [T] against rotated keys.

    Key s of KV head g is Rot_s norm(weight_g latent_s + bias_g), weight [g, d, r], bias [g, d],
    `norm` an RMSNorm of each head's d dimensions, or of all g * d together, or None. Keys are
    formed for a chunk of slots and for the KV heads alone, and turned in place, as complex
    numbers, by their offset within the chunk; the query is turned by the rest of the angle, once a
    chunk. A query matrix with a block for each KV head reads the chunk as it lies, uncopied.
    """
    batch, heads, length, dim = query.shape
    groups, _, rank = weight.shape
    total, device = latent.shape[1], latent.device
    work = torch.promote_types(latent.dtype, torch.float32)
    size, starts = _chunks(total, device)

    # Pairs side by side, as complex numbers lie in memory.
    rows = weight.view(groups, 2, dim // 2, rank).transpose(1, 2).reshape(groups * dim, rank)
    offset = None
    if bias is not None:
        offset = bias.view(groups, 2, dim // 2).transpose(1, 2).reshape(groups * dim)
    phase = angles.phases(size, groups, device)

    cos, sin = angles.at(slots - starts[:, None])  # [chunks, T, f]
    turned = torch.complex(*query.to(work).chunk(2, dim=-1))
    turned = turned * torch.complex(cos, sin)[:, None, None]
    turned = torch.view_as_real(turned).flatten(-2)  # [chunks, B, H, T, d]
    blocks = turned.new_zeros(len(starts), batch, groups, heads // groups, length, groups, dim)
    for group in range(groups):
        members = slice(group * (heads // groups), (group + 1) * (heads // groups))
        blocks[:, :, group, :, :, group] = turned[:, :, members]
    blocks = blocks.view(len(starts), batch, heads * length, groups * dim).transpose(2, 3)

    scores = latent.new_empty(batch, heads * length, total, dtype=work)
    for chunk, start in enumerate(range(0, total, size)):
        part = latent[:, start : start + size]
        keys = nn.functional.linear(part.flatten(0, 1), rows, offset).to(work)
        keys = keys.view(batch, -1, groups, dim // 2, 2)
        if norm is not None:
            scale = norm.weight.to(work).view(-1, 2, dim // 2).mT  # [1 or g, f, 2]
            over = (-3, -2, -1) if len(scale) > 1 else (-2, -1)
            inverse = (keys.square().mean(over, keepdim=True) + norm.variance_epsilon).rsqrt()
            keys = keys * inverse * scale
        pairs = torch.view_as_complex(keys)
        pairs.mul_(phase[: pairs.shape[1]])
        keys = keys.view(batch, -1, groups * dim)
        scores[..., start : start + size] = torch.bmm(keys, blocks[chunk]).transpose(1, 2)
    return scores


Pairs = Callable[[torch.Tensor], torch.Tensor]


def key_pairs(bias: torch.Tensor) -> Pairs:
    """Of latents [..., r], the key [..., d_r] that is their tail and `bias` [d_r], unturned.

    Each pair's two parts are side by side (`side_by_side`), as complex numbers lie in memory.
    """
    return lambda latent: latent[..., -len(bias) :] + bias


def with_turned(
    latent: torch.Tensor,
    kept: int,
    pairs: Pairs,
    index: torch.Tensor,
    angles: SlotAngles,
) -> torch.Tensor:
    """The first `kept` dimensions of latents [B, 1, S, C], then `pairs` of them turned by slot.

    The pairs [B, 1, S, 2 n] turn by the slot and the n frequencies `index`.
    """
    total = latent.shape[2]
    first = latent[..., :kept]
    if torch.compiler.is_compiling():
        cos, sin = (x.index_select(-1, index) for x in angles.table(total, latent.device))
        real, imag = pairs(latent).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((real * cos - imag * sin, imag * cos + real * sin), dim=-1)
        return torch.cat((first, turned.flatten(-2).to(latent.dtype)), dim=-1)
    rows = latent.new_empty(*latent.shape[:3], kept + 2 * len(index))
    rows[..., :kept] = first
    for part, turned in _turned_parts(latent, pairs, index, angles):
        rows[:, :, part, kept:] = turned
    return rows


def turned_scores(
    query: torch.Tensor,
    latent: torch.Tensor,
    pairs: Pairs,
    index: torch.Tensor,
    angles: SlotAngles,
    scaling: float,
) -> torch.Tensor:
    """Scores [B, H, T, S] of query [B, H, T, 2 n] against `pairs` of latents [B, 1, S, r], turned.

    The same as with the rows of `with_turned`, of which none are made: no latent is copied.
    """
    batch, heads, length, _ = query.shape
    work = torch.promote_types(latent.dtype, torch.float32)
    query = query.to(work).flatten(1, 2) * scaling
    if torch.compiler.is_compiling():
        scores = _fusible_scores(query, pairs(latent).squeeze(1), index, angles)
        return scores.view(batch, heads, length, -1)
    scores = query.new_empty(batch, heads * length, latent.shape[2])
    for part, turned in _turned_parts(latent, pairs, index, angles):
        scores[..., part] = query @ turned.squeeze(1).mT
    return scores.view(batch, heads, length, -1)


def _fusible_scores(
    query: torch.Tensor, keys: torch.Tensor, index: torch.Tensor, angles: SlotAngles
) -> torch.Tensor:
    """Scores [B, N, S] of query [B, N, 2 n] against keys [B, S, 2 n] turned by slot.

    For a compiler, in steps that it makes vector loops of: pair by pair the score is the real part
    of q* k exp(i a), or (q . k) cos a + (-i q . k) sin a, and only numbers side by side are
    multiplied. Frequencies are picked by a product, whose short tables a compiler keeps; the sines
    of an indexed table it would make anew for every number of every layer.
    """
    step = 64
    slots = torch.arange(0, keys.shape[1], step), torch.arange(step)
    pick = index.repeat_interleave(2) == torch.arange(len(angles.inv_freq))[:, None]  # [f, 2 n]
    (cos_o, sin_o), (cos_i, sin_i) = (
        [x @ pick.to(x.dtype) for x in angles.at(part.to(keys.device))] for part in slots
    )
    cos_o, sin_o = cos_o[:, None], sin_o[:, None]
    cos = (cos_o * cos_i - sin_o * sin_i).flatten(0, 1)[: keys.shape[1]]
    sin = (sin_o * cos_i + cos_o * sin_i).flatten(0, 1)[: keys.shape[1]]
    real, imag = query.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((imag, -real), dim=-1).flatten(-2)
    return torch.cat((query, turned), dim=-1) @ torch.cat((keys * cos, keys * sin), dim=-1).mT


def _turned_parts(
    latent: torch.Tensor, pairs: Pairs, index: torch.Tensor, angles: SlotAngles
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slots, and their turned pairs [B, 1, slots, 2 n] in float32 or wider."""
    total = latent.shape[2]
    phases = angles.selected_phases(total, index)  # [S, n]
    work = torch.promote_types(latent.dtype, torch.float32)
    size = max(1, GPU_CHUNK // len(latent))
    for start in range(0, total, size):
        part = slice(start, start + size)
        turned = pairs(latent[:, :, part]).to(work).contiguous()
        torch.view_as_complex(turned.unflatten(-1, (-1, 2))).mul_(phases[part])
        yield part, turned


def side_by_side(x: torch.Tensor) -> torch.Tensor:
    """x [..., 2n], real parts then imaginary parts, with the parts of each pair side by side."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def apart(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `side_by_side`: real parts, then imaginary parts."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
