"""Gemma with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaForCausalLM, GemmaModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class GemmaMLAConfig(MLAConfigMixin, GemmaConfig):
    model_type = "rehead_gemma_mla"
    head_dim: int | None = 256


class GemmaMLAModel(ConvertedModel, GemmaModel):
    config: GemmaMLAConfig


class GemmaMLAForCausalLM(ConvertedForCausalLM, GemmaForCausalLM):
    config: GemmaMLAConfig
    model_class = GemmaMLAModel


@strict
class GemmaMFAConfig(MFAConfigMixin, GemmaConfig):
    model_type = "rehead_gemma_mfa"
    head_dim: int | None = 256


class GemmaMFAModel(ConvertedModel, GemmaModel):
    config: GemmaMFAConfig


class GemmaMFAForCausalLM(ConvertedForCausalLM, GemmaForCausalLM):
    config: GemmaMFAConfig
    model_class = GemmaMFAModel
