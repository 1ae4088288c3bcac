"""What a conversion was asked to do, and what it did."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..modeling.coding import BITS, Code

# A layer is out of the ordinary whose error is so many times the median layer's, and no trifle.
ODD_RATIO = 10.0
ODD_ERROR = 0.05


@dataclass(frozen=True)
class Recipe:
    """What was asked for; it is kept in the converted model's config.json."""

    source: str
    form: str
    rope: str
    kv_budget: float
    calibration: str
    samples: int
    heal: int
    seed: int
    kv_bits: str = "16"
    exact_tokens: int = 4
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    q_lora_rank: int | None = None
    num_key_value_heads: int | None = None
    pooling: str | None = None
    head_dim: int | None = None
    share_q_dim: int | None = None
    uniform: bool = False
    native: bool = False
    preset: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """One converted layer; errors are relative squared errors of the attention's output.

    Args:
        dims: its dims by the config's names.
        closed_form_error: before anything is fitted beyond the moments.
        parameters: of the source's attention and the converted one.
        pairs: how many frequencies the source has, which `rope_pairs` are indices of.
        code: counts of the keys' code and of the values' code (`modeling.coding.Code`); None where
            the cache is not coded.
        energy: the weighted squared error that leaving out each direction of the latent adds, by
            falling importance; those that were left out are the last.
    """

    layer: int
    dims: dict[str, int]
    rope_pairs: tuple[int, ...] = ()
    closed_form_error: float | None = None
    error: float | None = None
    parameters: tuple[int, int] | None = None
    pairs: int = 0
    code: tuple[tuple[int, ...], ...] | None = None
    energy: tuple[float, ...] = ()

    @property
    def codes(self) -> dict[str, tuple[int, ...]]:
        """Channel counts by `BITS` of the keys' and values' codes, or of the one code of both.

        Empty where the cache is not coded.
        """
        if self.code is None:
            return {}
        keys, values = (Code(counts).by_bits() for counts in self.code)
        if not any(values):
            return {"keys and values": keys}
        return {"keys": keys, "values": values}

    def to_dict(self) -> dict[str, Any]:
        """Flat, the dims among the rest; without the spectrum, which is long."""
        fields = {k: v for k, v in asdict(self).items() if k not in ("pairs", "energy")}
        return {"layer": fields.pop("layer")} | fields.pop("dims") | fields


def channel_words(counts: Sequence[int]) -> str:
    """Channel counts by `BITS` as words, such as "channels: 8 of 8, 12 of 4 bits"."""
    each = [
        f"{count:,} of {bits}" for count, bits in zip(counts, BITS, strict=True) if count and bits
    ]
    first = f" and {counts[-1]:,} for first tokens alone" if counts[-1] else ""
    return f"channels: {', '.join(each)} bits{first}"


def odd_layers(layers: Sequence[LayerReport]) -> list[str]:
    """A line for every layer whose error is out of the ordinary."""
    errors = {layer.layer: layer.error for layer in layers if layer.error is not None}
    usual = median([error for error in errors.values() if error < 1] or [0.0])
    lines = []
    for layer, error in errors.items():
        if not error < 1:  # not a number counts
            lines.append(
                f"layer {layer} is further from the original than no output at all would be "
                f"(error {error:.3g})"
            )
        elif error > max(ODD_ERROR, ODD_RATIO * usual):
            lines.append(
                f"layer {layer} has an error of {error:.3g}, and the median layer one of "
                f"{usual:.3g}"
            )
    return lines


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or with `--dry-run` would do.

    Args:
        parts: seconds of all layers by what was done: "read", "forward", "statistics", "compare
            dims", "factorise", "fit" (healing and regression), "write" and "verify".
        attention_parameters: of all layers, "source" and "converted".
        pays_from_tokens: the cached tokens, of all sequences together, from which on weights and
            cache take less memory than the source's: 0 for a model that is nowhere larger.
        warnings: a line for every layer whose error is out of the ordinary.
    """

    output: Path | None
    form: str
    kv_budget: float
    kv_bytes_per_token: dict[str, int]
    seconds: float
    peak_rss_bytes: int
    recipe: Recipe
    parts: dict[str, float] = field(default_factory=dict)
    attention_parameters: dict[str, int] = field(default_factory=dict)
    pays_from_tokens: int | None = None
    layers: list[LayerReport] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def channels(self) -> dict[int, int] | None:
        """Bits -> how many channels of all layers have so many, where they are coded."""
        codes = [counts for layer in self.layers for counts in layer.codes.values()]
        if not codes:
            return None
        return dict(zip(BITS, map(sum, zip(*codes, strict=True)), strict=True))

    @property
    def coded(self) -> str | None:
        """What the cached numbers are coded with, in words."""
        if self.channels is None:
            return None
        mean = f"{16 * self.kv_budget:.3g}"
        return (
            f"{mean} bit{'' if mean == '1' else 's'} for each number that the original caches "
            f"({channel_words([*self.channels.values()])})"
        )

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        fields = asdict(self) | {"layers": [layer.to_dict() for layer in self.layers]}
        return fields | {"output": None if self.output is None else str(self.output)}
