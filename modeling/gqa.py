"""Grouped-query attention for families whose own class has a KV head for every query head.

B batch, T query tokens, S tokens in the cache, H query heads, g KV heads, d head_dim.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from .cached_decoding import take_cache, update_cache
from .converted_attention import NO_ROPE, ConvertedAttention
from .rope_slots import SlotAngles, rotate


class GQAAttention(ConvertedAttention):
    """Attention of H query heads over g KV heads (2305.13245), H / g of them to one.

    A head's pairs are its two halves, whatever the family's layout. What it does not rotate has
    frequency 0; without RoPE nothing is rotated.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.num_key_value_groups = heads // groups

        hidden, width = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, heads * width, bias=config.q_bias)
        self.k_proj = nn.Linear(hidden, groups * width, bias=config.k_bias)
        self.v_proj = nn.Linear(hidden, groups * width, bias=config.v_bias)
        self.o_proj = nn.Linear(heads * width, hidden, bias=config.o_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor, SlotAngles] = NO_ROPE,
        attention_mask: torch.Tensor | None = None,
        cache=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The block's output [B, T, hidden], and the attention weights where they were made."""
        batch, length = hidden_states.shape[:2]
        cache = take_cache(type(self).__name__, cache, kwargs)
        query, key, value = (
            project(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H or g, T, d]
        cos, sin, _ = position_embeddings
        if cos is not None:
            cos, sin = (x[:, None, :, : self.head_dim // 2] for x in (cos, sin))
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if cache is not None:
            key, value = update_cache(cache, key, value, self.layer_idx, kwargs)
        # Not `_attend`: vLLM serves a class whose `forward` itself names the attention's interface.
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(output.reshape(batch, length, -1)), weights
