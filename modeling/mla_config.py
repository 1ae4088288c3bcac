"""Configuration fields of multi-head latent attention, shared by every family."""

from typing import Any, ClassVar

from .coding import Code
from .converted_config import ConvertedConfigMixin
from .rows import CodedRows, PlainRows

# Of 12 channels, for a layout of a tiny model.
TINY_CODE = [1, 1, 1, 0, 1, 0, 4]


class MLAConfigMixin(ConvertedConfigMixin):
    """Fields that turn a family's config into one of its MLA form.

    `head_dim`, `rope_parameters` and `num_key_value_heads` stay those of the source model: scores
    are scaled by `head_dim ** -0.5`, and `rope_pairs` points into the source's frequencies.

    Args:
        kv_lora_rank: Width r of the cached latent; the largest over layers where they differ.
        qk_rope_head_dim: Width d_r of the one rotated key all heads share, twice its number of
            components; the largest over layers where they differ.
        qk_nope_head_dim, v_head_dim: Widths of a head's key and value: those of the source,
            `head_dim`. Of a key only the pairs in `layer_resting_pairs` are read from the latent.
        q_lora_rank: Rank of the queries; None for a full query projection.
        kv_lora_rank_per_layer: r of each layer; None where all have `kv_lora_rank`.
        qk_rope_head_dim_per_layer: d_r of each layer, 0 allowed; None where all have
            `qk_rope_head_dim`.
        rope_pairs: For each layer, the index of every rotated component's frequency among the
            source's `head_dim / 2`, repeats allowed. None: component j turns with frequency j.
        rope_on_read: Cache the latent alone and rotate the keys when they are read, by their slot:
            the one rotated key of a layer with d_r above 0, which is then the latent's last d_r
            dims, and the keys of all heads, whole, of a layer with d_r = 0. Where such a layer's r
            is `hidden_size`, its input is cached as it is.
        qk_norm: An RMSNorm of every head's query and key before their rotation, of families that
            have one. The family says whether it is of each head by itself. What keys are multiplied
            with is cached beside the latent; with `rope_on_read` keys are formed when they are
            read, and rotated whole.
        cache_codes: For each layer the code of keys, and that of values: how many bytes of a row
            hold channels of 8, 6+2, 5+3, 4+4, 3+3+2 and 2+2+2+2 bits, and how many channels of no
            bits are kept of the sequence's first tokens alone. None where all have 16 bits.
            Decoupled, the keys are then all of them rotated components, turned by their slot, and
            the latent is the values' alone.
        exact_tokens: How many first tokens of a sequence keep 16 bits in a coded cache.
        conversion: The recipe the checkpoint was made with.
    """

    form_name: ClassVar[str] = "MLA"
    attention_tp_plan: ClassVar[dict[str, str]] = {
        "q_phase": "colwise",
        "k_synthesis": "colwise",
        "q_proj": "colwise",
        "q_b_proj": "colwise",
        "kv_a_proj_with_mqa": "mla_kv_a_proj",
        "kv_b_proj": "colwise",
        "o_proj": "rowwise",
    }
    least_widths: ClassVar[dict[str, int]] = {"kv_lora_rank": 1, "qk_rope_head_dim": 0}
    tiny_layouts: ClassVar[tuple[dict[str, Any], ...]] = tuple(
        dict(kv_lora_rank=12) | layout
        for layout in (
            dict(qk_rope_head_dim=4),
            dict(qk_rope_head_dim=4, rope_on_read=True),
            dict(qk_rope_head_dim=0, rope_on_read=True),
            dict(qk_rope_head_dim=0, rope_on_read=True, kv_lora_rank=32),
            dict(qk_rope_head_dim=0, cache_codes=[[TINY_CODE, [0] * 7]] * 2),
            dict(qk_rope_head_dim=0, rope_on_read=True, cache_codes=[[TINY_CODE, [0] * 7]] * 2),
            dict(
                qk_rope_head_dim=12,
                rope_pairs=[[0, 1, 1, 2, 3, 3]] * 2,
                cache_codes=[[[2, 0, 0, 2, 0, 0, 6], TINY_CODE]] * 2,
            ),
        )
    )

    kv_lora_rank: int = 512
    qk_nope_head_dim: int | None = None
    v_head_dim: int | None = None
    q_lora_rank: int | None = None
    kv_lora_rank_per_layer: list[int] | None = None
    rope_on_read: bool = False
    kv_a_bias: bool = False
    kv_b_bias: bool = False
    cache_codes: list[list[list[int]]] | None = None
    exact_tokens: int = 4

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.qk_nope_head_dim = self.v_head_dim = self.head_dim
        coded = self.cache_codes is not None
        if self.qk_norm or coded or (self.rope_on_read and self.qk_rope_head_dim):
            # What keys are scaled by, or the rotated key within the latent, are every head's: the
            # attention is not split.
            self.base_model_tp_plan: dict[str, str] | None = {
                name: split
                for name, split in (type(self).base_model_tp_plan or {}).items()
                if f".{self.attention_name}." not in name
            }

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head; having it tells transformers that keys and values differ."""
        assert self.head_dim is not None
        return self.head_dim + self.qk_rope_head_dim

    def layer_rows(self, layer_idx: int) -> PlainRows | CodedRows:
        if self.cache_codes is None:
            return PlainRows()
        halves = self.layer_layout(layer_idx) == "turned keys"
        return CodedRows(*self._layer_codes(layer_idx), self.exact_tokens, halves)

    def _layer_codes(self, layer_idx: int) -> tuple[Code, Code]:
        """The code of one layer's keys and the code of its values."""
        assert self.cache_codes is not None
        keys, values = self.cache_codes[layer_idx]
        return Code(tuple(keys)), Code(tuple(values))

    def layer_layout(self, layer_idx: int) -> str:
        if not self.rope_on_read:
            coded = self.cache_codes is not None and self.layer_dims(layer_idx)[1]
            return "turned keys" if coded else "mla"
        rank, rotated = self.layer_dims(layer_idx)
        if rotated:
            return "key in latent"
        plain = rank == self.hidden_size and self.cache_codes is None
        return "inputs" if plain else "whole keys"

    def query_rank(self, layer_idx: int) -> int | None:
        return self.q_lora_rank

    def layer_dims(self, layer_idx: int) -> tuple[int, int]:
        """(r, d_r) of one layer."""
        return (
            self.layer_width("kv_lora_rank", layer_idx),
            self.layer_width("qk_rope_head_dim", layer_idx),
        )

    def _check_widths(self):
        self._check_at_least_one("kv_lora_rank")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"q_lora_rank={self.q_lora_rank} must be None or at least 1.")
        for name in ("qk_nope_head_dim", "v_head_dim"):
            width = getattr(self, name)
            if width not in (None, self.head_dim):
                raise ValueError(
                    f"{name}={width} must be the source's head_dim={self.head_dim}, or left out."
                )
        super()._check_widths()
        self._check_code()
        for layer_idx in range(self.num_hidden_layers):
            rank, rotated = self.layer_dims(layer_idx)
            if self.rope_on_read and rotated > rank:
                raise ValueError(
                    f"qk_rope_head_dim={rotated} of layer {layer_idx} must not exceed its "
                    f"kv_lora_rank={rank}: with rope_on_read=True it is a part of it."
                )

    def _check_code(self):
        """Raises unless a coded row has the channels that its layer caches."""
        if self.cache_codes is None:
            return
        if len(self.cache_codes) != self.num_hidden_layers or self.exact_tokens < 0:
            raise ValueError(
                f"cache_codes has {len(self.cache_codes)} entries for num_hidden_layers="
                f"{self.num_hidden_layers}, and exact_tokens={self.exact_tokens}; give one for "
                "each layer, and 0 or more tokens."
            )
        for layer_idx in range(self.num_hidden_layers):
            rank, rotated = self.layer_dims(layer_idx)
            layout = self.layer_layout(layer_idx)
            found = tuple(code.channels for code in self._layer_codes(layer_idx))
            meant = (rotated, rank) if layout == "turned keys" else (rank, 0)
            if found != meant:
                raise ValueError(
                    f"cache_codes[{layer_idx}] has {found} channels of keys and values, and the "
                    f"layer caches {meant}."
                )

    def _check_rope(self):
        super()._check_rope()
        if self.qk_norm and self.qk_rope_head_dim and self.rope_on_read:
            raise ValueError(
                "qk_norm=True with rope_on_read=True forms keys whole when they are read: "
                f"qk_rope_head_dim={self.qk_rope_head_dim} must be 0."
            )
