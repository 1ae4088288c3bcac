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
    """

    layer: int
    dims: dict[str, int]
    rope_pairs: tuple[int, ...] = ()
    closed_form_error: float | None = None
    error: float | None = None
    parameters: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Flat, the dims among the rest."""
        fields = asdict(self)
        return {"layer": fields.pop("layer")} | fields.pop("dims") | fields


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
    attention_parameters: dict[str, int] = field(default_factory=dict)
    layers: list[LayerReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        fields = asdict(self) | {"layers": [layer.to_dict() for layer in self.layers]}
        return fields | {"output": None if self.output is None else str(self.output)}
