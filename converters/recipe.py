"""What a conversion was asked to do, and what it did."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


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
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    q_lora_rank: int | None = None
    uniform: bool = False
    native: bool = False


@dataclass(frozen=True)
class LayerReport:
    """One converted layer; errors are relative squared errors of the attention's output."""

    layer: int
    kv_lora_rank: int
    qk_rope_head_dim: int
    rope_pairs: tuple[int, ...] = ()
    error_before_healing: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or with `--dry-run` would do."""

    output: Path | None
    form: str
    kv_budget: float
    kv_bytes_per_token: dict[str, int]
    seconds: float
    peak_rss_bytes: int
    recipe: Recipe
    layers: list[LayerReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self) | {"output": None if self.output is None else str(self.output)}
