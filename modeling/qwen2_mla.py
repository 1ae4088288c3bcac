"""Qwen2 with multi-head latent attention."""

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
from .mla import MLAAttention
from .mla_config import MLAConfigMixin
from .rope_slots import SlotRotaryMixin


@strict
class Qwen2MLAConfig(MLAConfigMixin, Qwen2Config):
    model_type = "rehead_qwen2_mla"
    head_dim: int | None = None


class Qwen2MLARotaryEmbedding(SlotRotaryMixin, Qwen2RotaryEmbedding):
    pass


class Qwen2MLAModel(ConvertedModelMixin, Qwen2Model):
    config: Qwen2MLAConfig
    _can_record_outputs = recorded_outputs(Qwen2DecoderLayer)

    def __init__(self, config: Qwen2MLAConfig):
        super().__init__(config)
        self.rotary_emb = Qwen2MLARotaryEmbedding(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MLAAttention(config, layer_idx)
        self.post_init()


class Qwen2MLAForCausalLM(ConvertedModelMixin, Qwen2ForCausalLM):
    config: Qwen2MLAConfig
    _can_record_outputs = Qwen2MLAModel._can_record_outputs

    def __init__(self, config: Qwen2MLAConfig):
        # Past Qwen2ForCausalLM's own, which would build a second decoder.
        super(Qwen2ForCausalLM, self).__init__(config)
        self.model = Qwen2MLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
