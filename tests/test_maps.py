"""The central object: its two attentions, and that they are transformers' own."""

from dataclasses import replace

import layers
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import error

from rehead.converters.families import family_of
from rehead.converters.maps import (
    AttentionMaps,
    attention,
    position_angles,
    reference_attention,
    rotate,
)

ROPES = tiny.ROPE_TYPES | {
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
}


def twins(maps: AttentionMaps) -> dict[str, AttentionMaps]:
    """The same layer, wrong on purpose."""
    swapped = maps.q.clone()
    swapped[[0, -1]] = maps.q[[-1, 0]]
    return {
        "two heads swapped": replace(maps, q=swapped),
        "no scaling": replace(maps, scaling=1.0),
        "turned the other way": replace(maps, inv_freq=-maps.inv_freq),
        "frequencies in reverse": replace(maps, inv_freq=maps.inv_freq.flip(0)),
    }


SHAPES = {
    "grouped": {},
    "biases": dict(bias=True),
    "a head each": dict(groups=4),
    "one key head": dict(groups=1, bias=True),
    "wide queries": dict(width=14, v_dim=6),
    "wide values": dict(width=4, v_dim=10, bias=True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_reference_and_no_twin_is(shape):
    maps, x = layers.maps(**SHAPES[shape]), layers.inputs()
    wanted = torch.stack([reference_attention(maps, row) for row in x.double()])
    assert error(attention(maps.to(torch.float32), x), wanted) < 2e-6
    for name, twin in twins(maps).items():
        assert error(attention(twin.to(torch.float32), x), wanted) > 1e-2, name


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_attention_are_those_of_the_reference(shape):
    maps, x = layers.maps(**SHAPES[shape]), layers.inputs(1)
    names = [name for name in vars(maps) if isinstance(getattr(maps, name), torch.Tensor)]
    names.remove("inv_freq")
    found = {}
    for dtype in (torch.float32, torch.float64):
        leaves = {name: getattr(maps, name).to(dtype).requires_grad_() for name in names}
        part = replace(maps, inv_freq=maps.inv_freq.to(dtype), **leaves)
        y = (
            attention(part, x)
            if dtype == torch.float32
            else reference_attention(part, x[0].double())
        )
        found[dtype] = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    for name, ours, wanted in zip(names, found[torch.float32], found[torch.float64], strict=True):
        assert error(ours, wanted) < 1e-4, name


def test_no_token_sees_a_later_one():
    maps, x = layers.maps(bias=True), layers.inputs(1, dtype=torch.float64)[0]
    changed = x.clone()
    changed[10:] += 1
    before, after = reference_attention(maps, x), reference_attention(maps, changed)
    assert torch.equal(before[:10], after[:10])
    assert not torch.allclose(before[10:], after[10:])


def test_only_differences_of_positions_count():
    maps, x = layers.maps(), layers.inputs(1, dtype=torch.float64)[0]
    positions = torch.arange(len(x), dtype=torch.float64)
    wanted = reference_attention(maps, x)
    assert error(reference_attention(maps, x, positions + 17), wanted) < 1e-12
    assert error(reference_attention(maps, x, 2 * positions), wanted) > 1e-2


def test_a_frequency_of_zero_is_not_rotated():
    maps, x = layers.maps(), layers.inputs(1, dtype=torch.float64)[0]
    still = replace(maps, inv_freq=torch.zeros_like(maps.inv_freq))
    elsewhere = torch.rand(len(x), dtype=torch.float64)
    wanted = reference_attention(still, x)
    assert torch.equal(reference_attention(still, x, elsewhere), wanted)
    assert error(reference_attention(maps, x), wanted) > 1e-2


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=3), st.floats(-50, 50))
@settings(max_examples=50, deadline=None)
def test_rotations_add_up_and_keep_lengths(angles, start):
    a = torch.tensor(angles, dtype=torch.float64)
    x = torch.linspace(-1, 2, 6, dtype=torch.float64) + start
    assert torch.allclose(rotate(rotate(x, a), 2 * a), rotate(x, 3 * a), atol=1e-10)
    assert torch.allclose(rotate(x, a).norm(), x.norm())
    z = torch.complex(*x.chunk(2)) * torch.polar(torch.ones_like(a), a)
    assert torch.allclose(rotate(x, a), torch.cat([z.real, z.imag]), atol=1e-10)


def test_angles_start_where_asked():
    inv_freq = torch.tensor([1.0, 0.25], dtype=torch.float64)
    angles = position_angles(inv_freq, 3, start=4)
    assert angles.tolist() == [[4.0, 1.0], [5.0, 1.25], [6.0, 1.5]]


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("family", tiny.SOURCES)
@torch.no_grad()
def test_reference_is_transformers_own_attention(family, rope_type):
    """Qwen2 has biases, filled with random numbers; 40 tokens are beyond longrope's short ones."""
    fields = {"attention_bias": True} if family == "llama" and rope_type == "yarn" else {}
    model = tiny.source(family, rope_parameters=ROPES[rope_type], **fields)
    module = model.model.layers[1].self_attn
    x = layers.inputs(2, 40)
    rotary = model.model.rotary_emb
    turned = rotary(x, torch.arange(40)[None])
    future = torch.full((40, 40), -torch.inf).triu(1)[None, None]
    wanted = module(x, position_embeddings=turned, attention_mask=future)[0]
    factor = float(rotary.attention_scaling)
    assert (factor != 1) == (rope_type in ("yarn", "longrope"))
    maps = family_of(model.config).read(model.config, module.state_dict(), rotary.inv_freq, factor)
    assert (maps.q_bias is not None) == (family == "qwen2" or bool(fields))

    def distance(found: AttentionMaps) -> float:
        return error(torch.stack([reference_attention(found, row) for row in x.double()]), wanted)

    assert distance(maps) < 5e-6
    wrong = twins(maps)
    if factor != 1:
        wrong["no attention factor"] = replace(maps, scaling=maps.scaling / factor**2)
    if maps.q_bias is not None:
        wrong["no bias"] = replace(maps, q_bias=None)
    for name, twin in wrong.items():
        assert distance(twin) > 1e-2, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(3, 8, 32)), r"k has shape \(3, 8, 32\), expected \(2, 8, 32\)"),
        (dict(v=torch.zeros(3, 8, 32)), "4 query heads cannot share 3 KV heads evenly"),
        (dict(o=torch.zeros(32, 4, 9)), r"o has shape \(32, 4, 9\), expected \(32, 4, 8\)"),
        (dict(q=torch.zeros(4, 7, 32)), "qk_dim=7 is odd"),
        (dict(inv_freq=torch.zeros(3)), r"inv_freq has shape \(3,\), expected \(4,\)"),
        (dict(v_bias=torch.zeros(4, 8)), "v_bias has shape"),
    ],
)
def test_maps_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(layers.maps(), **change)


def test_moving_keeps_what_is_no_tensor():
    maps = layers.maps(bias=True).to(torch.float32)
    assert {t.dtype for t in vars(maps).values() if isinstance(t, torch.Tensor)} == {torch.float32}
    assert maps.scaling == 8**-0.5
    assert layers.maps().to(torch.float32).q_bias is None
    assert (maps.heads, maps.kv_heads, maps.repeats) == (4, 2, 2)
    assert (maps.qk_dim, maps.v_dim, maps.hidden) == (8, 8, 32)
