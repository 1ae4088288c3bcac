"""Llama with multi-head latent attention."""

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
from .mla import MLAAttention
from .mla_config import MLAConfigMixin
from .rope_slots import SlotRotaryMixin


@strict
class LlamaMLAConfig(MLAConfigMixin, LlamaConfig):
    model_type = "rehead_llama_mla"


class LlamaMLARotaryEmbedding(SlotRotaryMixin, LlamaRotaryEmbedding):
    pass


class LlamaMLAModel(ConvertedModelMixin, LlamaModel):
    config: LlamaMLAConfig
    _can_record_outputs = recorded_outputs(LlamaDecoderLayer)

    def __init__(self, config: LlamaMLAConfig):
        super().__init__(config)
        self.rotary_emb = LlamaMLARotaryEmbedding(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MLAAttention(config, layer_idx)
        self.post_init()


class LlamaMLAForCausalLM(ConvertedModelMixin, LlamaForCausalLM):
    config: LlamaMLAConfig
    _can_record_outputs = LlamaMLAModel._can_record_outputs

    def __init__(self, config: LlamaMLAConfig):
        # Past LlamaForCausalLM's own, which would build a second decoder.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = LlamaMLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
