"""Gemma 2 with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM, Gemma2Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class Gemma2MLAConfig(MLAConfigMixin, Gemma2Config):
    model_type = "rehead_gemma2_mla"
    caps_scores = True


class Gemma2MLAModel(ConvertedModel, Gemma2Model):
    config: Gemma2MLAConfig


class Gemma2MLAForCausalLM(ConvertedForCausalLM, Gemma2ForCausalLM):
    config: Gemma2MLAConfig
    model_class = Gemma2MLAModel


@strict
class Gemma2MFAConfig(MFAConfigMixin, Gemma2Config):
    model_type = "rehead_gemma2_mfa"
    caps_scores = True


class Gemma2MFAModel(ConvertedModel, Gemma2Model):
    config: Gemma2MFAConfig


class Gemma2MFAForCausalLM(ConvertedForCausalLM, Gemma2ForCausalLM):
    config: Gemma2MFAConfig
    model_class = Gemma2MFAModel
