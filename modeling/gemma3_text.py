"""Gemma 3 with its attention converted. Its norms of keys allow MLA that forms keys on read."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForCausalLM, Gemma3TextModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mla_config import MLAConfigMixin


@strict
class Gemma3MLAConfig(MLAConfigMixin, Gemma3TextConfig):
    model_type = "rehead_gemma3_text_mla"
    head_dim: int | None = 256


class Gemma3MLAModel(ConvertedModel, Gemma3TextModel):
    config: Gemma3MLAConfig


class Gemma3MLAForCausalLM(ConvertedForCausalLM, Gemma3ForCausalLM):
    config: Gemma3MLAConfig
    model_class = Gemma3MLAModel
