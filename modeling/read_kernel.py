"""Reading a latent that is rotated on read, for one new token, as a Triton kernel.

Nothing is formed in memory: a block of latents is read once; its tail, the rotated key, is turned
and used in registers, and the same block is then summed as the value (a flash-decoding pass over
the cache, 2307.08691, with the key turned on the way).

B batch, H query heads, S slots in the cache, r latent width, n rotated pairs.
"""

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .rope_slots import SlotAngles

try:
    import triton
    import triton.language as tl
except ImportError:  # it comes with torch's CUDA builds
    triton = None

# The attn_implementation that reads by the kernel where it can, and as sdpa does elsewhere.
NAME = "rehead_triton"
ALL_ATTENTION_FUNCTIONS.register(NAME, sdpa_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)

BLOCK = 64  # slots read at a time; divides SlotAngles' step
SPLITS = 64  # programs a sequence is shared among, at most

if triton is not None:

    @triton.jit
    def _read(
        query, tail, latent, key_bias, mask, outer, inner, mixed, top, norm,
        slots, per_program, scale,
        latent_batch, latent_slot, mask_batch,
        heads: tl.constexpr, rank: tl.constexpr, pairs: tl.constexpr,
        HEADS: tl.constexpr, RANK: tl.constexpr, PAIRS: tl.constexpr,
        BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
    ):  # fmt: skip
        """One share of one sequence's slots: the unnormalised mixture, its largest score and sum.

        query [B, H, r], tail [B, H, 2, n], latent [B, S, r], key_bias [n, 2], mask [B, S],
        outer [2, S / STEP, n] and inner [2, STEP, n] cos and sin,
        mixed [B, splits, H, r], top and norm [B, splits, H].
        """
        batch, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
        splits = tl.num_programs(1)
        h, d, p = tl.arange(0, HEADS), tl.arange(0, RANK), tl.arange(0, PAIRS)
        of_query = (h[:, None] < heads) & (d[None, :] < rank)
        of_tail = (h[:, None] < heads) & (p[None, :] < pairs)
        q = tl.load(query + (batch * heads + h[:, None]) * rank + d[None, :], of_query, 0.0)
        at = tail + (batch * heads + h[:, None]) * 2 * pairs + p[None, :]
        q_real, q_imag = tl.load(at, of_tail, 0.0), tl.load(at + pairs, of_tail, 0.0)
        b_real = tl.load(key_bias + 2 * p, p < pairs, 0.0).to(tl.float32)[None, :]
        b_imag = tl.load(key_bias + 2 * p + 1, p < pairs, 0.0).to(tl.float32)[None, :]
        best = tl.full([HEADS], -float("inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        sums = tl.zeros([HEADS, RANK], tl.float32)
        periods = tl.cdiv(slots, STEP)
        first = split * per_program
        for start in range(first, tl.minimum(first + per_program, slots), BLOCK):
            s = start + tl.arange(0, BLOCK)
            here = s < slots
            row = latent + batch * latent_batch + s[:, None] * latent_slot
            rows = tl.load(row + d[None, :], here[:, None] & (d[None, :] < rank), 0.0)
            # The key's parts are in these rows already; to load them again is to read a cache.
            at = row + rank - 2 * pairs + 2 * p[None, :]
            of_key = here[:, None] & (p[None, :] < pairs)
            real = tl.load(at, of_key, 0.0).to(tl.float32) + b_real
            imag = tl.load(at + 1, of_key, 0.0).to(tl.float32) + b_imag
            # A block lies within one period of the short tables: angle = outer + inner.
            at = outer + (start // STEP) * pairs + p
            cos_o, sin_o = (
                tl.load(at, p < pairs, 0.0)[None, :],
                tl.load(at + periods * pairs, p < pairs, 0.0)[None, :],
            )
            at = inner + (start % STEP + tl.arange(0, BLOCK)[:, None]) * pairs + p[None, :]
            of_inner = tl.full([BLOCK, PAIRS], 1, tl.int1) & (p[None, :] < pairs)
            cos_i, sin_i = tl.load(at, of_inner, 0.0), tl.load(at + STEP * pairs, of_inner, 0.0)
            cos, sin = cos_o * cos_i - sin_o * sin_i, sin_o * cos_i + cos_o * sin_i
            turned_real = (real * cos - imag * sin).to(rows.dtype)
            turned_imag = (imag * cos + real * sin).to(rows.dtype)
            scores = tl.dot(q, tl.trans(rows), input_precision="ieee")
            scores += tl.dot(q_real, tl.trans(turned_real), input_precision="ieee")
            scores += tl.dot(q_imag, tl.trans(turned_imag), input_precision="ieee")
            scores *= scale
            if MASKED:
                scores += tl.load(mask + batch * mask_batch + s, here, 0.0)[None, :]
            scores = tl.where(here[None, :], scores, -float("inf"))
            new = tl.maximum(best, tl.max(scores, 1))
            # While all is masked, the largest score is -inf, and -inf - -inf is no number.
            shift = tl.where(new == -float("inf"), 0.0, new)
            weights = tl.exp(scores - shift[:, None])
            decay = tl.exp(best - shift)
            total = total * decay + tl.sum(weights, 1)
            mixture = tl.dot(weights.to(rows.dtype), rows, input_precision="ieee")
            sums = sums * decay[:, None] + mixture
            best = new
        place = (batch * splits + split) * heads + h
        tl.store(mixed + place[:, None] * rank + d[None, :], sums, of_query)
        tl.store(top + place, best, h < heads)
        tl.store(norm + place, total, h < heads)


def kernel_serves(implementation: str | None, query: torch.Tensor) -> bool:
    """Whether the kernel is wanted and can: one token a sequence, no gradient, Triton is here."""
    can = triton is not None and query.shape[2] == 1 and not torch.is_grad_enabled()
    return implementation == NAME and can


def kernel_read(
    query: torch.Tensor,
    tail: torch.Tensor,
    latent: torch.Tensor,
    bias: torch.Tensor,
    mask: torch.Tensor | None,
    index: torch.Tensor,
    angles: SlotAngles,
    scaling: float,
) -> torch.Tensor:
    """The mixture [B, H, 1, r] of latents [B, 1, S, r] under one query a head.

    A score is (query . c + tail . Rot_s (the last 2n dims of c + bias)) * scaling.

    Args:
        query: absorbed, [B, H, 1, r].
        tail: turned by its own slot, [B, H, 1, 2n], real parts then imaginary parts.
        bias: [2n], the two parts of each pair side by side, as in c.
        mask: boolean or additive, [B, 1, 1, S], or None.
        index: the pairs' frequencies among the angles'.
    """
    batch, heads, _, rank = query.shape
    slots, pairs = latent.shape[2], len(index)
    outer, inner = (torch.stack((t.real, t.imag)) for t in angles.short_tables(slots, index))
    blocks = triton.cdiv(slots, BLOCK)
    per_program = triton.cdiv(blocks, min(SPLITS, blocks)) * BLOCK
    splits = triton.cdiv(slots, per_program)
    mixed = query.new_empty(batch, splits, heads, rank, dtype=torch.float32)
    top, norm = (mixed.new_empty(batch, splits, heads) for _ in range(2))
    if mask is not None:
        mask = mask.expand(batch, -1, -1, -1)[:, 0, 0, :slots]
        if mask.dtype == torch.bool:
            mask = mixed.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
        mask = mask.float().contiguous()
    latent = latent[:, 0]
    if latent.stride(-1) != 1:
        latent = latent.contiguous()
    _read[(batch, splits)](
        query.to(latent.dtype).contiguous(), tail.to(latent.dtype).contiguous(), latent,
        bias.contiguous(), mask, outer.contiguous(), inner.contiguous(), mixed, top, norm,
        slots, per_program, scaling,
        latent.stride(0), latent.stride(1), 0 if mask is None else mask.stride(0),
        heads, rank, pairs,
        max(16, triton.next_power_of_2(heads)), max(16, triton.next_power_of_2(rank)),
        max(16, triton.next_power_of_2(pairs)), BLOCK, angles.STEP,
        MASKED=mask is not None,
    )  # fmt: skip
    shares = torch.exp(top - top.amax(1, keepdim=True))[..., None]
    joined = (mixed * shares).sum(1) / (norm[..., None] * shares).sum(1)
    return joined.to(query.dtype)[:, :, None]
