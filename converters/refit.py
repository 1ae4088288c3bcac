"""The output map of a converted layer by regression on the original's output.

Letters: N sequences, T tokens in each, D hidden size, H query heads, V value width, F features:
the H V outputs of the heads, and a constant where o has a bias.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .activations import Activations
from .healing import Form, heads_by, reader_in, rounded
from .lowrank import square_roots

# Ridges to choose from, as shares of the mean energy of a feature.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)

FormT = TypeVar("FormT", bound=Form)


@torch.no_grad()
def refit_output(form: FormT, seen: Activations, dtype: torch.dtype = torch.float32) -> FormT:
    """The form with o (and its bias) replaced by the ridge regression of the original's output.

    The output is linear in o, so that given queries, keys and values the best o has a closed form.
    The ridge draws towards the o at hand; it is chosen on a quarter of the sequences, where "no
    change" takes part as well, and then all are used. The equations are solved in the form's
    precision.

    Args:
        dtype: to compute the heads' outputs in.
    """
    reader = reader_in(form, dtype)
    bias = form.o_bias
    o = form.o.flatten(1).float()
    if bias is not None:
        o = torch.cat([o, bias[:, None].float()], dim=1)

    def features(x: Tensor) -> Tensor:
        out = heads_by(reader, x[None])[0].flatten(1)  # [T, H V]
        return out if bias is None else torch.cat([out, torch.ones_like(out[:, :1])], dim=1)

    delta = output_step(features, o, seen, form.o.dtype)
    if delta is None:
        return form
    width = form.o[0].numel()
    fitted = {"o": form.o + delta[:, :width].unflatten(1, form.o.shape[1:])}
    if bias is not None:
        fitted["o_bias"] = bias + delta[:, width]
    return replace(form, **fitted)


@torch.no_grad()
def refit_values(form: Any, seen: Activations, dtype: torch.dtype = torch.float32) -> Any:
    """The form with its maps from a value head to every KV head's values, and o, fitted together.

    Given queries and keys, the output is linear in the product W_h = o_h v_b of every head, so that
    the best one has a closed form. The nearest product of the form's rank, under the moment of what
    it reads, is a truncated singular value decomposition. Heads that share v_b decide on it by
    their mean moment, and each has then the o that is best for it.

    Args:
        form: with `value_reader` and `v_b`.
        dtype: to compute the heads' outputs in.
    """
    reader = rounded(form, dtype).value_reader()
    wide = form.value_reader().o

    def features(x: Tensor) -> Tensor:
        return heads_by(reader, x[None])[0].flatten(1)  # [T, H C]

    bias = form.o_bias
    o = wide.flatten(1).float()

    def with_constant(x: Tensor) -> Tensor:
        out = features(x)
        return out if bias is None else torch.cat([out, torch.ones_like(out[:, :1])], dim=1)

    if bias is not None:
        o = torch.cat([o, bias[:, None].float()], dim=1)
    delta = output_step(with_constant, o, seen, form.o.dtype)
    if delta is None:
        return form
    wide = wide + delta[:, : wide[0].numel()].unflatten(1, wide.shape[1:])
    moments = _moments_by_head(features, seen, wide.shape[1], wide.dtype)
    v_b, out = factor_values(wide, moments, form.v_b.shape[:2])
    return replace(form, v_b=v_b, o=out)


def factor_values(
    wide: Float[Tensor, "D H C"], moments: Float[Tensor, "H C C"], shape: tuple[int, int]
) -> tuple[Float[Tensor, "G V C"], Float[Tensor, "D H V"]]:
    """(v_b, o) of the given groups and width whose products come nearest to every head's map.

    Args:
        moments: of what each head's map reads.
    """
    groups, width = shape
    repeats = wide.shape[1] // groups
    found_v, found_o = [], []
    for group in range(groups):
        heads = slice(group * repeats, (group + 1) * repeats)
        root, inverse = square_roots(moments[heads].mean(0))
        rows = wide[:, heads].permute(1, 0, 2).flatten(0, 1) @ root  # [R D, C]
        _, vectors = torch.linalg.eigh(rows.mT @ rows)
        v_b = vectors.flip(1)[:, :width].mT @ inverse
        if len(v_b) < width:  # a value head narrower than the heads' values
            v_b = torch.nn.functional.pad(v_b, (0, 0, 0, width - len(v_b)))
        found_v.append(v_b)
        for head in range(heads.start, heads.stop):
            read = moments[head] @ v_b.mT
            gram = v_b @ read
            gram.diagonal().add_(1e-8 * gram.diagonal().mean())
            found_o.append(torch.linalg.solve(gram, (wide[:, head] @ read).mT).mT)
    return torch.stack(found_v), torch.stack(found_o, dim=1)


def _moments_by_head(
    features: Callable[[Tensor], Tensor], seen: Activations, heads: int, precision: torch.dtype
) -> Float[Tensor, "H C C"]:
    total: Any = 0
    for x, weights in zip(seen.x, seen.weights, strict=True):
        out = features(x).unflatten(1, (heads, -1)).transpose(0, 1)  # [H, T, C]
        total = total + ((out * weights[:, None]).mT @ out).to(precision)
    return total


def output_step(
    features: Callable[[Tensor], Tensor],
    o: Float[Tensor, "D F"],
    seen: Activations,
    precision: torch.dtype = torch.float64,
) -> Float[Tensor, "D F"] | None:
    """What to add to o so that o features(x) comes near y; None if nothing helps.

    Args:
        features: [T, D] of one sequence -> [T, F].
        precision: to solve the equations in, and of what is returned.
    """
    held = max(1, len(seen) // 4)
    if len(seen) < 2:
        return None
    solve = by_tokens if seen.weights.numel() < o.shape[1] else by_features
    return solve(features, o, seen, held, precision)


def by_features(
    features: Callable[[Tensor], Tensor],
    o: Float[Tensor, "D F"],
    seen: Activations,
    held: int,
    precision: torch.dtype = torch.float64,
) -> Float[Tensor, "D F"] | None:
    """`output_step` with the first `held` sequences held out, by equations of F unknowns."""
    fit, test = (
        _normal_equations(features, o, seen[rows], precision)
        for rows in (slice(held, None), slice(held))
    )

    def change(ridge: float) -> float:  # of the squared error on the held-out sequences
        delta = _ridge_step(*fit, ridge)
        return float((delta * (test[0] @ delta - 2 * test[1])).sum())

    if not float(fit[0].diagonal().sum()) > 0:
        return None
    ridge = _best(change)
    return None if ridge is None else _ridge_step(fit[0] + test[0], fit[1] + test[1], ridge).mT


def by_tokens(
    features: Callable[[Tensor], Tensor],
    o: Float[Tensor, "D F"],
    seen: Activations,
    held: int,
    precision: torch.dtype = torch.float64,
) -> Float[Tensor, "D F"] | None:
    """The same by equations of as many unknowns as there are tokens: cheaper if they are few."""
    found, missing = [], []
    for z, y, weights in zip(seen.x, seen.y, seen.weights, strict=True):
        out, root = features(z), weights.sqrt()[:, None]
        found.append(out * root)
        missing.append((y - out @ o.T) * root)
    x, off = torch.cat(found), torch.cat(missing).to(precision)
    gram = (x @ x.mT).to(precision)
    test, fit = slice(held * seen.x.shape[1]), slice(held * seen.x.shape[1], None)

    def step(rows: slice, ridge: float) -> Tensor:  # (gram + ridge * a feature's energy)^-1 off
        damped = gram[rows, rows].clone()
        damped.diagonal().add_(ridge * damped.diagonal().sum() / x.shape[1])
        return torch.cholesky_solve(off[rows], torch.linalg.cholesky(damped))

    def change(ridge: float) -> float:
        moved = gram[test, fit] @ step(fit, ridge)
        return float((moved * (moved - 2 * off[test])).sum())

    if not float(gram[fit, fit].diagonal().sum()) > 0:
        return None
    ridge = _best(change)
    return None if ridge is None else step(slice(None), ridge).mT @ x.to(precision)


def _best(change: Callable[[float], float]) -> float | None:
    """The ridge that changes the held-out error for the better, and most."""
    changes = {ridge: change(ridge) for ridge in RIDGES}
    ridge = min(changes, key=changes.__getitem__)
    return ridge if changes[ridge] < 0 else None


def _ridge_step(
    gram: Float[Tensor, "F F"], moment: Float[Tensor, "F D"], ridge: float
) -> Float[Tensor, "F D"]:
    """(gram + ridge * its mean energy)^-1 moment."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(moment, torch.linalg.cholesky(damped))


def _normal_equations(
    features: Callable[[Tensor], Tensor],
    o: Float[Tensor, "D F"],
    seen: Activations,
    precision: torch.dtype,
) -> tuple[Float[Tensor, "F F"], Float[Tensor, "F D"]]:
    """F^T w F and F^T w (y - o F) of the features F."""
    hidden, count = o.shape
    gram = torch.zeros(count, count, dtype=precision, device=seen.x.device)
    moment = torch.zeros(count, hidden, dtype=precision, device=seen.x.device)
    for x, y, weights in zip(seen.x, seen.y, seen.weights, strict=True):
        out = features(x)
        weighed = (out * weights[:, None]).T
        gram += (weighed @ out).to(precision)
        moment += (weighed @ y).to(precision)
    return gram, moment - gram @ o.to(precision).T
