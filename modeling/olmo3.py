"""OLMo 3 with its attention converted. Its norms of keys allow MLA that forms keys on read."""

from huggingface_hub.dataclasses import strict
from transformers.models.olmo3.configuration_olmo3 import Olmo3Config
from transformers.models.olmo3.modeling_olmo3 import Olmo3ForCausalLM, Olmo3Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mla_config import MLAConfigMixin


@strict
class Olmo3MLAConfig(MLAConfigMixin, Olmo3Config):
    model_type = "rehead_olmo3_mla"
    norm_all_heads = True


class Olmo3MLAModel(ConvertedModel, Olmo3Model):
    config: Olmo3MLAConfig


class Olmo3MLAForCausalLM(ConvertedForCausalLM, Olmo3ForCausalLM):
    config: Olmo3MLAConfig
    model_class = Olmo3MLAModel
