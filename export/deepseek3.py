"""A conversion made with `--preset engine` as a checkpoint of DeepSeek-V3's class, without experts.

vLLM and SGLang have a class of that name of their own. Its norm on the latent is made nearly
constant, see `engine`.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import DeepseekV3Config

from .latent import LatentModel
from .native import CARRIED
from .steady import SteadyLayer

ARCHITECTURE = "DeepseekV3ForCausalLM"
# No layer has experts. Engines read these all the same, and some of them count or divide by them.
NO_EXPERTS = {
    "n_routed_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def deepseek_config(
    model: LatentModel, dtype: torch.dtype, base: float, extra: int
) -> DeepseekV3Config:
    """The config of the exported model.

    Args:
        base: of the rotary frequencies.
        extra: channels more in the latent.
    """
    old = model.config
    carried = {name: getattr(old, name) for name in CARRIED if hasattr(old, name)}
    # vLLM's class has no tied head, and leaves it unfilled if it is not in the file.
    return DeepseekV3Config(
        **carried | {"tie_word_embeddings": False} | NO_EXPERTS,
        num_key_value_heads=old.num_attention_heads,
        first_k_dense_replace=old.num_hidden_layers,
        moe_intermediate_size=old.intermediate_size,
        num_mtp_layers=0,  # written as num_nextn_predict_layers
        kv_lora_rank=old.kv_lora_rank + extra,
        q_lora_rank=None,
        attention_bias=False,
        rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        architectures=[ARCHITECTURE],
        dtype=dtype,
        conversion=old.conversion,
    )


def deepseek_tensors(
    model: LatentModel, layers: Iterable[SteadyLayer], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint; `layers` are those of the model in order."""
    for index, layer in enumerate(layers):
        for name, tensor in deepseek_attention(layer).items():
            yield f"model.layers.{index}.self_attn.{name}", tensor.to(dtype)
    for name, stored in model.other_names().items():
        tensor = model.source.tensor(stored).to(dtype)
        yield name, tensor
        if name == EMBEDDING and model.config.tie_word_embeddings:
            yield HEAD, tensor


def deepseek_attention(layer: SteadyLayer) -> dict[str, Tensor]:
    """One layer by the names of the class, in float64.

    The norm's weights are put into the map that reads it, where no dtype rounds them; those that
    are left choose the latent's own channels.
    """
    return {
        "q_proj.weight": layer.q,
        "kv_a_proj_with_mqa.weight": torch.cat([layer.latent, layer.rope]),
        "kv_a_layernorm.weight": (layer.weight != 0).to(layer.weight.dtype),
        "kv_b_proj.weight": layer.kv * layer.weight,
        "o_proj.weight": layer.o,
    }
