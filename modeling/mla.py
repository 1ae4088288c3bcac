"""Multi-head latent attention on a GQA source: one cached latent a token, read by every head.

B batch, T query tokens, S tokens in the cache, H query heads, g KV heads, r latent width, d_r width
of the shared rotated key, n = qk_nope_head_dim, v = v_head_dim.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .converted_attention import NO_ROPE, ConvertedAttention
from .read_kernel import kernel_read, kernel_serves
from .rope_slots import (
    SlotAngles,
    apart,
    key_pairs,
    rotate,
    side_by_side,
    slot_scores,
    turned_scores,
    with_turned,
)


class MLAAttention(ConvertedAttention):
    """Attention of queries [q_nope | q_rope] over keys and values read from a latent (2405.04434).

    score = (q_nope . W_uk c + q_rope . k_rope) * head_dim ** -0.5 and value = W_uv c, with c the
    latent and k_rope one rotated key for all heads. W_uk and W_uv (`kv_b_proj`) are held for the
    g KV heads of the source; query head h reads those of KV head h // (H / g). There is no norm on
    the latent, so a conversion of full rank is exact.

    With `rope_on_read` the latent alone is cached, and keys are rotated by the token's slot when
    they are read. Positions given with a cache must then be contiguous. Where d_r is above 0,
    k_rope is the latent's last d_r dims, the two parts of each pair side by side, and a bias, and
    W_uk c is position-free; where it is 0 there is no k_rope, and W_uk c is rotated whole. With
    `qk_norm` every head's query and key, or all heads' together, are normalised before they are
    turned.
    """

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_lora_rank = config.layer_width("kv_lora_rank", layer_idx)
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.v_head_dim = config.v_head_dim
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads

        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * self.qk_head_dim, bias=config.q_bias)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(
                config.q_lora_rank, heads * self.qk_head_dim, bias=config.q_bias
            )
        # Whether the latent has the rotated key in it; else it is cached beside the latent.
        self.reads_rope = config.rope_on_read and self.qk_rope_head_dim > 0
        cached = self.kv_lora_rank + (0 if config.rope_on_read else self.qk_rope_head_dim)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, cached, bias=config.kv_a_bias)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank,
            config.num_key_value_heads * (self.qk_nope_head_dim + self.v_head_dim),
            bias=config.kv_b_bias,
        )
        if self.reads_rope:  # what is constant in the key has no place in the latent
            self.k_rope_bias = nn.Parameter(torch.zeros(self.qk_rope_head_dim))
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=config.o_bias)
        if config.qk_norm:
            widths = (
                (heads * self.qk_head_dim, config.num_key_value_heads * self.qk_head_dim)
                if config.norm_all_heads
                else (self.qk_head_dim, self.qk_head_dim)
            )
            self.q_norm, self.k_norm = (
                LlamaRMSNorm(width, eps=config.rms_norm_eps) for width in widths
            )

    def init_own(self):
        super().init_own()
        if self.reads_rope:
            init.zeros_(self.k_rope_bias)
        if self.config.qk_norm:  # some families begin their own norms at zero
            init.ones_(self.q_norm.weight)
            init.ones_(self.k_norm.weight)

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
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_proj(hidden_states))
        query = query.view(batch, length, -1, self.qk_head_dim)
        if self.config.qk_norm:
            query = _normalised(self.q_norm, query)
        query = query.transpose(1, 2)  # [B, H, T, n + d_r]
        cached = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)  # [B, 1, T, r + d_r]
        if self.qk_rope_head_dim and not self.reads_rope:
            # [B, 1, T, d_r / 2]
            cos, sin = (x.unsqueeze(1) for x in self._select(position_embeddings[:2]))
            query, cached = self._rotate_tail(query, cos, sin), self._rotate_tail(cached, cos, sin)

        slots = None
        if cache is not None:
            if self.config.rope_on_read:
                seen = cache.get_seq_length(self.layer_idx)
                slots = torch.arange(length, device=hidden_states.device) + seen
            # The latent serves keys and values alike, so the cache's values stay empty.
            cached, _ = cache.update(cached, cached[..., :0], self.layer_idx, kwargs=kwargs)
            if slots is not None:
                slots = self._slots_in(cached, slots)
        if cache is not None and self._can_absorb(length, cached, attention_mask):
            output, weights = self._absorbed(
                query, cached, attention_mask, slots, position_embeddings[2]
            )
        else:
            output, weights = self._expanded(
                query, cached, attention_mask, slots, position_embeddings, **kwargs
            )
        return self.o_proj(output.reshape(batch, length, -1)), weights

    def _expanded(self, query, cached, mask, slots, position_embeddings, **kwargs):
        """Attention [B, T, H, v] over keys and values formed for every cached token.

        `kv_b_proj` is called, not read, so adapters, quantised weights and gradients all count.
        """
        batch, _, total, _ = cached.shape
        r = self.kv_lora_rank
        latent, rope_key = cached.split([r, cached.shape[-1] - r], dim=-1)
        pair = self.kv_b_proj(latent.squeeze(1))
        pair = pair.view(batch, total, -1, self.qk_nope_head_dim + self.v_head_dim)
        key, value = pair.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        if self.config.qk_norm:
            key = _normalised(self.k_norm, key)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        scaling = self.scaling
        if self.config.rope_on_read:
            cos, sin, angles = position_embeddings
            if slots is None:
                at_query = at_key = tuple(x[:, None, :, : x.shape[-1] // 2] for x in (cos, sin))
            else:
                at_query, at_key = angles.at(slots), angles.table(total, key.device)
            if self.reads_rope:
                read_key = apart(key_pairs(self.k_rope_bias)(latent))
                rope_key = rotate(read_key, *self._select(at_key))
                if slots is not None:
                    at_query = tuple(x * angles.score_scaling for x in at_query)
                query = self._rotate_tail(query, *self._select(at_query))
            else:
                query, key = rotate(query, *at_query), rotate(key, *at_key)
                if slots is not None:
                    scaling = scaling * angles.score_scaling
        if self.qk_rope_head_dim:
            key = torch.cat((key, rope_key.expand(-1, key.shape[1], -1, -1)), dim=-1)
        return self._attend(query, key, value, mask, scaling, **kwargs)

    def _can_absorb(self, length: int, cached: torch.Tensor, mask: torch.Tensor | None) -> bool:
        """Whether W_uk and W_uv may, and should, be folded into the query and the output."""
        layer, on_read = self.kv_b_proj, self.config.rope_on_read
        if not self._heads_may_be_rows(length, mask):
            return False
        # An adapter, a quantised or sharded or offloaded weight, autocast or a hook: what
        # kv_b_proj(x) gives is then not a product with its weight.
        weight = layer.weight if type(layer) is nn.Linear else None
        if type(weight) is not nn.Parameter or layer._forward_hooks or layer._forward_pre_hooks:
            return False
        if (weight.dtype, weight.device) != (cached.dtype, cached.device):
            return False
        # A compiler fuses the rotation into the product that forms the keys; leave it whole.
        whole = on_read and not self.reads_rope
        if whole and torch.compiler.is_compiling():
            return False
        # Multiply-adds of both ways. Absorbed, a score costs r + d_r and a value r for each head,
        # and the folds r (n + v) for each query; expanded, forming keys and values costs r (n + v)
        # for each cached token and KV head, but a score only n + d_r and a value v. Rotated whole,
        # keys are formed either way, and the absorbed scores read the keys of all g KV heads.
        r, rotated, n, v = (
            self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim, self.v_head_dim
        )  # fmt: skip
        total, groups = cached.shape[2], layer.out_features // (n + v)
        queries = length * groups * self.num_key_value_groups
        expanded = total * groups * r * (n + v) + queries * total * (n + rotated + v)
        if whole:
            absorbed = total * groups * r * n + queries * (total * (groups * n + r) + r * v)
        else:
            absorbed = queries * (r * (n + v) + total * (2 * r + rotated))
        return absorbed < expanded

    def _absorbed(self, query, cached, mask, slots, angles):
        """Attention [B, T, H, v] with every head's query against the cache itself.

        (W_uk c) . q = c . (W_uk' q), and sum_s a_s W_uv c_s = W_uv sum_s a_s c_s: heads share one
        key and one value, the cached row, and nothing as large as the cache is formed or copied.
        """
        batch, heads, length, _ = query.shape
        r, n = self.kv_lora_rank, self.qk_nope_head_dim
        per_head = n + self.v_head_dim
        weight = self.kv_b_proj.weight.view(-1, per_head, r)  # [g, n + v, r]
        bias: torch.Tensor | None = self.kv_b_proj.bias
        bias = None if bias is None else bias.view(-1, per_head)
        groups = weight.shape[0]
        if self.config.rope_on_read and not self.reads_rope:
            key_bias = None if bias is None else bias[:, :n]
            norm = self.k_norm if self.config.qk_norm else None
            scores = slot_scores(
                query, cached.squeeze(1), weight[:, :n], key_bias, slots, angles, norm
            )
            scores = scores.view(batch, heads, length, -1) * (self.scaling * angles.score_scaling)
            weights = self._softmax(scores, mask, query.dtype)
            mixed = self._mix(weights, cached)
        else:
            if self.reads_rope:
                query = self._turned_at(query, slots, angles)
            # The keys' bias adds the same to all scores of a query, which softmax cannot see.
            free = query[..., :n].unflatten(1, (groups, -1))
            free = torch.einsum("bgmtn,gnr->bgmtr", free, weight[:, :n]).flatten(1, 2)
            tail = query[..., n:]
            kernel = self.softcap is None and kernel_serves(self.config._attn_implementation, query)
            if self.reads_rope and kernel:
                mixed, weights = (
                    kernel_read(
                        free,
                        tail,
                        cached,
                        self.k_rope_bias,
                        mask,
                        self.rope_index,
                        angles,
                        self.scaling,
                    ),
                    None,
                )
            else:
                turned = None
                if self.reads_rope:
                    tail, pairs = side_by_side(tail), key_pairs(self.k_rope_bias)
                    turning = pairs, self.rope_index, angles
                    if self._scores_apart(query):
                        turned = turned_scores(tail, cached, *turning, self.scaling)
                        tail = tail[..., :0]
                    else:
                        cached = with_turned(cached, r, *turning)
                # The whole row is the value too: equal widths take the fused kernel, and the excess
                # is cut off.
                query = torch.cat((free, tail), dim=-1)
                mixed, weights = self._attend_as_rows(query, cached, cached, mask, turned)
            mixed = mixed[..., :r]
        output = torch.einsum("bgmtr,gvr->btgmv", mixed.unflatten(1, (groups, -1)), weight[:, n:])
        if bias is not None:
            output = output + bias[:, None, n:]
        return output.flatten(2, 3), weights


def _normalised(norm: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """x [B, T, h, d], of each head or of all together, as wide as the norm is."""
    width = norm.weight.numel()
    return norm(x.flatten(2).unflatten(-1, (-1, width))).reshape(x.shape)
