"""Tiny checkpoints on disk, with a tokenizer whose tokens are bytes."""

import struct
from pathlib import Path

import gguf
import numpy as np
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = "<|end|>"
_BYTES = bytes_to_unicode()
# llama.cpp's format wants a list of merges; these bytes are never in UTF-8 text.
_MERGES = [(_BYTES[0xFC], _BYTES[0xFD]), (_BYTES[0xFE], _BYTES[0xFF])]
VOCABULARY = [*_BYTES.values(), END, *map("".join, _MERGES)]
MODEL_FIELDS = dict(vocab_size=len(VOCABULARY), bos_token_id=256, eos_token_id=256)


def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that any text has a known number of them."""
    vocab = {token: index for index, token in enumerate(VOCABULARY)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=_MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=END, eos_token=END)


def save(folder: Path, model: torch.nn.Module | None = None, **options) -> torch.nn.Module:
    """The model, a tiny Llama unless given, after it was saved there with the tokenizer."""
    model = model if model is not None else tiny.source(**MODEL_FIELDS)
    model.save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return model


def save_gguf(path: Path, model: torch.nn.Module, *, rope: dict | None = None) -> None:
    """Writes a stock Llama as llama.cpp does, unquantised.

    Args:
        rope: further metadata under `llama.rope.`; the key `freqs` is written as the tensor.
    """
    config = model.config
    rope = dict(rope or {})
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    freqs = rope.pop("freqs", None)
    for key, value in rope.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"llama.rope.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    kinds = [gguf.TokenType.NORMAL] * len(VOCABULARY)
    kinds[VOCABULARY.index(END)] = gguf.TokenType.CONTROL
    writer.add_token_types(kinds)
    writer.add_token_merges([*map(" ".join, _MERGES)])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, kind = name.rpartition(".")
        target = names.get_name(stem)
        count = heads.get(target.split(".")[-1])
        if count:  # llama.cpp rotates neighbouring dims, Hugging Face's Llama the two halves
            tensor = tensor.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{target}.{kind}", tensor.contiguous().float().numpy())
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(freqs, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def safetensors_header(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file made of these parts, with a header length of one's choosing."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data
