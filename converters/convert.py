"""The conversion of a checkpoint: survey every layer, spend the budget, fit, write.

Letters: N sequences, T tokens in each, D hidden size.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from ..modeling import MLA_CLASSES
from .activations import Activations
from .budget import Budget
from .calibration import Kronecker, PhaseMoments
from .checkpoint import Source, copy_side_files, open_source
from .errors import InputError, one_line
from .families import Family, family_of
from .healing import has_fast_bfloat16, output_error
from .healing import heal as heal_layer
from .lowrank import Factors
from .maps import AttentionMaps
from .memory import peak_rss_bytes
from .mla import (
    MLA,
    MLAMoments,
    mla_moments,
    rope_components,
    shared_rope_pairs,
    to_mla,
    with_low_rank_queries,
)
from .model_card import model_card
from .plan import TRIED_SPLITS, TRIED_WIDTHS, LayerDims, parse_budget, spend, split_width
from .recipe import Conversion, LayerReport, Recipe
from .stream import LayerStream
from .text import default_calibration_text, read_text, windows
from .writer import Writer, check_output

FORMS = {"mla": "multi-head latent attention"}
ROPES = ("decoupled", "on-read")

# Of the calibration sequences, this many give the moments and this many measure errors.
MOMENT_SEQUENCES = 8
MEASURE_SEQUENCES = 4
HEALING_SEQUENCES = 100
SEQUENCE_LENGTH = 1024
HEALING_STEPS = 100
# A layer whose relative error is below this is left as it is: what healing sees of it may be the
# rounding of bfloat16 alone.
EXACT = 1e-4

Sequences = TypeVar("Sequences", Tensor, Activations)
Progress = Callable[[str, int, int, dict[str, Any]], None]


def convert(
    model: str,
    *,
    to: str = "mla",
    output: str | Path,
    kv_budget: float | str = 0.5,
    calibration: str | None = None,
    samples: int | None = None,
    heal: int | None = None,
    rope: str = "decoupled",
    uniform_rank: bool = False,
    native: bool = False,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    q_lora_rank: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Converts a checkpoint's attention and writes a Hugging Face folder.

    Args:
        model: a hub id, a folder or a `.gguf` file.
        to: a form, one of `FORMS`.
        output: the folder to write.
        kv_budget: the share of the source's KV cache to keep per token, 0.5 or "50%".
        calibration: a text (see `text.read_text`); None for the one that comes with rehead.
        samples: calibration sequences.
        heal: healing steps a layer; None for the default.
        rope: "decoupled" or "on-read".
        uniform_rank: give every layer the same dims.
        native: and the same frequencies, which is what transformers' own MLA classes can hold.
        dtype: of the weights written; None for the source's.
        kv_lora_rank, qk_rope_head_dim: explicit dims, instead of a budget.
        q_lora_rank: give the queries a low rank too.
        progress: called as progress(stage, done, total, info).

    Raises:
        InputError: what was asked cannot be done; nothing has been written.
    """
    began = time.monotonic()
    if to not in FORMS or rope not in ROPES:
        raise InputError(f"form {to!r} with rope {rope!r} is unknown. Forms: {', '.join(FORMS)}.")
    steps = HEALING_STEPS if heal is None else heal
    if native and rope != "decoupled":
        raise InputError("--native classes rotate a key of their own. Use --rope decoupled.")
    recipe = Recipe(
        source=str(model),
        form=to,
        rope=rope,
        kv_budget=parse_budget(kv_budget),
        calibration=calibration or "default",
        samples=samples or (HEALING_SEQUENCES if steps else MOMENT_SEQUENCES + MEASURE_SEQUENCES),
        heal=steps,
        seed=seed,
        kv_lora_rank=kv_lora_rank,
        qk_rope_head_dim=qk_rope_head_dim,
        q_lora_rank=q_lora_rank,
        uniform=uniform_rank or native,
        native=native,
    )
    source = open_source(model)
    output = Path(output).expanduser()
    check_output(output, force=force, protect=source.path)
    family = family_of(source.config)
    budget = Budget.of(source.config, recipe)
    cast = target_dtype(dtype, source)
    target = target_device(device)
    tokens = calibration_tokens(source, recipe, calibration)
    recipe = replace(recipe, samples=len(tokens))  # a short text gives fewer
    job = _Job(source, family, recipe, budget, target, progress or _silent)

    def result(folder: Path | None, layers: list[LayerReport]) -> Conversion:
        number = cast.itemsize
        width = sum(layer.kv_lora_rank + layer.qk_rope_head_dim for layer in layers)
        return Conversion(
            output=folder,
            form=to,
            kv_budget=width / (budget.source * job.layers),
            kv_bytes_per_token={
                "source": budget.source * job.layers * number,
                "converted": width * number,
            },
            seconds=time.monotonic() - began,
            peak_rss_bytes=peak_rss_bytes(),
            layers=layers,
            recipe=recipe,
        )

    if dry_run:
        with tempfile.TemporaryDirectory(prefix="rehead-") as scratch:
            dims = job.survey(tokens, Path(scratch))
        planned = (LayerReport(i, d.kv_lora_rank, d.qk_rope_head_dim) for i, d in enumerate(dims))
        return result(None, list(planned))
    # A text changed under the same name is another recipe.
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    note = json.dumps(asdict(recipe) | {"tokens": digest}, sort_keys=True)
    with _work_folder(output.with_name(f".{output.name}.work"), note, resume) as work:
        dims = job.survey(tokens, work)
        with Writer(
            output, force=force, expected_bytes=source.bytes, protect=source.path
        ) as writer:
            layers, biases = job.write(tokens, dims, work, writer, cast)
            config = converted_config(source.config, recipe, layers, biases, cast)
            config.save_pretrained(writer.folder)
            copy_side_files(source, writer.folder)
            writer.finish({"README.md": model_card(result(output, layers), source.config)})
    return result(output, layers)


def _silent(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    pass


class _Job:
    """One conversion's parts; each method is one pass over the layers."""

    def __init__(
        self,
        source: Source,
        family: Family,
        recipe: Recipe,
        budget: Budget,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.source, self.family, self.recipe, self.budget = source, family, recipe, budget
        self.device, self.progress = device, progress
        self.layers = source.config.num_hidden_layers
        self.on_read = recipe.rope == "on-read"

    def survey(self, tokens: Tensor, work: Path) -> list[LayerDims]:
        """Every layer's moments, kept in `work`, and the dims the budget buys."""
        count = min(len(tokens), MOMENT_SEQUENCES + MEASURE_SEQUENCES)
        stream = LayerStream(self.source, self.family, tokens[:count], self.device)
        curves, shares = [], []
        for layer in range(self.layers):
            file = work / f"moments-{layer:04d}.pt"
            seen = stream.advance(layer)
            if not file.exists():
                maps = stream.maps(layer)
                fitting, measured = hold_out(seen)
                moments = mla_moments(maps, fitting.x, self._generator(layer), self.on_read)
                curve: dict[int, float] = {}
                share = 0.0
                if self.budget.fixed is None:
                    curve, share = self._measure(maps, moments, measured)
                _save(file, {"moments": moments, "curve": curve, "share": share})
            saved = _load(file)
            curves.append(saved["curve"])
            shares.append(saved["share"])
            self.progress("survey", layer + 1, self.layers, {})
        dims = self.budget.fixed or self._spend(curves, shares)
        if self.recipe.native and not self.on_read:
            dims = self._share_rope_pairs(dims, stream, work)
        return dims

    def _measure(
        self, maps: AttentionMaps, moments: MLAMoments, seen: Activations
    ) -> tuple[dict[int, float], float]:
        """({width: error}, share of rotated dims) of one layer."""
        budget = self.budget

        def error(width: int, share: float) -> float:
            dims = split_width(width, share, budget.rotatable, budget.rank)
            return output_error(to_mla(maps, moments, dims), seen).absolute

        splits = (0.0,) if self.on_read else TRIED_SPLITS
        at_mean = {share: error(budget.width, share) for share in splits}
        share = min(at_mean, key=at_mean.__getitem__)
        curve = {budget.width: at_mean[share]}
        if not self.recipe.uniform:
            for ratio in TRIED_WIDTHS:
                width = min(max(self._least(), round(ratio * budget.width)), self._most())
                if width not in curve:
                    curve[width] = error(width, share)
        return curve, share

    def _least(self) -> int:
        return 1 if self.on_read else 3

    def _most(self) -> int:
        return self.budget.rank if self.on_read else self.budget.source

    def _spend(self, curves: list[dict[int, float]], shares: list[float]) -> list[LayerDims]:
        budget = self.budget
        mean = budget.width
        if self.recipe.uniform:
            share = sorted(shares)[len(shares) // 2]
            return [split_width(mean, share, budget.rotatable, budget.rank)] * self.layers
        least, most = max(self._least(), mean // 3), min(3 * mean, self._most())
        widths = spend(curves, mean * self.layers, least, most)
        return [
            split_width(width, share, budget.rotatable, budget.rank)
            for width, share in zip(widths, shares, strict=True)
        ]

    def _share_rope_pairs(self, dims: list[LayerDims], stream: LayerStream, work: Path):
        """The same dims with one list of frequencies for all layers."""
        layers = [
            rope_components(stream.maps(i), _load(work / f"moments-{i:04d}.pt")["moments"].phases)
            for i in range(self.layers)
        ]
        pairs = shared_rope_pairs(layers, dims[0].qk_rope_head_dim // 2)
        return [replace(dim, rope_pairs=pairs) for dim in dims]

    def write(
        self, tokens: Tensor, dims: list[LayerDims], work: Path, writer: Writer, dtype: torch.dtype
    ) -> tuple[list[LayerReport], dict[str, bool]]:
        """Fits every layer to its dims, heals it, and writes it and all that stays.

        Returns:
            A report of every layer, and which projections have a bias.
        """
        if not self._fits():
            tokens = hold_out(tokens)[1]
        # Healing reads much text; the noise of bfloat16 is far below the errors it mends.
        low_precision = bool(self.recipe.heal) and has_fast_bfloat16(self.device)
        stream = LayerStream(self.source, self.family, tokens, self.device, low_precision)
        stage = "heal" if self.recipe.heal else "factorise"
        reports, biases = [], {}
        for layer, dim in enumerate(dims):
            seen = stream.advance(layer)
            file = work / f"fitted-{layer:04d}.pt"
            if not file.exists():
                moments = _load(work / f"moments-{layer:04d}.pt")["moments"]
                _save(file, self._fit(layer, to_mla(stream.maps(layer), moments, dim), seen))
            form, before, after = _load(file)
            tensors = form.state_dict(stream.attention_factor**2)
            for name, tensor in tensors.items():
                writer.add(self.family.prefix(layer) + name, tensor.to(dtype))
            biases = form.biases()
            reports.append(
                LayerReport(
                    layer, dim.kv_lora_rank, dim.qk_rope_head_dim, form.rope_pairs, before, after
                )
            )
            self.progress(stage, layer + 1, self.layers, {"error": after})
            del seen  # the largest thing in memory, before the next layer's is made
        prefixes = tuple(self.family.prefix(layer) for layer in range(self.layers))
        for name in self.source.names():
            if not name.startswith(prefixes):
                tensor = self.source.tensor(name)
                writer.add(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        return reports, biases

    def _fits(self) -> bool:
        """Whether layers are fitted beyond the closed form of the survey's moments."""
        return bool(self.recipe.heal) or self.recipe.q_lora_rank is not None

    def _fit(self, layer: int, form: MLA, seen: Activations) -> tuple[MLA, float, float]:
        """(the form, its error before healing, and after)."""
        generator = self._generator(layer)
        # Without anything to fit, all there is measures: `write` kept what was held out.
        fitting, measured = hold_out(seen) if self._fits() else (seen, seen)
        if self.recipe.q_lora_rank is not None:
            x = fitting.x[:MOMENT_SEQUENCES]
            form = with_low_rank_queries(form, x, generator, self.recipe.q_lora_rank)
        before = output_error(form, measured).relative
        if before < EXACT:
            return form, before, before
        healed = heal_layer(form, fitting, steps=self.recipe.heal, generator=generator)
        after = output_error(healed, measured).relative if self.recipe.heal else before
        return (healed, before, after) if after < before else (form, before, before)

    def _generator(self, layer: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.recipe.seed * 100_003 + layer)


def hold_out(seen: Sequences) -> tuple[Sequences, Sequences]:
    """(what to fit, what to measure on): the last sequences measure, a lone one does both."""
    count = len(seen)
    held = min(MEASURE_SEQUENCES, count // 4)
    return (seen, seen) if held == 0 else (seen[: count - held], seen[count - held :])


def converted_config(
    source: PretrainedConfig,
    recipe: Recipe,
    layers: list[LayerReport],
    biases: dict[str, bool],
    dtype: torch.dtype,
) -> PretrainedConfig:
    """The converted model's config: the source's, the form's fields and the recipe."""
    config_class, _, causal_lm = MLA_CLASSES[source.model_type]
    own = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
    fields = {k: v for k, v in source.to_dict().items() if k not in (*own, "dtype", "torch_dtype")}
    ranks = [layer.kv_lora_rank for layer in layers]
    rotated = [layer.qk_rope_head_dim for layer in layers]
    on_read = recipe.rope == "on-read"
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    if "sliding_window" in fields:
        fields |= {"sliding_window": None}
    if "use_sliding_window" in fields:
        fields |= {"use_sliding_window": False}
    fields |= biases
    return config_class(
        **fields | {"head_dim": head_dim},
        kv_lora_rank=max(ranks),
        qk_rope_head_dim=max(rotated),
        qk_nope_head_dim=head_dim,
        v_head_dim=head_dim,
        q_lora_rank=recipe.q_lora_rank,
        kv_lora_rank_per_layer=None if len(set(ranks)) == 1 else ranks,
        qk_rope_head_dim_per_layer=None if len(set(rotated)) == 1 else rotated,
        rope_pairs=None if on_read else [list(layer.rope_pairs) for layer in layers],
        rope_on_read=on_read,
        conversion=asdict(recipe)
        | {
            "rehead_version": version("rehead"),
            "layer_errors": [layer.error for layer in layers],
        },
        architectures=[causal_lm.__name__],
        dtype=dtype,
    )


@contextlib.contextmanager
def _work_folder(folder: Path, note: str, resume: bool) -> Iterator[Path]:
    """A folder for what is done of a conversion; it is left behind by an interruption alone.

    Args:
        note: what was asked for; only a run that was asked for the same is resumed.
    """
    marker = folder / "recipe.json"
    if folder.exists() and not (resume and marker.exists() and marker.read_text() == note):
        if resume and marker.exists():
            raise InputError(
                f"{folder} holds an interrupted conversion with another recipe. Give the same "
                "options to resume it, or leave out --resume to start anew."
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(note)
    except OSError as error:
        raise InputError(f"cannot write {folder.parent}: {error.strerror or error}.") from error
    try:
        yield folder
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # Ctrl-C and kills are no Exception: what is done stays for --resume.
    shutil.rmtree(folder, ignore_errors=True)


def _save(file: Path, item: object) -> None:
    """Whole or not at all, so that a resumed conversion never reads half a layer."""
    partial = file.with_suffix(".partial")
    torch.save(item, partial)
    partial.rename(file)


def _load(file: Path):
    # Written by this program a moment ago, or by the run that is resumed.
    with torch.serialization.safe_globals([MLA, MLAMoments, Kronecker, PhaseMoments, Factors]):
        return torch.load(file, weights_only=True)


def calibration_tokens(source: Source, recipe: Recipe, calibration: str | None) -> Tensor:
    """`recipe.samples` windows of the calibration text, drawn by the seed."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise InputError(f"{source.path} has no usable tokenizer: {one_line(error)}") from error
    text = default_calibration_text() if calibration is None else read_text(calibration)
    longest = getattr(source.config, "max_position_embeddings", SEQUENCE_LENGTH)
    length = min(SEQUENCE_LENGTH, longest)
    # A few times as many as needed, so that they do not all come from the text's start.
    tokens = windows(tokenizer, text, length, 8 * recipe.samples)
    if int(tokens.max()) >= source.config.vocab_size:
        raise InputError(
            f"the tokenizer of {source.path} gives id {int(tokens.max())}, and the model knows "
            f"{source.config.vocab_size}. They do not belong together."
        )
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(recipe.seed))
    return tokens[order[: recipe.samples]]


def target_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # also refuses meta, which holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name} cannot be used here ({one_line(error, 100)}). Use cpu."
        ) from error
    return device


def target_dtype(name: str | None, source: Source) -> torch.dtype:
    if name is None:
        return source.dtype(next(n for n in source.names() if n.endswith("weight")))
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(f"--dtype {name} is unknown. Use float32, bfloat16, float16 or float64.")
    return dtype
