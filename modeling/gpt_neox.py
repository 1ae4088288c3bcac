"""GPT-NeoX with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM, GPTNeoXModel

from .converted_model import ConvertedForCausalLM, ConvertedModel, keep_stored_names
from .gqa_config import GQAConfigMixin
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


@strict
class GPTNeoXGQAConfig(GQAConfigMixin, GPTNeoXConfig):
    model_type = "rehead_gpt_neox_gqa"
    attention_name = "attention"
    partial_rotary = True


class GPTNeoXGQAModel(ConvertedModel, GPTNeoXModel):
    config: GPTNeoXGQAConfig


class GPTNeoXGQAForCausalLM(ConvertedForCausalLM, GPTNeoXForCausalLM):
    config: GPTNeoXGQAConfig
    model_class = GPTNeoXGQAModel


keep_stored_names(
    "GPTNeoXForCausalLM", *(f"GPTNeoX{form}ForCausalLM" for form in ("MLA", "MFA", "GQA"))
)
