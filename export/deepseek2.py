"""A conversion made with `--preset engine` as llama.cpp's `deepseek2`, a GGUF file.

Its norm on the latent is made nearly constant, see `engine`.

Letters: H heads, N position-free key width, R rotated width, V value width, L channels of the
latent (its rank and the rows that steady its norm), D hidden size.
"""

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..converters.errors import InputError
from .engine import plain_base, steady_layers
from .gguf_tokenizer import add_tokenizer
from .latent import LatentModel
from .steady import SteadyLayer

OTHERS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
F32 = gguf.GGMLQuantizationType.F32
STORED = {
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    torch.float32: gguf.LlamaFileType.ALL_F32,
    torch.float16: gguf.LlamaFileType.MOSTLY_F16,
    torch.bfloat16: gguf.LlamaFileType.MOSTLY_BF16,
}


def check_engine(model: LatentModel) -> float:
    """The base of the model's rotary frequencies.

    Raises:
        InputError: llama.cpp's deepseek2 cannot hold the model.
    """
    base = plain_base(model, "llama.cpp")
    for name in model.other_names():
        target_name(name, model.source.path)
    return base


def target_name(name: str, path: Path) -> str:
    """llama.cpp's name of a tensor that is no layer's attention."""
    if name in OTHERS:
        return OTHERS[name]
    parts = name.split(".", 3)
    if parts[:2] == ["model", "layers"] and parts[3] in IN_LAYER:
        return f"blk.{parts[2]}.{IN_LAYER[parts[3]]}"
    raise InputError(f"{path} has {name}, for which llama.cpp has no place.")


def layer_tensors(layer: SteadyLayer, heads: int, nope: int) -> dict[str, Tensor]:
    """One layer's attention by llama.cpp's names, absorbed: keys and values apart, by head."""
    per_head = layer.kv.unflatten(0, (heads, -1))  # [H, N + V, L]
    return {
        "attn_q.weight": layer.q,
        "attn_kv_a_mqa.weight": torch.cat([layer.latent, layer.rope]),
        "attn_kv_a_norm.weight": layer.weight,
        "attn_k_b.weight": per_head[:, :nope].transpose(1, 2),  # [H, L, N]
        "attn_v_b.weight": per_head[:, nope:],  # [H, V, L]
        "attn_output.weight": layer.o,
    }


def write_gguf(
    model: LatentModel,
    output: Path,
    base: float,
    tokens: Int[Tensor, "N T"],
    extra: int,
    *,
    force: bool,
    progress: Callable[[str, int, int, dict[str, Any]], None],
) -> list[float]:
    """Writes the file beside its place and puts it there when it is complete.

    Args:
        base: of the rotary frequencies.
        tokens: calibration text.
        extra: channels more in the latent.

    Returns:
        The spread of every layer's norm.
    """
    writer = gguf.GGUFWriter(None, "deepseek2")
    add_metadata(writer, model, base, extra)
    planned = planned_shapes(model, extra)
    for name, shape in planned.items():
        kind = storage(shape, model.dtype)
        size = int(np.prod(shape)) * (4 if kind == F32 else 2)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
    partial = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    spreads: list[float] = []
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensors = gguf_tensors(model, tokens, extra, spreads, progress)
        for (name, shape), (given, tensor) in zip(planned.items(), tensors, strict=True):
            if (name, shape) != (given, tuple(tensor.shape)):
                raise ValueError(f"{given} {tuple(tensor.shape)} came for {name} {shape}")
            data = tensor.float().contiguous().numpy()
            writer.write_tensor_data(gguf.quantize(data, storage(shape, model.dtype)))
        writer.close()
        check_file(output, force)
        partial.replace(output)
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror or error}.") from error
    finally:
        partial.unlink(missing_ok=True)
    return spreads


def gguf_tensors(
    model: LatentModel,
    tokens: Int[Tensor, "N T"],
    extra: int,
    spreads: list[float],
    progress: Callable[[str, int, int, dict[str, Any]], None],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by llama.cpp's names, one layer's attention in memory at a time."""
    heads, nope = model.config.num_attention_heads, model.config.qk_nope_head_dim
    for index, made in enumerate(steady_layers(model, tokens, extra, progress)):
        spreads.append(made.spread)
        for name, tensor in layer_tensors(made, heads, nope).items():
            yield f"blk.{index}.{name}", tensor
    for name, stored in model.other_names().items():
        yield target_name(name, model.source.path), model.source.tensor(stored)


def planned_shapes(model: LatentModel, extra: int) -> dict[str, tuple[int, ...]]:
    """The shapes of `gguf_tensors`, in their order; the file names them all before the first."""
    config = model.config
    heads, hidden = config.num_attention_heads, config.hidden_size
    nope, rotated, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    rank = config.kv_lora_rank + extra
    layer = {
        "attn_q.weight": (heads * (nope + rotated), hidden),
        "attn_kv_a_mqa.weight": (rank + rotated, hidden),
        "attn_kv_a_norm.weight": (rank,),
        "attn_k_b.weight": (heads, rank, nope),
        "attn_v_b.weight": (heads, value, rank),
        "attn_output.weight": (hidden, heads * value),
    }
    planned = {
        f"blk.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    for name, stored in model.other_names().items():
        planned[target_name(name, model.source.path)] = model.source.shape(stored)
    return planned


def storage(shape: tuple[int, ...], dtype: torch.dtype) -> gguf.GGMLQuantizationType:
    """Matrices in the checkpoint's own precision, norms in float32."""
    return F32 if len(shape) == 1 else STORED.get(dtype, F32)


def check_file(output: Path, force: bool) -> None:
    """Raises unless a GGUF file may be put at `output`."""
    if output.suffix.lower() != ".gguf":
        raise InputError(f"{output} must end in .gguf. Give another --output.")
    if output.is_symlink() or (output.exists() and not output.is_file()):
        raise InputError(f"{output} exists and is no file. Give another --output.")
    if output.exists() and not force:
        raise InputError(f"{output} exists. Give --force to replace it, or another --output.")


def add_metadata(writer: gguf.GGUFWriter, model: LatentModel, base: float, extra: int) -> None:
    """What llama.cpp reads of a deepseek2 model without experts."""
    config = model.config
    rank, rotated = config.kv_lora_rank + extra, config.qk_rope_head_dim
    writer.add_name(model.source.path.resolve().name)
    writer.add_file_type(FILE_TYPES.get(model.dtype, gguf.LlamaFileType.ALL_F32))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)  # absorbed, all heads read one key
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(rotated)
    writer.add_q_lora_rank(0)  # whole queries; the key must be there
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rotated)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + rotated)
    writer.add_value_length_mla(config.v_head_dim)
    # All layers are dense; these are read all the same.
    writer.add_leading_dense_block_count(config.num_hidden_layers)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_shared_count(0)
    add_tokenizer(writer, model.source.path, config.vocab_size)
