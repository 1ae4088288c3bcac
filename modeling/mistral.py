"""Mistral with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class MistralMLAConfig(MLAConfigMixin, MistralConfig):
    model_type = "rehead_mistral_mla"


class MistralMLAModel(ConvertedModel, MistralModel):
    config: MistralMLAConfig


class MistralMLAForCausalLM(ConvertedForCausalLM, MistralForCausalLM):
    config: MistralMLAConfig
    model_class = MistralMLAModel


@strict
class MistralMFAConfig(MFAConfigMixin, MistralConfig):
    model_type = "rehead_mistral_mfa"


class MistralMFAModel(ConvertedModel, MistralModel):
    config: MistralMFAConfig


class MistralMFAForCausalLM(ConvertedForCausalLM, MistralForCausalLM):
    config: MistralMFAConfig
    model_class = MistralMFAModel
