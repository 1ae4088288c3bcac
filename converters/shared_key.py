"""One key for several heads: the least score error that a shared rotated key leaves.

With l the lag of a key behind its query, RoPE puts R between them, which turns pair f by
exp(-i theta_f l), and a score is q . R k. A shared key z = Y k, of all the group's keys k, and a
map B for every query head leave the error q . (R k_h - B R z), so that B goes into the query:
q . B R z = (B^T q) . R z. Y and B that only turn and scale pairs commute with R, are right at every
lag and have a closed form. Others are right as far as pairs stay in phase: the mean of R X R^T over
the lags that count needs no more than the mean phases of sums and differences of frequencies. The
error is quadratic in Y and in B, so that they are fitted in turn.

Letters: S source KV heads of the group, R query heads of each, H = S R query heads, E query and key
width, P = E/2 pairs, T lags.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Complex, Float
from torch import Tensor

# Of the mean diagonal: keeps a step small where a direction has no energy to fit it by.
RIDGE = 1e-6
# The error falls by a third at first and then by less than a thousandth a step.
STEPS = 10


@dataclass(frozen=True)
class SharedKey:
    """R k_h ~ synthesis_h R z with z = analysis k.

    Args:
        analysis: Y, from the stacked keys of the group.
        synthesis: B, of every query head.
    """

    analysis: Float[Tensor, "E SE"]
    synthesis: Float[Tensor, "H E E"]


@dataclass(frozen=True)
class KeyProblem:
    """What the score error of a group depends on.

    Args:
        keys: second moment of the group's stacked keys.
        queries: second moment of every head's queries, times what scores count.
        differences, sums: mean of exp(-i (theta_f -+ theta_f') l) over a head's lags l.
    """

    keys: Float[Tensor, "SE SE"]
    queries: Float[Tensor, "H E E"]
    differences: Complex[Tensor, "H P P"]
    sums: Complex[Tensor, "H P P"]

    @staticmethod
    def of(
        keys: Float[Tensor, "SE SE"],
        queries: Float[Tensor, "H E E"],
        lags: Float[Tensor, "H T"],
        inv_freq: Float[Tensor, " P"],
    ) -> "KeyProblem":
        """The problem of heads that weigh lags 0, 1, ... by `lags`, each row summing to 1."""
        times = torch.arange(lags.shape[1], dtype=inv_freq.dtype, device=inv_freq.device)
        angles = -times[:, None] * inv_freq
        phases = torch.polar(torch.ones_like(angles), angles)  # [T, P]
        weighed = lags[:, None].to(phases.dtype) * phases.mT
        return KeyProblem(keys, queries, weighed @ phases.conj(), weighed @ phases)

    def of_group(self, group: tuple[int, ...]) -> "KeyProblem":
        """The problem of some of these source heads only."""
        rows = torch.tensor(group)[:, None] * self.width + torch.arange(self.width)
        heads = torch.tensor(group)[:, None] * self.repeats + torch.arange(self.repeats)
        rows, heads = rows.flatten(), heads.flatten()
        keys = self.keys[rows][:, rows]
        return KeyProblem(keys, self.queries[heads], self.differences[heads], self.sums[heads])

    @property
    def width(self) -> int:
        return self.queries.shape[-1]

    @property
    def repeats(self) -> int:
        """Query heads of one source KV head."""
        return len(self.queries) * self.width // len(self.keys)

    def turned(self, x: Float[Tensor, "H E E"], back: bool = False) -> Float[Tensor, "H E E"]:
        """The mean of R x R^T over lags, or of R^T x R.

        Of a pair of frequency f and one of f', x is z -> a z + b conj(z) with complex a and b:
        R x R^T turns a by the difference of their angles and b by the sum.
        """
        half = self.width // 2
        differences, sums = self.differences, self.sums
        if back:
            differences, sums = differences.conj(), sums.conj()
        (rr, ri), (ir, ii) = (row.split(half, -1) for row in x.split(half, -2))
        a = torch.complex(rr + ii, ir - ri) / 2 * differences
        b = torch.complex(rr - ii, ir + ri) / 2 * sums
        real = torch.cat([a.real + b.real, b.imag - a.imag], dim=-1)
        return torch.cat([real, torch.cat([a.imag + b.imag, a.real - b.real], dim=-1)], dim=-2)

    def of_heads(self, x: Float[Tensor, "SE E"]) -> Float[Tensor, "H E E"]:
        """Every query head's part of something about the stacked keys."""
        return x.unflatten(0, (-1, self.width)).repeat_interleave(self.repeats, 0)


def commuting_key(problem: KeyProblem) -> SharedKey:
    """The best key that is a complex multiple of every head's, frequency by frequency.

    With D_s the energy of the queries that meet head s, D^1/2 (k - B z) is the error of frequency
    f, so that z is the first component of D^1/2 E[k k^H] D^1/2 (Eckart and Young 1936).
    """
    weight, moment = commuting_moment(problem)
    _, vectors = torch.linalg.eigh(moment)
    u = vectors[..., -1]  # [P, S]
    largest = u.gather(1, u.abs().argmax(1, keepdim=True))
    u = u * largest.conj().sgn()  # unique only up to a phase
    synthesis = u / weight
    # Unique only up to a scale, too: queries and keys stay about as large as they were.
    scale = synthesis.abs().square().mean(1, keepdim=True).sqrt()
    analysis, synthesis = (u.conj() * weight * scale).mT, (synthesis / scale).mT  # [S, P]
    return SharedKey(
        analysis=_multiplication(analysis).transpose(0, 1).flatten(1),
        synthesis=_multiplication(synthesis).repeat_interleave(problem.repeats, 0),
    )


def commuting_moment(
    problem: KeyProblem,
) -> tuple[Float[Tensor, "P S"], Complex[Tensor, "P S S"]]:
    """(D^1/2, D^1/2 E[k_f k_f^H] D^1/2) of every frequency."""
    half = problem.width // 2
    energy = problem.queries.diagonal(dim1=-2, dim2=-1).unflatten(0, (-1, problem.repeats)).sum(1)
    weight = energy.unflatten(-1, (2, half)).sum(1).mT / 2  # of one real score, [P, S]
    # A pair that no query uses still needs a nonzero weight to be decomposed.
    weight = weight.clamp_min(weight.max() * 1e-12).clamp_min(1e-30).sqrt()
    keys = problem.keys.unflatten(0, (-1, 2, half)).unflatten(-1, (-1, 2, half))
    rr, ri, ir, ii = (
        keys[:, i, :, :, j].diagonal(dim1=1, dim2=3).permute(2, 0, 1)
        for i in (0, 1)
        for j in (0, 1)
    )  # [P, S, S] each
    moment = torch.complex(rr + ii, ir - ri)
    return weight, weight[:, :, None] * moment * weight[:, None, :]


def shared_key(problem: KeyProblem, steps: int = STEPS, ridge: float = RIDGE) -> SharedKey:
    """The commuting key, then analysis and synthesis fitted in turn; the error only falls.

    Args:
        ridge: of the mean diagonal, what draws every step towards the key at hand.
    """
    key = commuting_key(problem)
    for _ in range(steps):
        key = _with_best_synthesis(problem, key, ridge)
        key = _with_best_analysis(problem, key, ridge)
    return _with_best_synthesis(problem, key, ridge)


def score_error(problem: KeyProblem, key: SharedKey) -> float:
    """The mean of |q . (R k_h - B_h R z)|^2 over what counts, summed over heads."""
    own, cross, shared = _turned_moments(problem, key)
    b = key.synthesis
    return float((problem.queries * (own - 2 * b @ cross.mT + b @ shared @ b.mT)).sum())


def _turned_moments(
    problem: KeyProblem, key: SharedKey
) -> tuple[Float[Tensor, "H E E"], Float[Tensor, "H E E"], Float[Tensor, "H E E"]]:
    """Second moments of R k_h, of R k_h with R z, and of R z."""
    heads = len(problem.keys) // problem.width
    blocks = problem.keys.unflatten(0, (heads, -1)).unflatten(-1, (heads, -1))
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).repeat_interleave(problem.repeats, 0)
    cross = problem.keys @ key.analysis.mT
    shared = (key.analysis @ cross).expand_as(own)
    return problem.turned(own), problem.turned(problem.of_heads(cross)), problem.turned(shared)


def _with_best_synthesis(problem: KeyProblem, key: SharedKey, ridge: float) -> SharedKey:
    """Regression of R k_h on R z."""
    _, cross, shared = _turned_moments(problem, key)
    missing = cross - key.synthesis @ shared
    step = torch.linalg.solve(_ridged(shared, ridge), missing.mT).mT
    return replace(key, synthesis=key.synthesis + step)


def _with_best_analysis(problem: KeyProblem, key: SharedKey, ridge: float) -> SharedKey:
    """The z that every head's queries, turned to it, agree on best."""
    met = key.synthesis.mT @ problem.queries
    shared = problem.turned(met @ key.synthesis, back=True).sum(0)
    wanted = problem.turned(met, back=True).unflatten(0, (-1, problem.repeats)).sum(1)  # [S, E, E]
    missing = wanted.transpose(0, 1).flatten(1) - shared @ key.analysis
    return replace(key, analysis=key.analysis + torch.linalg.solve(_ridged(shared, ridge), missing))


def _ridged(moment: Float[Tensor, "*H E E"], ridge: float) -> Float[Tensor, "*H E E"]:
    added = ridge * moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = added.clamp_min(torch.finfo(added.dtype).tiny)
    eye = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    return moment + added[..., None, None] * eye


def _multiplication(factor: Complex[Tensor, "S P"]) -> Float[Tensor, "S E E"]:
    """Multiplying every pair with a complex number, as a real matrix."""
    re, im = factor.real.diag_embed(), factor.imag.diag_embed()
    return torch.cat([torch.cat([re, -im], dim=-1), torch.cat([im, re], dim=-1)], dim=-2)
