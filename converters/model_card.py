"""The README.md that a converted model carries."""

from pathlib import Path

from transformers import PretrainedConfig

from .recipe import Conversion

NAMES = {"mla": "multi-head latent attention (MLA)"}


def model_card(done: Conversion, source: PretrainedConfig) -> str:
    """Markdown with the hub's metadata, the recipe and what was measured during conversion."""
    recipe = done.recipe
    cache = done.kv_bytes_per_token
    errors = [layer.error for layer in done.layers if layer.error is not None]
    rows = "\n".join(
        f"| {layer.layer} | {layer.kv_lora_rank} | {layer.qk_rope_head_dim} | {layer.error:.3g} |"
        for layer in done.layers
        if layer.error is not None
    )
    # Only a hub id may stand as base_model; a local path says nothing to others.
    named = recipe.source.count("/") == 1 and recipe.source[0] not in "./~"
    base = f"base_model: {recipe.source}\n" if named and not Path(recipe.source).exists() else ""
    name = done.output.name if done.output else source.model_type
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rehead, {done.form}]
{base}---

# {name}

A {source.model_type} model converted to {NAMES[done.form]} by rehead.
Its KV cache holds {cache["converted"]:,} bytes per token instead of {cache["source"]:,}
({done.kv_budget:.1%}).

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
```

With `import rehead.modeling` first, `trust_remote_code` is not needed.

Recipe: rope {recipe.rope}, calibration text {recipe.calibration}, {recipe.samples} sequences,
{recipe.heal} healing steps a layer, seed {recipe.seed}. The whole of it is in `config.json` under
`conversion`.

Relative squared error of each attention layer's output on held-out calibration text
(mean {sum(errors) / max(1, len(errors)):.3g}):

| layer | kv_lora_rank | qk_rope_head_dim | error |
|---|---|---|---|
{rows}
"""
