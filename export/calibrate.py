"""What the layers of a converted model read and do on calibration text."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..converters.activations import Activations
from ..converters.stream import LayerStream
from .latent import LatentModel


def seen_by_layers(model: LatentModel, tokens: Tensor) -> Iterator[Activations]:
    """The inputs and outputs of every layer's attention, one layer after the other."""
    stream = LayerStream(model.source, model.family, tokens, torch.device("cpu"))
    for index in range(model.config.num_hidden_layers):
        yield stream.advance(index)
