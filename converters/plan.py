"""How a KV budget is spent: numbers cached per token, layer by layer.

A layer's cache of width C is split into rotated dims and latent rank. Both that split and the
widths of the layers are chosen by the error measured on calibration text, not by a formula.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import InputError

# Widths a layer is tried at, as shares of the mean width, and the step of the widths given out.
TRIED_WIDTHS = (0.6, 1.0, 1.5)
WIDTH_STEP = 4
# Shares of a layer's width that may be rotated dims.
TRIED_SPLITS = (0.2, 0.3, 0.45)
# On-read, shares of the keys' width that may be rotated; they cost no cache but time to read. The
# least is taken that keeps the error within the margin of that with every key rotated.
READ_SPLITS = (1 / 4, 1 / 3, 1 / 2, 2 / 3)
READ_MARGIN = 1.1


# What a cached number may have: "auto" deals out 0 to 8 bits, 16 codes none.
KV_BITS = ("auto", "16", "8", "4")


@dataclass(frozen=True)
class LayerDims:
    """One layer's cache: a latent of `kv_lora_rank` and `qk_rope_head_dim` rotated dims.

    Args:
        rope_pairs: the frequencies of the rotated components; None to choose the layer's best.
        on_read: the rotated dims are read from the latent instead of cached, 0 for every key whole.
        scales: numbers beside them, by which keys are scaled where they are normalised.
    """

    kv_lora_rank: int
    qk_rope_head_dim: int = 0
    rope_pairs: tuple[int, ...] | None = None
    on_read: bool = False
    scales: int = 0

    @property
    def width(self) -> int:
        rotated = 0 if self.on_read else self.qk_rope_head_dim
        return self.kv_lora_rank + rotated + self.scales

    def bytes(self, itemsize: int) -> int:
        """Bytes cached per token, with numbers of so many each."""
        return self.width * itemsize

    def named(self) -> dict[str, int]:
        """The dims by the config's names."""
        return {"kv_lora_rank": self.kv_lora_rank, "qk_rope_head_dim": self.qk_rope_head_dim}


def parse_budget(budget: float | str) -> float:
    """The share of the cache to keep, from `0.5`, `"0.5"` or `"50%"`.

    Raises:
        InputError: it is no number, or not above 0 and at most 1.
    """
    text = str(budget).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise InputError(f"--kv-budget {text} is no share. Give one such as 50% or 0.5.") from None
    if not 0 < share <= 1:
        hint = f" Did you mean {text}%?" if 1 < share <= 100 and "%" not in text else ""
        raise InputError(f"--kv-budget {text} must be above 0% and at most 100%.{hint}")
    return share


def parse_bits(bits: str | int | None) -> str:
    """The bits of a cached number: "auto", "16", "8" or "4".

    Raises:
        InputError: it is none of them.
    """
    text = "16" if bits is None else str(bits).strip()
    if text not in KV_BITS:
        raise InputError(f"--kv-bits {text} is unknown. Use {', '.join(KV_BITS)}.")
    return text


def check_exact_tokens(count: int | None, bits: str, length: int | None = None) -> None:
    """Raises unless so many first tokens can be kept whole.

    Args:
        count: None where nothing was asked.
        bits: of a cached number, see `parse_bits`.
        length: tokens of a calibration sequence, of which some must be left to code.
    """
    if count is None:
        return
    if bits == "16":
        raise InputError(
            f"--exact-tokens {count} keeps tokens out of a code, and nothing is coded here. Give "
            "--kv-bits auto, 8 or 4, or leave it out."
        )
    if count < 0:
        raise InputError(f"--exact-tokens {count} must be 0 or more.")
    if length is not None and count >= length:
        raise InputError(
            f"--exact-tokens {count} leaves nothing to code of calibration sequences of {length} "
            f"tokens. Give fewer than {length}."
        )


def split_width(width: int, share: float, most_rotated: int, most_rank: int) -> LayerDims:
    """A width split so that about `share` of it is rotated dims, an even number of them.

    Args:
        most_rotated: the rotated dims there are.
        most_rank: the rank from which on a latent is exact; what is beyond it is rotated.
    """
    rotated = max(2 * round(share * width / 2), width - most_rank)
    rotated = min(rotated + rotated % 2, most_rotated, 2 * ((width - 1) // 2))
    return LayerDims(min(width - rotated, most_rank), rotated)


def spend(curves: Sequence[Mapping[int, float]], total: int, least: int, most: int) -> list[int]:
    """The width of every layer, together at most `total`, that minimises the summed error.

    Between the measured widths the error is taken to fall exponentially. For a price per number
    every layer takes the width where error + price * width is least; the price is the one at which
    the budget is used up (Everett 1963).

    Args:
        curves: for each layer, width -> measured error.
        least, most: the smallest and the largest width of a layer.
    """
    grid = sorted({*range(least, most, WIDTH_STEP), most})
    errors = [[_interpolate(curve, width) for width in grid] for curve in curves]

    def widths(price: float) -> list[int]:
        best = (min(range(len(grid)), key=lambda i: row[i] + price * grid[i]) for row in errors)
        return [grid[i] for i in best]

    low, high = 0.0, max(max(row) for row in errors) + 1e-30
    if sum(widths(low)) <= total:
        return widths(low)
    for _ in range(80):
        middle = math.sqrt(low * high) if low else high * 1e-12
        if sum(widths(middle)) <= total:
            high = middle
        else:
            low = middle
        if low and high / low < 1 + 1e-9:
            break
    chosen = widths(high)
    # What rounding to the grid has left goes where it helps most.
    while True:
        left = total - sum(chosen)
        gains = []
        for layer, width in enumerate(chosen):
            at = grid.index(width)
            if at + 1 < len(grid) and grid[at + 1] - width <= left:
                gain = (errors[layer][at] - errors[layer][at + 1]) / (grid[at + 1] - width)
                gains.append((gain, -layer))
        if not gains:
            return chosen
        layer = -max(gains)[1]
        chosen[layer] = grid[grid.index(chosen[layer]) + 1]


def _interpolate(curve: Mapping[int, float], width: int) -> float:
    """log error, piecewise linear in the width, with the outer slopes carried on."""
    points = sorted((w, math.log(max(e, 1e-20))) for w, e in curve.items())
    if len(points) == 1:
        return math.exp(points[0][1])
    upper = next((i for i in range(1, len(points) - 1) if points[i][0] >= width), len(points) - 1)
    (w0, e0), (w1, e1) = points[upper - 1], points[upper]
    slope = min(0.0, (e1 - e0) / (w1 - w0))
    return math.exp(e0 + slope * (width - w0))
