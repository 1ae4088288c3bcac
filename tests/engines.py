"""Tiny conversions as engines want them, for the tests of every export with a steadied norm."""

from pathlib import Path

import folders
import tiny
import torch

# As `--preset engine` converts: no biases, and frequencies that are powers of one base.
FIELDS = folders.MODEL_FIELDS | dict(rope_pairs=[[0, 1, 2]] * 2)
# Printable bytes, as in the calibration text: what it never shows is not fitted.
IDS = torch.randint(33, 127, (2, 60), generator=torch.Generator().manual_seed(0))
# (family, rope, further fields)
KINDS = [
    ("llama", "default", {}),
    ("llama", "default", dict(tie_word_embeddings=True, num_key_value_heads=4)),
    ("llama", "yarn", {}),
    ("mistral", "default", dict(rope_pairs=[[0, 3]] * 2, qk_rope_head_dim=4)),
]


def save(folder: Path, family: str = "llama", rope: str = "default", **fields) -> torch.nn.Module:
    """A conversion with random norms and a padding row that is not zero, saved there."""
    parameters = dict(tiny.ROPE_TYPES[rope])
    if rope == "yarn":  # its fastest frequencies are as they were
        parameters |= dict(beta_fast=4, beta_slow=2, original_max_position_embeddings=400)
    model = tiny.mla(family, **FIELDS | dict(rope_parameters=parameters) | fields)
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.5, 2.0)
    torch.nn.init.normal_(model.model.embed_tokens.weight.data[0])
    return folders.save(folder, model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits
