"""MFA and MFA-KR as closed forms: exact at full width, best of their kind below it."""

import itertools
from dataclasses import replace

import layers
import pytest
import tiny
import torch
from layers import error
from transformers import LlamaConfig

from rehead.converters.activations import Activations
from rehead.converters.errors import InputError
from rehead.converters.healing import heal, output_error
from rehead.converters.latent import multiplied, with_low_rank_queries
from rehead.converters.maps import AttentionMaps, attention, reference_attention
from rehead.converters.mfa import MFA, MFADims, MFARows, mfa_builder
from rehead.converters.mfa_kr import MFAKR, MFAKRRows, mfa_kr_builder
from rehead.converters.moments import latent_moments
from rehead.converters.recipe import Recipe
from rehead.converters.refit import factor_values, refit_values
from rehead.converters.targets import target_of

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
    return latent_moments(maps, x, seeded(), rope_on_read=False)


def to_mfa(maps, moments, dims):
    return (mfa_kr_builder if dims.key_reuse else mfa_builder)(maps, moments)(dims)


def low_rank(mfa, x, rank):
    return with_low_rank_queries(mfa, x, seeded(), lambda energy: rank, "share_q_dim")


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
    assert type(mfa) is (MFAKR if key_reuse else MFA)
    assert mfa.expand().kv_heads == maps.kv_heads
    assert mfa.expand().qk_dim == maps.qk_dim  # every pair is rotated, so that no key has a rest
    # A narrower value, or a component's rotation less, would be seen.
    narrow = replace(dims, qk_rope_head_dim=dims.qk_rope_head_dim - 2)
    assert error(outputs(to_mfa(maps, moments, narrow).expand(), x), wanted) > 1e-4
    swapped = replace(mfa, q=mfa.q.flip(0))
    assert maps.kv_heads == 1 or error(outputs(swapped.expand(), x), wanted) > 1e-2


# Below the head's width, 8 here, every head has rows of the key head's.
LAYOUTS = {
    MFA: MFADims(12, 6),
    MFAKR: MFADims(12, 6, True),
    MFARows: MFADims(6, 4),
    MFAKRRows: MFADims(6, 4, True),
}


@pytest.mark.parametrize("key_reuse", [False, True])
@pytest.mark.parametrize("head_dim", [6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_run_as_it_is_expanded(shape, head_dim, key_reuse):
    maps = layers.maps(**SHAPES[shape])
    x = layers.inputs(hidden=maps.hidden)
    made = to_mfa(maps, moments_of(maps, x), MFADims(head_dim, 4, key_reuse))
    assert isinstance(made, MFARows | MFAKRRows) == (head_dim == 6)
    for mfa in (made, made.stored(x), low_rank(made, x, 10).balanced()):
        wanted = outputs(mfa.expand(), x)
        assert error(attention(mfa.reader(), x.double()), wanted) < 1e-5
        turned = replace(mfa, rope_pairs=mfa.rope_pairs[::-1])
        assert error(attention(turned, x.double()), wanted) > 1e-3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_basis_nor_full_rank_changes_anything(layout, bias):
    """What is stored, what is balanced, and queries of all the rank they have, in every layout."""
    maps, x, other = layers.maps(bias=bias), layers.inputs() + 3.0, layers.inputs(seed=8)
    mfa = to_mfa(maps, moments_of(maps, x), LAYOUTS[layout])
    assert type(mfa) is layout
    most = min(mfa.q.shape[0] * mfa.q.shape[1], 32)
    wanted, full = outputs(mfa.expand(), other), low_rank(mfa, x, most)
    assert full.q_down.shape == (most, 32)
    for found in (mfa.balanced(), mfa.stored(x), full, full.balanced(), full.stored(x)):
        assert error(outputs(found.expand(), other), wanted) < 1e-10
        # A channel twice as large as it is read would be seen.
        twin = replace(found, k=torch.cat([2 * found.k[:1], found.k[1:]]))
        assert error(outputs(twin.expand(), other), wanted) > 1e-4
    if layout in (MFA, MFAKR):
        assert torch.equal(mfa.stored(x).q, maps.q)
        assert torch.equal(mfa.stored(x).o, maps.o)


@pytest.mark.parametrize("queries", ["whole", "low rank"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("key_reuse", [False, True])
def test_structured_queries_are_the_wide_rows_they_replace(key_reuse, bias, queries):
    """Of width E + 2n, or of the key head's width C, where `k_b` and `v_b` go into them."""
    maps, x = layers.maps(bias=bias), layers.inputs()
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(16, 10, key_reuse))
    mfa = low_rank(mfa, x, 10) if queries == "low rank" else mfa
    assert len(set(mfa.rope_pairs)) < 5  # more components than frequencies
    for form in (mfa, layers.with_random_factors(mfa)):
        wide, rows = layers.wide_rows(form), form.as_rows()
        assert wide.q.shape == (4, form.phase.shape[1] + 10, 32)
        assert (rows.q.shape[:2], rows.o.shape) == ((4, 16), (32, 4, 16))
        assert rows.expand().kv_heads == 1
        assert rows.cache_width == form.cache_width
        found = outputs(form.expand(), x)
        assert error(found, outputs(wide, x)) < 1e-12
        assert error(found, outputs(rows.expand(), x)) < 1e-12
        assert error(attention(rows.reader(), x.double()), found) < 1e-5
        assert error(found, outputs(layers.wide_rows(form, conjugate=False), x)) > 1e-2
        sign = torch.tensor([1.0, -1.0]).repeat_interleave(5)
        twin = replace(form, synthesis=form.synthesis * sign).as_rows()
        assert error(found, outputs(twin.expand(), x)) > 1e-2
        twin = replace(form, k_b=form.k_b.flip(0), v_b=form.v_b.flip(0)).as_rows()
        assert error(found, outputs(twin.expand(), x)) > 1e-2


def test_complex_factors_multiply_pairs():
    x, factors = torch.randn(5, 4, 8, generator=seeded()), torch.randn(4, 8, generator=seeded(6))
    wanted = torch.complex(*x.chunk(2, -1)) * torch.complex(*factors.chunk(2, -1))
    found = multiplied(x, factors)
    assert torch.allclose(torch.complex(*found.chunk(2, -1)), wanted)
    twin = multiplied(x, factors * torch.tensor([1.0, -1.0]).repeat_interleave(4))
    assert not torch.allclose(torch.complex(*twin.chunk(2, -1)), wanted, atol=0.1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [MFAKR, MFAKRRows])
def test_values_of_key_reuse_are_the_papers(layout, bias):
    """v = k + (k N^T) * alpha, from the latent before its rotation: one with what reads it."""
    maps, x = layers.maps(bias=bias), layers.inputs()
    mfa = to_mfa(maps, moments_of(maps, x), LAYOUTS[layout])
    assert type(mfa) is layout
    width = mfa.head_dim
    gate, reuse = torch.randn(width, width + 1, generator=seeded(), dtype=torch.float64).split(
        [1, width], dim=1
    )
    k = torch.cat([mfa.k, torch.zeros(width, 1) if not bias else mfa.k_bias[:, None]], 1)
    rows = mfa if layout is MFAKRRows else mfa.as_rows()

    def read(latent: torch.Tensor) -> AttentionMaps:
        """One KV head's attention, whose values are these [map | bias]."""
        return replace(rows.expand(), v=latent[None, :, :-1], v_bias=latent[None, :, -1])

    mixing = torch.eye(width) + gate * reuse
    name = "o" if layout is MFAKRRows else "v_b"
    found = outputs(replace(mfa, **{name: getattr(mfa, name) @ mixing}).expand(), x)
    assert error(found, outputs(read(k + gate * (reuse @ k)), x)) < 1e-12
    assert error(found, outputs(read(k + reuse @ (gate * k)), x)) > 1e-2
    # And as it is made, its value is the latent as it is.
    assert error(outputs(mfa.expand(), x), outputs(read(k), x)) < 1e-12


def test_each_component_keeps_its_own_frequency():
    maps, x = layers.maps(), layers.inputs()
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(10, 6))
    read, rows = mfa.expand(), mfa.as_rows().expand()
    turned = sorted(set(mfa.rope_pairs))
    assert read.inv_freq.tolist() == [0, 0, 0, 0, *maps.inv_freq[turned].tolist()]
    assert rows.inv_freq.tolist() == [0, 0, *maps.inv_freq[list(mfa.rope_pairs)].tolist()]
    shuffled = replace(mfa, rope_pairs=mfa.rope_pairs[::-1])
    assert len(turned) > 1
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
def test_low_rank_queries(key_reuse):
    maps, x = layers.maps(bias=True), layers.inputs(8)
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(12, 6, key_reuse))
    wanted = outputs(mfa.expand(), x)
    ranks = [error(outputs(low_rank(mfa, x, r).expand(), x), wanted) for r in (2, 6, 12, 24, 32)]
    assert all(b < a for a, b in itertools.pairwise(ranks))
    assert ranks[-1] < 1e-10
    # A plain truncation is worse.
    u, s, vh = torch.linalg.svd(mfa.q.flatten(0, 1), full_matrices=False)
    plain = replace(mfa, q=(u[:, :12] * s[:12]).unflatten(0, (4, 8)), q_down=vh[:12])
    assert ranks[2] < error(outputs(plain.expand(), x), wanted)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("form", ["mfa", "mfa-kr"])
def test_queries_have_the_rank_that_they_need(form, rows):
    """The smallest at which the layer's error stays what it is, and none where none saves."""
    maps, x = layers.maps(), layers.inputs(8)
    widths = 6 if rows else 12
    mfa = to_mfa(maps, moments_of(maps, x), MFADims(widths, 4, form == "mfa-kr"))
    heads, width, hidden = mfa.q.shape
    assert width == (6 if rows else 8)
    wanted = outputs(mfa.expand(), x)

    def target(**options):
        recipe = Recipe("m", form, "decoupled", 0.5, "default", 4, 0, 0, **options)
        return target_of(LlamaConfig(**tiny.BASE), recipe)

    def finished(error, **options):
        made = target(**options)
        found = made.finish(mfa, x, error, seeded())
        dims = made.named(found, MFADims(widths, 4, form == "mfa-kr"))
        assert dims["share_q_dim"] == (0 if found.q_down is None else len(found.q_down))
        # A config has one flag for the biases of all layers, of which some have low rank.
        assert found.q_bias.shape == (heads, width)
        return found

    def rank(error, **options):
        return 0 if (found := finished(error, **options)).q_down is None else len(found.q_down)

    exact = finished(0.0)
    assert exact.q_down is None and torch.equal(exact.q, mfa.q) and not exact.q_bias.any()
    told = []
    with_low_rank_queries(mfa, x, seeded(), told.append, "share_q_dim")
    (energy,) = told
    lost = [float(energy[r:].sum() / energy.sum()) for r in range(len(energy) + 1)]
    # A rank that saves no weights is not taken.
    limit = heads * width * hidden / (heads * width + hidden)
    errors = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 40.0]
    chosen = []
    for error_left in errors:
        least = next(r for r in range(1, len(lost)) if lost[r] <= 0.02 * error_left)
        chosen.append(least)
        assert rank(error_left) == (least if least < limit else 0)
    # The more error there is, the less the queries need.
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] > limit > chosen[4] > chosen[-1] == 1
    assert rank(0.1, share_q_dim=20) == 20
    assert error(outputs(finished(0.1, share_q_dim=20).expand(), x), wanted) > 1e-6
    with pytest.raises(InputError, match="share_q_dim=33 must be at least 1 and at most 32"):
        target(share_q_dim=33)  # before anything is read
    # A layer with narrow rows has no higher rank than they have, whatever was asked for.
    assert rank(0.0, share_q_dim=32) == min(heads * width, hidden)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_healing_moves_every_map(layout):
    maps, x = layers.maps(bias=True), layers.inputs(8)
    mfa = low_rank(to_mfa(maps, moments_of(maps, x), LAYOUTS[layout]), x, 20)
    assert type(mfa) is layout
    y = outputs(maps, x).float()
    seen = Activations(x, y, torch.ones(x.shape[:2]))
    healed = heal(mfa, seen, steps=20, generator=seeded(), low_precision=False)
    assert output_error(healed, seen).relative < output_error(mfa, seen).relative
    for name, tensor in mfa.tensors().items():
        assert not torch.equal(getattr(healed, name), tensor), name


def test_values_are_factorised_with_the_outputs():
    """Exactly where the rank is enough, and under the moment of what is read where it is not."""
    draw = lambda *shape: torch.randn(*shape, generator=seeded(), dtype=torch.float64)  # noqa: E731
    o, v_b = draw(32, 4, 8), draw(2, 8, 12)
    root = draw(4, 12, 12) * torch.logspace(0, -2, 12).double()
    moments = root.mT @ root

    def products(v_b, o):
        return torch.einsum("dhv,hvc->dhc", o, v_b.repeat_interleave(2, 0))

    wide = products(v_b, o)
    assert error(products(*factor_values(wide, moments, (2, 8))), wide) < 1e-6
    assert error(products(*factor_values(wide, moments, (2, 7))), wide) > 1e-3

    def lost(moments_used):
        off = products(*factor_values(draw(32, 4, 12), moments_used, (2, 5))) - draw(32, 4, 12)
        return float(torch.einsum("dhc,hce,dhe->", off, moments, off))

    assert lost(moments) < 0.8 * lost(torch.eye(12).double().expand(4, -1, -1).clone())
    # Heads that are wider than the value head need no more than its rows.
    narrow = factor_values(draw(32, 4, 6), moments[:, :6, :6], (2, 8))
    assert error(products(*narrow), draw(32, 4, 6)) < 1e-6


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [MFA, MFAKR])
def test_refitted_values_bring_the_output_nearer(layout, bias):
    maps, x = layers.maps(bias=bias), layers.inputs(60)
    mfa = to_mfa(maps, moments_of(maps, x[:8]), LAYOUTS[layout])
    seen = Activations(x, outputs(maps, x).float(), torch.ones(x.shape[:2]))
    before, fitted = output_error(mfa, seen).relative, refit_values(mfa, seen)
    assert error(attention(mfa.value_reader(), x.double()), attention(mfa, x.double())) < 1e-10
    assert output_error(fitted, seen).relative < 0.95 * before
    for name, tensor in mfa.tensors().items():
        assert torch.equal(getattr(fitted, name), tensor) == (name not in ("o", "v_b")), name
    other = replace(seen, y=seen.y.flip(0))
    assert output_error(refit_values(mfa, other), seen).relative > before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_dict_has_the_class_names(layout):
    maps, x = layers.maps(bias=True), layers.inputs()
    made = to_mfa(maps, moments_of(maps, x), LAYOUTS[layout])
    assert type(made) is layout
    names = {"k_proj.weight", "k_proj.bias", "o_proj.weight", "o_proj.bias"}
    if layout in (MFA, MFAKR):
        names |= {"q_phase", "k_synthesis", "k_b_proj.weight", "v_b_proj.weight"}
    if layout in (MFA, MFARows):
        names |= {"v_proj.weight"}
    assert set(made.state_dict()) == names | {"q_proj.weight", "q_proj.bias"}
    mfa = low_rank(made, x, 20)
    low = {"q_a_proj.weight", "q_b_proj.weight", "q_b_proj.bias"}
    plain, scaled = mfa.state_dict(), mfa.state_dict(2.0)
    assert set(plain) == names | low
    # Position-free queries take the rotary factor, which the class gives to rotated ones.
    if layout in (MFA, MFAKR):
        assert torch.equal(scaled.pop("q_phase"), 2 * plain.pop("q_phase"))
    else:
        for name in ("q_b_proj.weight", "q_b_proj.bias"):
            found, before = (s.pop(name).unflatten(0, (4, 6)) for s in (scaled, plain))
            assert torch.equal(found[:, :2], 2 * before[:, :2])
            assert torch.equal(found[:, 2:], before[:, 2:])
    assert all(torch.equal(scaled[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("layout", [MFAKR, MFAKRRows])
def test_a_key_that_is_read_is_stored_with_its_pairs_side_by_side(layout):
    maps, x = layers.maps(bias=True), layers.inputs()
    mfa = to_mfa(maps, moments_of(maps, x), LAYOUTS[layout])
    state, free, count = mfa.state_dict(), mfa.free, len(mfa.rope_pairs)
    read = state["v_b_proj.weight"] if layout is MFAKR else state["o_proj.weight"]
    read = read.unflatten(0, (2, 8)) if layout is MFAKR else read.unflatten(1, (4, 6))
    value = mfa.v_b if layout is MFAKR else mfa.o
    stored = (state["k_proj.weight"], mfa.k), (state["k_proj.bias"], mfa.k_bias)
    for found, before in (*stored, (read.movedim(-1, 0), value.movedim(-1, 0))):
        assert torch.equal(found[:free], before[:free])
        assert torch.equal(found[free::2], before[free : free + count])
        assert torch.equal(found[free + 1 :: 2], before[free + count :])
