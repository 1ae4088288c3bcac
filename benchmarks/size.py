"""What a conversion takes at size: time a layer by its parts, memory and disk.

    python benchmarks/size.py write DIR --layers 32     # Llama-2-7B's shapes, 13.5 GB
    python benchmarks/size.py write DIR --layers 1 --shapes llama-3-70b
    python benchmarks/size.py run DIR --name llama-2-7b --budget 12.5
    python benchmarks/size.py table
    python benchmarks/size.py weights                   # attention's parameters, by form and budget

The weights are random and are written a layer at a time. Time and memory do not depend on their
values, nor does memory on the number of layers.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from rehead.converters.inspection import attention_parameters, offers, pays_from_tokens

RESULTS = Path(__file__).parent / "results" / "size.json"
SHAPES = {
    "llama-2-7b": dict(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    ),
    "llama-3-70b": dict(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
    ),
}

app = typer.Typer(pretty_exceptions_enable=False)
console = Console(highlight=False)


@app.command()
def write(
    folder: Path,
    layers: int = 32,
    seed: int = 0,
    shapes: Annotated[str, typer.Option(help=" or ".join(SHAPES))] = "llama-2-7b",
) -> None:
    """A checkpoint of a known model's shapes with that many layers."""
    if shapes not in SHAPES:
        raise typer.BadParameter(f"{shapes} is none of {', '.join(SHAPES)}.")
    folder.mkdir(parents=True)
    config = LlamaConfig(num_hidden_layers=layers, dtype="float16", **SHAPES[shapes])  # type: ignore[arg-type]
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, list[str]] = {}
    for name in sizes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        shards.setdefault(part, []).append(name)
    where, total = {}, 0
    for index, names in enumerate(track(shards.values(), "writing"), 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _weight(sizes[name], generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)


def _weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.float16)
    return (torch.randn(shape, generator=generator) * 0.02).half()


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@app.command()
def run(
    folder: Path,
    name: Annotated[str, typer.Option(help="Of the row in the results.")],
    budget: float = 12.5,
    samples: int = 16,
    heal: int = 0,
    options: Annotated[str, typer.Option(help="Further ones, for convert.")] = "",
) -> None:
    """Converts the checkpoint, notes what it took, and deletes the result."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        command = [Path(sys.executable).with_name("convert"), "--to", "mla", folder, "--json"]
        command += ["--verbose", "--kv-budget", f"{budget}%", "--samples", samples, "--heal", heal]
        command += ["--output", Path(place) / "out", *options.split()]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as child:
            most, over = [0], threading.Event()
            watch = threading.Thread(target=_watch_disk, args=(Path(place), most, over))
            watch.start()
            stdout, _ = child.communicate()
            over.set()
            watch.join()
        if child.returncode:
            raise typer.Exit(child.returncode)
        done = json.loads(stdout)
        written = _bytes(Path(place) / "out")
    row = dict(
        name=name,
        budget=budget,
        samples=samples,
        heal=heal,
        options=options,
        layers=len(done["layers"]),
        seconds=done["seconds"],
        parts=done["parts"],
        peak_rss_bytes=done["peak_rss_bytes"],
        disk_bytes=most[0],
        written_bytes=written,
        read_bytes=_bytes(folder),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    rows = [r for r in _rows() if r["name"] != name] + [row]
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    table()


def _watch_disk(place: Path, most: list[int], over: threading.Event) -> None:
    """Keeps the most bytes that the folder held, the work beside the output included."""
    while not over.wait(1):
        most[0] = max(most[0], _bytes(place))


def _bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # it was just renamed
            total += file.stat().st_size if file.is_file() else 0
    return total


@app.command()
def table() -> None:
    """Every row: seconds a layer by part, memory and disk."""
    rows = _rows()
    parts = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    shown = Table("name", "layers", *parts, "all", "memory", "disk", "of it the result")
    for row in rows:
        each = [row["parts"].get(part, 0) / row["layers"] for part in parts]
        sizes = (row[key] / 1e9 for key in ("peak_rss_bytes", "disk_bytes", "written_bytes"))
        shown.add_row(
            row["name"],
            str(row["layers"]),
            *(f"{seconds:.1f} s" for seconds in each),
            f"{row['seconds'] / 60:.1f} min",
            *(f"{size:.2f} GB" for size in sizes),
        )
    console.print(shown)


# Of the known models that `weights` shows: the config of each by its shapes.
KNOWN = {
    "Llama-2-7B": LlamaConfig(num_hidden_layers=32, **SHAPES["llama-2-7b"]),  # type: ignore[arg-type]
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Qwen3-8B": Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "Gemma-3-12B": Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=3840,
        intermediate_size=15360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
}


@app.command()
def weights(budgets: str = "50,33,25,12.5") -> None:
    """Attention's parameters over the source's and bytes a token, by form and budget, as Markdown.

    Of the config alone, with dims as a layer of mean width has them. Bytes are of 16 bits a number.
    """
    print(
        "| model | form | KV cache | parameters | over the source's | bytes a token | pays from |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, config in KNOWN.items():
        config.dtype = torch.bfloat16
        own = attention_parameters(config)
        for offer in offers(config, [float(budget) / 100 for budget in budgets.split(",")]):
            if offer.config is None or offer.kv_bytes_per_token is None:
                continue
            found = attention_parameters(offer.config)
            kv_bytes = {
                "source": round(offer.kv_bytes_per_token / offer.kv_budget),
                "converted": offer.kv_bytes_per_token,
            }
            form = offer.form + (" on-read" if offer.rope == "on-read" else "")
            form += " coded" if offer.kv_bits != "16" else ""
            cells = [name, form, f"{offer.kv_budget:.1%}" + " exact" * offer.exact]
            cells += [f"{found / 1e9:.3f}B", f"{found / own:.2f}", str(kv_bytes["converted"])]
            cells += [str(pays_from_tokens(own, found, kv_bytes, 2))]
            print("| " + " | ".join(cells) + " |")


def _rows() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


if __name__ == "__main__":
    app()
