"""Perplexity on windows of text.

Letters: n windows, L tokens in a window, V entries in the vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..converters.errors import InputError

# Positions whose scores are turned into float32 at a time: V * ROWS * 4 bytes are needed for it.
ROWS = 128


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood over the predicted tokens.

    Args:
        perplexity: that value.
        tokens: how many tokens were predicted, n * (L - 1): a window's first token is not.
        windows: how many windows the text gave, each seen by itself.
        window: L.
    """

    perplexity: float
    tokens: int
    windows: int
    window: int


@torch.no_grad()
def perplexity(
    model: Any, windows: Tensor, *, progress: Callable[[int, int], None] | None = None
) -> Perplexity:
    """The model's perplexity on windows [n, L], each by itself.

    The log-softmax is taken in float32 whatever the model's dtype, a few rows at a time, and the
    sum over windows in float64.

    Args:
        progress: called with the windows done and their number after each.

    Raises:
        InputError: the text holds token ids beyond the model's vocabulary.
    """
    count, length = windows.shape
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(windows.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives the id {int(windows.max())}, and the model has {vocabulary} "
            "embeddings. Use the model's own tokenizer."
        )
    total = 0.0
    for index in range(count):
        ids = windows[index : index + 1].to(model.device)  # [1, L]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]  # [L-1, V]
        total += _negative_log_likelihood(logits, ids[0, 1:])
        if progress is not None:
            progress(index + 1, count)
    tokens = count * (length - 1)
    mean = total / tokens
    return Perplexity(
        # A broken model's loss may be too large for exp, or not a number.
        perplexity=math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan,
        tokens=tokens,
        windows=count,
        window=length,
    )


def _negative_log_likelihood(logits: Tensor, targets: Tensor) -> float:
    """The sum over positions of -log softmax(logits)[target]; logits [T, V], targets [T]."""
    total = 0.0
    for start in range(0, len(targets), ROWS):
        rows = logits[start : start + ROWS].float()  # [ROWS, V]
        picked = rows.gather(1, targets[start : start + ROWS, None])[:, 0]  # [ROWS]
        total += float((rows.logsumexp(-1) - picked).double().sum())
    return total
