"""Tiny models of every family, in the variants that matter to its attention."""

import folders
import tiny
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    OlmoConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    OlmoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

GROUPED = tiny.BASE | folders.MODEL_FIELDS | dict(rope_parameters=tiny.ROPE_TYPES["default"])
# Of a head of 8 dims, 4 are rotated.
PART = dict(rope_parameters=tiny.ROPE_TYPES["default"] | dict(partial_rotary_factor=0.5))
PART_LONG = dict(
    rope_parameters=tiny.ROPE_TYPES["longrope"]
    | dict(partial_rotary_factor=0.5, short_factor=[1.0, 1.2], long_factor=[2.0, 3.0]),
    original_max_position_embeddings=32,
)
# The second of two layers has a window.
LAST_SLIDES = dict(use_sliding_window=True, sliding_window=16, max_window_layers=1)
# A layer with a window and one without, each with its own frequencies.
MIXED = dict(
    sliding_window=16,
    layer_types=["full_attention", "sliding_attention"],
    rope_parameters={
        "full_attention": tiny.ROPE_TYPES["yarn"] | dict(rope_theta=1000.0),
        "sliding_attention": tiny.ROPE_TYPES["default"],
    },
)
# A KV head for every query head: these configs know no other.
MULTI = {k: v for k, v in GROUPED.items() if k not in ("num_key_value_heads", "head_dim")}
NO_ROPE = {k: v for k, v in MULTI.items() if k != "rope_parameters"}

# family: config class, model class, fields.
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, GROUPED),
    "mistral": (MistralConfig, MistralForCausalLM, GROUPED | dict(sliding_window=None)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GROUPED),
    "phi3": (Phi3Config, Phi3ForCausalLM, GROUPED | PART_LONG),
    "mixtral": (MixtralConfig, MixtralForCausalLM, GROUPED | dict(num_local_experts=4)),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        GROUPED
        | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
        | dict(shared_expert_intermediate_size=24, mlp_only_layers=[0]),
    ),
    "stablelm": (StableLmConfig, StableLmForCausalLM, GROUPED | PART | dict(use_qkv_bias=True)),
    "phi": (PhiConfig, PhiForCausalLM, GROUPED | PART),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, MULTI | PART),
    "olmo": (OlmoConfig, OlmoForCausalLM, GROUPED),
    "gemma": (GemmaConfig, GemmaForCausalLM, GROUPED | dict(head_dim=16)),
    "gpt2": (GPT2Config, GPT2LMHeadModel, NO_ROPE),
    "opt": (
        OPTConfig,
        OPTForCausalLM,
        NO_ROPE | dict(ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    ),
    "seed_oss": (SeedOssConfig, SeedOssForCausalLM, GROUPED),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, GROUPED),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        GROUPED | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    ),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, GROUPED),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM, GROUPED | MIXED),
    "gemma3_text": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        GROUPED | MIXED | dict(query_pre_attn_scalar=12),
    ),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        GROUPED
        | dict(sliding_window=16, layer_types=["full_attention", "sliding_attention"])
        | dict(query_pre_attn_scalar=12, attn_logit_softcapping=3.0, final_logit_softcapping=9.0),
    ),
    "olmoe": (
        OlmoeConfig,
        OlmoeForCausalLM,
        GROUPED | dict(num_experts=4, num_experts_per_tok=2),
    ),
    "starcoder2": (
        Starcoder2Config,
        Starcoder2ForCausalLM,
        GROUPED | dict(use_bias=True, sliding_window=16),
    ),
}
# What a family's other checkpoints have: case -> family, fields.
VARIANTS = {
    "phi3, whole heads": ("phi3", dict(rope_parameters=tiny.ROPE_TYPES["default"])),
    "stablelm, parallel": ("stablelm", dict(use_qkv_bias=False, use_parallel_residual=True)),
    "gpt_neox, plain": ("gpt_neox", dict(attention_bias=False, use_parallel_residual=False)),
    "olmo, biases": ("olmo", dict(attention_bias=True)),
    "qwen3, biases": ("qwen3", dict(attention_bias=True)),
    "olmo2, biases": ("olmo2", dict(attention_bias=True)),
    "mistral, sliding": ("mistral", dict(sliding_window=16)),
    "qwen2, sliding": ("qwen2", LAST_SLIDES),
    "phi3, sliding": ("phi3", dict(sliding_window=16)),
    "qwen3, sliding": ("qwen3", LAST_SLIDES),
    "gemma3_text, other way": (
        "gemma3_text",
        dict(layer_types=["sliding_attention", "full_attention"], attention_bias=True),
    ),
    "olmo3, other way": ("olmo3", dict(layer_types=["sliding_attention", "full_attention"])),
    "opt, norm after": ("opt", dict(do_layer_norm_before=False)),
}
# Llama, Mistral and Qwen2 have tests of their own beside the ones for all.
CASES = {family: (family, {}) for family in FAMILIES} | VARIANTS
NEW = [case for case in CASES if case not in tiny.SOURCES]


def model(case: str, **fields) -> torch.nn.Module:
    """The case's model, with a large random initialisation and random biases."""
    torch.manual_seed(0)
    family, more = CASES[case]
    config_class, model_class, given = FAMILIES[family]
    made = tiny.fill_biases(model_class(config_class(**given | more | fields)))
    for name, parameter in made.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    if family == "gemma2":  # transformers 5.16 would take sdpa, which leaves the cap out
        made.set_attn_implementation("eager")
    return made.eval()
