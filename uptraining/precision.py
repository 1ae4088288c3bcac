"""Which dtype each weight is kept in while training."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..converters.errors import InputError


def linear_weights(model: nn.Module) -> set[str]:
    """The names of the weights that only ever are a factor of a matrix product."""
    return {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def kept_dtype(stored: torch.dtype, *, linear: bool, bfloat16: bool) -> torch.dtype:
    """The dtype to keep a frozen weight in.

    Autocast rounds the factors of products to bfloat16 again in every pass; kept so they take half
    the memory and no time. Norms and embeddings make the residual stream, and stay as precise as
    they are stored.
    """
    if not bfloat16:
        return torch.float32
    return torch.bfloat16 if linear or stored == torch.bfloat16 else torch.float32


def settle(model: nn.Module, *, bfloat16: bool) -> None:
    """Puts a model's frozen weights into the dtype they are kept in, trained ones into float32."""
    linear = linear_weights(model)
    for name, parameter in model.named_parameters():
        dtype = torch.float32
        if not parameter.requires_grad:
            dtype = kept_dtype(parameter.dtype, linear=name in linear, bfloat16=bfloat16)
        parameter.data = parameter.data.to(dtype)


def attention_implementation(device: torch.device, *, bfloat16: bool, window: int) -> str | None:
    """The implementation that trains fastest where it is not the model's default, else None.

    On a CPU the fused kernel wants keys and values of one width, which latent attention has not,
    and what stands in for it is slower than plain products of bfloat16 matrices: forward and
    backward took 1.8 s with sdpa and 1.1 s with eager (measured as in `without_denormals`; stock
    attention 1.1 s and 0.9 s; in float32 sdpa won). Plain products keep the scores, so long windows
    stay with sdpa.
    """
    return "eager" if device.type == "cpu" and bfloat16 and window <= 1024 else None


@contextlib.contextmanager
def without_denormals() -> Iterator[None]:
    """Lets numbers below 1e-38 be zero, as a CPU computes with them many times slower.

    A backward pass with sdpa took 1.1 s instead of 1.9 s (14M parameters as MLA, 2,048 tokens in
    bfloat16, processor time of one core, one run); with eager attention both took 0.6 s.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def training_device(name: str | None) -> torch.device:
    """The device of that name, or an accelerator if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {name}: training runs on cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name} cannot be used here. Use cpu.")
    return device
