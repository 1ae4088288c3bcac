"""Seed-OSS with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.seed_oss.configuration_seed_oss import SeedOssConfig
from transformers.models.seed_oss.modeling_seed_oss import SeedOssForCausalLM, SeedOssModel

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


@strict
class SeedOssMLAConfig(MLAConfigMixin, SeedOssConfig):
    model_type = "rehead_seed_oss_mla"
    head_dim: int | None = 128


class SeedOssMLAModel(ConvertedModel, SeedOssModel):
    config: SeedOssMLAConfig


class SeedOssMLAForCausalLM(ConvertedForCausalLM, SeedOssForCausalLM):
    config: SeedOssMLAConfig
    model_class = SeedOssMLAModel


@strict
class SeedOssMFAConfig(MFAConfigMixin, SeedOssConfig):
    model_type = "rehead_seed_oss_mfa"
    head_dim: int | None = 128


class SeedOssMFAModel(ConvertedModel, SeedOssModel):
    config: SeedOssMFAConfig


class SeedOssMFAForCausalLM(ConvertedForCausalLM, SeedOssForCausalLM):
    config: SeedOssMFAConfig
    model_class = SeedOssMFAModel
