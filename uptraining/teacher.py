"""A teacher that holds only what the student does not.

A conversion leaves embeddings, norms, MLPs and the head as they are, so the source and its
conversion differ in a small part of their weights. The teacher's tensors are read one at a time;
one that equals a frozen weight of the student becomes that weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..converters.checkpoint import Source, open_source
from ..converters.errors import InputError
from ..evaluation import load_model, load_tokenizer
from .precision import kept_dtype, linear_weights, settle
from .states import causal_lm


@dataclass(frozen=True)
class Teacher:
    """A model whose scores are matched.

    Args:
        model: frozen, in evaluation mode; None where there is no teacher.
        bytes: the size of all its weights, and `shared_bytes` of those that are the student's.
    """

    model: Any
    bytes: int = 0
    shared_bytes: int = 0


def load_teacher(
    name: str, student: Any, *, device: torch.device, bfloat16: bool, share: bool = True
) -> Teacher:
    """The model of that name, with the student's storage wherever the weights are equal.

    Args:
        student: as it will be trained, adapters in place, on `device`.
        share: False where the student's weights will be taken apart and spread over processes.

    Raises:
        InputError: there is no such model.
    """
    source = open_source(name)
    # Buffers are made for real: the rotary tables are in no file.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(source.config, trust_remote_code=False)
    frozen = _frozen(student) if share else {}
    tensors, shared = _read(source, model, frozen, device, bfloat16)
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    if any(parameter.is_meta for parameter in model.parameters()):
        # A family whose weights transformers renames as it loads them.
        model, shared = load_model(name), 0
        model.requires_grad_(False)
        settle(model, bfloat16=bfloat16)
    model.requires_grad_(False)
    total = sum(parameter.nbytes for parameter in model.parameters())
    return Teacher(model.to(device).eval(), total, shared)


def _frozen(student: Any) -> dict[str, Tensor]:
    """The student's frozen weights, under the names that they have without adapters."""
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in causal_lm(student).named_parameters()
        if not parameter.requires_grad
    }


def _read(
    source: Source,
    model: nn.Module,
    frozen: Mapping[str, Tensor],
    device: torch.device,
    bfloat16: bool,
) -> tuple[dict[str, Tensor], int]:
    """The source's tensors by name, and how many bytes of them are the student's."""
    linear, names = linear_weights(model), set(model.state_dict())
    tensors, shared = {}, 0
    for name in source.names():
        if name not in names:
            continue
        tensor = source.tensor(name)
        if tensor.is_floating_point():
            dtype = kept_dtype(tensor.dtype, linear=name in linear, bfloat16=bfloat16)
            tensor = tensor.to(device, dtype)
        mine = frozen.get(name)
        if mine is not None and mine.dtype == tensor.dtype and torch.equal(mine, tensor):
            tensor = mine
            shared += mine.nbytes
        tensors[name] = tensor
    return tensors, shared


def check_same_tokens(teacher: str, student: str) -> None:
    """Raises unless both models read the same token ids."""
    ours, theirs = load_tokenizer(student), load_tokenizer(teacher)
    if ours.get_vocab() != theirs.get_vocab():
        raise InputError(
            f"the tokenizers of {teacher} and {student} differ, so their scores cannot be "
            "compared. Give a teacher with the same tokenizer, or --teacher none."
        )
