"""OLMo 2 with its attention converted. Its norms of keys allow MLA that forms keys on read."""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM, Olmo2Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mla_config import MLAConfigMixin


@strict
class Olmo2MLAConfig(MLAConfigMixin, Olmo2Config):
    model_type = "rehead_olmo2_mla"
    norm_all_heads = True


class Olmo2MLAModel(ConvertedModel, Olmo2Model):
    config: Olmo2MLAConfig


class Olmo2MLAForCausalLM(ConvertedForCausalLM, Olmo2ForCausalLM):
    config: Olmo2MLAConfig
    model_class = Olmo2MLAModel
