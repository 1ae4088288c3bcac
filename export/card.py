"""The README.md of an exported model: the conversion's own, with what the export changes."""

from transformers import PretrainedConfig

from .latent import LatentModel

FRONT = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [rehead, mla]\n---\n"
# Where the conversion's card goes over from how to load it to how it was made.
RECIPE = "\nRecipe: "


NATIVE = (
    "exported without loss to",
    """The last channel of the latent is a constant, which makes the latent's norm one. Engines that
leave out biases or longrope frequencies (llama.cpp among them) cannot run this checkpoint.""",
)
DEEPSEEK = (
    "exported to",
    """vLLM and SGLang have a class of that name of their own. No layer has experts. The latent goes
through an RMSNorm that some of its channels make nearly constant, at a small loss.""",
)


def stock_card(
    model: LatentModel, name: str, config: PretrainedConfig, about: tuple[str, str]
) -> str:
    """The card of a checkpoint in a stock class.

    Args:
        about: how it was exported, and what is to be known of it: `NATIVE` or `DEEPSEEK`.
    """
    front, recipe = _card_of(model)
    how, known = about
    return f"""{front}
# {name}

A {model.family.model_type} model converted to multi-head latent attention (MLA) by rehead, and
{how} transformers' own `{config.architectures[0]}`: no custom code is needed.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")
```

{known}
{recipe}"""


def _card_of(model: LatentModel) -> tuple[str, str]:
    """The metadata of the conversion's card, and all from its recipe on."""
    file = model.source.path / "README.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    parts = text.split("---\n", 2)
    front = f"---\n{parts[1]}---\n" if len(parts) == 3 and not parts[0] else FRONT
    _, found, rest = text.partition(RECIPE)
    return front, found + rest
