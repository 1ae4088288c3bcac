"""What engines without biases ask of a conversion, and its layers made for them.

llama.cpp's and the serving engines' MLA is DeepSeek's: no bias, frequencies that are powers of one
base, an RMSNorm on the latent. `steady` makes that norm nearly constant, and the output map makes
up for what is left of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..converters.errors import InputError
from ..converters.refit import output_step
from ..converters.rope_split import rope_base
from .calibrate import seen_by_layers
from .latent import LatentModel
from .steady import SteadyLayer, normed_heads, steady

AGAIN = "Convert the original again with --to mla --preset engine."


def plain_base(model: LatentModel, engine: str) -> float:
    """The base of the model's rotary frequencies.

    Args:
        engine: what cannot hold a model, as errors name it.

    Raises:
        InputError: the model has what DeepSeek's MLA lacks.
    """
    config, path = model.config, model.source.path
    biases = [n for n in ("q_bias", "kv_a_bias", "kv_b_bias", "o_bias") if getattr(config, n)]
    if biases:
        raise InputError(f"{path} has biases ({biases[0]}), and {engine}'s MLA none. {AGAIN}")
    if config.q_lora_rank is not None:
        raise InputError(
            f"{path} has low-rank queries, which are not exported for {engine}. {AGAIN}"
        )
    base = rope_base(model.inv_freq)
    if base is None or not torch.equal(model.inv_freq, model.long_inv_freq):
        raise InputError(
            f"{path} rotates with frequencies that are no powers of one base, and {engine} "
            f"computes them so. {AGAIN}"
        )
    if config.hidden_act != "silu":
        raise InputError(f"{path} has the activation {config.hidden_act}, and {engine} silu.")
    return base


def steady_layers(
    model: LatentModel,
    tokens: Int[Tensor, "N T"],
    extra: int,
    progress: Callable[[str, int, int, dict[str, Any]], None],
) -> Iterator[SteadyLayer]:
    """Every layer with `extra` channels more in its latent, one in memory at a time.

    Args:
        tokens: calibration text.
    """
    config = model.config
    heads, eps = config.num_attention_heads, config.rms_norm_eps
    for index, seen in enumerate(seen_by_layers(model, tokens)):
        layer = model.layer(index)
        made = steady(layer, seen.x.flatten(0, 1), extra, eps)

        def features(x: Tensor, made: SteadyLayer = made) -> Tensor:
            return normed_heads(made, x[None], model.inv_freq, heads, eps)[0]

        step = output_step(features, made.o.float(), seen)
        if step is not None:  # the output map makes up for what the norm changes
            made = replace(made, o=made.o + step)
        yield made
        progress("layers", index + 1, config.num_hidden_layers, {"spread": made.spread})
        del seen
