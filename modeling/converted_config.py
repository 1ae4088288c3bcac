"""Configuration fields of a converted model, shared by every form and family."""

from collections import Counter
from dataclasses import fields
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from .rows import CodedRows, PlainRows

# The layout of a converted model's tensors and fields, in `conversion`.
FORMAT = 2

# Of a model with a few thousand parameters, whichever of these fields its family has.
TINY = dict(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=32,
    ffn_dim=32,
    word_embed_proj_dim=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    num_experts=2,
    num_local_experts=2,
    num_experts_per_tok=1,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
    initializer_range=0.3,  # a small one would leave attention flat
    init_std=0.3,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


class ConvertedConfigMixin(PreTrainedConfig):
    """Fields that turn a family's config into one of a converted form, and their checks.

    `head_dim`, `rope_parameters` and `num_key_value_heads` stay those of the source model: scores
    are scaled by `head_dim ** -0.5` (by `query_pre_attn_scalar ** -0.5` in families that have it),
    and `rope_pairs` points into the source's frequencies, those of the layer's kind where kinds
    differ. Windows (`sliding_window`, `layer_types`) stay too. A width that differs between layers
    has a list `<name>_per_layer`, and `<name>` is then the largest.
    """

    form_name: ClassVar[str] = ""
    # What the family's layers call their attention.
    attention_name: ClassVar[str] = "self_attn"
    # Whether the family's classes may rotate a part of each head alone.
    partial_rotary: ClassVar[bool] = False
    # Whether the family normalises queries and keys, and whether all heads' together.
    norms_keys: ClassVar[bool] = False
    norm_all_heads: ClassVar[bool] = False
    # Whether the family's classes cap scores by `attn_logit_softcapping`.
    caps_scores: ClassVar[bool] = False
    attention_tp_plan: ClassVar[dict[str, str]] = {}
    # The formats that the form's classes read; the first one had no number.
    formats: ClassVar[tuple[int | None, ...]] = (FORMAT,)
    # The widths with a list for layers, and the least each may be.
    least_widths: ClassVar[dict[str, int]] = {"qk_rope_head_dim": 0}
    # Fields of the tiny models by which decoding is checked, a set for each layout of the cache.
    tiny_layouts: ClassVar[tuple[dict[str, Any], ...]] = ()

    head_dim: int | None = None
    qk_rope_head_dim: int = 64
    qk_rope_head_dim_per_layer: list[int] | None = None
    rope_pairs: list[list[int]] | None = None
    qk_norm: bool = False
    q_bias: bool = False
    o_bias: bool = False
    conversion: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.model_type:  # a form alone has no family's plan to keep
            plan = cls.base_model_tp_plan or {}
            place = f"layers.*.{cls.attention_name}."
            kept = {k: v for k, v in plan.items() if not k.startswith(place)}
            own = {place + k: v for k, v in cls.attention_tp_plan.items()}
            cls.base_model_tp_plan = own | kept

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if getattr(self, "num_key_value_heads", None) is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_format()
        self._check_source()
        self._check_widths()
        self._check_rope()

    def layer_resting_pairs(self, layer_idx: int) -> list[int]:
        """The pairs of a head's key of which not every KV head's component is rotated."""
        assert self.head_dim is not None
        counts = Counter(self.layer_rope_pairs(layer_idx))
        groups = self.num_key_value_heads
        return [pair for pair in range(self.head_dim // 2) if counts[pair] < groups]

    @classmethod
    def tiny(cls) -> list[Self]:
        """Configs of models with two small layers, one for each layout that the form can have."""
        known = {field.name for field in fields(cls)} | set(cls.attribute_map or {})
        small = {name: value for name, value in TINY.items() if name in known}
        layouts = cls.tiny_layouts
        if "rope_parameters" not in known:  # then nothing is rotated, and nothing on read
            still = {"qk_rope_head_dim": 0}
            rotates = ("rope_on_read", "rope_pairs")
            layouts = tuple(
                layout | still for layout in layouts if not any(map(layout.get, rotates))
            )
        if cls.norms_keys:  # and keys that are normalised are formed whole on read
            layouts = tuple(
                layout | {"qk_norm": True}
                for layout in layouts
                if not (layout.get("rope_on_read") and layout["qk_rope_head_dim"])
            )
        return [cls(**small | layout) for layout in layouts]

    def layer_rows(self, layer_idx: int) -> PlainRows | CodedRows:
        """How one layer's rows are cached."""
        return PlainRows()

    def layer_layout(self, layer_idx: int) -> str:
        """The name of one layer's attention."""
        return self.form_name.lower()

    def query_rank(self, layer_idx: int) -> int | None:
        """The rank of one layer's queries; None where they are projected at once."""
        return None

    @property
    def softcap(self) -> float | None:
        """The cap of attention scores; None where scores are not capped."""
        return self.attn_logit_softcapping if self.caps_scores else None

    @property
    def key_scales(self) -> int:
        """Numbers that a token caches to scale its keys by, where they are normalised."""
        if not self.qk_norm:
            return 0
        return 1 if self.norm_all_heads else self.num_key_value_heads

    def layer_width(self, name: str, layer_idx: int) -> int:
        """The width `name` of one layer."""
        widths = getattr(self, f"{name}_per_layer")
        return getattr(self, name) if widths is None else widths[layer_idx]

    def layer_rope_pairs(self, layer_idx: int) -> list[int]:
        """The frequency index of each of one layer's d_r / 2 rotated components."""
        if self.rope_pairs is None:
            return list(range(self.layer_width("qk_rope_head_dim", layer_idx) // 2))
        return self.rope_pairs[layer_idx]

    def save_pretrained(self, save_directory, **kwargs):
        """Also name every class the copied code holds, so that any Auto class finds its own."""
        module = type(self).__module__.rsplit(".", 1)[-1]
        stem = f"{module}.{type(self).__name__.removesuffix('Config')}"
        self.auto_map = {
            "AutoConfig": f"{stem}Config",
            "AutoModel": f"{stem}Model",
            "AutoModelForCausalLM": f"{stem}ForCausalLM",
        }
        super().save_pretrained(save_directory, **kwargs)

    def _check_format(self):
        found = None if self.conversion is None else self.conversion.get("format")
        if self.conversion is not None and found not in self.formats:
            raise ValueError(
                f"This model was written in format {found or 1}, and this rehead reads format "
                f"{FORMAT}. Convert the original again."
            )

    def _check_source(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}."
            )
        rope = getattr(self, "rope_parameters", None) or {}
        if not self.partial_rotary and rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "rope_parameters has a partial_rotary_factor, but this family rotates whole heads."
            )

    def _check_at_least_one(self, *names: str):
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")

    def _check_widths(self):
        for name, least in self.least_widths.items():
            widths, largest = getattr(self, f"{name}_per_layer"), getattr(self, name)
            if widths is None:
                continue
            if len(widths) != self.num_hidden_layers:
                raise ValueError(
                    f"{name}_per_layer has {len(widths)} entries for "
                    f"num_hidden_layers={self.num_hidden_layers}; give one for each layer."
                )
            if min(widths) < least or max(widths) != largest:
                raise ValueError(
                    f"{name}_per_layer spans {min(widths)} to {max(widths)}; it must start at "
                    f"{least} or more and its largest entry must be {name}={largest}."
                )
        for layer_idx in range(self.num_hidden_layers):
            rotated = self.layer_width("qk_rope_head_dim", layer_idx)
            if rotated % 2 or rotated < 0:
                raise ValueError(
                    f"qk_rope_head_dim={rotated} of layer {layer_idx} must be even, 0 or more."
                )

    def _check_rope(self):
        assert self.head_dim is not None
        frequencies = self.head_dim // 2
        if self.rope_pairs is not None and len(self.rope_pairs) != self.num_hidden_layers:
            raise ValueError(
                f"rope_pairs has {len(self.rope_pairs)} lists for "
                f"num_hidden_layers={self.num_hidden_layers}; give one for each layer."
            )
        for layer_idx in range(self.num_hidden_layers):
            pairs = self.layer_rope_pairs(layer_idx)
            rotated = self.layer_width("qk_rope_head_dim", layer_idx)
            if len(pairs) != rotated // 2:
                raise ValueError(
                    f"rope_pairs[{layer_idx}] has {len(pairs)} entries, but qk_rope_head_dim="
                    f"{rotated} needs {rotated // 2}, one for each two dimensions."
                )
            if any(not 0 <= pair < frequencies for pair in pairs):
                raise ValueError(
                    f"rope_pairs[{layer_idx}] spans {min(pairs)} to {max(pairs)}; it must hold "
                    f"indices of the source's head_dim / 2 frequencies, 0 to {frequencies - 1}."
                )
