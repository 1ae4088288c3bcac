"""Models and tokenizers from folders, with errors a user can act on."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

# Imported for what it does: it registers rehead's classes with transformers.
from .. import modeling  # noqa: F401
from ..converters.checkpoint import locate, open_source, read_config
from ..converters.errors import InputError, near_path, one_line


def load_config(model: str | Path) -> PretrainedConfig:
    """The config of a folder, a hub id or a `.gguf` file; of a hub id nothing else is fetched.

    Raises:
        InputError: there is no such model, or transformers does not know it.
    """
    if Path(model).expanduser().exists():
        return read_config(locate(model))
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{model} is no file or folder here, and not to be had from the hub "
            f"({one_line(error, 120)}).{near_path(Path(model))}"
        ) from error


def load_model(
    model: str | Path, *, dtype: str | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """The causal language model of a folder, a hub id or a `.gguf` file, ready to be evaluated.

    Args:
        dtype: a floating-point type by its torch name; None for the one it is stored in.
        device: a torch device.

    Raises:
        InputError: there is no such model, its weights are not those of its config, or dtype or
            device are not to be had.
    """
    target = _device(device)
    source = open_source(model)
    # Capped scores, which sdpa leaves out; transformers 5.16 takes it all the same.
    caps = getattr(source.config, "attn_logit_softcapping", None) is not None
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=source.config,
            attn_implementation="eager" if caps else None,
            dtype=parse_dtype(dtype),
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{model} cannot be loaded: {one_line(error)}") from error
    # transformers fills in what is missing at random and only warns.
    if info["missing_keys"]:
        raise InputError(f"{model} lacks weights, {sorted(info['missing_keys'])[0]} for one.")
    return loaded.to(target).eval()


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer that lies beside a model's weights."""
    from ..converters.checkpoint import locate

    path = locate(model)
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{model} has no usable tokenizer: {one_line(error)}") from error


def parse_dtype(name: str | None) -> torch.dtype | str:
    """The torch dtype of that name; "auto", the stored one, for None."""
    if name is None:
        return "auto"
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(f"--dtype {name} is unknown. Use float32, bfloat16, float16 or float64.")
    return dtype


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name} cannot be used here ({one_line(error, 100)}). Use cpu."
        ) from error
    if device.type == "meta":
        raise InputError("--device meta computes nothing. Use cpu.")
    return device
