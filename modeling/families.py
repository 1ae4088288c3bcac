"""Converted classes of every family and form, made from transformers' own when they are asked for.

A family is a row of `FAMILIES`, and a form of attention a row of `FORMS`. This module has their
classes under the names <Family><Form>Config, <Family><Form>Model and <Family><Form>ForCausalLM,
such as LlamaMLAConfig. A class is made when its name is first asked for, so that a checkpoint that
is loaded by its own copy of this file imports no other family of transformers.
"""

import sys
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    PreTrainedConfig,
)
from transformers.modeling_utils import PreTrainedModel

from .converted_attention import ConvertedAttention
from .converted_config import ConvertedConfigMixin
from .converted_model import ConvertedForCausalLM, ConvertedModel, keep_stored_names
from .gqa import GQAAttention
from .gqa_config import GQAConfigMixin
from .mfa import MFAAttention, MFARowsAttention
from .mfa_config import MFAConfigMixin
from .mfa_kr import MFAKRAttention, MFAKRRowsAttention
from .mla import MLAAttention
from .mla_config import MLAConfigMixin
from .on_read import KeyInLatentAttention
from .turned_keys import TurnedKeyAttention
from .whole_keys import InputAttention, WholeKeyAttention

# A config, a model, and a model with a language head.
Classes = tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]


@dataclass(frozen=True)
class Family:
    """The facts about one family's classes in transformers that its converted classes need.

    Args:
        prefix: what the classes' names begin with.
        layers_name: the attribute of the family's decoder that holds its layers.
        attention_name: the attribute of a layer that holds its attention.
        decoder: the class that holds the layers, in families whose model is a shell around it.
        has_kv_heads: whether the family's own config has `num_key_value_heads`.
        partial_rotary: whether the family's classes may rotate only a part of each head.
        caps_scores: whether the family's classes cap scores by `attn_logit_softcapping`.
        qk_norm: "head" where every query and key head is normalised by itself, "all" where all
            heads are normalised together, None where none is.
        attribute_map: other names of the config's fields, besides those that the family has.
    """

    prefix: str
    layers_name: str = "layers"
    attention_name: str = "self_attn"
    decoder: str | None = None
    has_kv_heads: bool = True
    partial_rotary: bool = False
    caps_scores: bool = False
    qk_norm: str | None = None
    attribute_map: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """The parts that the classes of one form of attention are made of.

    Args:
        config: the form's configuration fields.
        layouts: the modules that replace the attention of a layer, by the names that the config's
            `layer_layout` gives.
        holds_qk_norm: whether queries and keys can be normalised.
        stock_with_kv_heads: whether the form needs no classes where the family's own config has
            `num_key_value_heads`, because the family's own classes hold it.
    """

    config: type[ConvertedConfigMixin]
    layouts: dict[str, type[ConvertedAttention]]
    holds_qk_norm: bool = False
    stock_with_kv_heads: bool = False

    def serves(self, family: Family) -> bool:
        """Whether the family has classes of this form."""
        if self.stock_with_kv_heads and family.has_kv_heads:
            return False
        return family.qk_norm is None or self.holds_qk_norm


# By `model_type` of the source.
FAMILIES = {
    "llama": Family("Llama"),
    "mistral": Family("Mistral"),
    "qwen2": Family("Qwen2"),
    "phi3": Family("Phi3", partial_rotary=True),
    "mixtral": Family("Mixtral"),
    "qwen2_moe": Family("Qwen2Moe"),
    "stablelm": Family("StableLm", partial_rotary=True),
    "phi": Family("Phi", partial_rotary=True),
    "gpt_neox": Family(
        "GPTNeoX", attention_name="attention", has_kv_heads=False, partial_rotary=True
    ),
    "olmo": Family("Olmo"),
    "gemma": Family("Gemma"),
    "gpt2": Family(
        "GPT2",
        layers_name="h",
        attention_name="attn",
        has_kv_heads=False,
        attribute_map={"attention_dropout": "attn_pdrop"},
    ),
    "opt": Family("OPT", decoder="OPTDecoder", has_kv_heads=False),
    "seed_oss": Family("SeedOss"),
    "qwen3": Family("Qwen3", qk_norm="head"),
    "qwen3_moe": Family("Qwen3Moe", qk_norm="head"),
    "olmo2": Family("Olmo2", qk_norm="all"),
    "olmo3": Family("Olmo3", qk_norm="all"),
    "gemma3_text": Family("Gemma3", qk_norm="head"),
    "gemma2": Family("Gemma2", caps_scores=True),
    "olmoe": Family("Olmoe", qk_norm="all"),
    "starcoder2": Family("Starcoder2"),
}

# By the form's part of a class' name.
FORMS = {
    form.config.form_name: form
    for form in (
        Form(
            MLAConfigMixin,
            {
                "mla": MLAAttention,
                "turned keys": TurnedKeyAttention,
                "key in latent": KeyInLatentAttention,
                "whole keys": WholeKeyAttention,
                "inputs": InputAttention,
            },
            holds_qk_norm=True,
        ),
        Form(
            MFAConfigMixin,
            {
                "mfa": MFAAttention,
                "mfa rows": MFARowsAttention,
                "mfa-kr": MFAKRAttention,
                "mfa-kr rows": MFAKRRowsAttention,
            },
            holds_qk_norm=True,
        ),
        Form(GQAConfigMixin, {"gqa": GQAAttention}, stock_with_kv_heads=True),
    )
}


def converted(model_type: str, form_name: str) -> Classes:
    """The config, the model and the language model of one family and form.

    Args:
        model_type: a key of `FAMILIES`.
        form_name: a key of `FORMS`, of a form that serves the family.
    """
    made = _make(model_type, form_name)
    stem = FAMILIES[model_type].prefix + form_name
    return made[f"{stem}Config"], made[f"{stem}Model"], made[f"{stem}ForCausalLM"]


def __getattr__(name: str) -> type:
    """A converted class by its name, as pickle and transformers ask for it."""
    for model_type, family in FAMILIES.items():
        for form_name, form in FORMS.items():
            if name.startswith(family.prefix + form_name) and form.serves(family):
                made = _make(model_type, form_name)
                if name in made:
                    return made[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _make(model_type: str, form_name: str) -> dict[str, Any]:
    """All classes of one family and form by name. Each has transformers' own class as last base."""
    family, form = FAMILIES[model_type], FORMS[form_name]
    source = CONFIG_MAPPING[model_type]
    model, causal_lm = MODEL_MAPPING[source], MODEL_FOR_CAUSAL_LM_MAPPING[source]
    made: dict[str, Any] = {}

    def add(kind: str, *bases: type, **attributes: Any) -> Any:
        name = f"{family.prefix}{form_name}{kind}"
        made[name] = type(name, bases, {"__module__": __name__, **attributes})
        return made[name]

    own = _config_attributes(family, source)
    own["model_type"] = f"rehead_{model_type}_{form_name.lower()}"
    config = strict(add("Config", form.config, source, **own))

    shared: dict[str, Any] = {"config_class": config}
    if family.caps_scores:
        # sdpa does not cap scores. Gemma 2's own classes of transformers 5.16 do not say so.
        shared["_supports_sdpa"] = False
    holds_layers = {"layers_name": family.layers_name, "layouts": form.layouts}
    if family.decoder is None:
        body = add("Model", ConvertedModel, model, **shared, **holds_layers)
    else:
        decoder = getattr(sys.modules[model.__module__], family.decoder)
        inner = add("Decoder", ConvertedModel, decoder, **shared, **holds_layers)
        body = add("Model", ConvertedForCausalLM, model, **shared, model_class=inner)
    head = add("ForCausalLM", ConvertedForCausalLM, causal_lm, **shared, model_class=body)

    keep_stored_names(model_type, config.model_type)
    keep_stored_names(causal_lm.__name__, head.__name__)
    return made


def _config_attributes(family: Family, source: type[PreTrainedConfig]) -> dict[str, Any]:
    """Class attributes that all converted configs of a family share."""
    attributes: dict[str, Any] = {
        "attention_name": family.attention_name,
        "partial_rotary": family.partial_rotary,
        "caps_scores": family.caps_scores,
    }
    if family.qk_norm is not None:
        attributes |= {"norms_keys": True, "norm_all_heads": family.qk_norm == "all"}
    if family.attribute_map:
        attributes["attribute_map"] = source.attribute_map | family.attribute_map
    width = getattr(source, "head_dim", None)
    if width is not None:
        # The form's default, None, would otherwise hide the family's.
        attributes |= {"__annotations__": {"head_dim": int | None}, "head_dim": width}
    return attributes
