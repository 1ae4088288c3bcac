"""A converted model beside its source: the same text read by both, and what each says next."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..converters.text import windows
from .cache import kv_bytes_per_token
from .generation import continuation
from .loading import load_config, load_model, load_tokenizer
from .perplexity import Perplexity, perplexity

WINDOW, WINDOWS = 1024, 16
# So many windows' first tokens are gone on with.
PROMPTS = 3
PROMPT_TOKENS = 24
NEW_TOKENS = 40


@dataclass(frozen=True)
class Measured:
    """One model on the text.

    Args:
        kv_bytes_per_token: measured on the cache's tensors.
        continuations: of each prompt, greedy.
    """

    perplexity: Perplexity
    kv_bytes_per_token: int
    continuations: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Both models on one text.

    Args:
        text: the name it was given by.
        prompts: the text's own words, that both models go on with.
    """

    text: str
    prompts: tuple[str, ...]
    source: Measured
    converted: Measured


def comparison_windows(model: str | Path, text: str) -> Tensor:
    """The text's first windows, as long as the model's positions allow: LongTensor [n, L].

    Raises:
        InputError: there is no such model, or the text is shorter than one window.
    """
    tokenizer = load_tokenizer(model)
    longest = getattr(load_config(model), "max_position_embeddings", None) or WINDOW
    return windows(tokenizer, text, min(WINDOW, longest), WINDOWS)


def compare(
    source: str | Path,
    converted: str | Path,
    ids: Tensor,
    *,
    name: str = "",
    device: str = "cpu",
    progress: Callable[[str, int, int, dict[str, Any]], None] | None = None,
) -> Comparison:
    """Perplexity, cache and greedy continuations of two models, one of which is loaded at a time.

    Args:
        ids: windows of the text, see `comparison_windows`.
        name: what to call the text.
        progress: called as progress(stage, done, total, info).

    Raises:
        InputError: a model cannot be loaded.
    """
    tokenizer = load_tokenizer(converted)
    prompts = tuple(tokenizer.decode(row[:PROMPT_TOKENS]) for row in ids[:PROMPTS])

    def measured(stage: str, model: str | Path) -> Measured:
        loaded = load_model(model, device=device)
        return _measured(loaded, tokenizer, ids, prompts, lambda d, t: tell(stage, d, t, {}))

    tell = progress or (lambda *_: None)
    return Comparison(
        text=name,
        prompts=prompts,
        source=measured("evaluate source", source),
        converted=measured("evaluate converted", converted),
    )


def _measured(
    model: Any,
    tokenizer: Any,
    ids: Tensor,
    prompts: tuple[str, ...],
    progress: Callable[[int, int], None],
) -> Measured:
    return Measured(
        perplexity=perplexity(model, ids, progress=progress),
        kv_bytes_per_token=kv_bytes_per_token(model),
        continuations=tuple(
            continuation(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS) for prompt in prompts
        ),
    )
