"""The README.md that a converted model carries."""

from pathlib import Path

from transformers import PretrainedConfig

from .recipe import Conversion, LayerReport, channel_words
from .targets import TARGETS, is_stock


def model_card(done: Conversion, source: PretrainedConfig) -> str:
    """Markdown with the hub's metadata, the recipe and what was measured during conversion."""
    recipe = done.recipe
    cache = done.kv_bytes_per_token
    errors = [layer.error for layer in done.layers if layer.error is not None]
    layers = [layer for layer in done.layers if layer.error is not None]
    names = list(layers[0].dims) if layers else []
    codes = [*layers[0].codes] if layers else []
    rows = "\n".join(
        f"| {' | '.join(map(str, (layer.layer, *layer.dims.values(), *_codes(layer))))} "
        f"| {layer.error:.3g} |"
        for layer in layers
    )
    coded = f"\n\n{_coded(done)}" if done.coded else ""
    # Only a hub id may stand as base_model; a local path says nothing to others.
    named = recipe.source.count("/") == 1 and recipe.source[0] not in "./~"
    base = f"base_model: {recipe.source}\n" if named and not Path(recipe.source).exists() else ""
    rope = f"rope {recipe.rope}, " if done.form == "mla" else ""
    stock = is_stock(done.form, source)
    loading = "" if stock else ", trust_remote_code=True"
    note = (
        "It is the family's own class, which every engine loads."
        if stock
        else "With `import rehead.modeling` first, `trust_remote_code` is not needed."
    )
    name = done.output.name if done.output else source.model_type
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rehead, {done.form}]
{base}---

# {name}

A {source.model_type} model converted to {TARGETS[done.form].title} by rehead.
Its KV cache holds {cache["converted"]:,} bytes per token instead of {cache["source"]:,}
({cache["converted"] / cache["source"]:.1%}).{coded}

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}"{loading})
```

{note}

Recipe: {rope}calibration text {recipe.calibration}, {recipe.samples} sequences,
{recipe.heal} healing steps a layer, seed {recipe.seed}. The whole of it is in `config.json` under
`conversion`.

Relative squared error of each attention layer's output on held-out calibration text
(mean {sum(errors) / max(1, len(errors)):.3g}):

| {" | ".join(("layer", *names, *codes))} | error |
{"|---" * (len(names) + len(codes) + 2)}|
{rows}
"""


def _coded(done: Conversion) -> str:
    exact = done.recipe.exact_tokens
    whole = f" The first {exact} tokens of a sequence are cached whole as well." if exact else ""
    return f"What it caches is coded: {done.coded}.{whole}"


def _codes(layer: LayerReport) -> list[str]:
    """Of keys and of values, or of both together, the channels by their bits."""
    return [channel_words(counts) for counts in layer.codes.values()]
