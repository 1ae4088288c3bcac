"""What a forward pass of a causal language model leaves before its head.

Letters: B windows, T tokens, D hidden size, V entries in the vocabulary.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..converters.errors import InputError
from .loss import Head

# The names that transformers' decoder layers give their attention.
ATTENTION = ("self_attn", "attention", "attn")


@dataclass(frozen=True)
class States:
    """What one forward pass left.

    Args:
        last: what the head reads, [B, T, D]; the scores [B, T, V] where the head is not plain.
        attention: the output of each attention block, [B, T, D], if asked for.
    """

    last: Tensor
    attention: list[Tensor]


@dataclass
class _Record:
    last: Tensor | None = None
    attention: list[Tensor] = field(default_factory=list)


def causal_lm(model: Any) -> Any:
    """The transformers model inside an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def attention_modules(model: Any) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in causal_lm(model).named_modules() if n.split(".")[-1] in ATTENTION]


@contextlib.contextmanager
def _recorded(model: Any, *, attention: bool) -> Iterator[_Record]:
    """Records what one forward pass leaves, which may go through any wrapper around the model."""
    seen = _Record()

    def keep_last(module: nn.Module, args: Any, output: Any) -> None:
        seen.last = output[0]

    def keep_attention(module: nn.Module, args: Any, output: Any) -> None:
        seen.attention.append(output[0] if isinstance(output, tuple) else output)

    hooks = [causal_lm(model).get_decoder().register_forward_hook(keep_last)]
    if attention:
        hooks += [m.register_forward_hook(keep_attention) for _, m in attention_modules(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def forward_states(
    model: Any, wrapped: Any, ids: Tensor, *, plain: bool, attention: bool
) -> States:
    """The states that `wrapped`, a wrapper of the model or itself, makes of ids [B, T].

    Args:
        plain: whether the model's scores are its head times the last states, so that all but one
            of them need not be made.
    """
    with _recorded(model, attention=attention) as seen:
        few = {"logits_to_keep": 1} if plain else {}
        output = wrapped(input_ids=ids, use_cache=False, **few)
    last = seen.last if plain else output.logits
    if last is None:
        raise InputError("the model's decoder was not run, so nothing can be trained on it.")
    return States(last, seen.attention)


@torch.no_grad()
def has_plain_head(model: Any, *, bfloat16: bool) -> bool:
    """Whether the scores are a linear map of the last states: no scaling, no soft cap."""
    head = causal_lm(model).get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    device = head.weight.device
    ids = torch.arange(8, device=device)[None]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        with _recorded(model, attention=False) as seen:
            logits = model(input_ids=ids, use_cache=False).logits
        if seen.last is None or seen.last.shape[-1] != head.in_features:
            return False
        mine = head(seen.last)
    return torch.allclose(mine.float(), logits.float(), rtol=1e-2, atol=1e-2)


def head_of(model: Any, *, plain: bool, dtype: torch.dtype) -> Head:
    """The model's head in the dtype to compute in; gathered where processes hold shares of it."""
    if not plain:
        return Head(None)
    layer = causal_lm(model).get_output_embeddings()
    weight, bias = (_whole(x, dtype) for x in (layer.weight, layer.bias))
    return Head(weight, bias)


def _whole(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to(dtype)
