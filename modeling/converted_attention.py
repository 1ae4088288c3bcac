"""What the attention of every converted form shares.

B batch, T query tokens, S tokens in the cache, H query heads, d_r width of the rotated dimensions.
"""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from .cached_decoding import take_cache

# Position embeddings where layers are given none.
NO_ROPE: Any = (None, None, None)


class ConvertedAttention(nn.Module):
    """Queries and keys whose last d_r dimensions turn with chosen frequencies of the source."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.qk_rope_head_dim = config.layer_width("qk_rope_head_dim", layer_idx)
        self.scaling = getattr(config, "query_pre_attn_scalar", config.head_dim) ** -0.5
        kinds = getattr(config, "layer_types", None)
        slides = kinds is None or kinds[layer_idx] == "sliding_attention"
        # Masks have it too; some attention functions take it instead of a mask.
        self.sliding_window = getattr(config, "sliding_window", None) if slides else None
        # Scores are capped by it, which not every attention function can.
        self.softcap = config.softcap
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        # Not saved: ConvertedModelMixin._init_weights fills it after a load in meta mode.
        self.rope_index = nn.Buffer(self.make_rope_index(), persistent=False)

    def make_rope_index(self) -> torch.Tensor:
        """The frequency index of each rotated component, [d_r / 2]."""
        return torch.tensor(self.config.layer_rope_pairs(self.layer_idx), dtype=torch.long)

    def init_own(self):
        """Fill what no submodule holds."""
        init.copy_(self.rope_index, self.make_rope_index())

    def _take_cache(self, cache, kwargs):
        """The cache that the layer handed over, taken out of `kwargs`, or None.

        Raises:
            TypeError: a cache stands under a name that is not known.
            ValueError: the cache has pages of keys and values, as that of `generate_batch`.
        """
        cache = take_cache(type(self).__name__, cache, kwargs)
        if cache is not None and not hasattr(cache, "get_seq_length"):
            raise ValueError(
                f"{type(cache).__name__} holds pages of keys and values of one width, and "
                f"{type(self).__name__} caches no keys and values. Use generate in place of "
                "generate_batch."
            )
        return cache

    def turned_rows(self, x, rotation):
        """New tokens' x [B, 1, T, k] with its last d_r dimensions rotated."""
        if not self.qk_rope_head_dim:
            return x
        still, turning = x.split([x.shape[-1] - self.qk_rope_head_dim, self.qk_rope_head_dim], -1)
        return torch.cat((still, rotation.new_keys(turning, self.rope_index)), dim=-1)

    @staticmethod
    def _slots_in(cached, slots):
        """The new tokens' slots [T] in what the cache returned [B, 1, S, r].

        They were the numbers of tokens seen before, and a sliding cache has dropped its first rows.
        RoPE depends on differences of positions alone.
        """
        total = cached.shape[2]
        last = torch.arange(total - len(slots), total, device=slots.device)
        return torch.minimum(slots, last)

    def _attend(self, query, key, value, mask, scaling, **kwargs):
        """Attention [B, T, H, v], and its weights where they were made, as the config has it."""
        width = value.shape[-1]
        if self.config._attn_implementation != "eager":
            # Fused kernels want queries, keys and values of one width.
            missing = query.shape[-1] - width
            query, key = (nn.functional.pad(x, (0, max(0, -missing))) for x in (query, key))
            value = nn.functional.pad(value, (0, max(0, missing)))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if self.softcap is not None:
            if self.config._attn_implementation in ("sdpa", "rehead_triton"):
                raise ValueError(
                    f"{self.config._attn_implementation} does not cap scores, as this model does. "
                    'Give attn_implementation="eager".'
                )
            kwargs["softcap"] = self.softcap
        output, weights = attention(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return output[..., :width], weights

    def _heads_may_be_rows(self, length: int, mask: torch.Tensor | None) -> bool:
        """Whether no gradient is wanted, and one explicit mask serves all heads."""
        if self.training or torch.is_grad_enabled():
            return False
        if mask is None:
            return length == 1  # else the attention function is to apply the causal mask
        return isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] == 1

    @staticmethod
    def _scores_apart(query):
        """Whether scores against turned keys are made apart from the others, and added to them.

        For a step of one token on a CPU: a row of the cache is then neither copied nor widened. On
        a GPU the kernels that take scores to add want them in the query's dtype, which is too
        coarse.
        """
        return query.shape[2] == 1 and query.device.type == "cpu"

    def _attend_as_rows(self, query, key, value, mask, apart=None, normed=None):
        """Attention [B, H, T, v] of query [B, H, T, k] over one key and one value [B, 1, S, ...].

        The heads are rows of one product, so neither key nor value is copied for each head. The
        scores `apart` [B, H, T, S], scaled already, are added to those of query and key. `normed`
        makes of scores what they are with normalised keys.
        """
        batch, heads, length, _ = query.shape
        fused = self.config._attn_implementation != "eager" and self.softcap is None
        if not fused or normed is not None:
            scores = (query.flatten(1, 2) @ key.squeeze(1).mT) * self.scaling
            scores = scores.view(batch, heads, length, -1)
            scores = scores if apart is None else scores + apart
            scores = scores if normed is None else normed(scores)
            weights = self._softmax(scores, mask, query.dtype)
            return self._mix(weights, value), weights
        if apart is not None:
            mask = apart if mask is None else self._masked(apart, mask)
        # Tokens stand where heads would, so the mask needs no copy for each head.
        mixed = nn.functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.expand(-1, length, -1, -1),
            value.expand(-1, length, -1, -1),
            attn_mask=None if mask is None else mask.transpose(1, 2),
            scale=self.scaling,
        )
        return mixed.transpose(1, 2), None

    @staticmethod
    def _mix(weights, value):
        """Weights [B, H, T, S] times one value [B, 1, S, v], as [B, H, T, v]."""
        batch, heads, length, _ = weights.shape
        return (weights.flatten(1, 2) @ value.squeeze(1)).view(batch, heads, length, -1)

    def _softmax(self, scores, mask, dtype):
        """softmax of scores [B, H, T, S] under a boolean or additive mask, in fp32 or wider."""
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        scores = scores if mask is None else self._masked(scores, mask)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return nn.functional.softmax(scores, dim=-1, dtype=wide).to(dtype)

    @staticmethod
    def _masked(scores, mask):
        """Scores [B, H, T, S] under a boolean or additive mask."""
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores + mask
