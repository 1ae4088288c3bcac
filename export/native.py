"""A converted checkpoint as transformers' own dense MLA class, Youtu, without loss.

Youtu is DeepSeek-V3's attention in a Llama: unlike deepseek_v3 it has no experts to be switched
off. What it lacks is made up for: its norms are led past (`past_norm`), any list of frequencies is
a longrope list, and query biases go through the norm of two-step queries.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, YoutuConfig

from ..converters.errors import InputError
from .latent import LatentLayer, LatentModel
from .past_norm import past_norm

ARCHITECTURE = "YoutuForCausalLM"


def stock_config(model: LatentModel, dtype: torch.dtype) -> YoutuConfig:
    """The config of the stock class that computes the same."""
    old = model.config
    q_lora_rank = old.q_lora_rank
    if q_lora_rank is None and old.q_bias:
        q_lora_rank = old.hidden_size
    return YoutuConfig(
        **{name: getattr(old, name) for name in CARRIED if hasattr(old, name)},
        num_key_value_heads=old.num_attention_heads,
        kv_lora_rank=old.kv_lora_rank + 1,
        q_lora_rank=None if q_lora_rank is None else q_lora_rank + 1,
        attention_bias=True,
        rope_interleave=True,
        rope_parameters=rope_parameters(model),
        architectures=[ARCHITECTURE],
        dtype=dtype,
        conversion=old.conversion,
    )


CARRIED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "hidden_act", "rms_norm_eps"),
    *("max_position_embeddings", "initializer_range", "use_cache", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "tie_word_embeddings"),
    # Not pad_token_id: Youtu would zero its embedding, and with tied embeddings its score, on load.
    # It stands in the generation config.
)


def rope_parameters(model: LatentModel) -> dict[str, object]:
    """The model's frequencies as a longrope list: with a base of 1 its factors are 1 / frequency.

    Queries carry the rotary embedding's attention factor, so none is left here.
    """
    return {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": model.original_length,
        "short_factor": (1 / model.inv_freq.double()).tolist(),
        "long_factor": (1 / model.long_inv_freq.double()).tolist(),
    }


def stock_tensors(model: LatentModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the stock checkpoint, one layer's attention in memory at a time."""
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}.self_attn."
        for name, tensor in stock_attention(model.layer(index), dtype).items():
            yield prefix + name, tensor.to(dtype)
    for name, stored in model.other_names().items():
        yield name, model.source.tensor(stored).to(dtype)


def stock_attention(layer: LatentLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer by the names of the stock class, in float64.

    Args:
        dtype: what they are going to be stored in.
    """
    kv = past_norm(layer.latent, layer.latent_bias, layer.kv, layer.kv_bias, layer.gain, dtype)
    rope_bias = layer.rope.new_zeros(len(layer.rope))
    o_bias = layer.o.new_zeros(len(layer.o))
    tensors = {
        "kv_a_proj_with_mqa.weight": torch.cat([kv.down, layer.rope]),
        "kv_a_proj_with_mqa.bias": torch.cat(
            [kv.bias, rope_bias if layer.rope_bias is None else layer.rope_bias]
        ),
        "kv_a_layernorm.weight": kv.weight,
        "kv_b_proj.weight": kv.up,
        "o_proj.weight": layer.o,
        "o_proj.bias": o_bias if layer.o_bias is None else layer.o_bias,
    }
    if layer.q_down is None and layer.q_bias is None:
        return tensors | {"q_proj.weight": layer.q}
    down = layer.q_down
    if down is None:
        down = torch.eye(layer.q.shape[1], dtype=layer.q.dtype)
    q = past_norm(down, None, layer.q, layer.q_bias, layer.gain, dtype)
    return tensors | {
        "q_a_proj.weight": q.down,
        "q_a_proj.bias": q.bias,
        "q_a_layernorm.weight": q.weight,
        "q_b_proj.weight": q.up,
    }


def planned_bytes(model: LatentModel, config: PretrainedConfig) -> int:
    """The size of the checkpoint of a stock class that `config` describes.

    Raises:
        InputError: the model has weights that the stock class has no place for.
    """
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    expected = skeleton.state_dict()
    left = [name for name in model.other_names() if name not in expected]
    if left:
        raise InputError(
            f"{model.source.path} has {left[0]}, for which {config.architectures[0]} has no "
            "place, so it cannot be exported."
        )
    return sum(parameter.numel() for parameter in skeleton.parameters()) * config.dtype.itemsize
