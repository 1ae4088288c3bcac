"""Mixtral with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM, MixtralModel

from .converted_model import ConvertedForCausalLM, ConvertedModel, keep_stored_names
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class MixtralMLAConfig(MLAConfigMixin, MixtralConfig):
    model_type = "rehead_mixtral_mla"


class MixtralMLAModel(ConvertedModel, MixtralModel):
    config: MixtralMLAConfig


class MixtralMLAForCausalLM(ConvertedForCausalLM, MixtralForCausalLM):
    config: MixtralMLAConfig
    model_class = MixtralMLAModel


@strict
class MixtralMFAConfig(MFAConfigMixin, MixtralConfig):
    model_type = "rehead_mixtral_mfa"


class MixtralMFAModel(ConvertedModel, MixtralModel):
    config: MixtralMFAConfig


class MixtralMFAForCausalLM(ConvertedForCausalLM, MixtralForCausalLM):
    config: MixtralMFAConfig
    model_class = MixtralMFAModel


keep_stored_names("mixtral", MixtralMLAConfig.model_type, MixtralMFAConfig.model_type)
