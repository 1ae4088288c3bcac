"""Tiny models with a large init, so that softmax is not flat and a wrong rotation shows."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rehead.modeling import MLA_CLASSES

SOURCES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
MLA = {family: (config, causal_lm) for family, (config, _, causal_lm) in MLA_CLASSES.items()}
BASE = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
DECOUPLED = dict(
    kv_lora_rank=12,
    qk_rope_head_dim=6,
    qk_nope_head_dim=10,
    v_head_dim=8,
    rope_pairs=[[3, 0, 0], [1, 2, 1]],
)
ON_READ = dict(
    kv_lora_rank=12, qk_rope_head_dim=0, qk_nope_head_dim=8, v_head_dim=8, rope_on_read=True
)
FORMS = {"decoupled": DECOUPLED, "on_read": ON_READ}
BIASES = dict(q_bias=True, kv_a_bias=True, kv_b_bias=True, o_bias=True)
ROPE_TYPES = {
    "default": {"rope_type": "default", "rope_theta": 100.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 3.5],
        "original_max_position_embeddings": 32,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
}


def fill_biases(model: torch.nn.Module) -> torch.nn.Module:
    """The model with random biases, which transformers would leave at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def source(family: str = "llama", seed: int = 0, **fields) -> torch.nn.Module:
    """A randomly initialised stock model of the family."""
    torch.manual_seed(seed)
    config_class, model_class = SOURCES[family]
    fields = {"rope_parameters": ROPE_TYPES["default"]} | fields
    if family == "mistral":
        fields = {"sliding_window": None} | fields
    return fill_biases(model_class(config_class(**BASE | fields))).eval()


def mla(family: str = "llama", form: str = "decoupled", seed: int = 0, **fields) -> torch.nn.Module:
    """A randomly initialised MLA model of the family and form ("decoupled" or "on_read")."""
    torch.manual_seed(seed)
    config_class, model_class = MLA[family]
    fields = {"rope_parameters": ROPE_TYPES["default"]} | FORMS[form] | fields
    return fill_biases(model_class(config_class(**BASE | fields))).eval()


def exact(model: torch.nn.Module, family: str, form: str) -> torch.nn.Module:
    """The stock model rewritten as MLA without loss, by nothing but a layout of its weights.

    On read: the latent is [all keys; all values] before rotation, and `kv_b_proj` picks a head's.
    Decoupled: every pair of every KV head keeps RoPE in the shared key, the latent is all values,
    and a query head is zero outside its own KV head's pairs.
    """
    old = model.config
    heads, groups, dim = old.num_attention_heads, old.num_key_value_heads, BASE["head_dim"]
    half, width, per_group = dim // 2, groups * dim, heads // groups
    pairs = [f for _ in range(groups) for f in range(half)]
    decoupled = form == "decoupled"
    config_class, model_class = MLA[family]
    with_bias = model.model.layers[0].self_attn.q_proj.bias is not None
    new = model_class(
        config_class(
            **BASE,
            rope_parameters=dict(old.rope_parameters),
            kv_lora_rank=width if decoupled else 2 * width,
            qk_rope_head_dim=width if decoupled else 0,
            qk_nope_head_dim=0 if decoupled else dim,
            v_head_dim=dim,
            rope_pairs=[pairs] * old.num_hidden_layers if decoupled else None,
            rope_on_read=not decoupled,
            q_bias=with_bias,
            kv_a_bias=with_bias,
        )
    ).eval()
    state = {k: v for k, v in model.state_dict().items() if ".self_attn." not in k}
    for i, layer in enumerate(model.model.layers):
        a, at = layer.self_attn, f"model.layers.{i}.self_attn"
        state[f"{at}.o_proj.weight"] = a.o_proj.weight
        for kind in ("weight", "bias") if with_bias else ("weight",):
            q, k, v = (getattr(p, kind) for p in (a.q_proj, a.k_proj, a.v_proj))
            if decoupled:  # [all real parts | all imaginary parts]
                k = k.unflatten(0, (groups, 2, half)).transpose(0, 1).flatten(0, 2)
                heads_of_q = q.unflatten(0, (heads, 2, half))
                spread = q.new_zeros(heads, 2, groups, half, *q.shape[1:])
                for h in range(heads):
                    spread[h, :, h // per_group] = heads_of_q[h]
                q = spread.flatten(0, 3)
            state[f"{at}.q_proj.{kind}"] = q
            state[f"{at}.kv_a_proj_with_mqa.{kind}"] = torch.cat((v, k) if decoupled else (k, v))
        eye = torch.eye(width).view(groups, dim, width)
        if not decoupled:
            nothing = torch.zeros_like(eye)
            eye = torch.cat((torch.cat((eye, nothing), -1), torch.cat((nothing, eye), -1)), dim=1)
        state[f"{at}.kv_b_proj.weight"] = eye.flatten(0, 1)
    new.load_state_dict(state)
    return new
