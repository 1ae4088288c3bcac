"""GPT-NeoX with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM, GPTNeoXModel

from .converted_model import ConvertedForCausalLM, ConvertedModel, keep_stored_names
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class GPTNeoXMLAConfig(MLAConfigMixin, GPTNeoXConfig):
    model_type = "rehead_gpt_neox_mla"
    attention_name = "attention"
    partial_rotary = True


class GPTNeoXMLAModel(ConvertedModel, GPTNeoXModel):
    config: GPTNeoXMLAConfig


class GPTNeoXMLAForCausalLM(ConvertedForCausalLM, GPTNeoXForCausalLM):
    config: GPTNeoXMLAConfig
    model_class = GPTNeoXMLAModel


@strict
class GPTNeoXMFAConfig(MFAConfigMixin, GPTNeoXConfig):
    model_type = "rehead_gpt_neox_mfa"
    attention_name = "attention"
    partial_rotary = True


class GPTNeoXMFAModel(ConvertedModel, GPTNeoXModel):
    config: GPTNeoXMFAConfig


class GPTNeoXMFAForCausalLM(ConvertedForCausalLM, GPTNeoXForCausalLM):
    config: GPTNeoXMFAConfig
    model_class = GPTNeoXMFAModel


keep_stored_names("GPTNeoXForCausalLM", "GPTNeoXMLAForCausalLM", "GPTNeoXMFAForCausalLM")
