"""KL to a teacher and cross-entropy, without ever holding all scores.

Letters: N tokens, D and E the widths of student and teacher, V entries in the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

# Scores are made for as many tokens at a time as give this many of them, V times the tokens.
SCORES = 1 << 23

NO_TARGET = -1


@dataclass(frozen=True)
class Head:
    """What turns states into scores: a linear map, or nothing where they are scores already.

    Args:
        weight: [V, D], in the dtype to compute in; None if states are scores.
        bias: [V] or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None

    def scores(self, states: Tensor, vocabulary: int) -> Tensor:
        """[n, D] -> float32 [n, vocabulary], of the vocabulary's first entries."""
        if self.weight is None:
            return states[:, :vocabulary].to(torch.float32, copy=True)  # it is worked on in place
        bias = None if self.bias is None else self.bias[:vocabulary]
        weight = self.weight[:vocabulary]
        return linear(states.to(weight.dtype), weight, bias).float()

    def pull_back(self, gradient: Tensor, states: Tensor) -> Tensor:
        """The gradient of states [n, D] from that of their scores."""
        vocabulary = gradient.shape[1]
        if self.weight is None:
            return torch.nn.functional.pad(gradient, (0, states.shape[1] - vocabulary))
        return gradient.to(self.weight.dtype) @ self.weight[:vocabulary]


def chunked_loss(
    states: Tensor,
    head: Head,
    targets: Tensor,
    *,
    teacher_states: Tensor | None = None,
    teacher_head: Head | None = None,
    vocabulary: int,
    kl_weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor]:
    """kl_weight * mean KL(teacher || student) + ce_weight * mean cross-entropy, and both by token.

    The gradient of the scores s is (kl_weight + ce_weight) softmax(s) - kl_weight softmax(t) -
    ce_weight onehot, over N. It is known with the scores, so it is pulled back through the head
    at once and only [N, D] is kept: memory is that of `SCORES` scores, and no product is made
    twice (as in 2410.10989). The head is frozen, so it needs no gradient.

    Args:
        states: [N, D].
        targets: [N]; `NO_TARGET` where a token has no successor, which only the KL counts.
        teacher_states: [N, E]; None without a teacher, then the KL is 0.
        vocabulary: V, of both.

    Returns:
        The loss, and [N, 3]: KL, cross-entropy and the teacher's cross-entropy.
    """
    return _ChunkedLoss.apply(
        states, head, targets, teacher_states, teacher_head, vocabulary, (kl_weight, ce_weight)
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Head,
        targets: Tensor,
        teacher_states: Tensor | None,
        teacher_head: Head | None,
        vocabulary: int,
        weights: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        count, size = len(states), max(1, SCORES // vocabulary)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(states) if wanted else None
        by_token = torch.zeros(count, 3, device=states.device)
        with_target = int((targets >= 0).sum())
        scale = weights[0] / count, weights[1] / max(1, with_target)
        for start in range(0, count, size):
            part = slice(start, start + size)
            scores = head.scores(states[part], vocabulary)
            other = None
            if teacher_states is not None and teacher_head is not None:
                other = teacher_head.scores(teacher_states[part], vocabulary)
            pulled = _chunk(scores, other, targets[part], by_token[part], scale, wanted)
            if gradient is not None and pulled is not None:
                gradient[part] = head.pull_back(pulled, states)
        total = by_token.double().sum(0)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(by_token)
        return (scale[0] * total[0] + scale[1] * total[1]).float(), by_token

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0], None, None, None, None, None, None)


def _chunk(
    scores: Tensor,
    other: Tensor | None,
    targets: Tensor,
    by_token: Tensor,
    scale: tuple[float, float],
    wanted: bool,
) -> Tensor | None:
    """Fills by_token [n, 3] and gives the gradient of scores [n, V], in few passes over them."""
    known = targets >= 0
    picked = targets.clamp_min(0)[:, None]  # [n, 1]
    norm = scores.logsumexp(-1)
    ce = norm - scores.gather(1, picked)[:, 0]
    by_token[:, 1] = ce.where(known, 0)
    likely = None
    if other is not None:
        other_norm = other.logsumexp(-1)
        other_ce = other_norm - other.gather(1, picked)[:, 0]
        by_token[:, 2] = other_ce.where(known, 0)
        likely = (other - other_norm[:, None]).exp_()
        # sum q (log q - log p), where log q - log p is t - s less the difference of the norms.
        by_token[:, 0] = torch.linalg.vecdot(likely, other.sub_(scores)) - (other_norm - norm)
    if not wanted:
        return None
    gradient = scores.sub_(norm[:, None]).exp_()
    by_row = scale[0] * (likely is not None) + scale[1] * known.float()  # [n]
    gradient.mul_(by_row[:, None])
    if likely is not None:
        gradient.sub_(likely, alpha=scale[0])
    if scale[1]:
        gradient.scatter_add_(1, picked, -(scale[1] * known.float())[:, None])
    return gradient
