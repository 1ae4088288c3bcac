"""The Triton kernel that reads a latent, in its interpreter, against keys that are formed."""

import pytest
import tiny
import torch
from tiny import error, step_by_step

from rehead.modeling import on_read, read_kernel
from rehead.modeling.rope_slots import SlotAngles, key_pairs, side_by_side, with_turned

BATCH, HEADS, RANK, SLOTS, SCALING = 2, 3, 21, 300, 0.3
INDEX = torch.tensor([0, 2, 2, 5, 7])


def inputs(dtype: torch.dtype = torch.float32):
    """(query, tail, latent, bias), with a tail of 2 n dims."""
    make = torch.Generator().manual_seed(3)
    tail = 2 * len(INDEX)
    shapes = [(BATCH, HEADS, 1, RANK), (BATCH, HEADS, 1, tail), (BATCH, 1, SLOTS, RANK)]
    shapes += [(tail,)]
    return [torch.randn(shape, generator=make).to(dtype) for shape in shapes]


def formed(query, tail, latent, bias, mask, angles):
    """The same by keys that are formed, and torch's attention."""
    rows = with_turned(latent, latent.shape[-1], key_pairs(bias), INDEX, angles)
    return torch.nn.functional.scaled_dot_product_attention(
        torch.cat((query, side_by_side(tail)), dim=-1),
        rows.expand(-1, HEADS, -1, -1),
        latent.expand(-1, HEADS, -1, -1),
        attn_mask=mask,
        scale=SCALING,
    )


@pytest.fixture
def angles():
    return SlotAngles(100.0 ** (-torch.arange(8) / 8), 1.0)


@pytest.mark.parametrize("kind", ["all", "boolean", "additive"])
@torch.no_grad()
def test_kernel_equals_formed_keys(kind, angles, monkeypatch):
    """Over several blocks to a program, several programs, and a period of the angles' tables."""
    monkeypatch.setattr(read_kernel, "SPLITS", 2)
    query, tail, latent, bias = inputs()
    mask = torch.ones(BATCH, 1, 1, SLOTS, dtype=torch.bool)
    mask[0, ..., :200] = False  # a program that sees nothing at all
    if kind == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    mask = None if kind == "all" else mask
    got = read_kernel.kernel_read(query, tail, latent, bias, mask, INDEX, angles, SCALING)
    assert error(got, formed(query, tail, latent, bias, mask, angles)) < 1e-5
    # The twins: keys turned with each other's frequencies, and a bias left out, must fail it.
    for other, index in ((bias, INDEX.flip(0)), (0 * bias, INDEX)):
        wrong = read_kernel.kernel_read(query, tail, latent, other, mask, index, angles, SCALING)
        assert error(wrong, got) > 1e-2


@torch.no_grad()
def test_kernel_in_half_precision_errs_no_more_than_formed_keys(angles):
    # In float16: the interpreter has no products of bfloat16.
    exact = formed(*inputs(), None, angles)
    narrow = inputs(torch.float16)
    got = read_kernel.kernel_read(*narrow, None, INDEX, angles, SCALING)
    assert got.dtype == torch.float16
    theirs = error(formed(*narrow, None, angles).float(), exact)
    assert error(got.float(), exact) < 2 * theirs


MODELS = {
    "rope_read": lambda: tiny.mla(form="rope_read"),
    "rope_read, uneven": lambda: tiny.mla(
        form="rope_read", **tiny.BIASES | tiny.UNEVEN["rope_read"]
    ),
    "mfa_kr": lambda: tiny.mfa(form="mfa_kr", **tiny.MFA_BIASES),
    "mfa_kr, uneven": lambda: tiny.mfa(form="mfa_kr", **tiny.MFA_WIDE),
    "mfa_kr_rows": lambda: tiny.mfa(form="mfa_kr_rows"),
}


@pytest.mark.parametrize("form", MODELS)
@torch.no_grad()
def test_model_decodes_by_the_kernel(form, ids, left_padding, monkeypatch):
    """Asked for as an attn_implementation: left-padded steps equal the full forward."""
    model = MODELS[form]()
    real, positions = left_padding.bool(), tiny.positions_of(left_padding)
    want = model(ids, attention_mask=left_padding, position_ids=positions, use_cache=False).logits
    calls = []

    def counted(*args):
        calls.append(args)
        return read_kernel.kernel_read(*args)

    monkeypatch.setattr(on_read, "kernel_read", counted)
    model.set_attn_implementation(read_kernel.NAME)
    got = step_by_step(model, ids, left_padding, 16, [1, 1, 2])
    assert error(got[real], want[real]) < 1e-5
    read = sum(model.config.layer_dims(layer)[1] > 0 for layer in range(2))
    assert len(calls) == 2 * read
