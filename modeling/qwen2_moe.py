"""Qwen2-MoE with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM, Qwen2MoeModel

from .converted_model import ConvertedForCausalLM, ConvertedModel, keep_stored_names
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class Qwen2MoeMLAConfig(MLAConfigMixin, Qwen2MoeConfig):
    model_type = "rehead_qwen2_moe_mla"


class Qwen2MoeMLAModel(ConvertedModel, Qwen2MoeModel):
    config: Qwen2MoeMLAConfig


class Qwen2MoeMLAForCausalLM(ConvertedForCausalLM, Qwen2MoeForCausalLM):
    config: Qwen2MoeMLAConfig
    model_class = Qwen2MoeMLAModel


@strict
class Qwen2MoeMFAConfig(MFAConfigMixin, Qwen2MoeConfig):
    model_type = "rehead_qwen2_moe_mfa"


class Qwen2MoeMFAModel(ConvertedModel, Qwen2MoeModel):
    config: Qwen2MoeMFAConfig


class Qwen2MoeMFAForCausalLM(ConvertedForCausalLM, Qwen2MoeForCausalLM):
    config: Qwen2MoeMFAConfig
    model_class = Qwen2MoeMFAModel


keep_stored_names("qwen2_moe", Qwen2MoeMLAConfig.model_type, Qwen2MoeMFAConfig.model_type)
