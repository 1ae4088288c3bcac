"""GPT-2 with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .gqa_config import GQAConfigMixin
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class GPT2MLAConfig(MLAConfigMixin, GPT2Config):
    model_type = "rehead_gpt2_mla"
    attention_name = "attn"
    attribute_map = GPT2Config.attribute_map | {"attention_dropout": "attn_pdrop"}


class GPT2MLAModel(ConvertedModel, GPT2Model):
    config: GPT2MLAConfig
    layers_name = "h"


class GPT2MLAForCausalLM(ConvertedForCausalLM, GPT2LMHeadModel):
    config: GPT2MLAConfig
    model_class = GPT2MLAModel


@strict
class GPT2MFAConfig(MFAConfigMixin, GPT2Config):
    model_type = "rehead_gpt2_mfa"
    attention_name = "attn"
    attribute_map = GPT2Config.attribute_map | {"attention_dropout": "attn_pdrop"}


class GPT2MFAModel(ConvertedModel, GPT2Model):
    config: GPT2MFAConfig
    layers_name = "h"


class GPT2MFAForCausalLM(ConvertedForCausalLM, GPT2LMHeadModel):
    config: GPT2MFAConfig
    model_class = GPT2MFAModel


@strict
class GPT2GQAConfig(GQAConfigMixin, GPT2Config):
    model_type = "rehead_gpt2_gqa"
    attention_name = "attn"
    attribute_map = GPT2Config.attribute_map | {"attention_dropout": "attn_pdrop"}


class GPT2GQAModel(ConvertedModel, GPT2Model):
    config: GPT2GQAConfig
    layers_name = "h"


class GPT2GQAForCausalLM(ConvertedForCausalLM, GPT2LMHeadModel):
    config: GPT2GQAConfig
    model_class = GPT2GQAModel
