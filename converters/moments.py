"""Statistics of one layer on the calibration text, for every layout of latent attention."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .calibration import (
    Kronecker,
    PhaseMoments,
    kronecker,
    phase_moments,
    probe_gradients,
)
from .maps import AttentionMaps
from .rope_split import multiplied


@dataclass(frozen=True)
class LatentMoments:
    """All that the calibration text says about one layer, for either kind of RoPE.

    Args:
        kronecker: of position-free keys and values; on-read, of each KV head's [keys as they are |
            position-free keys], and of values.
        phases: what it costs to drop a rotation. None where keys are formed whole and normalised;
            there are then no position-free keys.
    """

    kronecker: Kronecker
    phases: PhaseMoments | None
    rope_on_read: bool = False


def latent_moments(
    maps: AttentionMaps,
    x: Float[Tensor, "N T D"],
    generator: torch.Generator,
    rope_on_read: bool,
) -> LatentMoments:
    """Moments of one layer on calibration inputs x, in float32."""
    narrow = maps.to(torch.float32)
    if maps.k_norm is not None and rope_on_read:  # keys are formed whole, and so is their norm
        whole, values = probe_gradients(narrow, x, generator)
        gradients = torch.cat([whole.flatten(2), values.flatten(2)], -1)
        return LatentMoments(kronecker(x, gradients), None, rope_on_read)
    phases = phase_moments(narrow, x[: (len(x) + 2) // 3])  # few numbers: a third is plenty
    factor = torch.cat([phases.mean_phase.real, phases.mean_phase.imag], dim=-1).float()
    keys, values = probe_gradients(
        narrow,
        x,
        generator,
        lambda sequence: multiplied(narrow.queries(sequence), factor),
        rotated_too=rope_on_read,
    )
    # Where keys are normalised, those of what is linear in the input.
    keys = keys * narrow.key_scales(x)[..., None]
    gradients = torch.cat([keys.flatten(2), values.flatten(2)], -1)
    return LatentMoments(kronecker(x, gradients), phases, rope_on_read)
