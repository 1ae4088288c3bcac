"""Configuration fields of grouped-query attention, for families whose own config has none."""

from typing import Any, ClassVar

from .converted_config import FORMAT, ConvertedConfigMixin


class GQAConfigMixin(ConvertedConfigMixin):
    """Fields that turn a family's config into one with fewer KV heads than query heads.

    Args:
        num_key_value_heads: KV heads; unlike in other forms, those of the converted model.
        conversion: The recipe the checkpoint was made with.
    """

    form_name: ClassVar[str] = "GQA"
    attention_tp_plan: ClassVar[dict[str, str]] = {
        "q_proj": "colwise",
        "k_proj": "colwise",
        "v_proj": "colwise",
        "o_proj": "rowwise",
    }
    formats: ClassVar[tuple[int | None, ...]] = (None, FORMAT)  # in which it is stored alike
    tiny_layouts: ClassVar[tuple[dict[str, Any], ...]] = ({"num_key_value_heads": 2},)

    # Heads are rotated as the family rotates them, with no frequencies of their own.
    qk_rope_head_dim: int = 0
    k_bias: bool = False
    v_bias: bool = False
