"""Mistral with multi-matrix factorization attention."""

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
from .mfa import MFAAttention
from .mfa_config import MFAConfigMixin
from .rope_slots import SlotRotaryMixin


@strict
class MistralMFAConfig(MFAConfigMixin, MistralConfig):
    model_type = "rehead_mistral_mfa"
    # Mistral's own default is a window, which MFA does not have.
    sliding_window: int | None = None


class MistralMFARotaryEmbedding(SlotRotaryMixin, MistralRotaryEmbedding):
    pass


class MistralMFAModel(ConvertedModelMixin, MistralModel):
    config: MistralMFAConfig
    _can_record_outputs = recorded_outputs(MistralDecoderLayer)

    def __init__(self, config: MistralMFAConfig):
        super().__init__(config)
        self.rotary_emb = MistralMFARotaryEmbedding(config)
        for layer_idx, layer in enumerate(self.layers):
            layer.self_attn = MFAAttention(config, layer_idx)
        self.post_init()


class MistralMFAForCausalLM(ConvertedModelMixin, MistralForCausalLM):
    config: MistralMFAConfig
    _can_record_outputs = MistralMFAModel._can_record_outputs

    def __init__(self, config: MistralMFAConfig):
        # Past MistralForCausalLM's own, which would build a second decoder.
        super(MistralForCausalLM, self).__init__(config)
        self.model = MistralMFAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
