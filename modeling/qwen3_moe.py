"""Qwen3-MoE with its attention converted. Its norms of keys allow MLA that forms keys on read."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM, Qwen3MoeModel

from .converted_model import ConvertedForCausalLM, ConvertedModel, keep_stored_names
from .mla_config import MLAConfigMixin


@strict
class Qwen3MoeMLAConfig(MLAConfigMixin, Qwen3MoeConfig):
    model_type = "rehead_qwen3_moe_mla"


class Qwen3MoeMLAModel(ConvertedModel, Qwen3MoeModel):
    config: Qwen3MoeMLAConfig


class Qwen3MoeMLAForCausalLM(ConvertedForCausalLM, Qwen3MoeForCausalLM):
    config: Qwen3MoeMLAConfig
    model_class = Qwen3MoeMLAModel


keep_stored_names("qwen3_moe", Qwen3MoeMLAConfig.model_type)
