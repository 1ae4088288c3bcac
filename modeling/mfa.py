"""Multi-matrix factorization attention: many query heads on one wide key and one wide value.

B batch, T query tokens, S tokens in the cache, H query heads, C width of the key, d_r width of its
rotated tail.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .converted_attention import NO_ROPE, ConvertedAttention
from .rope_slots import SlotAngles, side_by_side, tail_pairs, turned_scores, with_turned


class MFAAttention(ConvertedAttention):
    """Attention of H queries of width C over one key and one value of width C (2412.19255).

    Queries and the key are [position-free | real parts | imaginary parts], and scores are scaled by
    the source's head_dim ** -0.5. Keys are cached rotated, and values beside them.

    With `key_reuse` (MFA-KR) the value is c + (N c) * alpha of the unrotated key c, N `kr_proj` and
    alpha `kr_alpha`. c alone is cached, and rotated by the token's slot when it is read. Positions
    given with a cache must then be contiguous.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.mfa_head_dim = config.layer_width("mfa_head_dim", layer_idx)
        self.num_key_value_groups = config.num_attention_heads

        hidden, heads, width = config.hidden_size, config.num_attention_heads, self.mfa_head_dim
        share_q_dim = config.layer_width("share_q_dim", layer_idx)
        self.q_proj = nn.Linear(hidden, share_q_dim, bias=False)
        if config.use_inter_norm:
            self.inter_norm = LlamaRMSNorm(share_q_dim, eps=config.rms_norm_eps)
        self.wq = nn.Linear(share_q_dim, heads * width, bias=config.q_bias)
        self.k_proj = nn.Linear(hidden, width, bias=config.k_bias)
        if config.key_reuse:
            self.kr_proj = nn.Linear(width, width, bias=False)
            self.kr_alpha = nn.Parameter(torch.zeros(width))
        else:
            self.v_proj = nn.Linear(hidden, width, bias=False)
        self.o_proj = nn.Linear(heads * width, hidden, bias=config.o_bias)

    def init_own(self):
        super().init_own()
        if self.config.key_reuse:
            init.zeros_(self.kr_alpha)

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
        cache = self._take_cache(cache, kwargs)
        query = self.q_proj(hidden_states)
        if self.config.use_inter_norm:
            query = self.inter_norm(query)
        query = self.wq(query).view(batch, length, -1, self.mfa_head_dim).transpose(1, 2)
        key = self.k_proj(hidden_states).unsqueeze(1)  # [B, 1, T, C]

        if self.config.key_reuse and cache is not None:
            seen = cache.get_seq_length(self.layer_idx)
            slots = torch.arange(length, device=hidden_states.device) + seen
            # Keys and values are read from the same rows, so the cache's values stay empty.
            latent, _ = cache.update(key, key[..., :0], self.layer_idx, kwargs=kwargs)
            slots = self._slots_in(latent, slots)
            output, weights = self._read(
                query, latent, attention_mask, slots, position_embeddings[2], **kwargs
            )
            return self.o_proj(output.reshape(batch, length, -1)), weights

        value = self._value(key) if self.config.key_reuse else self.v_proj(hidden_states)[:, None]
        if self.qk_rope_head_dim:
            # [B, 1, T, d_r / 2]
            cos, sin = (x.unsqueeze(1) for x in self._select(position_embeddings[:2]))
            query, key = self._rotate_tail(query, cos, sin), self._rotate_tail(key, cos, sin)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        if cache is not None and self._can_absorb(length, key, attention_mask):
            output, weights = self._attend_as_rows(query, key, value, attention_mask)
            output = output.transpose(1, 2)
        else:
            output, weights = self._attend(
                query, key, value, attention_mask, self.scaling, **kwargs
            )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _value(self, latent):
        """The values [..., C] of MFA-KR. Linear, so the value of a mixture is the mixed value.

        `kr_proj` is called, not read, so adapters, quantised weights and gradients all count; and
        called as every linear layer of a language model is, on [B, tokens, C].
        """
        mapped = self.kr_proj(latent.flatten(1, -2)).view(latent.shape)
        return (latent + mapped * self.kr_alpha).to(latent.dtype)

    def _can_absorb(self, length: int, cached: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether the heads' queries may, and should, be rows of one product with the cache."""
        # Above that, the copies for each head are no larger than the queries, and MFA-KR maps more
        # mixtures than there are values.
        queries = length * self.config.num_attention_heads
        return self._heads_may_be_rows(length, mask) and queries < cached.shape[2]

    def _read(self, query, latent, mask, slots, angles, **kwargs):
        """Attention [B, T, H, C] of query [B, H, T, C] at `slots` [T] over latent [B, 1, S, C]."""
        absorb = self._can_absorb(query.shape[2], latent, mask)
        key, apart = latent, None
        if self.qk_rope_head_dim:
            kept = self.mfa_head_dim - self.qk_rope_head_dim
            query = self._turned_at(query, slots, angles)
            free, tail = query[..., :kept], side_by_side(query[..., kept:])
            turning = tail_pairs(self.rope_index), self.rope_index, angles
            if absorb and self._scores_apart(query):
                apart = turned_scores(tail, latent, *turning, self.scaling)
                tail = torch.zeros_like(tail)
            else:
                key = with_turned(latent, kept, *turning)
            query = torch.cat((free, tail), dim=-1)
        if absorb:
            mixed, weights = self._attend_as_rows(query, key, latent, mask, apart)
            return self._value(mixed).transpose(1, 2), weights
        return self._attend(query, key, self._value(latent), mask, self.scaling, **kwargs)
