"""The output map of a converted layer by regression on the original's output.

Letters: N sequences, T tokens in each, D hidden size, H query heads, V value width, F features:
the H V outputs of the heads, and a constant where o has a bias.
"""

from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from .activations import Activations
from .healing import Form
from .maps import AttentionMaps, head_outputs

# Ridges to choose from, as shares of the mean energy of a feature.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)

FormT = TypeVar("FormT", bound=Form)


@torch.no_grad()
def refit_output(form: FormT, seen: Activations) -> FormT:
    """The form with o (and its bias) replaced by the ridge regression of the original's output.

    The output is linear in o, so that given queries, keys and values the best o has a closed form.
    The ridge draws towards the o at hand; it is chosen on a quarter of the sequences, where "no
    change" takes part as well, and then all are used.
    """
    held = max(1, len(seen) // 4)
    if len(seen) < 2:
        return form
    maps = form.expand()
    fit, test = (_normal_equations(maps, seen[rows]) for rows in (slice(held, None), slice(held)))

    def change(delta: Tensor) -> float:  # of the squared error on the held-out quarter
        return float((delta * (test[0] @ delta - 2 * test[1])).sum())

    if not float(fit[0].diagonal().sum()) > 0:
        return form
    changes = {ridge: change(_ridge_step(*fit, ridge)) for ridge in RIDGES}
    ridge = min(changes, key=changes.__getitem__)
    if changes[ridge] >= 0:
        return form
    delta = _ridge_step(fit[0] + test[0], fit[1] + test[1], ridge).mT
    width = maps.heads * maps.v_dim
    fitted = {"o": maps.o + delta[:, :width].unflatten(1, maps.o.shape[1:])}
    if maps.o_bias is not None:
        fitted["o_bias"] = maps.o_bias + delta[:, width]
    return replace(form, **fitted)


def _ridge_step(
    gram: Float[Tensor, "F F"], moment: Float[Tensor, "F D"], ridge: float
) -> Float[Tensor, "F D"]:
    """(gram + ridge * its mean energy)^-1 moment."""
    damped = gram.clone()
    damped.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.cholesky_solve(moment, torch.linalg.cholesky(damped))


def _normal_equations(
    maps: AttentionMaps, seen: Activations
) -> tuple[Float[Tensor, "F F"], Float[Tensor, "F D"]]:
    """F^T w F and F^T w (y - F o) of the heads' outputs F, and a constant where o has a bias."""
    narrow = maps.to(torch.float32)
    features = maps.heads * maps.v_dim + (maps.o_bias is not None)
    gram = torch.zeros(features, features, dtype=torch.float64, device=seen.x.device)
    moment = torch.zeros(features, maps.hidden, dtype=torch.float64, device=seen.x.device)
    for x, y, weights in zip(seen.x, seen.y, seen.weights, strict=True):
        out = head_outputs(narrow, x[None])[0].flatten(1)  # [T, H V]
        o = narrow.o.flatten(1)
        if narrow.o_bias is not None:
            out = torch.cat([out, torch.ones_like(out[:, :1])], dim=1)
            o = torch.cat([o, narrow.o_bias[:, None]], dim=1)
        weighed = (out * weights[:, None]).T
        gram += (weighed @ out).double()
        moment += (weighed @ (y - out @ o.T)).double()
    return gram, moment
