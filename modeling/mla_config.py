"""Configuration fields of multi-head latent attention, shared by every family."""

from typing import Any

from transformers import PreTrainedConfig

_TENSOR_PARALLEL_ATTENTION = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.q_b_proj": "colwise",
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
}


class MLAConfigMixin(PreTrainedConfig):
    """Fields that turn a family's config into one of its MLA form.

    `head_dim`, `rope_parameters` and `num_key_value_heads` stay those of the source model: scores
    are scaled by `head_dim ** -0.5`, and `rope_pairs` points into the source's frequencies.

    Args:
        kv_lora_rank: Width r of the cached latent; the largest over layers where they differ.
        qk_rope_head_dim: Width d_r of the one rotated key all heads share, twice its number of
            components; the largest over layers where they differ.
        qk_nope_head_dim: Width of a head's key read from the latent.
        v_head_dim: Width of a head's value.
        q_lora_rank: Width of the low-rank query; None for a full query projection.
        kv_lora_rank_per_layer: r of each layer; None where all have `kv_lora_rank`.
        qk_rope_head_dim_per_layer: d_r of each layer, 0 allowed; None where all have
            `qk_rope_head_dim`.
        rope_pairs: For each layer, the index of every rotated component's frequency among the
            source's `head_dim / 2`, repeats allowed. None: component j turns with frequency j.
        rope_on_read: Cache the latent alone and rotate the keys when they are read, by their slot.
        conversion: The recipe the checkpoint was made with.
    """

    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    q_lora_rank: int | None = None
    kv_lora_rank_per_layer: list[int] | None = None
    qk_rope_head_dim_per_layer: list[int] | None = None
    rope_pairs: list[list[int]] | None = None
    rope_on_read: bool = False
    q_bias: bool = False
    kv_a_bias: bool = False
    kv_b_bias: bool = False
    o_bias: bool = False
    conversion: dict[str, Any] | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        mlp = {k: v for k, v in (cls.base_model_tp_plan or {}).items() if ".self_attn." not in k}
        cls.base_model_tp_plan = _TENSOR_PARALLEL_ATTENTION | mlp

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if getattr(self, "head_dim", None) is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_heads()
        self._check_widths()
        if self.rope_on_read:
            self._check_rope_on_read()
        else:
            self._check_rope_pairs()

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head; having it tells transformers that keys and values differ."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def layer_dims(self, layer_idx: int) -> tuple[int, int]:
        """(r, d_r) of one layer."""
        ranks, rotated = self.kv_lora_rank_per_layer, self.qk_rope_head_dim_per_layer
        return (
            self.kv_lora_rank if ranks is None else ranks[layer_idx],
            self.qk_rope_head_dim if rotated is None else rotated[layer_idx],
        )

    def layer_rope_pairs(self, layer_idx: int) -> list[int]:
        """The frequency index of each of one layer's d_r / 2 rotated components."""
        if self.rope_pairs is None:
            return list(range(self.layer_dims(layer_idx)[1] // 2))
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

    def _check_heads(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}."
            )
        if getattr(self, "sliding_window", None) is not None:
            raise ValueError(
                f"sliding_window={self.sliding_window} is in use, but MLA layers attend to every "
                "token. Use a source without a sliding window."
            )
        if "sliding_attention" in (getattr(self, "layer_types", None) or []):
            raise ValueError(
                "layer_types holds sliding_attention layers, but MLA layers attend to every token. "
                "Use a source without sliding windows."
            )
        if (self.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "rope_parameters has a partial_rotary_factor; only sources that rotate the whole "
                "head are supported."
            )

    def _check_widths(self):
        for name in ("kv_lora_rank", "v_head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be None or at least 1.")
        if self.qk_nope_head_dim < 0:
            raise ValueError(f"qk_nope_head_dim={self.qk_nope_head_dim} must not be negative.")
        for name, least in (("kv_lora_rank", 1), ("qk_rope_head_dim", 0)):
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
            rotated = self.layer_dims(layer_idx)[1]
            if rotated % 2 or rotated < 0:
                raise ValueError(
                    f"qk_rope_head_dim={rotated} of layer {layer_idx} must be even, 0 or more."
                )
            if rotated + self.qk_nope_head_dim == 0:
                raise ValueError(
                    f"Layer {layer_idx} has neither rotated nor position-free key dimensions; "
                    "raise qk_nope_head_dim or qk_rope_head_dim."
                )

    def _check_rope_on_read(self):
        if self.qk_rope_head_dim or any(self.rope_pairs or []):
            raise ValueError(
                "rope_on_read=True rotates whole keys when they are read; "
                f"set qk_rope_head_dim={self.qk_rope_head_dim} to 0 and rope_pairs to None."
            )
        if self.qk_nope_head_dim != self.head_dim:
            raise ValueError(
                f"rope_on_read=True needs qk_nope_head_dim={self.qk_nope_head_dim} to be the "
                f"source's head_dim={self.head_dim}."
            )

    def _check_rope_pairs(self):
        frequencies = self.head_dim // 2
        if self.rope_pairs is not None and len(self.rope_pairs) != self.num_hidden_layers:
            raise ValueError(
                f"rope_pairs has {len(self.rope_pairs)} lists for "
                f"num_hidden_layers={self.num_hidden_layers}; give one for each layer."
            )
        for layer_idx in range(self.num_hidden_layers):
            pairs, rotated = self.layer_rope_pairs(layer_idx), self.layer_dims(layer_idx)[1]
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
