"""OLMo with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo.configuration_olmo import OlmoConfig
from transformers.models.olmo.modeling_olmo import OlmoForCausalLM, OlmoModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class OlmoMLAConfig(MLAConfigMixin, OlmoConfig):
    model_type = "rehead_olmo_mla"


class OlmoMLAModel(ConvertedModel, OlmoModel):
    config: OlmoMLAConfig


class OlmoMLAForCausalLM(ConvertedForCausalLM, OlmoForCausalLM):
    config: OlmoMLAConfig
    model_class = OlmoMLAModel


@strict
class OlmoMFAConfig(MFAConfigMixin, OlmoConfig):
    model_type = "rehead_olmo_mfa"


class OlmoMFAModel(ConvertedModel, OlmoModel):
    config: OlmoMFAConfig


class OlmoMFAForCausalLM(ConvertedForCausalLM, OlmoForCausalLM):
    config: OlmoMFAConfig
    model_class = OlmoMFAModel
