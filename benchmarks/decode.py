"""What a token costs to decode, and the memory of the cache, against the context's length.

    python benchmarks/decode.py run HuggingFaceTB/SmolLM2-135M-Instruct --name smollm2 --budget 25
    python benchmarks/decode.py run mha-32x64 --name mha-32x64 --budget 12.5 --batches 8
    python benchmarks/decode.py table smollm2
    python benchmarks/decode.py plot smollm2 --output decode.png
    python benchmarks/decode.py floor mha-32x64 --budget 12.5 --contexts 4096

The weights are random, in the shapes a conversion to the budget has: time does not depend on their
values. Nor does it on the cache's, so that is filled instead of computed. All models of one row
are timed in turns, in one process; read their ratios. `stock` is transformers' own dense MLA class
with the same widths. `coded` and `coded-on-read` cache codes of the budget's bytes. A kind may be a
converted model's folder too, for its own dims.
"""

import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    PretrainedConfig,
    StaticCache,
    YoutuConfig,
)

from rehead.converters.inspection import offers
from rehead.modeling.cached_decoding import cache_argument
from rehead.modeling.coded_cache import FirstTokens, coded_layer

RESULTS = Path(__file__).parent / "results"
# A Llama with true multi-head attention, of which there is none as small and as well known.
SYNTHETIC = {
    "mha-32x64": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5504,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=32768,
    )
}
KINDS = "original,decoupled,on-read,mfa,mfa-kr,stock"
WARM_UP, STEPS, ROUNDS = 2, 6, 3

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def run(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or mha-32x64.")],
    name: Annotated[str, typer.Option(help="The results file's name.")],
    budget: Annotated[float, typer.Option(help="Per cent of the cache.")] = 25,
    kinds: str = KINDS,
    contexts: str = "1024,4096,16384",
    batches: str = "1,8",
    dtype: str = "bfloat16",
    static: Annotated[bool, typer.Option(help="StaticCache instead of DynamicCache.")] = False,
    compiled: Annotated[bool, typer.Option(help="torch.compile the decoding step.")] = False,
) -> None:
    """Times every kind at every context and batch; the rows replace what was there of the same."""
    config = SYNTHETIC.get(model) or AutoConfig.from_pretrained(model)
    torch.manual_seed(0)
    models = {kind: _build(_config(config, kind, budget), dtype) for kind in kinds.split(",")}
    _share(list(models.values()))
    steps: dict[str, Callable[..., Any]] = {
        kind: torch.compile(model, dynamic=not static) if compiled else model
        for kind, model in models.items()
    }
    wanted = [(int(b), int(c)) for b in batches.split(",") for c in contexts.split(",")]
    for batch, context in track(wanted, description="contexts"):
        times: dict[str, list[float]] = {kind: [] for kind in models}
        memory = {}
        for _ in range(ROUNDS):
            for kind, step in steps.items():
                taken, memory[kind] = _decode(models[kind], step, batch, context, static)
                times[kind] += taken
        for kind, step in steps.items():
            memory[kind]["tensors_mb"] = _tensors(models[kind], step, batch, context, static)
        for kind in models:
            row = {
                "model": model,
                "kind": kind,
                "budget": 100.0 if kind == "original" else budget,
                "batch": batch,
                "context": context,
                "dtype": dtype,
                "static": static,
                "compiled": compiled,
                "ms": round(1e3 * statistics.median(times[kind]), 2),
                **memory[kind],
                "machine": _machine(),
            }
            _keep(name, row)
            print(json.dumps(row), flush=True)


# Which operations a step's parts are; all else it does, Python's part included, is `other`.
PARTS = {
    "weights": ("aten::mm", "aten::addmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::bmm"),
    "cache": ("aten::cat",),  # which copies a layer's to append to it
}


@app.command()
def floor(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or mha-32x64.")],
    budget: Annotated[float, typer.Option(help="Per cent of the cache.")] = 25,
    kinds: str = "original,decoupled,on-read,mfa,mfa-kr",
    contexts: str = "1024,4096,16384",
    batches: str = "1",
) -> None:
    """Prints a step's time in float32, its parts', and what reading weights and cache would take.

    The last is their bytes at the rate at which this machine sums a gigabyte. The parts are those
    of steps under the profiler, which take a little longer.
    """
    source = SYNTHETIC.get(model) or AutoConfig.from_pretrained(model)
    rate = _bytes_a_second()
    names = ("step", *PARTS, "other", "reading")
    print(f"{rate / 1e9:.1f} GB/s, {_machine()}, milliseconds")
    print("| kind | batch | context | " + " | ".join(names) + " | step over it |")
    print("|---|---|---|" + "---|" * (len(names) + 1))
    for kind in kinds.split(","):
        torch.manual_seed(0)
        built = _build(_config(source, kind, budget), "float32")
        # Every weight but the embedding's, of which a token reads a row.
        tied = built.config.tie_word_embeddings
        unread = 0 if tied else built.get_input_embeddings().weight.nbytes
        weights = sum(weight.nbytes for weight in built.parameters()) - unread
        for batch in map(int, batches.split(",")):
            for context in map(int, contexts.split(",")):
                taken, memory = _decode(built, built, batch, context, False)
                parts = _parts(built, batch, context)
                step = 1e3 * statistics.median(taken)
                read = 1e3 * (weights + 1e6 * (memory["cache_mb"] or 0)) / rate
                times = [step, *parts.values(), read]
                cells = [kind, str(batch), str(context), *(f"{x:.1f}" for x in times)]
                print("| " + " | ".join([*cells, f"{step / read:.1f}"]) + " |", flush=True)


def _bytes_a_second() -> float:
    numbers, times = torch.randn(2**28), []
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        times.append(time.perf_counter() - start)
    return numbers.nbytes / min(times)


@torch.no_grad()
def _parts(model: Any, batch: int, context: int) -> dict[str, float]:
    """Milliseconds of a step's operations, by part."""
    cache = _filled(model, batch, context, False)
    token = torch.zeros(batch, 1, dtype=torch.long)
    for _ in range(WARM_UP):
        model(input_ids=token, **{cache_argument(model): cache}, use_cache=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        for _ in range(STEPS):
            model(input_ids=token, **{cache_argument(model): cache}, use_cache=True)
        taken = 1e3 * (time.perf_counter() - start) / STEPS
    spent = {
        event.key: event.self_cpu_time_total / 1e3 / STEPS for event in profiled.key_averages()
    }
    parts = {part: sum(spent.get(name, 0.0) for name in names) for part, names in PARTS.items()}
    return parts | {"other": taken - sum(parts.values())}


def _config(source: PretrainedConfig, kind: str, budget: float) -> PretrainedConfig:
    """The source's config, a folder's, or that of a conversion with the same dims everywhere."""
    if kind == "original":
        return source
    if Path(kind).is_dir():
        return AutoConfig.from_pretrained(kind)
    form, rope, bits = {
        "stock": ("mla", "decoupled", "16"),
        "decoupled": ("mla", "decoupled", "16"),
        "on-read": ("mla", "on-read", "16"),
        "coded": ("mla", "decoupled", "auto"),
        "coded-on-read": ("mla", "on-read", "auto"),
    }.get(kind, (kind, "decoupled", "16"))
    offer = next(
        o
        for o in offers(source, [budget / 100])
        if (o.form, o.rope, o.kv_bits) == (form, rope, bits)
    )
    if offer.config is None:
        raise typer.BadParameter(str(offer.refused))
    return _stock(offer.config) if kind == "stock" else offer.config


def _stock(config: PretrainedConfig) -> PretrainedConfig:
    """The same widths in transformers' class, whose KV heads are as many as its heads."""
    return YoutuConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        kv_lora_rank=config.kv_lora_rank,
        q_lora_rank=None,
        qk_rope_head_dim=config.qk_rope_head_dim,
        qk_nope_head_dim=config.qk_nope_head_dim,
        v_head_dim=config.v_head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
    )


def _build(config: PretrainedConfig, dtype: str) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def _share(models: list[Any]) -> None:
    """One copy of all that is not attention, so that the caches have the memory."""
    first = models[0].state_dict()
    for model in models[1:]:
        same = [name for name in model.state_dict() if name in first and "attn" not in name]
        model.load_state_dict({name: first[name] for name in same}, strict=False, assign=True)
    gc.collect()


@torch.no_grad()
def _decode(
    model: Any, step: Callable[..., Any], batch: int, context: int, static: bool
) -> tuple[list[float], dict[str, float | None]]:
    """Seconds of every step that follows a context, and the memory it all took."""
    before = _reset_peak()
    cache = _filled(model, batch, context, static)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    token = torch.zeros(batch, 1, dtype=torch.long)
    times = []
    for number in range(WARM_UP + STEPS):
        start = time.perf_counter()
        step(input_ids=token, **{cache_argument(model): cache}, use_cache=True)
        if number >= WARM_UP:
            times.append(time.perf_counter() - start)
    peak = _peak()
    used = None if before is None or peak is None else round((peak - before) / 1e6, 1)
    return times, {"cache_mb": round(size / 1e6, 1), "peak_mb": used}


@torch.no_grad()
def _tensors(model: Any, step: Callable[..., Any], batch: int, context: int, static: bool) -> float:
    """Megabytes that the cache and all else a step makes take at most, without the allocator's."""
    token = torch.zeros(batch, 1, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        cache = _filled(model, batch, context, static)
        with record_function("steps"):
            for _ in range(2):
                step(input_ids=token, **{cache_argument(model): cache}, use_cache=True)
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    begun = next(event.start_ns() for event in events if event.name() == "steps")
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    held = accumulate(nbytes for _, nbytes in changes)
    steps = (size for (at, _), size in zip(changes, held, strict=True) if at >= begun)
    return round(max(steps) / 1e6, 1)


def _filled(model: Any, batch: int, context: int, static: bool) -> Any:
    """A cache as a prompt would leave it, with random numbers in it."""
    room = context + WARM_UP + STEPS
    cache = StaticCache(model.config, max_cache_len=room) if static else DynamicCache()
    probe = DynamicCache()
    model(
        input_ids=torch.zeros(1, 1, dtype=torch.long),
        **{cache_argument(model): probe},
        use_cache=True,
    )
    for index, layer in enumerate(probe.layers):
        if isinstance(layer, FirstTokens):
            coded_layer(cache, index).first = layer.first.repeat(batch, 1, 1)
        cache.update(
            _random(layer.keys, batch, context), _random(layer.values, batch, context), index
        )
    return cache


def _random(like: torch.Tensor, batch: int, context: int) -> torch.Tensor:
    numbers = like.new_empty(batch, like.shape[1], context, like.shape[3])
    return numbers.normal_() if numbers.is_floating_point() else numbers.random_()


def _reset_peak() -> int | None:
    """Resident bytes now; the peak is counted from here (Linux; None elsewhere)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would hide the peak
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _status("VmRSS")


def _peak() -> int | None:
    return _status("VmHWM")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    return f"{processor}, {cores}, torch {torch.__version__}"


@app.command()
def table(name: str) -> None:
    """The results as Markdown: milliseconds a token, and each kind's time over the original's."""
    rows = _read(name)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    print("| batch | context | " + " | ".join(kinds) + " |")
    print("|---|---|" + "---|" * len(kinds))
    for batch, context, found in _groups(rows):
        base = found.get("original", {}).get("ms")
        cells = []
        for kind in kinds:
            ms = found.get(kind, {}).get("ms")
            ratio = f" ({base / ms:.2f}x)" if base and ms and kind != "original" else ""
            cells.append("" if ms is None else f"{ms:.1f}{ratio}")
        print(f"| {batch} | {context} | " + " | ".join(cells) + " |")


@app.command()
def plot(name: str, output: Annotated[Path, typer.Option()]) -> None:
    """Tokens a second against the context, a panel for every batch, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = _read(name)
    batches = sorted({row["batch"] for row in rows})
    figure, panels = plt.subplots(
        1, len(batches), figsize=(4.5 * len(batches), 4), dpi=150, squeeze=False
    )
    for batch, axes in zip(batches, panels[0], strict=True):
        for kind in dict.fromkeys(row["kind"] for row in rows):
            points = sorted(
                (row["context"], row["batch"] * 1e3 / row["ms"])
                for row in rows
                if (row["kind"], row["batch"]) == (kind, batch)
            )
            axes.plot(*zip(*points, strict=True), "o-", label=kind)
        axes.set(
            xscale="log", yscale="log", xlabel="context", ylabel="tokens/s", title=f"batch {batch}"
        )
        contexts = sorted({row["context"] for row in rows})
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        ticks = [d * 10.0**e for e in range(-2, 5) for d in (1, 2, 5) if low < d * 10.0**e < high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    figure.suptitle(rows[0]["machine"], fontsize=7)
    figure.tight_layout()
    figure.savefig(output)


def _groups(rows: list[dict]) -> Iterator[tuple[int, int, dict[str, dict]]]:
    for batch, context in sorted({(row["batch"], row["context"]) for row in rows}):
        here = [row for row in rows if (row["batch"], row["context"]) == (batch, context)]
        yield batch, context, {row["kind"]: row for row in here}


def _read(name: str) -> list[dict]:
    file = RESULTS / f"decode-{name}.json"
    return json.loads(file.read_text()) if file.exists() else []


def _keep(name: str, row: dict) -> None:
    """Adds the row to the results, in the place of one for the same question."""
    asked = ("model", "kind", "budget", "batch", "context", "dtype", "static", "compiled")
    key = [row[field] for field in asked]
    rows = [old for old in _read(name) if [old[field] for field in asked] != key]
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps([*rows, row], indent=1)
    (RESULTS / f"decode-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    app()
