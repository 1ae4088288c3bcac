"""One attention layer as random maps, and inputs like a language model's: skewed and off centre."""

import torch
from torch import Tensor

from rehead.converters.maps import AttentionMaps

HEAD_DIM, HIDDEN = 8, 32


def maps(
    heads: int = 4,
    groups: int = 2,
    *,
    width: int = HEAD_DIM,
    v_dim: int = HEAD_DIM,
    hidden: int = HIDDEN,
    bias: bool = False,
    theta: float = 100.0,
    seed: int = 0,
) -> AttentionMaps:
    """Random maps in float64, large enough that softmax is not flat."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return AttentionMaps(
        q=draw(heads, width, hidden),
        k=draw(groups, width, hidden),
        v=draw(groups, v_dim, hidden),
        o=draw(hidden, heads, v_dim),
        inv_freq=theta ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2)),
        scaling=width**-0.5,
        q_bias=draw(heads, width) if bias else None,
        k_bias=draw(groups, width) if bias else None,
        v_bias=draw(groups, v_dim) if bias else None,
        o_bias=draw(hidden) if bias else None,
    )


def inputs(
    sequences: int = 4,
    length: int = 24,
    hidden: int = HIDDEN,
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[sequences, length, hidden], with directions of very different size and a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sequences, length, hidden, generator=generator, dtype=torch.float64)
    scale = torch.logspace(0.5, -1.5, hidden, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator, dtype=torch.float64))[0]
    offset = 0.5 * torch.randn(hidden, generator=generator, dtype=torch.float64)
    return ((x * scale) @ turn + offset).to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of two tensors."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())
