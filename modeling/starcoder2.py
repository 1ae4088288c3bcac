"""StarCoder2 with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.starcoder2.configuration_starcoder2 import Starcoder2Config
from transformers.models.starcoder2.modeling_starcoder2 import (
    Starcoder2ForCausalLM,
    Starcoder2Model,
)

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class Starcoder2MLAConfig(MLAConfigMixin, Starcoder2Config):
    model_type = "rehead_starcoder2_mla"


class Starcoder2MLAModel(ConvertedModel, Starcoder2Model):
    config: Starcoder2MLAConfig


class Starcoder2MLAForCausalLM(ConvertedForCausalLM, Starcoder2ForCausalLM):
    config: Starcoder2MLAConfig
    model_class = Starcoder2MLAModel


@strict
class Starcoder2MFAConfig(MFAConfigMixin, Starcoder2Config):
    model_type = "rehead_starcoder2_mfa"


class Starcoder2MFAModel(ConvertedModel, Starcoder2Model):
    config: Starcoder2MFAConfig


class Starcoder2MFAForCausalLM(ConvertedForCausalLM, Starcoder2ForCausalLM):
    config: Starcoder2MFAConfig
    model_class = Starcoder2MFAModel
