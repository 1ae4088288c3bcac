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


@dataclass(frozen=True)
class CodingTokens:
    """Calibration tokens: a layer's inputs, and the gradients of its keys and values.

    Args:
        inputs: the layer's input at each token.
        gradients: of the log-likelihood with respect to each token's M numbers; see
            `CodingMoments`.
        positions: each token's position in its sequence.
    """

    inputs: Float[Tensor, "N D"]
    gradients: Float[Tensor, "N M"]
    positions: Float[Tensor, " N"]

    def every(self, step: int) -> "CodingTokens":
        """One token of every `step`, the first of them included."""
        return CodingTokens(self.inputs[::step], self.gradients[::step], self.positions[::step])


@dataclass(frozen=True)
class CodingMoments:
    """What coding a layer's keys and values with few bits needs to know of them.

    A token's M = G E + G V numbers are stacked as [keys of all KV heads | values of all KV heads].
    Keys are those before their norm and their rotation, a head's dims in the order of
    `AttentionMaps`. All numbers are maps of the layer's input.

    Args:
        importance: mean over tokens of g g^T, for g the gradient of the model's log-likelihood with
            respect to a token's numbers. The log-likelihood, in nats, is summed over the tokens of
            a sequence, and its labels are drawn from the model: this is the true Fisher
            information. A small error e of one token's numbers adds e^T importance e / 2 to the KL
            divergence from the model's predictions.
        covariance: of the layer's input, over tokens.
        mean: of the layer's input, over tokens.
        first: the sequences' first tokens, which the moments are not of; None for none.
    """

    importance: Float[Tensor, "M M"]
    covariance: Float[Tensor, "D D"]
    mean: Float[Tensor, " D"]
    first: CodingTokens | None = None


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
