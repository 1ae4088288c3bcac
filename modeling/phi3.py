"""Phi-3 and Phi-4 with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM, Phi3Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class Phi3MLAConfig(MLAConfigMixin, Phi3Config):
    model_type = "rehead_phi3_mla"
    partial_rotary = True


class Phi3MLAModel(ConvertedModel, Phi3Model):
    config: Phi3MLAConfig


class Phi3MLAForCausalLM(ConvertedForCausalLM, Phi3ForCausalLM):
    config: Phi3MLAConfig
    model_class = Phi3MLAModel


@strict
class Phi3MFAConfig(MFAConfigMixin, Phi3Config):
    model_type = "rehead_phi3_mfa"
    partial_rotary = True


class Phi3MFAModel(ConvertedModel, Phi3Model):
    config: Phi3MFAConfig


class Phi3MFAForCausalLM(ConvertedForCausalLM, Phi3ForCausalLM):
    config: Phi3MFAConfig
    model_class = Phi3MFAModel
