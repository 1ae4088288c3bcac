"""Windows of tokens to train on, and others to measure on that share nothing with them.

Letters: n windows, L tokens in a window.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..converters.errors import InputError
from ..converters.text import read_text, windows
from .config import UptrainConfig

# A run of this many tokens in both texts is taken for a copy, not for chance.
RUN = 32
# An odd multiplier of 64 bits: the rolling hash below wraps around at 2^64.
MULTIPLIER = 0x9E3779B97F4A7C15
# Of a text too short for both, this share at most is held out.
SHARE = 0.1


class Windows(Dataset):
    """Rows of token ids [n, L] as a data set; kept as int32, half of what the model wants."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows.to(torch.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index].long()}


@dataclass(frozen=True)
class Prepared:
    """What a run reads.

    Args:
        train: windows [n, L], a whole number of batches; read again where a run asks for more.
        held_out: windows never trained on, nor any run of `RUN` tokens of them.
        dropped: windows of the text left out of `train` for that reason.
    """

    train: Windows
    held_out: Windows
    dropped: int

    @property
    def digest(self) -> str:
        """Of all token ids, by which a resumed run knows its text."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(repr(tuple(part.rows.shape)).encode())
            digest.update(part.rows.contiguous().numpy().data)
        return digest.hexdigest()


def prepare(tokenizer: Any, config: UptrainConfig) -> Prepared:
    """The recipe's text in windows, and the held-out ones.

    Without a text of their own, held-out windows are those that follow the ones trained on.

    Raises:
        InputError: the text is too short for one step.
    """
    wanted = config.steps * config.batch
    held_out = None
    if config.eval_text is not None:
        held_out = windows(
            tokenizer, read_text(config.eval_text), config.window, config.eval_windows
        )
    own = config.eval_windows if held_out is None else 0
    rows = windows(tokenizer, read_text(config.data), config.window, wanted + own)
    if held_out is None:
        enough = len(rows) == wanted + own
        count = own if enough else min(own, max(1, int(SHARE * len(rows))))
        rows, held_out = rows[:-count], rows[-count:]
    kept = rows[~overlaps(rows, held_out, RUN)]
    train = kept[: len(kept) // config.batch * config.batch]
    if not len(train):
        raise InputError(
            f"{config.data} gives {len(kept)} windows of {config.window} tokens to train on, fewer "
            f"than --batch {config.batch}. Give a longer text, or a smaller --batch or --window."
        )
    return Prepared(Windows(train), Windows(held_out), len(rows) - len(kept))


def overlaps(rows: Tensor, held_out: Tensor, run: int) -> Tensor:
    """Which of the windows [n, L] hold a run of tokens that a held-out window holds; bool [n]."""
    run = min(run, rows.shape[1], held_out.shape[1])
    forbidden = np.unique(_hashes(held_out, run))
    return torch.from_numpy(np.isin(_hashes(rows, run), forbidden).any(axis=1))


def _hashes(rows: Tensor, run: int) -> np.ndarray:
    """A hash of every run of tokens, [n, L - run + 1]: sum_j x_(i+j) m^j modulo 2^64."""
    ids = rows.numpy().astype(np.uint64) + 1
    total = np.zeros((len(ids), ids.shape[1] - run + 1), dtype=np.uint64)
    factor = 1
    for offset in range(run):
        total += ids[:, offset : offset + total.shape[1]] * np.uint64(factor)
        factor = factor * MULTIPLIER % 2**64
    return total
