"""Qwen2 with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class Qwen2MLAConfig(MLAConfigMixin, Qwen2Config):
    model_type = "rehead_qwen2_mla"


class Qwen2MLAModel(ConvertedModel, Qwen2Model):
    config: Qwen2MLAConfig


class Qwen2MLAForCausalLM(ConvertedForCausalLM, Qwen2ForCausalLM):
    config: Qwen2MLAConfig
    model_class = Qwen2MLAModel


@strict
class Qwen2MFAConfig(MFAConfigMixin, Qwen2Config):
    model_type = "rehead_qwen2_mfa"


class Qwen2MFAModel(ConvertedModel, Qwen2Model):
    config: Qwen2MFAConfig


class Qwen2MFAForCausalLM(ConvertedForCausalLM, Qwen2ForCausalLM):
    config: Qwen2MFAConfig
    model_class = Qwen2MFAModel
