"""Fitting a converted layer to the original attention's output by gradient steps.

Layer by layer, with the original's inputs and outputs, so that no backward pass crosses a layer:
what it needs is one layer and its activations, whatever the model's size (LoLCATs, 2410.10254,
calls this attention transfer).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from .activations import Activations
from .maps import AttentionMaps, Reader, attention, head_outputs

# Of an entry's size by its row and column, per step, at the peak.
LEARNING_RATE = 0.015
WARM_UP = 0.1
# The least size of a row or a column, of the whole matrix'.
SMALLEST = 1e-2
# Small batches and many steps go further than the reverse at the same cost.
TOKENS_PER_STEP = 1024
TOKENS_AT_ONCE = 1024
BETAS = (0.9, 0.95)
# The relative error from which on the full rate is right; below, the rate falls with its root.
FULL_RATE_ERROR = 0.04


class Form(Protocol):
    """A frozen dataclass with the weights of a converted attention layer."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def inv_freq(self) -> Tensor: ...

    @property
    def o(self) -> Tensor: ...

    @property
    def o_bias(self) -> Tensor | None: ...

    def tensors(self) -> dict[str, Tensor]: ...

    def balanced(self) -> Self: ...

    def expand(self) -> AttentionMaps:
        """The same attention as maps per head, for whoever asks what it is."""
        ...

    def reader(self) -> Reader:
        """The same attention in the fewest operations, for whoever runs it."""
        ...


FormT = TypeVar("FormT", bound=Form)


@dataclass(frozen=True)
class OutputError:
    """How far a form's output is from the original's, on given text.

    Args:
        relative: squared error over the squared output.
        absolute: mean over tokens of the squared error over the squared residual stream, which
            can be compared across layers.
    """

    relative: float
    absolute: float


@torch.no_grad()
def output_error(
    form: Form,
    seen: Activations,
    heads: Float[Tensor, "N T H V"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> OutputError:
    """The form's error on what the original attention saw and did, weighted by `seen.weights`.

    Args:
        heads: `heads_of(form, seen.x, dtype)`, where it is known.
        dtype: to compute them in.
    """
    heads = heads_of(form, seen.x, dtype) if heads is None else heads
    o, o_bias = form.o.flatten(1).float(), None if form.o_bias is None else form.o_bias.float()
    off = linear(heads.flatten(2), o, o_bias) - seen.y
    wrong = float((off.square().sum(-1) * seen.weights).sum())
    total = float((seen.y.square().sum(-1) * seen.weights).sum())
    return OutputError(wrong / max(total, 1e-30), wrong / seen.weights.numel())


@torch.no_grad()
def heads_of(
    form: Form, x: Float[Tensor, "N T D"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "N T H V"]:
    """What the form's output map reads, in float32, computed in that dtype."""
    reader = reader_in(form, dtype)
    step = max(1, TOKENS_AT_ONCE // x.shape[1])
    return torch.cat([heads_by(reader, rows) for rows in x.split(step)])


def reader_in(form: Form, dtype: torch.dtype) -> Reader:
    """The form's reader in that dtype."""
    return rounded(form, dtype).reader()


def rounded(form: FormT, dtype: torch.dtype) -> FormT:
    """The form with its weights in that dtype."""
    return replace(form, **{name: tensor.to(dtype) for name, tensor in form.tensors().items()})


def heads_by(reader: Reader, x: Float[Tensor, "N T D"]) -> Float[Tensor, "N T H V"]:
    """`head_outputs` in the reader's dtype, as float32."""
    return head_outputs(reader, x.to(reader.o.dtype)).float()


def heal(
    form: FormT,
    seen: Activations,
    *,
    steps: int,
    generator: torch.Generator,
    learning_rate: float = LEARNING_RATE,
    low_precision: bool | None = None,
) -> FormT:
    """The form with all its maps fitted so that its output comes near the original's.

    Adam with rates relative to the size of what they change and to the error that is left (an
    almost exact layer would only be shaken by full steps), a short warm-up and a cosine decay.

    Args:
        steps: gradient steps; 0 returns the form as it is.
        generator: chooses the sequences of every step.
        low_precision: run the matrix products in bfloat16; None where the hardware has them.
    """
    if steps == 0:
        return form
    device = seen.x.device
    if low_precision is None:
        low_precision = has_fast_bfloat16(device)
    order = _orders(len(seen.x), max(1, TOKENS_PER_STEP // seen.x.shape[1]), generator)
    first = output_error(form, seen[:4]).relative
    learning_rate *= min(1.0, math.sqrt(first / FULL_RATE_ERROR))
    shares = {name: tensor.detach().float() for name, tensor in form.tensors().items()}
    sizes = {name: _sizes(tensor) for name, tensor in shares.items()}
    shares = {name: (shares[name] / size).requires_grad_(True) for name, size in sizes.items()}
    optimizer = torch.optim.Adam(shares.values(), lr=learning_rate, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    base = replace(form, inv_freq=form.inv_freq.float())
    for _ in range(steps):
        part = _rows(seen, next(order))
        parameters = {name: sizes[name] * share for name, share in shares.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
            out = attention(replace(base, **parameters).reader(), part.x)
        wrong = ((out.float() - part.y).square().sum(-1) * part.weights).sum()
        loss = wrong / (part.y.square().sum(-1) * part.weights).sum().clamp_min(1e-30)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    dtypes = {name: tensor.dtype for name, tensor in form.tensors().items()}
    found = {name: sizes[name] * share.detach() for name, share in shares.items()}
    return replace(form, **{name: tensor.to(dtypes[name]) for name, tensor in found.items()})


def _sizes(tensor: Tensor) -> Tensor:
    """An entry's, to be broadcast: its row's root mean square times its column's over that of all.

    Rows and columns are the last two dimensions, each taken over all others. How large a channel of
    the latent is, and how small the maps that read it, is a matter of basis, and rotated components
    are ten times as large as others and more. One rate for a matrix would shake what reads them.
    """
    square = tensor.square()
    whole = square.mean().sqrt() + 1e-12
    if tensor.ndim < 2:
        return whole
    rows, columns = (
        square.mean([dim for dim in range(tensor.ndim) if dim != kept], keepdim=True).sqrt()
        for kept in (tensor.ndim - 2, tensor.ndim - 1)
    )
    least = SMALLEST * whole  # what is zero, or all but zero, has a rate too
    return rows.clamp_min(least) * columns.clamp_min(least) / whole


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    return False


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _orders(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of row numbers, every sequence once before any comes again."""
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += torch.randperm(count, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]


def _rows(seen: Activations, rows: list[int]) -> Activations:
    return Activations(seen.x[rows], seen.y[rows], seen.weights[rows])
