"""Weighted low-rank factorisation in closed form.

Letters: M rows, D columns, r rank.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

# Eigenvalues of a moment below this share of the largest are raised to it: directions that the
# calibration text never shows are then cheap, not free, and nothing is divided by zero.
FLOOR = 1e-7


@dataclass(frozen=True)
class Factors:
    """`up[:, :r] @ down[:r]` is the best rank-r approximation, for every r up to R at once.

    Args:
        up: columns by falling importance.
        down: rows by falling importance.
        energy: weighted squared error that leaving out each component adds, of all C there are.
    """

    up: Float[Tensor, "M R"]
    down: Float[Tensor, "R D"]
    energy: Float[Tensor, " C"]


def square_roots(
    moment: Float[Tensor, "N N"], floor: float = FLOOR
) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N N"]]:
    """(S, S^-1) with S Hermitian and S S = moment, its spectrum floored."""
    values, vectors = torch.linalg.eigh((moment + moment.mH) / 2)
    if (
        values[-1] * floor <= torch.finfo(values.dtype).tiny
    ):  # no data: every direction counts alike
        eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        return eye, eye.clone()
    root = values.clamp_min(values[-1] * floor).sqrt()
    return (vectors * root) @ vectors.mH, (vectors / root) @ vectors.mH


def weighted_svd(
    weight: Float[Tensor, "M D"],
    left: Float[Tensor, "M M"],
    right: Float[Tensor, "D D"],
) -> Factors:
    """The W' of every rank that minimises tr(left (W - W') right (W - W')^T).

    With A = left^1/2 and C = right^1/2 the error is |A (W - W') C|_F^2, so the truncated singular
    value decomposition of A W C gives the minimum (Eckart and Young 1936), and the error is the
    sum of the squared singular values left out.

    Args:
        left: second moment of what multiplies the rows, such as a loss' gradients.
        right: second moment of the input.
    """
    return WeightedSVD.of(left, right)(weight)


def gram_svd(
    weight: Float[Tensor, "M D"], felt: Float[Tensor, "D D"], right: Float[Tensor, "D D"]
) -> Factors:
    """`weighted_svd` where the left moment is known as what the weight makes of it alone.

    Args:
        felt: W^T left W, the second moment of the gradients with respect to the input.
    """
    root, inverse = square_roots(right)
    return _of_gram(root @ felt @ root, inverse, None, lambda v: weight @ (root @ v))


def _of_gram(
    gram: Float[Tensor, "D D"],
    right_inverse: Float[Tensor, "D D"],
    rank: int | None,
    seen: Callable[[Float[Tensor, "D R"]], Float[Tensor, "M R"]],
) -> Factors:
    """Factors by the right singular vectors, the eigenvectors of C W^T left W C.

    Args:
        seen: W C times what it is given.
    """
    energy, v = torch.linalg.eigh((gram + gram.mT) / 2)  # rounded, it is not even
    v = v.flip(1)[:, :rank]
    v, vh = fix_signs(v, v.mT)
    return Factors(seen(v), vh @ right_inverse, energy.flip(0).clamp_min(0))


@dataclass(frozen=True)
class WeightedSVD:
    """`weighted_svd` of many weights under the same moments, with the moments' roots made once.

    Args:
        left: the left moment.
        left_roots: its root and the root's inverse; None where it is the larger of the two. The
            right singular vectors are then those of C W^T A^2 W C, and nothing of A is needed.
        right, right_inverse: the right moment's root, and the root's inverse.
    """

    left: Float[Tensor, "M M"]
    left_roots: tuple[Float[Tensor, "M M"], Float[Tensor, "M M"]] | None
    right: Float[Tensor, "D D"]
    right_inverse: Float[Tensor, "D D"]

    @classmethod
    def of(cls, left: Float[Tensor, "M M"], right: Float[Tensor, "D D"]) -> "WeightedSVD":
        return cls(left, None, *square_roots(right)).under(left)

    def under(self, left: Float[Tensor, "M M"]) -> "WeightedSVD":
        """The same with another left moment."""
        roots = square_roots(left) if len(left) <= len(self.right) else None
        return WeightedSVD(left, roots, self.right, self.right_inverse)

    def __call__(self, weight: Float[Tensor, "M D"], rank: int | None = None) -> Factors:
        """Factors of no more than that rank; None for all there are."""
        return self.less(weight, 0)(weight[:0, :0], weight[:0], rank)

    def less(
        self, weight: Float[Tensor, "M D"], first: int
    ) -> Callable[[Float[Tensor, "K R"], Float[Tensor, "R D"], int | None], Factors]:
        """Factors of what a product leaves of a weight, for many products of few rows.

        What is returned takes (columns, rows, rank) and factorises the weight with columns @ rows
        taken from its first K rows. All that M and D cost together is paid once; a product costs
        R D (K + D), and the decomposition.

        Args:
            first: K.
        """
        seen = weight @ self.right
        if self.left_roots is not None:
            root, inverse = self.left_roots

            def by_root(columns: Tensor, rows: Tensor, rank: int | None) -> Factors:
                rest = torch.cat([seen[:first] - columns @ (rows @ self.right), seen[first:]])
                u, s, vh = torch.linalg.svd(root @ rest, full_matrices=False)
                u, vh = fix_signs(u[:, :rank], vh[:rank])
                return Factors(inverse @ u * s[:rank], vh @ self.right_inverse, s.square())

            return by_root

        felt = self.left @ seen
        gram, felt = seen.mT @ felt, felt[:first].clone()  # its other rows are let go
        left = self.left[:first, :first]

        def by_gram(columns: Tensor, rows: Tensor, rank: int | None) -> Factors:
            taken = rows @ self.right
            cross = taken.mT @ (columns.mT @ felt - columns.mT @ left @ columns @ taken / 2)

            def rest(v: Tensor) -> Tensor:
                up = seen @ v
                up[:first] -= columns @ (taken @ v)
                return up

            weighted = gram - cross - cross.mT
            del cross
            return _of_gram(weighted, self.right_inverse, rank, rest)

        return by_gram


def fix_signs(
    u: Float[Tensor, "M R"], vh: Float[Tensor, "R D"]
) -> tuple[Float[Tensor, "M R"], Float[Tensor, "R D"]]:
    """The same decomposition with the largest entry of every column of u positive.

    Singular vectors are unique only up to sign; two machines may differ in it.
    """
    largest = u.abs().argmax(0, keepdim=True)
    sign = u.gather(0, largest).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    return u * sign, vh * sign.mT
