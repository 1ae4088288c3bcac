"""Sizes of channels: what a factorisation leaves free, and training does not.

A channel between two maps may be made s times as large where it is read 1/s times as much. To the
function that is nothing, but optimizers such as Adam change all numbers at one rate, and LoRA all
rows: what is small is shaken, what is large stays. As they come from a factorisation, rotated
components are a hundred times as large as what reads them, and more.
"""

import torch
from torch import Tensor

# A channel that is smaller than this share of the largest one is rounding.
ROUNDING = 1e-5


def size(tensor: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """The root mean square over dims."""
    return tensor.square().mean(dims).sqrt()


def paired(sizes: Tensor) -> Tensor:
    """Sizes [..., 2n] of real parts then imaginary parts, those of a pair made one."""
    halves = sizes.unflatten(-1, (2, sizes.shape[-1] // 2))
    both = halves.square().mean(-2, keepdim=True).sqrt()
    return both.expand_as(halves).flatten(-2)


def evening(made: Tensor, read: Tensor) -> Tensor:
    """What to multiply channels by so that both maps have one size; 1 for one that is unused."""
    if not made.numel():
        return torch.ones_like(made)
    used = (made > ROUNDING * made.max()) & (read > ROUNDING * read.max())
    return (read.where(used, 1) / made.where(used, 1)).sqrt()


def even_queries(q: Tensor, q_down: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Queries [H, Q, L] and the down-projection [L, D] they map from, if any, of one size."""
    if q_down is None:
        return q, None
    low = evening(size(q_down, -1), size(q, (0, 1)))
    return q / low, q_down * low[:, None]
