"""A conversion's figures, drawn with matplotlib as SVG.

Drawn for the width of a phone: a figure's text is then readable there, and large on a desk.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..converters.recipe import Conversion, LayerReport
from ..modeling.coding import BITS

SIZE = (4.6, 2.9)  # inches; 390 CSS pixels are 4.06
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small, and in the reader's own font
    "svg.hashsalt": "rehead",  # the same conversion makes the same bytes
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Of channels with each number of `BITS`: the more bits, the darker; those without any are grey.
SHADES = (*matplotlib.colormaps["Blues_r"](np.linspace(0.1, 0.85, len(BITS) - 1)), "#bdbdbd")
# Where a spectrum is drawn down to, as a share of all.
LEAST_ENERGY = 1e-6


def errors(layers: Sequence[LayerReport]) -> Figure:
    """Every layer's relative output error, in closed form and after what followed."""
    figure, axes = _figure("relative error of the output")
    at = [layer.layer for layer in layers]
    axes.bar(at, [_number(layer.error) for layer in layers], color="C0", label="as written")
    closed = [_number(layer.closed_form_error) for layer in layers]
    axes.plot(at, closed, "_", color="C1", markeredgewidth=2, label="closed form")
    axes.legend(frameon=False)
    return figure


def dims(layers: Sequence[LayerReport]) -> Figure:
    """Every layer's dims, by the config's names."""
    figure, axes = _figure("dims")
    at = [layer.layer for layer in layers]
    for name in layers[0].dims:
        axes.plot(at, [layer.dims[name] for layer in layers], "o-", markersize=3, label=name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def bits(layers: Sequence[LayerReport]) -> Figure:
    """Every layer's channels, stacked by their bits: of keys and of values, or of both as one."""
    names = [*layers[0].codes]
    figure = Figure(figsize=(SIZE[0], SIZE[1] * (1 + len(names)) / 2), layout="constrained")
    at = [layer.layer for layer in layers]
    below, panels = None, []
    for row, name in enumerate(names, 1):
        axes = figure.add_subplot(len(names), 1, row, ylabel=f"channels of {name}", sharex=below)
        counts = np.array([layer.codes[name] for layer in layers])  # [layers, kinds]
        base = np.zeros(len(layers), dtype=int)
        for kind, width in enumerate(BITS):
            if not any(of[kind] for layer in layers for of in layer.codes.values()):
                continue
            label = f"{width} bits" if width else "first tokens alone"
            axes.bar(at, counts[:, kind], bottom=base, color=SHADES[kind], label=label)
            base = base + counts[:, kind]
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        below = axes
        panels.append(axes)
    panels[-1].set_xlabel("layer")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    return figure


def rotated(layers: Sequence[LayerReport]) -> Figure:
    """A heat map: how many components of each frequency keep their rotation in each layer."""
    counts = rotated_counts(layers)
    figure, axes = _figure("frequency (0 turns fastest)")
    most = max(1, int(counts.max()))
    colours = matplotlib.colormaps["viridis"].resampled(most + 1)
    norm = BoundaryNorm(np.arange(most + 2) - 0.5, most + 1)
    image = axes.imshow(
        counts.T, aspect="auto", origin="lower", interpolation="nearest", cmap=colours, norm=norm
    )
    ticks = np.unique(np.linspace(0, most, min(most, 5) + 1).round())
    figure.colorbar(image, ax=axes, label="rotated components", ticks=ticks)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def rotated_counts(layers: Sequence[LayerReport]) -> np.ndarray:
    """[layers, frequencies]: the rotated components of each."""
    counts = np.zeros((len(layers), max(layer.pairs for layer in layers)), dtype=int)
    for row, layer in zip(counts, layers, strict=True):
        np.add.at(row, list(layer.rope_pairs), 1)
    return counts


def spectra(layers: Sequence[LayerReport]) -> Figure:
    """What a latent of every rank leaves out, a line a layer, with a dot at the rank it has."""
    figure, axes = _figure("share of the weighted energy left out", "rank")
    colours = matplotlib.colormaps["viridis"]
    for index, layer in enumerate(layers):
        left = left_out(layer.energy)
        colour = colours(index / max(1, len(layers) - 1))
        axes.plot(left, color=colour, linewidth=0.8)
        rank = latent_rank(layer)
        if rank < len(left):
            axes.plot(rank, left[rank], "o", color=colour, markersize=3)
    axes.set(yscale="log", ylim=(LEAST_ENERGY, 1))
    scale = matplotlib.cm.ScalarMappable(
        matplotlib.colors.Normalize(0, max(1, len(layers) - 1)), colours
    )
    figure.colorbar(scale, ax=axes, label="layer")
    return figure


def left_out(energy: Sequence[float]) -> np.ndarray:
    """[R + 1]: the share of the energy beyond the first r directions, r = 0 to R."""
    tail = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return tail / max(tail[0], np.finfo(float).tiny)


def latent_rank(layer: LayerReport) -> int:
    """Of the directions in `energy`, how many the layer keeps."""
    if "kv_lora_rank" in layer.dims:
        of_first = [counts[-1] for counts in layer.codes.values()][-1:]
        return layer.dims["kv_lora_rank"] - sum(of_first)
    return layer.dims["head_dim"] - layer.dims["qk_rope_head_dim"]


def cache(done: Conversion) -> Figure:
    """Bytes a token takes, before and after."""
    figure = Figure(figsize=(SIZE[0], 1.3), layout="constrained")
    axes = figure.add_subplot()
    sizes = [done.kv_bytes_per_token[name] / 1024 for name in ("source", "converted")]
    bars = axes.barh(["before", "after"], sizes, color=["0.7", "C0"])
    axes.bar_label(bars, fmt="%.4g KiB", padding=3)
    axes.invert_yaxis()
    axes.set(xlabel="KiB a token", xlim=(0, 1.25 * max(sizes)))
    return figure


def svg(draw: Callable[..., Figure], *args: Any) -> bytes:
    """What a function of this module draws, as an SVG file of its own."""
    content = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        draw(*args).savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()


def _figure(ylabel: str, xlabel: str = "layer") -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    return figure, axes


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
