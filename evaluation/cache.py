"""The size of a model's KV cache, read off the tensors that a forward pass leaves in it."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig

from ..modeling.cached_decoding import cache_of
from ..modeling.coding import Code

# Two lengths whose difference counts: what does not grow with the text is no cost of a token.
LENGTHS = (16, 48)


@torch.no_grad()
def kv_bytes_per_token(model: Any) -> int:
    """The bytes that every further token adds to the cache, over all layers.

    Measured, not computed from the config: two prompts are run, and the memory behind all tensors
    of the caches they leave is compared. A cache of any class and any width is so counted alike.
    """
    short, long = (_cache_bytes(model, length) for length in LENGTHS)
    per_token, rest = divmod(long - short, LENGTHS[1] - LENGTHS[0])
    if rest:
        raise RuntimeError(f"the cache of {type(model).__name__} does not grow token by token")
    return per_token


def cache_bytes_of_config(config: PretrainedConfig) -> int:
    """The same of the model a config describes, run without weights on the meta device."""
    config = copy.deepcopy(config)
    config.pad_token_id = None  # some models look for it among the ids, which have no values here
    # Experts all in one product, which takes any dtype there.
    options = {"experts_implementation": "batched_mm"} if _has_experts(config) else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    return kv_bytes_per_token(model.eval())


def _has_experts(config: PretrainedConfig) -> bool:
    return any(hasattr(config, name) for name in ("num_experts", "num_local_experts"))


def exact_bytes(config: PretrainedConfig) -> int:
    """The bytes of each sequence's first tokens in a coded cache, where they are kept whole.

    The room that a growing cache has for its next tokens is not counted.
    """
    if getattr(config, "cache_codes", None) is None:
        return 0
    codes = (Code(tuple(counts)) for layer in config.cache_codes for counts in layer)
    channels = sum(code.channels for code in codes)
    return channels * config.exact_tokens * (config.dtype or torch.float32).itemsize


def _cache_bytes(model: Any, length: int) -> int:
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.arange(length, device=model.device).remainder(vocabulary)[None]  # [1, length]
    cache = cache_of(model(input_ids=ids, use_cache=True))
    if cache is None:
        return 0
    storages = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr() or storage._cdata] = storage.nbytes()  # 0 on the meta device
    return sum(storages.values())


def _tensors(item: Any, seen: set[int]) -> list[Tensor]:
    """Every tensor reachable from a cache through its attributes, lists and dicts."""
    if isinstance(item, Tensor):
        return [item]
    if id(item) in seen or isinstance(item, (str, bytes, type)):
        return []
    seen.add(id(item))
    if isinstance(item, dict):
        inner = list(item.values())
    elif isinstance(item, (list, tuple, set)):
        inner = list(item)
    elif hasattr(item, "__dict__"):
        inner = list(vars(item).values())
    else:
        return []
    return [tensor for part in inner for tensor in _tensors(part, seen)]
