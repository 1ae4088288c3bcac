"""StableLM with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.stablelm.configuration_stablelm import StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmForCausalLM, StableLmModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class StableLmMLAConfig(MLAConfigMixin, StableLmConfig):
    model_type = "rehead_stablelm_mla"
    partial_rotary = True


class StableLmMLAModel(ConvertedModel, StableLmModel):
    config: StableLmMLAConfig


class StableLmMLAForCausalLM(ConvertedForCausalLM, StableLmForCausalLM):
    config: StableLmMLAConfig
    model_class = StableLmMLAModel


@strict
class StableLmMFAConfig(MFAConfigMixin, StableLmConfig):
    model_type = "rehead_stablelm_mfa"
    partial_rotary = True


class StableLmMFAModel(ConvertedModel, StableLmModel):
    config: StableLmMFAConfig


class StableLmMFAForCausalLM(ConvertedForCausalLM, StableLmForCausalLM):
    config: StableLmMFAConfig
    model_class = StableLmMFAModel
