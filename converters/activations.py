"""What one attention layer sees and does on the calibration text.

Letters: N sequences, T tokens in each, D hidden size.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Activations:
    """One attention layer on the calibration text, in float32.

    Args:
        x: what the attention reads, after the layer's norm.
        y: what it adds to the residual stream.
        weights: 1 / |h|^2 of the residual stream h that y has been added to. The next norm divides
            by |h|, so this is how much an error in y matters; and attention sinks, whose stream is
            enormous, do not drown the other tokens. Where y itself is normalised before it is
            added, times |norm(y)|^2 / |y|^2.
    """

    x: Float[Tensor, "N T D"]
    y: Float[Tensor, "N T D"]
    weights: Float[Tensor, "N T"]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> "Activations":
        return Activations(self.x[rows], self.y[rows], self.weights[rows])

    def until(self, tokens: int) -> "Activations":
        """A copy of the start of every sequence, which causal attention computes by itself."""
        parts = (part[:, :tokens].clone() for part in (self.x, self.y, self.weights))
        return Activations(*parts)
