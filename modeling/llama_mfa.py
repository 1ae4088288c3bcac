"""Llama with multi-matrix factorization attention."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRotaryEmbedding,
)

from .converted_attention import ConvertedModelMixin, recorded_outputs
from .mfa import MFAAttention
from .mfa_config import MFAConfigMixin
from .rope_slots import SlotRotaryMixin


@strict
class LlamaMFAConfig(MFAConfigMixin, LlamaConfig):
    model_type = "rehead_llama_mfa"


class LlamaMFARotaryEmbedding(SlotRotaryMixin, LlamaRotaryEmbedding):
    pass


class LlamaMFAModel(ConvertedModelMixin, LlamaModel):
    config: LlamaMFAConfig
    _can_record_outputs = recorded_outputs(LlamaDecoderLayer)

    def __init__(self, config: LlamaMFAConfig):
        super().__init__(config)
        self.rotary_emb = LlamaMFARotaryEmbedding(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MFAAttention(config, layer_idx)
        self.post_init()


class LlamaMFAForCausalLM(ConvertedModelMixin, LlamaForCausalLM):
    config: LlamaMFAConfig
    _can_record_outputs = LlamaMFAModel._can_record_outputs

    def __init__(self, config: LlamaMFAConfig):
        # Past LlamaForCausalLM's own, which would build a second decoder.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaMFAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
