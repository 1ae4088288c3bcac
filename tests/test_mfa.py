"""MFA and MFA-KR as closed forms: exact at full width, best of their kind below it."""

import itertools
from dataclasses import replace

import layers
import pytest
import torch
from layers import error

from rehead.converters.activations import Activations
from rehead.converters.errors import InputError
from rehead.converters.healing import heal, output_error
from rehead.converters.maps import attention, reference_attention
from rehead.converters.mfa import MFADims, mfa_moments, to_mfa, with_shared_queries

SHAPES = {
    "grouped": {},
    "grouped, biases": dict(bias=True),
    "a head each": dict(groups=4, hidden=48),
    "one key head": dict(groups=1, bias=True),
    "cache wider than the input": dict(groups=4, hidden=24, bias=True),
}


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def moments_of(maps, x):
    return mfa_moments(maps, x, seeded())


def outputs(maps, x):
    return torch.stack([reference_attention(maps, row) for row in x.double()])


def full(maps, key_reuse):
    keys = maps.kv_heads * maps.qk_dim
    return MFADims(2 * keys if key_reuse else keys, keys, key_reuse)


@pytest.mark.parametrize("key_reuse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_at_full_width_it_is_the_identity(shape, key_reuse):
    maps = layers.maps(**SHAPES[shape])
    x = layers.inputs(hidden=maps.hidden)
    wanted, moments, dims = outputs(maps, x), moments_of(maps, x), full(maps, key_reuse)
    mfa = to_mfa(maps, moments, dims)
    assert mfa.cache_width == dims.width
    assert error(outputs(mfa.expand(), x), wanted) < 1e-6
    assert mfa.expand().kv_heads == 1
    # A narrower value, or a component's rotation less, would be seen.
    narrow = replace(dims, qk_rope_head_dim=dims.qk_rope_head_dim - 2)
    assert error(outputs(to_mfa(maps, moments, narrow).expand(), x), wanted) > 1e-4
    swapped = replace(mfa, q=mfa.q.flip(0))
    assert maps.kv_heads == 1 or error(outputs(swapped.expand(), x), wanted) > 1e-2


@pytest.mark.parametrize("key_reuse", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_run_by_its_shared_projection_as_it_is_expanded(shape, key_reuse):
    maps = layers.maps(**SHAPES[shape])
    x = layers.inputs(hidden=maps.hidden)
    made = to_mfa(maps, moments_of(maps, x), MFADims(8, 4, key_reuse))
    for mfa in (made, with_shared_queries(made, x, seeded(), share_q_dim=10, error=0.1).balanced()):
        wanted = outputs(mfa.expand(), x)
        assert error(attention(mfa.reader(), x.double()), wanted) < 1e-5
        turned = replace(mfa, rope_pairs=mfa.rope_pairs[::-1])
        assert error(attention(turned, x.double()), wanted) > 1e-3


def test_values_of_key_reuse_are_the_papers():
    """v = k + (k N^T) * alpha, from the latent before its rotation."""
    maps, x = layers.maps(bias=True), layers.inputs()
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(12, 6, True))
    k = x.double() @ mfa.k.T + mfa.k_bias
    v = k + (k @ mfa.reuse.T) * mfa.reuse_gate
    read = mfa.expand()
    assert error(x.double() @ read.v[0].T + read.v_bias[0], v) < 1e-12
    gated = replace(mfa, reuse_gate=torch.zeros_like(mfa.reuse_gate)).expand()
    assert error(x.double() @ gated.v[0].T + gated.v_bias[0], k) < 1e-12


def test_each_component_keeps_its_own_frequency():
    maps, x = layers.maps(), layers.inputs()
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(10, 6))
    read = mfa.expand()
    assert read.inv_freq.tolist() == [0, 0, *maps.inv_freq[list(mfa.rope_pairs)].tolist()]
    shuffled = replace(mfa, rope_pairs=mfa.rope_pairs[::-1])
    assert len(set(mfa.rope_pairs)) > 1
    wanted = outputs(maps, x)
    assert error(outputs(read, x), wanted) < 0.8 * error(outputs(shuffled.expand(), x), wanted)


@pytest.mark.parametrize("key_reuse", [False, True])
def test_wider_heads_are_nearer(key_reuse):
    maps, x = layers.maps(bias=True), layers.inputs(8)
    moments, unseen = moments_of(maps, x[:6]), x[6:]
    wanted, most = outputs(maps, unseen), full(maps, key_reuse).head_dim
    found = []
    for head_dim in range(4, most + 1, 4):
        dims = MFADims(head_dim, head_dim // 4 * 2, key_reuse)
        found.append(error(outputs(to_mfa(maps, moments, dims).expand(), unseen), wanted))
    assert all(b < a for a, b in itertools.pairwise(found))


def test_key_reuse_beats_two_heads_of_the_same_cache():
    maps, x = layers.maps(), layers.inputs(8)
    moments, wanted = moments_of(maps, x), outputs(maps, x)
    reused = to_mfa(maps, moments, MFADims(16, 8, True))
    apart = to_mfa(maps, moments, MFADims(8, 4))
    assert reused.cache_width == apart.cache_width == 16
    assert error(outputs(reused.expand(), x), wanted) < error(outputs(apart.expand(), x), wanted)


@pytest.mark.parametrize("key_reuse", [False, True])
def test_shared_queries(key_reuse):
    maps, x = layers.maps(bias=True), layers.inputs(8)
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(12, 6, key_reuse))
    wanted = outputs(mfa.expand(), x)

    def lost(**options):
        form = with_shared_queries(mfa, x, seeded(), **options)
        assert form.q.shape == (4, 12, form.share_q_dim)
        assert form.q_down.shape == (form.share_q_dim, 32)
        return form.share_q_dim, error(outputs(form.expand(), x), wanted)

    assert lost()[1] < 1e-6  # an exact layer stays exact
    ranks = [lost(share_q_dim=rank)[1] for rank in (2, 6, 12, 24)]
    assert all(b < a for a, b in itertools.pairwise(ranks))
    # The more error there is, the less the queries need.
    chosen = [lost(error=e)[0] for e in (0.0, 0.01, 0.1, 0.5)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[-1] < chosen[0]
    with pytest.raises(InputError, match="share_q_dim=33 must be at least 1 and at most 32"):
        lost(share_q_dim=33)


@pytest.mark.parametrize("key_reuse", [False, True])
def test_healing_moves_every_map(key_reuse):
    maps, x = layers.maps(bias=True), layers.inputs(8)
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(8, 4, key_reuse))
    mfa = with_shared_queries(mfa, x, seeded(), error=0.01)
    y = outputs(maps, x).float()
    seen = Activations(x, y, torch.ones(x.shape[:2]))
    healed = heal(mfa, seen, steps=20, generator=seeded(), low_precision=False)
    assert output_error(healed, seen).relative < output_error(mfa, seen).relative
    for name, tensor in mfa.tensors().items():
        assert not torch.equal(getattr(healed, name), tensor), name


def test_state_dict_has_the_class_names():
    maps, x = layers.maps(bias=True), layers.inputs()
    for key_reuse, own in ((False, {"v_proj.weight"}), (True, {"kr_proj.weight", "kr_alpha"})):
        mfa = to_mfa(maps, moments_of(maps, x), MFADims(12, 6, key_reuse))
        with pytest.raises(ValueError, match="with_shared_queries"):
            mfa.state_dict()
        mfa = with_shared_queries(mfa, x, seeded())
        weights = {f"{name}_proj.weight" for name in "qko"} | {"wq.weight"}
        biases = {"wq.bias", "k_proj.bias", "o_proj.bias"}
        assert set(mfa.state_dict()) == weights | biases | own
        scaled = mfa.state_dict(2.0)["wq.weight"].unflatten(0, (4, 12))
        plain = mfa.state_dict()["wq.weight"].unflatten(0, (4, 12))
        assert torch.equal(scaled[:, :6], 2 * plain[:, :6])
        assert torch.equal(scaled[:, 6:], plain[:, 6:])
