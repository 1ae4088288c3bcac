"""Multi-head latent attention whose keys are formed, and turned whole, when they are read.

Letters as in `latent_attention`, and r the latent's width.
"""

import torch

from .key_norm import add_norms, normalised
from .latent_attention import LatentAttention
from .mla import add_latent, folded, formed
from .rope_slots import slot_scores
from .shared_key import read_values


class WholeKeyAttention(LatentAttention):
    """Keys and values formed from one latent, and keys turned by the token's slot.

    With `qk_norm` every head's query and key, or all heads' together, are normalised before they
    are turned. Positions given with a cache must be contiguous.
    """

    on_read = True

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.kv_lora_rank = config.layer_width("kv_lora_rank", layer_idx)
        self.add_queries(config.head_dim, config.query_rank(layer_idx))
        self.add_latent()
        self.add_output(self.v_head_dim)
        add_norms(self)

    def add_latent(self):
        """The projection to the latent, and the one from it."""
        add_latent(self, self.kv_lora_rank)

    def readers(self):
        yield self.kv_b_proj

    def cached(self, hidden_states, rotation):
        row = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)
        return row, row[..., :0]

    def expanded(self, query, keys, values, rotation):
        key, value = formed(self, keys)
        if self.config.qk_norm:
            key = normalised(self.k_norm, key)
        key, value = key.transpose(1, 2), value.transpose(1, 2)
        return rotation.query(query), rotation.keys(key), value

    def absorbs(self, length: int, total: int) -> bool:
        # A compiler fuses the rotation into the product that forms the keys; leave it whole.
        if torch.compiler.is_compiling():
            return False
        # Multiply-adds of both ways. Keys are formed either way, and the absorbed scores read the
        # keys of all g KV heads.
        groups, rank = self.config.num_key_value_heads, self.kv_lora_rank
        queries, width = length * self.config.num_attention_heads, self.head_dim
        formed_too = total * groups * rank * self.v_head_dim
        expanded = formed_too + queries * total * (width + self.v_head_dim)
        return queries * (total * (groups * width + rank) + rank * self.v_head_dim) < expanded

    def absorbed(self, query, keys, values, mask, rotation):
        w_uk, w_uv, key_bias, bias = folded(self)
        norm = self.k_norm if self.config.qk_norm else None
        angles = rotation.angles
        scores = slot_scores(query, keys.squeeze(1), w_uk, key_bias, rotation.slots, angles, norm)
        scores = scores.unflatten(1, (query.shape[1], -1)) * (self.scaling * angles.score_scaling)
        weights = self._softmax(scores, mask, query.dtype)
        return read_values(self._mix(weights, keys), w_uv, bias), weights


class InputAttention(WholeKeyAttention):
    """The latent is the layer's own input, of the same width: the source's attention, exactly.

    There is no projection to a latent, so a layer has the source's weights and no more.
    """

    def add_latent(self):
        add_latent(self, self.kv_lora_rank)
        del self.kv_a_proj_with_mqa

    def cached(self, hidden_states, rotation):
        row = hidden_states.unsqueeze(1)
        return row, row[..., :0]
