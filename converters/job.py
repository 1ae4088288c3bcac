"""The passes over a model's layers: survey them and spend the budget, fit, write, verify.

Letters: N sequences, T tokens in each, D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .activations import Activations
from .calibration import in_precision
from .checkpoint import Source
from .clock import Clock
from .errors import InputError
from .families import Family
from .fisher import fisher_moments
from .healing import Form, has_fast_bfloat16, heads_of, heal, output_error, reader_in
from .inspection import code_of
from .maps import AttentionMaps, attention
from .memory import release
from .plan import TRIED_WIDTHS, spend
from .processes import Processes
from .recipe import LayerReport, Recipe
from .refit import refit_output, refit_values
from .stream import LayerStream, OnTensor, ignore
from .targets import CodedMLATarget, Dims, Target
from .verify import verify
from .work import load, save
from .writer import Writer

# The first so many sequences are surveyed; what is fitted beyond the closed form sees them all.
SURVEY_SEQUENCES = 12
# So many where the whole model's gradients are asked for, which take more text to settle.
IMPORTANCE_SEQUENCES = 24
# So many, and so many tokens of each, are enough to compare dims by.
REFIT_SEQUENCES = 4
COMPARED_TOKENS = 512
# The last so many of either are held out: they measure errors.
MEASURE_SEQUENCES = 4
# From this hidden size on, layers are factorised in single precision and their dims compared by
# heads in bfloat16: in half the memory and time, for weights that are stored in 16 bits.
WIDE = 2048
# A layer whose relative error is below this is left as it is: there is nothing to fit.
EXACT = 1e-4
# The tokens that tell whether it is, and how far bfloat16 may take the model from the maps.
EXACT_TOKENS = 256
ROUNDED = 1e-2

Sequences = TypeVar("Sequences", Tensor, Activations)
Progress = Callable[[str, int, int, dict[str, Any]], None]


class Job:
    """One conversion's parts; each method is one pass over the layers.

    Args:
        processes: that share `survey` and `fit`, with one work folder.
    """

    def __init__(
        self,
        source: Source,
        family: Family,
        recipe: Recipe,
        target: Target,
        device: torch.device,
        progress: Progress,
        processes: Processes,
    ) -> None:
        self.source, self.family, self.recipe, self.target = source, family, recipe, target
        self.processes = processes
        self.device, self.progress = device, progress
        self.layers = source.config.num_hidden_layers
        # What the model and its forms are run in, and what they are factorised in.
        self.dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
        wide = source.config.hidden_size >= WIDE
        self.precision = torch.float32 if wide else torch.float64
        self.compared = self.dtype if wide else torch.float32
        self.clock = Clock()

    def survey(self, tokens: Tensor, work: Path) -> Sequence[Dims]:
        """Every layer's moments, kept in `work`, and the dims the budget buys."""
        for name in self.source.names():
            if not name.startswith(f"{self.family.layers}."):
                self.source.tensor(name)  # what is only copied, at the end: damage is told now
        files = [_moments_file(work, layer) for layer in range(self.layers)]
        if isinstance(self.target, CodedMLATarget):
            self._survey_model(self.target, tokens[:IMPORTANCE_SEQUENCES], work, files)
            self.processes.wait()
            return self.processes.of_first(self._dims(files) if self.processes.first else None)
        # What moments and choices take from the text is coarser than bfloat16.
        stream = self._stream(tokens[:SURVEY_SEQUENCES], self.dtype == torch.bfloat16)
        for layer, file in enumerate(files):
            self._survey_layer(stream, layer, file)
            release()
            self.progress("survey", layer + 1, self.layers, {})
        self.processes.wait()
        return self.processes.of_first(self._dims(files) if self.processes.first else None)

    def _survey_model(
        self, target: CodedMLATarget, tokens: Tensor, work: Path, files: list[Path]
    ) -> None:
        """Every layer's moments from one pass through the whole model and back.

        The pass goes through one layer after the other, so one process makes it.
        """
        if not self.processes.first or all(file.exists() for file in files):
            return
        found = fisher_moments(
            self.source,
            self.family,
            tokens,
            work,
            torch.Generator().manual_seed(self.recipe.seed),
            device=self.device,
            clock=self.clock,
            progress=self.progress,
            skip=self.recipe.exact_tokens,
        )
        for layer, maps, moments, seen in found:
            with self.clock("statistics"):
                asked = target.channels(maps.to(self.precision), moments, seen)
            save(files[layer], {"moments": moments, "curve": {}, "share": 0.0, "asked": asked})

    def _survey_layer(self, stream: LayerStream, layer: int, file: Path) -> None:
        """Moves the stream on by a layer, and keeps what is not known of it yet."""
        mine = self.processes.takes(layer) and not file.exists()
        seen = stream.advance(layer, keep=mine)
        if not mine:
            return
        maps = stream.maps(layer).to(self.precision)
        fitting, measured = hold_out(seen)
        with self.clock("statistics"):
            moments = self.target.moments(maps, fitting.x, self._generator(layer))
            moments = in_precision(moments, torch.float32)
            asked = self.target.asked(maps, moments)
        fitting = fitting[:REFIT_SEQUENCES].until(COMPARED_TOKENS)
        measured = measured.until(COMPARED_TOKENS)
        del seen  # the largest thing in memory
        curve: dict[int, float] = {}
        share = 0.0
        if self.target.fixed is None:
            with self.clock("compare dims"):
                curve, share = self._measure(maps.to(torch.float32), moments, fitting, measured)
        save(file, {"moments": moments, "curve": curve, "share": share, "asked": asked})

    def _measure(
        self, maps: AttentionMaps, moments: Any, fitting: Activations, measured: Activations
    ) -> tuple[dict[int, float], float]:
        """({width: error}, share of rotated dims) of one layer, with its output map refit.

        The output map mends much of what lost rotations cost and less of what lost rank does. In
        single precision errors came out the same to 1e-4; bfloat16 (`compared`) moves one by some
        1e-4 of the output.
        """
        target, build = self.target, self.target.builder(maps, moments)

        def error(width: int, share: float) -> float:
            form = build(target.dims(width, share))
            refit = refit_output(form, fitting, self.compared)
            return output_error(refit, measured, dtype=self.compared).absolute

        at_mean = cache(partial(error, target.width))
        share = target.choose(at_mean)
        curve = {target.width: at_mean(share)}
        if not self.recipe.uniform:
            for ratio in TRIED_WIDTHS:
                width = min(max(target.least, round(ratio * target.width)), target.most)
                if width not in curve:
                    curve[width] = error(width, share)
        return curve, share

    def _dims(self, files: list[Path]) -> Sequence[Dims]:
        """Every layer's, from all surveys."""
        surveys = [load(file, torch.device("cpu")) for file in files]  # moments stay on disk
        curves, shares, asked = ([s[key] for s in surveys] for key in ("curve", "share", "asked"))
        if isinstance(self.target, CodedMLATarget):
            return self.target.shared([], asked)
        dims = list(self.target.fixed or self._spend(curves, shares))
        return self.target.shared(dims, asked)

    def _spend(self, curves: Sequence[dict[int, float]], shares: Sequence[float]) -> list[Dims]:
        target, mean = self.target, self.target.width
        if self.recipe.uniform:
            share = sorted(shares)[len(shares) // 2]
            return [target.dims(mean, share)] * self.layers
        least, most = max(target.least, mean // 3), min(3 * mean, target.most)
        widths = spend(curves, mean * self.layers, least, most)
        return [target.dims(*layer) for layer in zip(widths, shares, strict=True)]

    def fit(
        self,
        tokens: Tensor,
        dims: Sequence[Dims],
        work: Path,
        dtype: torch.dtype,
        copy: OnTensor = ignore,
    ) -> None:
        """Fits every layer to its dims and heals it; what comes of it is kept in `work`.

        Args:
            copy: is given what stays of each layer when it is read, so that nobody reads it again.

        Raises:
            InputError: a layer has a value that the dtype cannot hold.
        """
        # The noise of bfloat16 is below what a budget costs; `exactly` sees to the rest.
        stream = self._stream(tokens, self.dtype == torch.bfloat16, copy)
        stage = "heal" if self.recipe.heal else "factorise"
        for layer, dim in enumerate(dims):
            file, mine = _fitted_file(work, layer), self.processes.takes(layer)
            new = mine and not file.exists()
            seen = stream.advance(layer, keep=new)
            info = {}
            if mine:
                if new:
                    self._fit_layer(stream.maps(layer), layer, dim, seen, work)
                form, _, error, _ = load(file, self.device)
                self._tensors(stream, layer, form, dtype)  # refused now, not when all are fitted
                info = {"error": error}
                del form
            self.progress(stage, layer + 1, self.layers, info)
            del seen  # before the next layer's is made
            release()
        self.processes.wait()

    def _fit_layer(
        self, maps: AttentionMaps, layer: int, dim: Dims, seen: Activations, work: Path
    ) -> None:
        maps = maps.to(self.precision)
        with self.clock("factorise"):
            moments = load(_moments_file(work, layer), self.device)["moments"]
            form = self.target.builder(maps, moments)(dim)
            del moments
        with self.clock("fit"):
            before, meant = parameters_of(maps), exactly(maps, form, seen)
            del maps
            if meant is None:
                form, closed, error = self._fit(layer, form, seen, self.dtype)
            else:
                form, closed, error = self._fit(layer, form, meant, torch.float32)
        save(_fitted_file(work, layer), (self.target.settled(form, seen.x), closed, error, before))
        known = _moments_file(work, layer)
        save(known, load(known, torch.device("cpu")) | {"moments": None})

    def _tensors(
        self, stream: LayerStream, layer: int, form: Any, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """A fitted layer as it is stored."""
        factor = stream.attention_factor(layer)
        if self.target.stock:
            tensors = self.family.write(form.expand(), factor)
        else:
            tensors = form.state_dict(factor**2)
        names = {name: self.family.prefix(layer) + name for name in tensors}
        return {names[name]: cast(names[name], x, dtype) for name, x in tensors.items()}

    def write(
        self,
        tokens: Tensor,
        dims: Sequence[Dims],
        work: Path,
        writer: Writer,
        dtype: torch.dtype,
        copy: OnTensor,
    ) -> tuple[list[LayerReport], dict[str, bool]]:
        """Writes the fitted layers, and what stays and is not written yet.

        Args:
            dtype: of the attention.
            copy: writes what stays.

        Returns:
            A report of every layer, and which projections have a bias.
        """
        stream = self._stream(tokens, False)  # it is only asked for what its config says
        reports: list[LayerReport] = []
        biases: dict[str, bool] = {}
        with self.clock("write"):
            for layer, dim in enumerate(dims):
                form, closed, error, source_parameters = load(
                    _fitted_file(work, layer), self.device
                )
                tensors = self._tensors(stream, layer, form, dtype)
                for name, tensor in tensors.items():
                    writer.add(name, tensor)
                for name, has in form.biases().items():
                    biases[name] = biases.get(name, False) or has
                parameters = source_parameters, sum(tensor.numel() for tensor in tensors.values())
                reports.append(
                    LayerReport(
                        layer,
                        self.target.named(form, dim),
                        getattr(form, "rope_pairs", ()),
                        closed,
                        error,
                        parameters,
                        len(form.inv_freq),
                        code_of(dim),
                        getattr(form, "energy", ()),
                    )
                )
                del form, tensors  # before the next layer's are made
                release()
            prefixes = tuple(self.family.prefix(layer) for layer in range(self.layers))
            for name in self.source.names():
                if not name.startswith(prefixes) and name not in writer:
                    copy(name, self.source.tensor(name))
        return reports, biases

    def verify(self, folder: Path, work: Path, tokens: Tensor, dtype: torch.dtype) -> None:
        """Raises unless the folder computes, layer by layer, what the layers were fitted to."""
        forms = (load(_fitted_file(work, layer), self.device)[0] for layer in range(self.layers))
        found = verify(folder, self.family, forms, tokens, dtype, self.device)
        with self.clock("verify"):
            for layer, off in enumerate(found, 1):
                self.progress("verify", layer, self.layers, {"off by": off})

    def _fit(
        self, layer: int, form: Form, seen: Activations, dtype: torch.dtype
    ) -> tuple[Form, float, float]:
        """(the form, the error of its closed form, and the one that is left)."""
        generator = self._generator(layer)
        fitting, measured = hold_out(seen)
        x = fitting.x[: SURVEY_SEQUENCES - MEASURE_SEQUENCES]
        heads = heads_of(form, measured.x, dtype)
        closed = output_error(form, measured, heads).relative
        finished = self.target.finish(form, x, closed, generator)
        if finished is not form:
            del heads
            heads = heads_of(form := finished, measured.x, dtype)
            closed = output_error(form, measured, heads).relative
        if closed < EXACT or not self.target.refits:
            return form, closed, closed
        # The output map last: fitted first, it holds the other maps where they are.
        fitted = heal(form, fitting, steps=self.recipe.heal, generator=generator)
        if fitted is not form:
            heads = heads_of(fitted, measured.x, dtype)
        fitted = refit_output(fitted, fitting, dtype)
        error = output_error(fitted, measured, heads).relative
        if hasattr(form, "value_reader"):
            del heads
            both = refit_output(refit_values(fitted, fitting, dtype), fitting, dtype)
            other = output_error(both, measured, dtype=dtype).relative
            fitted, error = (both, other) if other < error else (fitted, error)
        return (fitted, closed, error) if error < closed else (form, closed, closed)

    def _stream(
        self, tokens: Tensor, low_precision: bool, on_tensor: OnTensor = ignore
    ) -> LayerStream:
        return LayerStream(
            self.source, self.family, tokens, self.device, low_precision, self.clock, on_tensor
        )

    def _generator(self, layer: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 100_003 + layer)


def parameters_of(maps: AttentionMaps) -> int:
    tensors = (t for t in vars(maps).values() if isinstance(t, Tensor))
    return sum(t.numel() for t in tensors) - maps.inv_freq.numel()


@torch.no_grad()
def exactly(maps: AttentionMaps, form: Form, seen: Activations) -> Activations | None:
    """What the maps do on the text, in float32, if the form does almost the same; else None.

    What the running model did may be rounded to bfloat16, and would be such a layer's whole error.
    None also where the maps are not what the model does.
    """
    maps = maps.to(torch.float32)
    x = seen.x[:1, :EXACT_TOKENS]
    meant = attention(maps, x)
    if not _distance(attention(reader_in(form, torch.float32), x), meant) < EXACT:
        return None
    y = torch.cat([attention(maps, sequence[None]) for sequence in seen.x])
    return replace(seen, y=y) if _distance(y, seen.y) < ROUNDED else None


def _distance(found: Tensor, meant: Tensor) -> float:
    """Squared, over the squared length of what was meant."""
    return float((found - meant).square().sum() / meant.square().sum().clamp_min(1e-30))


def _moments_file(work: Path, layer: int) -> Path:
    return work / f"moments-{layer:04d}.pt"


def _fitted_file(work: Path, layer: int) -> Path:
    return work / f"fitted-{layer:04d}.pt"


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype, if it is one of floating-point numbers.

    Raises:
        InputError: it has a value too large for the dtype.
    """
    if not tensor.is_floating_point():
        return tensor
    found = tensor.to(dtype)
    if not found.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"{name} has a value of {float(tensor.abs().max()):.3g}, which {kind} cannot hold. "
            "Give --dtype bfloat16 or float32."
        )
    return found


def hold_out(seen: Sequences) -> tuple[Sequences, Sequences]:
    """(what to fit, what to measure on): the last sequences measure, a lone one does both."""
    count = len(seen)
    held = min(MEASURE_SEQUENCES, count // 4)
    return (seen, seen) if held == 0 else (seen[: count - held], seen[count - held :])
