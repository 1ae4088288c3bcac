"""What was written, run as it will be loaded and held against what was meant."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..modeling.cached_decoding import WrongDecoding, distance, remedy
from .checkpoint import open_source
from .coded import Coded
from .families import Family
from .healing import Form, reader_in
from .maps import attention
from .stream import LayerStream

# The tokens of one calibration sequence that are run: positions enough for a wrong RoPE to show.
TOKENS = 256
# So many of them are also decoded one by one, through a cache.
DECODED = 2
# Relative distance of two float32 computations of one attention layer.
ROUNDING = 1e-3
# A coded number at the edge of a step is read as one step or as the next, by how it was rounded. So
# much noise in the layer's input, relative to it, moves a few numbers across edges, where rounding
# moves one at most; it may cost so many times what these cost.
AT_AN_EDGE = 1e-3
OF_EDGES = 3.0
# Beyond it, so many times what the layer's own maps lose by being stored in the dtype.
OF_DTYPE = 3.0


class WrittenWrongly(RuntimeError):
    """The folder does not compute what its layers were fitted to: a fault of ours."""


@torch.no_grad()
def verify(
    folder: Path,
    family: Family,
    forms: Iterable[Form],
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterable[float]:
    """Each layer's distance from what was meant, relative to its output.

    The model is the one that the Auto class makes of the folder's config.json, its weights are read
    back from the folder's files, and it runs from the embedding on: with one layer in memory, for
    it may be larger than that. A layer's output is compared with its form's maps on the same input,
    and then its last tokens, decoded one by one through a cache, with the same tokens without one.

    Args:
        forms: what every layer was meant to be.
        tokens: calibration sequences, [N, T].
        dtype: that the weights were written in.

    Raises:
        InputError: the folder lacks a weight, or has one of the wrong shape.
        WrittenWrongly: a layer is off by more than rounding explains.
        WrongDecoding: a layer gives something else through a cache than without one.
    """
    stream = LayerStream(open_source(folder), family, tokens[:1, :TOKENS], device)
    for layer, form in enumerate(forms):
        steps = min(DECODED, stream.tokens.shape[1] - 1)
        seen = stream.advance(layer, decode=steps)
        x = seen.x.to(form.inv_freq.device)
        meant = attention(reader_in(form, torch.float32), x)
        stored = {name: t.to(dtype).to(torch.float32) for name, t in form.tensors().items()}
        rounded = attention(reader_in(replace(form, **stored), torch.float32), x)
        del stored  # before the next layer is run
        edges = across_edges(form, x, meant)
        off, allowed = distance(seen.y.to(x), meant), distance(rounded, meant)
        if not off <= ROUNDING + OF_DTYPE * allowed + OF_EDGES * distance(edges, meant):
            raise WrittenWrongly(
                f"layer {layer} as written is {off:.2g} of its output away from what it was "
                f"fitted to, and {dtype} explains {allowed:.2g}; nothing is put in place"
            )
        if stream.decoded is not None:
            apart = distance(stream.decoded, seen.y[0, -steps:].cpu())
            # Few tokens need not have a number at an edge: it is the most that any of them loses.
            size = (
                meant.norm(dim=-1).square().mean().sqrt().clamp_min(torch.finfo(meant.dtype).tiny)
            )
            most = (edges - meant).norm(dim=-1).max() / size
            if not apart <= ROUNDING + OF_EDGES * most:
                raise WrongDecoding(
                    f"layer {layer} gives something else through a cache than without one, "
                    f"{apart:.2g} of its output away; nothing is put in place. {remedy()}"
                )
        yield off


def across_edges(form: Form, x: Tensor, meant: Tensor) -> Tensor:
    """A layer's output [1, T, D] from a noisy input, which moves a few codes to the next step.

    Args:
        x: the layer's input [1, T, D].
        meant: its output, which is returned of a form that codes nothing.
    """
    if not isinstance(form, Coded):
        return meant
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return attention(reader_in(form, torch.float32), x * (1 + AT_AN_EDGE * noise))
