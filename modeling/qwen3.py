"""Qwen3 with its attention converted. Its norms of keys allow MLA that forms keys on read."""

from huggingface_hub.dataclasses import strict
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mla_config import MLAConfigMixin


@strict
class Qwen3MLAConfig(MLAConfigMixin, Qwen3Config):
    model_type = "rehead_qwen3_mla"


class Qwen3MLAModel(ConvertedModel, Qwen3Model):
    config: Qwen3MLAConfig


class Qwen3MLAForCausalLM(ConvertedForCausalLM, Qwen3ForCausalLM):
    config: Qwen3MLAConfig
    model_class = Qwen3MLAModel
