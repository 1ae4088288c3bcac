"""What a model says next."""

from typing import Any

import torch


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
