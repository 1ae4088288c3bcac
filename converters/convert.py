"""The conversion of a checkpoint: survey every layer, spend the budget, fit, write.

Letters: N sequences, T tokens in each, D hidden size.
"""

import hashlib
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig

from ..modeling.cached_decoding import check_if_newer
from ..modeling.converted_config import FORMAT
from .checkpoint import Source, copy_side_files, open_source
from .errors import InputError, one_line
from .families import family_of
from .inspection import attention_parameters, code_of, config_of_dims, pays_from_tokens
from .job import Job, Progress, cast
from .memory import peak_rss_bytes
from .model_card import model_card
from .plan import check_exact_tokens, parse_bits, parse_budget
from .processes import Processes
from .recipe import Conversion, LayerReport, Recipe, odd_layers
from .targets import ROPES, TARGETS, Dims, Target, target_of
from .text import default_calibration_text, read_text, windows
from .work import work_folder
from .writer import Writer, check_output

FORMS = {name: target.title for name, target in TARGETS.items()}

# Calibration sequences: this many without healing and with it, when `samples` does not say.
CLOSED_FORM_SEQUENCES = 16
HEALING_SEQUENCES = 100
SEQUENCE_LENGTH = 1024
DEFAULT_TEXT = "default"
HEALING_STEPS = 100
# First tokens of a sequence that stay whole in a coded cache.
EXACT_TOKENS = 4


def convert(
    model: str,
    *,
    to: str = "mla",
    output: str | Path,
    kv_budget: float | str | None = None,
    calibration: str | Sequence[str] | None = None,
    samples: int | None = None,
    heal: int | None = None,
    rope: str = "decoupled",
    uniform_rank: bool = False,
    native: bool = False,
    preset: str | None = None,
    seed: int = 0,
    dtype: str | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    resume: bool = False,
    force: bool = False,
    kv_lora_rank: int | None = None,
    qk_rope_head_dim: int | None = None,
    q_lora_rank: int | None = None,
    num_key_value_heads: int | None = None,
    pooling: str | None = None,
    head_dim: int | None = None,
    share_q_dim: int | None = None,
    kv_bits: str | int | None = None,
    exact_tokens: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Converts a checkpoint's attention and writes a Hugging Face folder.

    Run under `accelerate launch`, every process calls this; they share the layers, and the first
    one writes. The output must then be on a disk that all see.

    Args:
        model: a hub id, a folder or a `.gguf` file.
        to: a form, one of `TARGETS`.
        output: the folder to write.
        kv_budget: the share of the source's KV cache to keep per token, 0.5 or "50%"; None for
            half, and for what MQA keeps.
        calibration: a text (see `text.read_text`); `default`, or None, for the one that comes with
            rehead. Of several, each gives an equal share of the sequences.
        samples: calibration sequences.
        heal: healing steps a layer; None for the default.
        rope: "decoupled" or "on-read", of MLA.
        uniform_rank: give every layer the same dims.
        native: and the same frequencies, which is what transformers' own MLA classes can hold.
        preset: "engine" for what engines such as llama.cpp hold: native, without biases, and with
            the frequencies base^(-2j/d) that they compute.
        dtype: of the weights written; None for the source's, where every weight that stays keeps
            its own.
        kv_lora_rank, qk_rope_head_dim, num_key_value_heads, head_dim: explicit dims of the form
            that has them, instead of a budget.
        q_lora_rank: give MLA's queries a low rank too.
        pooling: of GQA and MQA, "aligned" (None) or "mean".
        share_q_dim: width of MFA's shared query projection; None for what the error allows.
        kv_bits: the bits of MLA's cached numbers: "auto" to deal them out by what each number
            matters, 8 or 4 for all that are kept, 16 to code none.
        exact_tokens: how many first tokens of a sequence keep 16 bits in a coded cache.
        resume: go on with what an interrupted run of the same recipe has left beside the output.
        progress: called as progress(stage, done, total, info).

    Raises:
        InputError: what was asked cannot be done; nothing has been written.
    """
    began = time.monotonic()
    processes = Processes()
    with processes.first_alone():
        if to not in TARGETS or rope not in ROPES:
            raise InputError(
                f"form {to!r} with rope {rope!r} is unknown. Forms: {', '.join(TARGETS)}."
            )
        steps = HEALING_STEPS if heal is None else heal
        recipe = Recipe(
            source=str(model),
            form=to,
            rope=rope,
            kv_budget=parse_budget(TARGETS[to].default_budget if kv_budget is None else kv_budget),
            calibration=" + ".join(text_names(calibration)),
            samples=samples or (HEALING_SEQUENCES if steps else CLOSED_FORM_SEQUENCES),
            heal=steps,
            seed=seed,
            kv_lora_rank=kv_lora_rank,
            qk_rope_head_dim=qk_rope_head_dim,
            q_lora_rank=q_lora_rank,
            num_key_value_heads=num_key_value_heads,
            pooling=pooling,
            head_dim=head_dim,
            share_q_dim=share_q_dim,
            kv_bits=parse_bits(kv_bits),
            exact_tokens=EXACT_TOKENS if exact_tokens is None else exact_tokens,
            uniform=uniform_rank or native or preset == "engine",
            native=native or preset == "engine",
            preset=preset,
        )
        source = open_source(model, accept=family_of)
        output = Path(output).expanduser()
        check_output(output, force=force, protect=source.path)
        family = family_of(source.config)
        target = target_of(source.config, recipe)
        check_exact_tokens(exact_tokens, recipe.kv_bits)
        if target.model_class is not None:  # told now, not by the verification hours later
            check_if_newer(target.model_class)
        stored_dtype, where = target_dtype(dtype, source), target_device(device, processes)
        tokens = calibration_tokens(source, recipe.samples, recipe.seed, calibration)
        check_exact_tokens(exact_tokens, recipe.kv_bits, tokens.shape[1])
    recipe = replace(recipe, samples=len(tokens))  # a short text gives fewer
    progress = progress if progress and processes.first else _silent
    job = Job(source, family, recipe, target, where, progress, processes)

    def result(folder: Path | None, dims: Sequence[Dims], layers: list[LayerReport]) -> Conversion:
        scale = stored_dtype.itemsize
        before, after = (
            sum(counts)
            for counts in zip(*(layer.parameters or (0, 0) for layer in layers), strict=True)
        )
        if folder is None:  # no layer was made
            planned = config_of_dims(target, dims)
            before, after = attention_parameters(source.config), attention_parameters(planned)
        kv_bytes = {
            "source": target.source * job.layers * scale,
            "converted": math.ceil(sum(dim.bytes(scale) for dim in dims)),
        }
        return Conversion(
            output=folder,
            form=to,
            kv_budget=sum(dim.width for dim in dims) / (target.source * job.layers),
            kv_bytes_per_token=kv_bytes,
            attention_parameters={"source": before, "converted": after},
            pays_from_tokens=pays_from_tokens(before, after, kv_bytes, scale),
            seconds=time.monotonic() - began,
            peak_rss_bytes=peak_rss_bytes(),
            parts=dict(job.clock.seconds),
            layers=layers,
            warnings=odd_layers(layers),
            recipe=recipe,
        )

    if dry_run:
        with processes.scratch() as scratch:
            dims = job.survey(tokens, scratch)
        planned = [LayerReport(i, dim.named(), code=code_of(dim)) for i, dim in enumerate(dims)]
        return result(None, dims, planned)
    place = output.with_name(f".{output.name}.work")
    if not processes.first:
        processes.wait()  # until the folder is there
        job.fit(tokens, job.survey(tokens, place), place, stored_dtype)
        return processes.of_first()
    note = resume_note(recipe, source, tokens, where)
    with (
        work_folder(place, note, resume) as work,
        Writer(
            output,
            force=force,
            expected_bytes=source.bytes,
            protect=source.path,
            folder=work / "model",
        ) as writer,
    ):

        def copy(name: str, tensor: Tensor) -> None:
            with job.clock("write"):
                writer.add(name, tensor if dtype is None else cast(name, tensor, stored_dtype))

        processes.wait()
        dims = job.survey(tokens, work)
        job.fit(tokens, dims, work, stored_dtype, copy)
        layers, biases = job.write(tokens, dims, work, writer, stored_dtype, copy)
        config = converted_config(target, recipe, layers, biases, stored_dtype)
        config.save_pretrained(writer.folder)
        copy_side_files(source, writer.folder)
        writer.close()
        job.verify(writer.folder, work, tokens, stored_dtype)
        card = model_card(result(output, dims, layers), source.config)
        writer.finish({"README.md": card})
    return processes.of_first(result(output, dims, layers))


def plan(model: str, *, to: str = "mla", **options: Any) -> Conversion:
    """What `convert` would do: every layer's dims, and the cache before and after.

    The source runs over the calibration text, since dims are chosen by measured error; nothing is
    written. `inspection.offers` tells the forms and sizes from the config alone.

    Args:
        options: those of `convert`, but for `output`, `dry_run`, `resume` and `force`.

    Raises:
        InputError: what was asked cannot be done.
    """
    with tempfile.TemporaryDirectory(prefix="rehead-") as scratch:
        return convert(model, to=to, output=Path(scratch) / "none", dry_run=True, **options)


def resume_note(
    recipe: Recipe, source: Source, tokens: Tensor, device: torch.device
) -> dict[str, Any]:
    """All that a conversion's bytes come from; a run that differs in any is not resumed."""
    return asdict(recipe) | {
        # A text or a model changed under the same name is another one.
        "the calibration text's digest": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "the source's digest": source.fingerprint(),
        "device": device.type,
        "rehead": version("rehead"),
        "format": FORMAT,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _silent(stage: str, done: int, total: int, info: dict[str, Any]) -> None:
    pass


def converted_config(
    target: Target,
    recipe: Recipe,
    layers: list[LayerReport],
    biases: dict[str, bool],
    dtype: torch.dtype,
) -> PretrainedConfig:
    """The converted model's config: the source's, the form's fields and the recipe."""
    source = target.config
    own = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
    fields = {k: v for k, v in source.to_dict().items() if k not in (*own, "dtype", "torch_dtype")}
    conversion = asdict(recipe) | {
        "format": FORMAT,
        "rehead_version": version("rehead"),
        "layer_errors": [layer.error for layer in layers],
    }
    fields |= biases | {"head_dim": target.head_dim, "conversion": conversion, "dtype": dtype}
    return target.config_of(layers, fields)


def text_names(calibration: str | Sequence[str] | None) -> list[str]:
    """The texts that were asked for, as `convert` takes them, one by one."""
    return [calibration] if isinstance(calibration, str) else [*(calibration or [DEFAULT_TEXT])]


def calibration_tokens(
    source: Source, samples: int, seed: int, calibration: str | Sequence[str] | None
) -> Tensor:
    """So many windows drawn by the seed, of each text an equal share; fewer of a short text."""
    texts = text_names(calibration)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise InputError(f"{source.path} has no usable tokenizer: {one_line(error)}") from error
    if samples < len(texts):
        raise InputError(f"{len(texts)} calibration texts cannot share --samples {samples}.")
    longest = getattr(source.config, "max_position_embeddings", SEQUENCE_LENGTH)
    length = min(SEQUENCE_LENGTH, longest)
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for number, name in enumerate(texts):
        text = default_calibration_text() if name == DEFAULT_TEXT else read_text(name)
        share = (samples + len(texts) - 1 - number) // len(texts)
        # A few times as many as needed, so that they do not all come from the text's start.
        tokens = windows(tokenizer, text, length, 8 * share)
        drawn.append(tokens[torch.randperm(len(tokens), generator=generator)[:share]])
    tokens = torch.cat(drawn)
    if int(tokens.max()) >= source.config.vocab_size:
        raise InputError(
            f"the tokenizer of {source.path} gives id {int(tokens.max())}, and the model knows "
            f"{source.config.vocab_size}. They do not belong together."
        )
    # What is held out of the sequences has then its share of every text.
    return tokens if len(texts) == 1 else tokens[torch.randperm(len(tokens), generator=generator)]


def target_device(name: str, processes: Processes) -> torch.device:
    """The device of that name; where several processes share a run, this one's of that type."""
    try:
        device = processes.own(torch.device(name))
        torch.zeros(1, device=device).item()  # also refuses meta, which holds nothing
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {name} cannot be used here ({one_line(error, 100)}). Use cpu."
        ) from error
    return device


def target_dtype(name: str | None, source: Source) -> torch.dtype:
    """The dtype of that name; for None the one that most of the source is stored in."""
    if name is None:
        sizes: Counter[torch.dtype] = Counter()
        for entry in source.entries.values():
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] += entry.nbytes
        return sizes.most_common(1)[0][0]
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise InputError(f"--dtype {name} is unknown. Use float32, bfloat16, float16 or float64.")
    return dtype
