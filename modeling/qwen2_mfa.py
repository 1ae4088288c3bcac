"""Qwen2 with multi-matrix factorization attention."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2RotaryEmbedding,
)

from .converted_attention import ConvertedModelMixin, recorded_outputs
from .mfa import MFAAttention
from .mfa_config import MFAConfigMixin
from .rope_slots import SlotRotaryMixin


@strict
class Qwen2MFAConfig(MFAConfigMixin, Qwen2Config):
    model_type = "rehead_qwen2_mfa"
    head_dim: int | None = None


class Qwen2MFARotaryEmbedding(SlotRotaryMixin, Qwen2RotaryEmbedding):
    pass


class Qwen2MFAModel(ConvertedModelMixin, Qwen2Model):
    config: Qwen2MFAConfig
    _can_record_outputs = recorded_outputs(Qwen2DecoderLayer)

    def __init__(self, config: Qwen2MFAConfig):
        super().__init__(config)
        self.rotary_emb = Qwen2MFARotaryEmbedding(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MFAAttention(config, layer_idx)
        self.post_init()


class Qwen2MFAForCausalLM(ConvertedModelMixin, Qwen2ForCausalLM):
    config: Qwen2MFAConfig
    _can_record_outputs = Qwen2MFAModel._can_record_outputs

    def __init__(self, config: Qwen2MFAConfig):
        # Past Qwen2ForCausalLM's own, which would build a second decoder.
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = Qwen2MFAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
