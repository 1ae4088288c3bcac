"""Families as data: how a model type's checkpoint names its attention, and what is refused, why.

Adding one is a row of `FAMILIES`; what is special about it is a field of `Family`. A model type
that is not listed is refused; there is no fallback.
"""

from collections.abc import Callable
from difflib import get_close_matches

from transformers import PretrainedConfig

from ..errors import InputError
from .family import (
    Experts,
    Family,
    head_dim,
    kv_heads,
    layer_kind,
    partial_rotary_factor,
    window,
    window_in_use,
)

__all__ = ["FAMILIES", "Experts", "Family", "family_of", "head_dim", "kv_heads"]
__all__ += ["layer_kind", "window", "window_in_use"]


def _layers(config: PretrainedConfig) -> str | None:
    """Why its kinds of layers cannot be converted."""
    kinds = getattr(config, "layer_types", None) or []
    odd = sorted({*map(str, kinds)} - {"full_attention", "sliding_attention"})
    if odd:
        return f"has layers of {odd[0]} (layer_types)"
    if kinds and len(kinds) != config.num_hidden_layers:
        return f"has {config.num_hidden_layers} layers and {len(kinds)} layer_types"
    size = getattr(config, "sliding_window", None)
    used = "sliding_attention" in kinds or (size is not None and not kinds)
    whole = isinstance(size, int) and not isinstance(size, bool) and 1 <= size < 2**31
    return f"slides a window of {size!r:.80} tokens" if used and not whole else None


def _any(**reasons: str) -> Callable[[PretrainedConfig], str | None]:
    """A refusal of models whose config has one of these fields set, with its reason."""

    def refuse(config: PretrainedConfig) -> str | None:
        return next((why for name, why in reasons.items() if getattr(config, name, None)), None)

    return refuse


def _gpt2(config: PretrainedConfig) -> str | None:
    if not config.scale_attn_weights:
        return "does not scale its scores by the width of a head (scale_attn_weights)"
    return _any(
        scale_attn_by_inverse_layer_idx="scales its scores layer by layer",
        add_cross_attention="attends to an encoder",
    )(config)


def _opt(config: PretrainedConfig) -> str | None:
    if config.word_embed_proj_dim != config.hidden_size:
        return "projects its embeddings (word_embed_proj_dim)"
    return None


_QWEN_EXPERTS = Experts(
    "mlp", {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
)
_CLIPPED = _any(clip_qkv="clips queries, keys and values (clip_qkv)")
_BOTH_WAYS = _any(use_bidirectional_attention="attends to later tokens")
_QK_NORM = _any(qk_layernorm="normalises queries and keys (qk_layernorm)")

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", llama_decoder=True),
        Family("mistral", llama_decoder=True),
        Family("qwen2", llama_decoder=True),
        Family("phi3", fused="qkv_proj", rotary="partial"),
        Family(
            "mixtral",
            experts=Experts(
                "block_sparse_moe", {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}
            ),
        ),
        Family("qwen2_moe", experts=_QWEN_EXPERTS),
        Family(
            "stablelm",
            rotary="partial",
            parallel=lambda config: config.use_parallel_residual,
            refuse=_QK_NORM,
        ),
        Family("phi", o="dense", rotary="partial", parallel=lambda config: True, refuse=_QK_NORM),
        Family(
            "gpt_neox",
            layers="gpt_neox.layers",
            attention="attention",
            fused="query_key_value",
            head_by_head=True,
            o="dense",
            buffers=frozenset({"rotary_emb.inv_freq", "bias", "masked_bias"}),
            rotary="partial",
            parallel=lambda config: config.use_parallel_residual,
        ),
        Family("olmo", refuse=_CLIPPED),
        Family(
            "gemma",
            embed_scale=lambda config: config.hidden_size**0.5,
            refuse=_BOTH_WAYS,
        ),
        Family(
            "gpt2",
            layers="transformer.h",
            attention="attn",
            fused="c_attn",
            transposed=True,
            o="c_proj",
            buffers=frozenset({"bias", "masked_bias"}),
            rotary="none",
            positions="transformer.wpe",
            refuse=_gpt2,
        ),
        Family(
            "opt",
            layers="model.decoder.layers",
            o="out_proj",
            rotary="none",
            positions="model.decoder.embed_positions",
            first_position=2,
            refuse=_opt,
        ),
        Family("seed_oss", llama_decoder=True),
        Family("qwen3", qk_norm="head"),
        Family("qwen3_moe", qk_norm="head", experts=_QWEN_EXPERTS),
        Family("olmo2", qk_norm="all", post_norm="post_attention_layernorm"),
        Family("olmo3", qk_norm="all", post_norm="post_attention_layernorm"),
        Family(
            "gemma3_text",
            qk_norm="head",
            norms_from=1.0,
            scale=lambda config: config.query_pre_attn_scalar**-0.5,
            embed_scale=lambda config: config.hidden_size**0.5,
            post_norm="post_attention_layernorm",
            refuse=_BOTH_WAYS,
        ),
        Family(
            "gemma2",
            scale=lambda config: config.query_pre_attn_scalar**-0.5,
            softcap=lambda config: config.attn_logit_softcapping,
            embed_scale=lambda config: config.hidden_size**0.5,
            post_norm="post_attention_layernorm",
            refuse=_BOTH_WAYS,
        ),
        Family("olmoe", qk_norm="all", experts=_QWEN_EXPERTS, refuse=_CLIPPED),
        Family("starcoder2"),
    )
}

_LATENT = "has multi-head latent attention already, and a cache that small"
_NO_SOFTMAX = "has layers without softmax attention, which keep a state and no cache of keys"
_NOT_CAUSAL = "is no causal decoder, so it has no cache of keys and values to shrink"
_NORM = "normalises queries and keys in a way that is not supported yet"
_MIXED = "rotates keys in some of its layers only, which is not supported yet"
_IMAGES = "reads images too (its language model alone, gemma3_text, is supported)"
_ALIBI = "adds biases by distance to its scores (ALiBi), which is not supported yet"

# Model types that are known and not converted, and why.
REFUSED = {
    model_type: reason
    for reason, model_types in {
        _LATENT: "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite longcat_flash minicpm3 youtu",
        _NO_SOFTMAX: "bamba falcon_h1 falcon_mamba granitemoehybrid jamba lfm2 mamba mamba2 "
        "nemotron_h qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2",
        _NOT_CAUSAL: "albert bart bert camembert deberta deberta-v2 distilbert electra marian "
        "mbart modernbert mpnet mt5 pegasus roberta switch_transformers t5 umt5 whisper "
        "xlm-roberta",
        _NORM: "flex_olmo hunyuan_v1_dense",
        _MIXED: "cohere2",
        _IMAGES: "gemma3",
        _ALIBI: "bloom mpt",
    }.items()
    for model_type in model_types.split()
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a checkpoint's config.

    Raises:
        InputError: the model type is unknown, or the model uses what its conversion cannot carry.
    """
    model_type = config.model_type
    if model_type.startswith("rehead_"):
        raise InputError(f"this checkpoint is converted already ({model_type}). Give its source.")
    if model_type in REFUSED:
        raise InputError(f"{model_type} {REFUSED[model_type]}, so it cannot be converted.")
    if model_type not in FAMILIES:
        near = get_close_matches(model_type, FAMILIES, n=1)
        hint = f" ({near[0]} is the nearest)" if near else ""
        raise InputError(
            f"model_type {model_type!r} is not supported{hint}. Supported: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    reason = _layers(config) or family.refuse(config)
    if family.rotary == "whole" and partial_rotary_factor(config) != 1:
        reason = f"rotates a part of its heads ({partial_rotary_factor(config)})"
    if reason:
        raise InputError(f"this {model_type} model {reason}, which cannot be converted.")
    return family
