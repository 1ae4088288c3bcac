"""Mistral with multi-head latent attention."""

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralRotaryEmbedding,
)

from .converted_attention import ConvertedModelMixin, recorded_outputs
from .mla import MLAAttention
from .mla_config import MLAConfigMixin
from .rope_slots import SlotRotaryMixin


@strict
class MistralMLAConfig(MLAConfigMixin, MistralConfig):
    model_type = "rehead_mistral_mla"
    # Mistral's own default is a window, which latent attention does not have.
    sliding_window: int | None = None


class MistralMLARotaryEmbedding(SlotRotaryMixin, MistralRotaryEmbedding):
    pass


class MistralMLAModel(ConvertedModelMixin, MistralModel):
    config: MistralMLAConfig
    _can_record_outputs = recorded_outputs(MistralDecoderLayer)

    def __init__(self, config: MistralMLAConfig):
        super().__init__(config)
        self.rotary_emb = MistralMLARotaryEmbedding(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MLAAttention(config, layer_idx)
        self.post_init()


class MistralMLAForCausalLM(ConvertedModelMixin, MistralForCausalLM):
    config: MistralMLAConfig
    _can_record_outputs = MistralMLAModel._can_record_outputs

    def __init__(self, config: MistralMLAConfig):
        # Past MistralForCausalLM's own, which would build a second decoder.
        super(MistralForCausalLM, self).__init__(config)
        self.model = MistralMLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
