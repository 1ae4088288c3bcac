"""OPT with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTDecoder, OPTForCausalLM, OPTModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .gqa_config import GQAConfigMixin
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class OPTMLAConfig(MLAConfigMixin, OPTConfig):
    model_type = "rehead_opt_mla"


class OPTMLADecoder(ConvertedModel, OPTDecoder):
    config: OPTMLAConfig


# OPT's model is a shell around its decoder, as its language model is one around the model.
class OPTMLAModel(ConvertedForCausalLM, OPTModel):
    config: OPTMLAConfig
    model_class = OPTMLADecoder


class OPTMLAForCausalLM(ConvertedForCausalLM, OPTForCausalLM):
    config: OPTMLAConfig
    model_class = OPTMLAModel


@strict
class OPTMFAConfig(MFAConfigMixin, OPTConfig):
    model_type = "rehead_opt_mfa"


class OPTMFADecoder(ConvertedModel, OPTDecoder):
    config: OPTMFAConfig


class OPTMFAModel(ConvertedForCausalLM, OPTModel):
    config: OPTMFAConfig
    model_class = OPTMFADecoder


class OPTMFAForCausalLM(ConvertedForCausalLM, OPTForCausalLM):
    config: OPTMFAConfig
    model_class = OPTMFAModel


@strict
class OPTGQAConfig(GQAConfigMixin, OPTConfig):
    model_type = "rehead_opt_gqa"


class OPTGQADecoder(ConvertedModel, OPTDecoder):
    config: OPTGQAConfig


class OPTGQAModel(ConvertedForCausalLM, OPTModel):
    config: OPTGQAConfig
    model_class = OPTGQADecoder


class OPTGQAForCausalLM(ConvertedForCausalLM, OPTForCausalLM):
    config: OPTGQAConfig
    model_class = OPTGQAModel
