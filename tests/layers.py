"""One attention layer as random maps, and inputs like a language model's: skewed and off centre."""

from dataclasses import replace

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
    norm: str | None = None,
) -> AttentionMaps:
    """Random maps in float64, large enough that softmax is not flat.

    Args:
        norm: of queries and keys: of each "head" by itself, of "all" together, or None.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = AttentionMaps(
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
    if norm is None:
        return made
    each = norm == "head"
    weights = {"q_norm": draw(*[heads][each:], width), "k_norm": draw(*[groups][each:], width)}
    return replace(made, norm_eps=1e-6, **{name: 1 + weight for name, weight in weights.items()})


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


def wide_rows(form, *, conjugate: bool = True) -> AttentionMaps:
    """The layer with a query row for every dim of the shared key, by the complex formula.

    Args:
        form: queries of the source's width, and factors: phases mu and syntheses s.
        conjugate: q'_j = conj(s_gj) q_f(j), as it must be. False is a mistake.
    """
    pairs, repeats = list(form.rope_pairs), len(form.q) // len(form.synthesis)
    groups, half = len(form.synthesis), form.q.shape[1] // 2
    resting = [pair for pair in range(half) if pairs.count(pair) < groups]  # which leave a rest
    mu = torch.complex(*form.phase.chunk(2, -1))[..., None]  # [H, N / 2, 1]
    s = torch.complex(*form.synthesis.chunk(2, -1)).repeat_interleave(repeats, 0)[..., None]
    s = s.conj() if conjugate else s

    def rows(q: Tensor) -> Tensor:
        q = torch.complex(*q.chunk(2, 1))  # [H, P, D]
        q = torch.cat([mu * q[:, resting], s * q[:, pairs]], 1)
        return torch.cat([q.real, q.imag], 1)

    def keys(x: Tensor) -> tuple[Tensor, Tensor]:
        free, shared, values = form.keys_and_values(x)
        halves = [free.chunk(2, -1), shared[:, None].expand(-1, free.shape[1], -1).chunk(2, -1)]
        return torch.cat([part[i] for i in (0, 1) for part in halves], -1), values

    nothing = torch.zeros_like(form.o[:1, 0, :1]).expand(1, len(form.o))
    (k_bias, v_bias), made = keys(nothing), keys(torch.eye(len(form.o)).to(form.o))
    k, v = (part - bias for part, bias in zip(made, (k_bias, v_bias), strict=True))
    chosen = form.inv_freq[pairs]
    return AttentionMaps(
        q=rows(form.q if form.q_down is None else form.q @ form.q_down),
        k=k.movedim(0, -1),
        v=v.movedim(0, -1),
        o=form.o,
        inv_freq=torch.cat([form.inv_freq.new_zeros(len(resting)), chosen]),
        scaling=form.scaling,
        q_bias=None if form.q_bias is None else rows(form.q_bias[..., None])[..., 0],
        k_bias=k_bias[0],
        v_bias=v_bias[0],
        o_bias=form.o_bias,
    )


def with_random_factors(form, seed: int = 0):
    """The layer with phases and syntheses that are no calibration's."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: torch.randn(getattr(form, name).shape, generator=generator, dtype=torch.float64)
        for name in ("phase", "synthesis")
    }
    return replace(form, **factors)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of two tensors."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())
