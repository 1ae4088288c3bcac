"""A deepseek2 GGUF file run by transformers: what llama.cpp computes from it, without llama.cpp."""

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import YoutuConfig, YoutuForCausalLM

from rehead.export.deepseek2 import IN_LAYER, OTHERS

ATTENTION: dict[str, str] = {
    "q_proj.weight": "attn_q.weight",
    "kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "o_proj.weight": "attn_output.weight",
}


def emulated(path: str | Path) -> YoutuForCausalLM:
    """The file's model in float32, with the biasless norms and plain frequencies of the engine."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        field = reader.get_field(f"deepseek2.{key}")
        return None if field is None else field.contents()

    rotated, heads = value("rope.dimension_count"), value("attention.head_count")
    nope = value("attention.key_length_mla") - rotated
    eps = value("attention.layer_norm_rms_epsilon")
    stored = {
        tensor.name: torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    config = YoutuConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        kv_lora_rank=value("attention.kv_lora_rank"),
        q_lora_rank=value("attention.q_lora_rank") or None,
        qk_rope_head_dim=rotated,
        qk_nope_head_dim=nope,
        v_head_dim=value("attention.value_length_mla"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=eps,
        tie_word_embeddings="output.weight" not in stored,
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        pad_token_id=None,  # see `export.native`
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = YoutuForCausalLM(config)
    state = {name: stored.pop(own) for name, own in OTHERS.items() if own in stored}
    for index in range(config.num_hidden_layers):
        block, layer = f"blk.{index}.", f"model.layers.{index}."
        for name, own in IN_LAYER.items():
            state[layer + name] = stored.pop(block + own)
        attention = layer + "self_attn."
        keys = stored.pop(block + "attn_k_b.weight").transpose(1, 2)  # [H, N, L]
        values = stored.pop(block + "attn_v_b.weight")  # [H, V, L]
        state[attention + "kv_b_proj.weight"] = torch.cat([keys, values], dim=1).flatten(0, 1)
        for name, own in ATTENTION.items():
            state[attention + name] = stored.pop(block + own)
    if stored:
        raise ValueError(f"{path} holds {sorted(stored)[0]}, which was not read")
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for layer in model.model.layers:  # llama.cpp has one epsilon for all norms
        layer.self_attn.kv_a_layernorm.variance_epsilon = eps
    return model.eval()
