"""A family's own models with their attention replaced by that of a converted form."""

from typing import ClassVar

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_utils import PreTrainedModel

from .cached_decoding import check_if_newer
from .converted_attention import ConvertedAttention
from .rope_slots import hand_over_angles


class ConvertedModelMixin(PreTrainedModel):
    """What a family's converted classes need beyond the family's own."""

    _supports_attention_backend = True

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        # The family's own, which are behind this mixin.
        recorded = super()._can_record_outputs or {}
        cls._can_record_outputs = recorded | {"attentions": ConvertedAttention}

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Loads the model as transformers does, after a check of newer libraries.

        Raises:
            WrongDecoding: with the installed libraries, newer than tested, a cache is not used.
        """
        check_if_newer(cls)
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    def is_backend_compatible(cls):
        """Whether an engine may replace the attention by its own, which caches keys and values.

        Only GQA caches keys and values. An engine would compute the other forms wrongly.
        """
        return cls.config_class.form_name == "GQA"

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, ConvertedAttention):
            module.init_own()


class ConvertedModel(ConvertedModelMixin):
    """A family's decoder, to be named before the family's own class."""

    # Where the family keeps its layers.
    layers_name: ClassVar[str] = "layers"
    # What replaces the attention of a layer, by what the config says of it (`layer_layout`).
    layouts: ClassVar[dict[str, type[ConvertedAttention]]]

    def __init__(self, config):
        super().__init__(config)
        for layer_idx, layer in enumerate(getattr(self, self.layers_name)):
            attention = self.layouts[config.layer_layout(layer_idx)]
            setattr(layer, config.attention_name, attention(config, layer_idx))
        if hasattr(self, "rotary_emb"):
            self.rotary_emb.register_forward_hook(hand_over_angles)
        self.post_init()


class ConvertedForCausalLM(ConvertedModelMixin):
    """A family's language model around its converted decoder, to be named before its own class."""

    model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config):
        # The family's own decoder is not kept: it is made without memory.
        with torch.device("meta"):
            super().__init__(config)
        for name, module in list(self.named_children()):
            if isinstance(module, PreTrainedModel):
                setattr(self, name, self.model_class(config))
            else:
                bias = module.bias is not None
                setattr(self, name, nn.Linear(module.in_features, module.out_features, bias=bias))
        self.post_init()


def keep_stored_names(source: str, converted: str):
    """Have converted checkpoints read and written as transformers does those of the source.

    Where a family's files name or split weights otherwise than its classes do, conversion leaves
    what is not attention as it is stored. Most families have nothing to keep.

    Args:
        source: a family's model_type, or the name of one of its classes.
        converted: the same of the converted family.
    """
    mapping = get_checkpoint_conversion_mapping(source)
    if mapping is not None:
        register_checkpoint_conversion_mapping(converted, mapping, overwrite=True)
