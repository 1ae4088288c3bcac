"""Phi-1 and Phi-2 with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.phi.configuration_phi import PhiConfig
from transformers.models.phi.modeling_phi import PhiForCausalLM, PhiModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class PhiMLAConfig(MLAConfigMixin, PhiConfig):
    model_type = "rehead_phi_mla"
    partial_rotary = True


class PhiMLAModel(ConvertedModel, PhiModel):
    config: PhiMLAConfig


class PhiMLAForCausalLM(ConvertedForCausalLM, PhiForCausalLM):
    config: PhiMLAConfig
    model_class = PhiMLAModel


@strict
class PhiMFAConfig(MFAConfigMixin, PhiConfig):
    model_type = "rehead_phi_mfa"
    partial_rotary = True


class PhiMFAModel(ConvertedModel, PhiModel):
    config: PhiMFAConfig


class PhiMFAForCausalLM(ConvertedForCausalLM, PhiForCausalLM):
    config: PhiMFAConfig
    model_class = PhiMFAModel
