"""Tiny models of every kind that cache codes."""

import sources
import tiny
import torch

# A layer that sees all tokens and one with a window.
MIXED = dict(sliding_window=6, layer_types=["full_attention", "sliding_attention"])
# Case -> family, fields.
CASES = {
    "llama": ("llama", {}),
    "yarn": ("llama", dict(rope_parameters=tiny.ROPE_TYPES["yarn"])),
    "longrope": ("llama", dict(rope_parameters=tiny.ROPE_TYPES["longrope"])),
    "window": ("mistral", dict(sliding_window=6)),
    "norm of a head": ("qwen3", {}),
    "norm of all heads": ("olmo2", {}),
    "norm of all heads, window": ("olmo3", MIXED),
    "two kinds of RoPE": ("gemma3_text", MIXED),
    "cap": ("gemma2", MIXED),
    "part of a head": ("phi", {}),
    "other part": ("stablelm", {}),
    "no RoPE": ("gpt2", {}),
}
SHORT = ("llama", "norm of a head", "window")
EVERY = [(c, layout) for c in CASES for layout in tiny.CODED if c != "no RoPE" or layout == "mla"]
SOME = [(case, layout) for case, layout in EVERY if case in SHORT]


def made(case: str, layout: str, dtype: torch.dtype = torch.float64, **fields) -> torch.nn.Module:
    """In float64, whose rounding moves no number to the next step, unless told otherwise."""
    family, own = CASES[case]
    source = None if family == "llama" else sources.FAMILIES[family][2]
    model = tiny.coded(layout, family, source, **own | fields).to(dtype)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    return model
