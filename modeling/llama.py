"""Llama with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class LlamaMLAConfig(MLAConfigMixin, LlamaConfig):
    model_type = "rehead_llama_mla"


class LlamaMLAModel(ConvertedModel, LlamaModel):
    config: LlamaMLAConfig


class LlamaMLAForCausalLM(ConvertedForCausalLM, LlamaForCausalLM):
    config: LlamaMLAConfig
    model_class = LlamaMLAModel


@strict
class LlamaMFAConfig(MFAConfigMixin, LlamaConfig):
    model_type = "rehead_llama_mfa"


class LlamaMFAModel(ConvertedModel, LlamaModel):
    config: LlamaMFAConfig


class LlamaMFAForCausalLM(ConvertedForCausalLM, LlamaForCausalLM):
    config: LlamaMFAConfig
    model_class = LlamaMFAModel
