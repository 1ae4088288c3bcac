"""OLMoE with its attention converted. Its norms of keys allow MLA that forms keys on read."""

from huggingface_hub.dataclasses import strict
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM, OlmoeModel

from .converted_model import ConvertedForCausalLM, ConvertedModel, keep_stored_names
from .mla_config import MLAConfigMixin


@strict
class OlmoeMLAConfig(MLAConfigMixin, OlmoeConfig):
    model_type = "rehead_olmoe_mla"
    norm_all_heads = True


class OlmoeMLAModel(ConvertedModel, OlmoeModel):
    config: OlmoeMLAConfig


class OlmoeMLAForCausalLM(ConvertedForCausalLM, OlmoeForCausalLM):
    config: OlmoeMLAConfig
    model_class = OlmoeMLAModel


keep_stored_names("olmoe", OlmoeMLAConfig.model_type)
