"""Gemma 2 with its attention converted."""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM, Gemma2Model

from .converted_model import ConvertedForCausalLM, ConvertedModel
from .mfa_config import MFAConfigMixin
from .mla_config import MLAConfigMixin


class CapsScores:
    """Scores are capped, which sdpa cannot; Gemma 2's own classes of 5.16 do not say so."""

    _supports_sdpa = False


@strict
class Gemma2MLAConfig(MLAConfigMixin, Gemma2Config):
    model_type = "rehead_gemma2_mla"
    head_dim: int | None = 256
    caps_scores = True


class Gemma2MLAModel(CapsScores, ConvertedModel, Gemma2Model):
    config: Gemma2MLAConfig


class Gemma2MLAForCausalLM(CapsScores, ConvertedForCausalLM, Gemma2ForCausalLM):
    config: Gemma2MLAConfig
    model_class = Gemma2MLAModel


@strict
class Gemma2MFAConfig(MFAConfigMixin, Gemma2Config):
    model_type = "rehead_gemma2_mfa"
    head_dim: int | None = 256
    caps_scores = True


class Gemma2MFAModel(CapsScores, ConvertedModel, Gemma2Model):
    config: Gemma2MFAConfig


class Gemma2MFAForCausalLM(CapsScores, ConvertedForCausalLM, Gemma2ForCausalLM):
    config: Gemma2MFAConfig
    model_class = Gemma2MFAModel
