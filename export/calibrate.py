"""What the layers of a converted model read and do on calibration text."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..converters.activations import Activations
from ..converters.stream import LayerStream
from ..modeling import MLAAttention
from .latent import LatentModel


class ConvertedStream(LayerStream):
    """Runs a converted checkpoint layer by layer."""

    def _load(self, module: nn.Module, layer: int) -> nn.Module:
        module = super()._load(module, layer)
        for part in module.modules():
            if isinstance(part, MLAAttention):  # not saved, and without memory so far
                part.rope_index = nn.Buffer(part.make_rope_index(), persistent=False)
        return module


def seen_by_layers(model: LatentModel, tokens: Tensor) -> Iterator[Activations]:
    """The inputs and outputs of every layer's attention, one layer after the other."""
    stream = ConvertedStream(model.source, model.family, tokens, torch.device("cpu"))
    for index in range(model.config.num_hidden_layers):
        yield stream.advance(index)
