"""What a model says next."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ..converters.errors import InputError


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 32) -> str:
    """The text with which the model goes on after `prompt`, greedily, without the prompt."""
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    # A generation config that samples carries values that greedy search warns about.
    out = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    return tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def own_texts(
    model: Any,
    tokenizer: Any,
    tokens: int,
    *,
    length: int = 512,
    batch: int = 32,
    temperature: float = 1.0,
    top_p: float = 0.95,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[str, int]]:
    """Texts that the model writes from nothing, each with its number of tokens.

    Calibrated on its own words, a conversion needs no data (LLM-QAT, arXiv 2305.17888).

    Args:
        tokens: of all texts together, or a few more.
        length: at most so many tokens in a text, which ends before where the model ends it.
        batch: texts that are written at once, at most.
        temperature, top_p: of the sampling; at 1 and 1 it is the model's own distribution.
        progress: called as progress(tokens) with every step, before the texts that hold them.

    Raises:
        InputError: the tokenizer has no token that a text begins with.
    """
    first = tokenizer.bos_token_id
    if first is None:
        first = tokenizer.eos_token_id  # models without the one have texts follow the other
    if first is None:
        raise InputError("the tokenizer names neither a BOS nor an EOS for a text to begin with.")
    ends = {tokenizer.eos_token_id, *_listed(model.generation_config.eos_token_id)} - {None}
    longest = getattr(model.config, "max_position_embeddings", None) or length + 1
    torch.manual_seed(seed)
    written = 0
    while written < tokens:
        count = min(batch, -(-(tokens - written) // length))
        start = torch.full((count, 1), first, device=model.device)
        watch = _Watch(progress, written) if progress else None
        rows = model.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=min(length, longest - 1),
            do_sample=True,
            temperature=temperature,
            top_p=top_p,
            top_k=0,
            pad_token_id=first if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([watch] if watch else []),
        )
        before = written
        for row in rows[:, 1:].tolist():
            size = next((place for place, token in enumerate(row) if token in ends), len(row))
            text = tokenizer.decode(row[:size], skip_special_tokens=True)
            if written < tokens and text.strip():
                written += size
                yield text, size
        if written == before:
            raise InputError("the model ends its texts before the first word.")


class _Watch(StoppingCriteria):
    """Stops nothing: it tells how many tokens are drawn."""

    def __init__(self, progress: Callable[[int], None], before: int) -> None:
        self.progress, self.before = progress, before

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.progress(self.before + len(input_ids) * (input_ids.shape[1] - 1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _listed(item: Any) -> list[Any]:
    return item if isinstance(item, list) else [item]
