"""Configuration fields of multi-matrix factorization attention, shared by every family."""

from typing import Any, ClassVar

from .converted_config import ConvertedConfigMixin


class MFAConfigMixin(ConvertedConfigMixin):
    """Fields that turn a family's config into one of its MFA or MFA-KR form.

    `head_dim`, `rope_parameters` and `num_key_value_heads` stay those of the source model: scores
    are scaled by `head_dim ** -0.5`, and `rope_pairs` points into the source's frequencies. Queries
    and values have the source's width; in layers whose C is below it, they have width C, unless
    they are normalised.

    Args:
        mfa_head_dim: Width C of the one key and the one value that are cached; the largest over
            layers where they differ.
        share_q_dim: Rank of the queries, which all heads share; the largest over layers where they
            differ. None for a full query projection.
        qk_rope_head_dim: Width d_r of the key's rotated tail, twice its number of components; the
            largest over layers where they differ.
        mfa_head_dim_per_layer: C of each layer; None where all have `mfa_head_dim`.
        share_q_dim_per_layer: The rank of each layer's queries, 0 for a full projection; None where
            all have `share_q_dim`.
        qk_rope_head_dim_per_layer: d_r of each layer, 0 allowed; None where all have
            `qk_rope_head_dim`.
        rope_pairs: For each layer, the index of every rotated component's frequency among the
            source's `head_dim / 2`, repeats allowed. None: component j turns with frequency j.
        key_reuse: MFA-KR: the value is a map of the unrotated key, which alone is cached, and
            rotated when it is read, by its slot.
        qk_norm: An RMSNorm of every head's query and key before their rotation, of families that
            have one. What keys are multiplied with is cached beside them.
        conversion: The recipe the checkpoint was made with.
    """

    form_name: ClassVar[str] = "MFA"
    # All heads read one key and one value, whose gradients no head-wise split would complete: the
    # two wide matrices are split, the heads are not.
    attention_tp_plan: ClassVar[dict[str, str]] = {
        "q_proj": "colwise_rep",
        "q_b_proj": "colwise_rep",
        "o_proj": "colwise_rep",
    }
    least_widths: ClassVar[dict[str, int]] = {
        "mfa_head_dim": 1,
        "share_q_dim": 0,
        "qk_rope_head_dim": 0,
    }
    tiny_layouts: ClassVar[tuple[dict[str, Any], ...]] = tuple(
        dict(mfa_head_dim=width, qk_rope_head_dim=4, key_reuse=reuse)
        for reuse in (False, True)
        for width in (12, 6)
    )

    mfa_head_dim: int = 256
    share_q_dim: int | None = None
    mfa_head_dim_per_layer: list[int] | None = None
    share_q_dim_per_layer: list[int] | None = None
    key_reuse: bool = False
    k_bias: bool = False

    @property
    def qk_head_dim(self) -> int:
        """Width of a query head; having it tells transformers that the cache has its own width."""
        return self.mfa_head_dim

    def layer_layout(self, layer_idx: int) -> str:
        assert self.head_dim is not None
        name = "mfa-kr" if self.key_reuse else "mfa"
        # Rows of width C are linear in the input, and normalised queries are not.
        narrow = self.layer_width("mfa_head_dim", layer_idx) < self.head_dim and not self.qk_norm
        return f"{name} rows" if narrow else name

    def layer_resting_pairs(self, layer_idx: int) -> list[int]:
        width, rotated = self.layer_dims(layer_idx)
        if width == rotated and not self.qk_norm:
            return []
        return super().layer_resting_pairs(layer_idx)

    def query_rank(self, layer_idx: int) -> int | None:
        return self.layer_width("share_q_dim", layer_idx) or None

    def layer_dims(self, layer_idx: int) -> tuple[int, int]:
        """(C, d_r) of one layer."""
        return (
            self.layer_width("mfa_head_dim", layer_idx),
            self.layer_width("qk_rope_head_dim", layer_idx),
        )

    def _check_widths(self):
        self._check_at_least_one("mfa_head_dim")
        if self.share_q_dim is not None and self.share_q_dim < 1:
            raise ValueError(f"share_q_dim={self.share_q_dim} must be None or at least 1.")
        super()._check_widths()
        for layer_idx in range(self.num_hidden_layers):
            width, rotated = self.layer_dims(layer_idx)
            if rotated > width:
                raise ValueError(
                    f"qk_rope_head_dim={rotated} of layer {layer_idx} must not exceed its "
                    f"mfa_head_dim={width}."
                )
