"""MLA from any attention's maps: what is lost and what is not, in maps and in the model class."""

import itertools
from dataclasses import replace

import layers
import pytest
import tiny
import torch
from layers import error

from rehead.converters.calibration import in_precision, kronecker
from rehead.converters.errors import InputError
from rehead.converters.families import family_of
from rehead.converters.latent import spreading, with_low_rank_queries
from rehead.converters.lowrank import weighted_svd
from rehead.converters.maps import AttentionMaps, attention, project, reference_attention
from rehead.converters.mfa import MFADims, mfa_builder
from rehead.converters.mfa_kr import mfa_kr_builder
from rehead.converters.mla import decoupled_mla, mla_builder, to_mla
from rehead.converters.moments import latent_moments
from rehead.converters.on_read import ReadKeyMLA
from rehead.converters.plan import LayerDims
from rehead.converters.rope_split import (
    multiplied,
    rope_components,
    shared_rope_pairs,
    split_rope,
)
from rehead.modeling import MLA_CLASSES

SHAPES = {
    "grouped": {},
    "grouped, biases": dict(bias=True),
    "a head each": dict(groups=4, hidden=48),
    "one key head": dict(groups=1, bias=True),
    "wide values": dict(width=4, v_dim=10, bias=True),
    "cache wider than the input": dict(groups=4, hidden=24, bias=True),
}


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def moments_of(maps, x, kind="decoupled"):
    return in_precision(latent_moments(maps, x, seeded(), kind != "decoupled"), maps.q.dtype)


def low_rank(mla, x, rank):
    return with_low_rank_queries(mla, x, seeded(), lambda energy: rank, "q_lora_rank")


# Keys rotated when they are read: whole, or one rotated key that is read from the latent.
KINDS = ["decoupled", "whole keys", "read key"]


def dims_of(kind, rank, rotated):
    return LayerDims(rank, 0 if kind == "whole keys" else rotated, on_read=kind != "decoupled")


def all_dims(maps, kind):
    """Everything kept: all components and every direction there is."""
    keys = maps.kv_heads * maps.qk_dim
    values = maps.kv_heads * maps.v_dim
    least = values if kind == "decoupled" else keys + values
    return dims_of(kind, min(least, maps.hidden), keys)


def outputs(maps, x):
    return torch.stack([reference_attention(maps, row) for row in x.double()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything_kept_is_the_identity(shape, kind):
    maps = layers.maps(**SHAPES[shape])
    x = layers.inputs(hidden=maps.hidden)
    wanted = outputs(maps, x)
    moments, dims = moments_of(maps, x, kind), all_dims(maps, kind)
    mla = to_mla(maps, moments, dims)
    assert (mla.kv_b.shape[2], 2 * len(mla.rope_pairs)) == (
        dims.kv_lora_rank,
        dims.qk_rope_head_dim,
    )
    assert mla.cache_width == dims.width
    # A factorisation by eigenvectors keeps half the digits.
    tolerance = 1e-5 if kind == "read key" else 1e-6
    assert error(outputs(mla.expand(), x), wanted) < tolerance
    # One less, and it is not: the test would see a loss.
    less = to_mla(maps, moments, replace(dims, kv_lora_rank=dims.kv_lora_rank - 1))
    assert error(outputs(less.expand(), x), wanted) > tolerance
    swapped = replace(mla, q=mla.q.flip(0))
    assert error(outputs(swapped.expand(), x), wanted) > 1e-2


@pytest.mark.parametrize("queries", ["whole", "low rank"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_run_through_its_latent_as_it_is_expanded(shape, kind, queries):
    maps = layers.maps(**SHAPES[shape])
    x = layers.inputs(hidden=maps.hidden)
    made = to_mla(maps, moments_of(maps, x, kind), dims_of(kind, 12, 6))
    if queries == "low rank":
        made = low_rank(made, x, 10)
    for mla in (made, made.balanced(), made.stored(x), made.stored(x).balanced()):
        wanted = outputs(mla.expand(), x)
        assert error(attention(mla.reader(), x.double()), wanted) < 1e-5
        # Another form's, or one whose rotated key is another, would be seen.
        assert error(attention(replace(mla, kv_b=mla.kv_b.flip(1)), x.double()), wanted) > 1e-2
        if mla.rope_pairs:
            turned = replace(mla, rope_pairs=mla.rope_pairs[::-1])
            assert error(attention(turned, x.double()), wanted) > 1e-3


def half_kept(maps, moments, count, x, *, mean=torch.clone):
    """The layer with `count` components rotated, straight from its definition, one sequence.

    Args:
        mean: what to do with the mean phases; the identity but for a mistake.
    """
    components = rope_components(maps, moments.phases)
    half, length = maps.qk_dim // 2, len(x)
    mu = mean(moments.phases.mean_phase)
    q, k, v = (project(x, getattr(maps, n), getattr(maps, f"{n}_bias")) for n in "qkv")
    q, k = (torch.complex(t[..., :half], t[..., half:]) for t in (q, k))
    times = torch.arange(length, dtype=torch.float64)
    y = torch.zeros(length, maps.hidden, dtype=torch.float64)
    for h in range(maps.heads):
        g = h // maps.repeats
        scores = torch.zeros(length, length, dtype=torch.complex128)
        for pair in range(half):
            kept = torch.zeros(length, dtype=torch.complex128)
            for j in range(count):
                if components.pair[j] == pair:
                    z = k[:, :, pair] @ components.analysis[j]
                    kept += components.synthesis[j, g] * z
            turn = torch.exp(1j * maps.inv_freq[pair] * (times - times[:, None]))
            scores += q[:, h, pair, None].conj() * kept * turn
            free = (q[:, h, pair] * mu[h, pair])[:, None].conj()
            scores += free * (k[:, g, pair] - kept)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (scores.real * maps.scaling).masked_fill(future, -torch.inf).softmax(-1)
        y += weights @ v[:, g] @ maps.o[:, h].T
    return y if maps.o_bias is None else y + maps.o_bias


@pytest.mark.parametrize("count", [0, 1, 3, 8])
@pytest.mark.parametrize("shape", ["grouped", "grouped, biases", "a head each", "wide values"])
def test_removed_rotations_are_those_of_the_definition(shape, count):
    """Apart from any rank: the latent holds everything that is left."""
    maps = layers.maps(**SHAPES[shape])
    x = layers.inputs(2, 16, hidden=maps.hidden)
    moments = moments_of(maps, x)
    count = min(count, maps.kv_heads * maps.qk_dim // 2)
    full = min(maps.kv_heads * (maps.qk_dim + maps.v_dim), maps.hidden)
    mla = to_mla(maps, moments, LayerDims(full, 2 * count))
    found = reference_attention(mla.expand(), x[0].double())
    wanted = half_kept(maps, moments, count, x[0].double())
    assert error(found, wanted) < 1e-8
    if count and shape != "wide values":  # more rows than inputs: what hardly counts is rounded
        dims = LayerDims(full, 2 * count, on_read=True)
        read = to_mla(maps, moments_of(maps, x, "read key"), dims)
        assert error(reference_attention(read.expand(), x[0].double()), wanted) < 1e-6
    if 2 * count < maps.kv_heads * maps.qk_dim:
        for mean in (torch.conj, torch.ones_like):
            twin = half_kept(maps, moments, count, x[0].double(), mean=mean)
            assert error(found, twin) > 1e-3


def test_components_take_the_keys_apart_and_put_them_together():
    maps = layers.maps(groups=4, bias=True)
    x = layers.inputs()
    phases = moments_of(maps, x).phases
    found = rope_components(maps, phases)
    assert sorted(found.pair) == sorted(4 * list(range(4)))
    assert (found.cost.diff() <= 0).all()
    for pair in range(4):
        own = torch.tensor(found.pair) == pair
        together = found.synthesis[own].T @ found.analysis[own]
        assert torch.allclose(together, torch.eye(4).to(together.dtype), atol=1e-10)
    # Components of one frequency are uncorrelated where the keys matter.
    keys = torch.cat([maps.k, maps.k_bias[..., None]], -1)
    keys = torch.complex(*keys.chunk(2, dim=1))
    z = torch.einsum("cg,cgd->cd", found.analysis, keys.transpose(0, 1)[list(found.pair)])
    moment = z @ phases.inputs.to(z.dtype) @ z.mH
    same = torch.tensor(found.pair)[:, None] == torch.tensor(found.pair)
    off = moment * same * (1 - torch.eye(len(z)))
    assert off.abs().max() < 1e-6 * moment.abs().max()
    assert torch.allclose(moment.diagonal().real, found.cost.double(), rtol=1e-6, atol=1e-12)


def test_rotations_that_cost_most_are_kept():
    maps, x = layers.maps(), layers.inputs()
    moments = moments_of(maps, x)
    components = rope_components(maps, moments.phases)
    removed = [split_rope(maps, moments.phases, components, count).removed for count in range(9)]
    assert removed == sorted(removed, reverse=True)
    assert removed[0] == pytest.approx(float(components.cost.sum()))
    assert removed[8] == 0
    whole = split_rope(maps, moments.phases, components, 8)
    assert not whole.k_nope.any()
    # What is not rotated has nothing to lose.
    still = replace(maps, inv_freq=maps.inv_freq * torch.tensor([1.0, 0, 0, 1.0]))
    order = rope_components(still, moments_of(still, x).phases).pair
    assert set(order[:4]) == {0, 3}


def test_layers_can_share_the_frequencies_they_keep():
    """The ones worth most over all layers, each layer with its own best components of them."""
    x = layers.inputs()
    several = []
    for seed in (0, 1, 2):
        maps = layers.maps(seed=seed)
        several.append((maps, rope_components(maps, moments_of(maps, x).phases)))
    found = [components for _, components in several]
    assert shared_rope_pairs(found, 8) == (0, 0, 1, 1, 2, 2, 3, 3)
    worth = {}
    for components in found:
        shares = components.cost / components.cost.sum()
        for pair in range(4):
            own = shares[torch.tensor(components.pair) == pair]
            for place in range(2):
                worth[pair, place] = worth.get((pair, place), 0) + float(own[place])
    best = sorted(worth, key=worth.get, reverse=True)
    for count in range(9):
        pairs = shared_rope_pairs(found, count)
        assert pairs == tuple(sorted(pair for pair, _ in best[:count]))
        for maps, components in several:
            dims = LayerDims(20, 2 * count, rope_pairs=pairs)
            assert to_mla(maps, moments_of(maps, x), dims).rope_pairs == pairs
            ordered = components.first(pairs)
            assert sorted(ordered.pair) == sorted(components.pair)
            for pair in set(pairs):  # the costliest of a frequency come first
                costs = ordered.cost[torch.tensor(ordered.pair) == pair]
                assert (costs.diff() <= 0).all()
            assert (ordered.cost[count:].diff() <= 0).all()


def test_position_free_queries_carry_the_mean_phase():
    maps, x = layers.maps(bias=True), layers.inputs()
    phases = moments_of(maps, x).phases
    split = split_rope(maps, phases, rope_components(maps, phases), 3)
    mu, queries = phases.mean_phase, maps.queries(x.double())
    z = torch.complex(queries[..., :4], queries[..., 4:]) * mu
    assert torch.allclose(multiplied(queries, split.phase), torch.cat([z.real, z.imag], -1))


def stacked_error(maps, keys, mla, moments):
    """The Gauss-Newton error of a layer's position-free keys and values."""
    kv = mla.kv_b @ mla.kv_a[: mla.kv_lora_rank]
    nope = maps.qk_dim
    off = torch.cat([(keys - kv[:, :nope]).flatten(0, 1), (maps.v - kv[:, nope:]).flatten(0, 1)])
    return float((moments.gradients @ off @ moments.inputs * off).sum())


def test_error_falls_with_rank_and_is_below_a_plain_svds():
    """On its own data, as the theorem has it."""
    maps, x = layers.maps(bias=True), layers.inputs()
    moments = moments_of(maps, x)
    split = split_rope(maps, moments.phases, rope_components(maps, moments.phases), 3)
    keys = split.k_nope

    def make(factors, rank):
        return decoupled_mla(maps, split, factors, moments, LayerDims(rank, 6))

    stacked = torch.cat([keys.flatten(0, 1), maps.v.flatten(0, 1)])
    factors = weighted_svd(stacked, moments.kronecker.gradients, moments.kronecker.inputs)
    rows, columns = stacked.shape
    plain = weighted_svd(stacked, torch.eye(rows).double(), torch.eye(columns).double())
    ranks = range(1, 31)
    errors = [stacked_error(maps, keys, make(factors, r), moments.kronecker) for r in ranks]
    assert all(b <= a * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(errors))
    for rank, calibrated in zip(ranks, errors, strict=True):
        energy = float(factors.energy[rank:].sum())
        assert calibrated == pytest.approx(energy, rel=1e-2, abs=1e-4 * errors[0])
        other = stacked_error(maps, keys, make(plain, rank), moments.kronecker)
        assert calibrated <= other * (1 + 1e-6) + 1e-10
    assert errors[7] < 0.8 * stacked_error(maps, keys, make(plain, 8), moments.kronecker)


def test_a_rotated_key_has_its_part_in_every_key():
    """What its rows say is what the split left out, and so they take gradients back."""
    maps, x = layers.maps(bias=True), layers.inputs()
    phases = moments_of(maps, x).phases
    components = rope_components(maps, phases)
    for count in (1, 3, 8):
        split = split_rope(maps, phases, components, count)
        part = (split.rows.mT @ split.k_rope).unflatten(0, maps.k.shape[:2])
        assert error(part + split.k_nope, maps.k) < 1e-12
        twin = (split.rows.mT @ split.k_rope.flip(0)).unflatten(0, maps.k.shape[:2])
        assert error(twin + split.k_nope, maps.k) > 1e-2
        # The factors that are stored say the same, in complex numbers.
        found = spreading(split.synthesis, split.rope_pairs, [*range(4)]) @ split.k_rope
        assert error(found, part) < 1e-12
        conjugate = split.synthesis * torch.tensor([1.0, -1.0]).repeat_interleave(count)
        assert error(spreading(conjugate, split.rope_pairs, [*range(4)]) @ split.k_rope, part) > 0.1


@pytest.mark.parametrize("kind", ["whole keys", "read key"])
def test_on_read_error_falls_with_rank(kind):
    maps, x = layers.maps(bias=True), layers.inputs(8)
    moments, wanted = moments_of(maps, x, kind), outputs(maps, x)
    build = mla_builder(maps, moments)
    errors = [
        error(outputs(build(dims_of(kind, rank, 16)).expand(), x), wanted)
        for rank in (2, 6, 12, 20, 32)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    # The latent alone is cached, so at one width the rotated key costs decoupled some rank.
    decoupled = to_mla(maps, moments_of(maps, x), LayerDims(6, 6))
    read = build(dims_of(kind, 12, 6))
    assert read.cache_width == decoupled.cache_width == 12
    assert error(outputs(read.expand(), x), wanted) < error(outputs(decoupled.expand(), x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_calibrated_outputs_are_nearer_than_a_plain_svds(kind):
    """Not a theorem, but what it is for."""
    maps, x = layers.maps(bias=True), layers.inputs(8)
    moments = moments_of(maps, x, kind)
    dims = dims_of(kind, 12, 8)
    wanted = outputs(maps, x)
    found = error(outputs(to_mla(maps, moments, dims).expand(), x), wanted)
    eye = torch.eye(32, dtype=torch.float64)
    rows = len(moments.kronecker.gradients)
    blind = replace(
        moments.kronecker,
        gradients=torch.eye(rows, dtype=torch.float64),
        inputs=eye,
        mean=torch.zeros(32, dtype=torch.float64),
    )
    plain = to_mla(maps, replace(moments, kronecker=blind), dims)
    assert found < 0.8 * error(outputs(plain.expand(), x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_constant_over_tokens_costs_no_rank(kind):
    """Inputs that are a constant and two directions need a latent of two."""
    maps = layers.maps(bias=True)
    x = layers.inputs(4, 24, 2) @ torch.randn(2, 32, generator=seeded()) + 3
    moments = moments_of(maps, x, kind)
    wanted = outputs(maps, x)
    dims = dims_of(kind, 2, 16)
    assert error(outputs(to_mla(maps, moments, dims).expand(), x), wanted) < 1e-3
    shifted = replace(moments.kronecker, mean=torch.zeros(32, dtype=torch.float64))
    twin = to_mla(maps, replace(moments, kronecker=shifted), dims)
    assert error(outputs(twin.expand(), x), wanted) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["grouped", "grouped, biases", "wide values"])
def test_low_rank_queries(shape, kind):
    maps = layers.maps(**SHAPES[shape])
    x = layers.inputs(hidden=maps.hidden)
    moments = moments_of(maps, x, kind)
    mla = to_mla(maps, moments, dims_of(kind, 12, 6))
    wanted = outputs(mla.expand(), x)
    full = min(mla.q.shape[0] * mla.q.shape[1], maps.hidden)
    same = low_rank(mla, x, full)
    assert same.q_down.shape == (full, maps.hidden)
    assert error(outputs(same.expand(), x), wanted) < 1e-9
    rank = maps.heads * maps.qk_dim // 2
    some = low_rank(mla, x, rank)
    found = error(outputs(some.expand(), x), wanted)
    # A plain truncation is worse.
    u, s, vh = torch.linalg.svd(mla.q.flatten(0, 1), full_matrices=False)
    up = (u[:, :rank] * s[:rank]).unflatten(0, mla.q.shape[:2])
    plain = replace(mla, q=up, q_down=vh[:rank])
    assert 1e-6 < found < error(outputs(plain.expand(), x), wanted)
    for wrong in (0, full + 1):
        with pytest.raises(InputError, match=f"q_lora_rank={wrong} must be at least 1 and at most"):
            low_rank(mla, x, wrong)
    # The rank is told by what leaving out each direction adds, and may be none.
    told = []
    same = with_low_rank_queries(mla, x, seeded(), told.append, "q_lora_rank")
    assert same is mla
    assert told[0].shape == (full,)
    assert (told[0].diff() <= 0).all()


def test_the_same_seed_gives_the_same_layer():
    maps, x = layers.maps(bias=True), layers.inputs()
    one, other = (to_mla(maps, moments_of(maps, x), LayerDims(9, 6)) for _ in range(2))
    assert one.rope_pairs == other.rope_pairs
    for name, tensor in one.tensors().items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, other.tensors()[name])


def test_text_that_says_nothing_gives_a_layer_all_the_same():
    """Equal tokens: no covariance, no gradient to keys."""
    maps = layers.maps(bias=True)
    x = layers.inputs(1, 1).expand(2, 6, -1)
    for kind in KINDS:
        moments = moments_of(maps, x, kind)
        mla = to_mla(maps, moments, dims_of(kind, 5, 4))
        assert all(torch.isfinite(tensor).all() for tensor in mla.tensors().values())
        assert error(outputs(mla.expand(), x), outputs(maps, x)) < 1e-5


FORMS = {
    "decoupled": LayerDims(9, 6),
    "decoupled, none rotated": LayerDims(9, 0),
    "decoupled, all rotated": LayerDims(9, 16),
    "whole keys": LayerDims(13, on_read=True),
    "read key": LayerDims(13, 6, on_read=True),
}


@pytest.mark.parametrize("q_lora_rank", [None, 7])
@pytest.mark.parametrize("rope_type", ["default", "yarn", "longrope"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_model_class_computes_what_the_maps_say(form, rope_type, q_lora_rank):
    """The module with `state_dict()` loaded, against `expand()`; Qwen2 has biases."""
    stock = tiny.source("qwen2", rope_parameters=tiny.ROPE_TYPES[rope_type])
    x = layers.inputs(2, 40)
    rotary = stock.model.rotary_emb
    turned = rotary(x, torch.arange(40)[None])
    factor = float(rotary.attention_scaling)
    assert (factor != 1) == (rope_type != "default")
    maps = family_of(stock.config).read(
        stock.config, stock.model.layers[0].self_attn.state_dict(), rotary.inv_freq, factor
    )
    dims = FORMS[form]
    mla = to_mla(maps, moments_of(maps, x, "read key" if dims.on_read else "decoupled"), dims)
    if q_lora_rank:
        mla = low_rank(mla, x, q_lora_rank)
    wanted = outputs(mla.expand(), x)
    mla = mla.stored(x)

    config_class, _, causal_lm = MLA_CLASSES["qwen2"]
    model = causal_lm(
        config_class(
            **tiny.BASE | dict(num_hidden_layers=1, rope_parameters=stock.config.rope_parameters),
            kv_lora_rank=dims.kv_lora_rank,
            qk_rope_head_dim=dims.qk_rope_head_dim,
            q_lora_rank=q_lora_rank,
            rope_pairs=[list(mla.rope_pairs)],
            rope_on_read=dims.on_read,
            **mla.biases(),
        )
    ).eval()
    module, future = model.model.layers[0].self_attn, torch.full((40, 40), -torch.inf).triu(1)
    position_embeddings = model.model.rotary_emb(x, torch.arange(40)[None])
    assert torch.equal(position_embeddings[0], turned[0])

    def distance(rope_factor):
        module.load_state_dict(mla.state_dict(rope_factor))
        return error(module(x, position_embeddings, future[None, None])[0], wanted)

    assert distance(factor**2) < 5e-6
    if factor != 1 and form not in ("whole keys", "decoupled, all rotated"):
        assert distance(1.0) > 1e-3
        assert distance(factor) > 1e-3


@pytest.mark.parametrize("kind", ["whole keys", "read key"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [6, 13])
def test_a_stored_layer_is_the_same(kind, bias, rank):
    """Also where the key is all of the latent, and on other inputs than it was stored with."""
    maps, x = layers.maps(bias=bias), layers.inputs() + 3.0
    mla = to_mla(maps, moments_of(maps, x, kind), dims_of(kind, rank, 6))
    found, other = mla.stored(x), layers.inputs(seed=8)
    assert error(outputs(found.expand(), other), outputs(mla.expand(), other)) < 1e-10
    latents = x.double() @ found.kv_a.mT + found.kv_a_bias
    assert latents.mean((0, 1)).abs().max() < 1e-10
    if kind == "read key":
        # The key is read by a slice; one of another order of its parts would be seen.
        assert not hasattr(found, "k_rope")
        assert found.k_rope_bias.shape == (6,)
        twin = replace(found, kv_a=found.kv_a.clone())
        twin.kv_a[-2:] = found.kv_a[[-1, -2]]
        assert error(outputs(twin.expand(), other), outputs(mla.expand(), other)) > 1e-2
        free, key = latents.flatten(0, 1).split([rank - 6, 6], dim=1)
        together = free.mT @ key / (free.square().sum(0)[:, None] * key.square().sum(0)).sqrt()
        assert not together.numel() or together.abs().max() < 0.05
        with pytest.raises(ValueError, match="stored"):
            mla.state_dict()


LAYOUTS = {
    "decoupled": dims_of("decoupled", 9, 6),
    "decoupled, none rotated": LayerDims(9, 0),
    "whole keys": dims_of("whole keys", 13, 0),
    "inputs": dims_of("whole keys", 32, 0),
    "read key": dims_of("read key", 13, 6),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_neither_basis_nor_full_rank_changes_anything(layout, bias):
    """What is stored, what is balanced, and queries of all the rank they have, in every layout."""
    maps, x, other = layers.maps(bias=bias), layers.inputs() + 3.0, layers.inputs(seed=8)
    dims = LAYOUTS[layout]
    kind = "read key" if dims.on_read else "decoupled"
    mla = to_mla(maps, moments_of(maps, x, kind), dims)
    wanted, full = outputs(mla.expand(), other), low_rank(mla, x, 32)
    for found in (
        *(mla.balanced(), mla.stored(x), mla.stored(x).balanced(), mla.stored(other).stored(x)),
        *(full, full.balanced(), full.stored(x)),
    ):
        assert error(outputs(found.expand(), other), wanted) < 1e-10
        # A channel twice as large as it is read would be seen.
        twin = replace(found, kv_b=torch.cat([2 * found.kv_b[..., :1], found.kv_b[..., 1:]], 2))
        assert error(outputs(twin.expand(), other), wanted) > 1e-4
    assert full.q_down.shape == (32, 32)
    assert torch.equal(mla.q, maps.q)
    assert torch.equal(mla.stored(x).q, maps.q)
    assert torch.equal(mla.stored(x).o, maps.o)


@pytest.mark.parametrize("queries", ["whole", "low rank"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["decoupled", "read key", "stored"])
def test_structured_queries_are_the_wide_rows_they_replace(layout, bias, queries):
    """Of width E + 2n instead of E, for one key that all heads share."""
    maps, x = layers.maps(bias=bias), layers.inputs()
    kind = "decoupled" if layout == "decoupled" else "read key"
    mla = to_mla(maps, moments_of(maps, x, kind), dims_of(kind, 13, 10))
    mla = low_rank(mla, x, 10) if queries == "low rank" else mla
    mla = mla.stored(x) if layout == "stored" else mla
    assert len(set(mla.rope_pairs)) < 5  # more components than frequencies
    for form in (mla, layers.with_random_factors(mla)):
        wide = layers.wide_rows(form)
        assert wide.q.shape == (4, form.phase.shape[1] + 10, 32)
        assert form.expand().qk_dim == form.phase.shape[1] + 2 * len(set(form.rope_pairs))
        wanted = outputs(wide, x)
        assert error(outputs(form.expand(), x), wanted) < 1e-12
        assert error(attention(form.reader(), x.double()), wanted) < 1e-5
        twin = outputs(layers.wide_rows(form, conjugate=False), x)
        assert error(outputs(form.expand(), x), twin) > 1e-2


@pytest.mark.parametrize("bias", [False, True])
def test_a_latent_as_wide_as_the_input_is_the_input(bias):
    """The source's maps, to the last bit, whatever the text says."""
    maps, x = layers.maps(bias=bias), layers.inputs()
    for kind in ("whole keys", "read key"):
        build = mla_builder(maps, moments_of(maps, x, kind))
        found = build(LayerDims(32, on_read=True))
        assert found.cache_width == 32
        assert torch.equal(found.q, maps.q)
        assert torch.equal(found.kv_b, torch.cat([maps.k, maps.v], 1))
        assert torch.equal(found.o, maps.o)
        assert error(outputs(found.stored(x).expand(), x), outputs(maps, x)) < 1e-14
        assert not {"kv_a_proj_with_mqa.weight"} & found.state_dict().keys()
        less = build(LayerDims(31, on_read=True))
        assert error(outputs(less.expand(), x), outputs(maps, x)) > 1e-6


@pytest.mark.parametrize("alike", [False, True])
def test_small_and_similar_pairs_of_the_key_lose_nothing(alike, monkeypatch):
    """One far smaller than the others, and two of one frequency that are almost the same."""
    maps, x = layers.maps(6, 3), layers.inputs()
    mla = to_mla(maps, moments_of(maps, x, "read key"), LayerDims(13, 6, on_read=True))
    pairs = (0, 0, 1) if alike else mla.rope_pairs
    mixed = torch.eye(3).double()
    mixed[1] = torch.tensor([1.0 if alike else 0.0, 1e-4, 0.0])
    key, read = (torch.block_diag(part, part) for part in (mixed, mixed.inverse()))
    before = replace(mla, rope_pairs=pairs)
    odd = replace(
        before,
        synthesis=mla.synthesis @ read,
        k_rope=key @ mla.k_rope,
        k_rope_bias=key @ mla.k_rope_bias,
    )
    wanted = outputs(before.expand(), x)
    assert error(outputs(odd.expand(), x), wanted) < 1e-10
    assert error(outputs(odd.stored(x).expand(), x), wanted) < 1e-10
    monkeypatch.setattr(
        ReadKeyMLA, "_with_white_pairs", lambda m, _: (m.k_rope, m.synthesis, m.k_rope_bias)
    )
    assert error(outputs(odd.stored(x).expand(), x), wanted) > 1e-3


def test_a_key_that_does_not_vary_still_leaves_room_for_values():
    """A direction that no key has gets a little of it, and the values are as they were."""
    maps, x = layers.maps(), layers.inputs()
    mla = to_mla(maps, moments_of(maps, x, "read key"), LayerDims(6, 6, on_read=True))
    for k_rope in (torch.zeros_like(mla.k_rope), mla.k_rope[:1].expand(6, -1).clone()):
        flat = replace(mla, k_rope=k_rope)
        found = flat.stored(x)
        assert found.kv_b.isfinite().all()
        values = (found.kv_b @ found.kv_a)[:, -8:]
        assert error(values, (flat.kv_b @ flat.kv_a)[:, -8:]) < 1e-9
        # What it gets changes the key, by little even where all else of it is one direction.
        assert error(outputs(found.expand(), x), outputs(flat.expand(), x)) < 0.05


def test_biases_are_named_as_in_the_config():
    x = layers.inputs()
    plain, biased = layers.maps(), layers.maps(bias=True)
    dims = LayerDims(9, 6)
    found = to_mla(plain, moments_of(plain, x), dims).biases()
    assert found == dict(q_bias=False, kv_a_bias=False, kv_b_bias=False, o_bias=True)
    found = to_mla(biased, moments_of(biased, x), dims).biases()
    assert found == dict(q_bias=True, kv_a_bias=True, kv_b_bias=False, o_bias=True)
    found = to_mla(plain, moments_of(plain, x, "whole keys"), LayerDims(9, on_read=True)).biases()
    assert found == dict(q_bias=False, kv_a_bias=False, kv_b_bias=True, o_bias=True)


def test_kronecker_factors_stand_for_keys_first():
    """An error in a key's row is weighed by keys' gradients, one in a value's by values'."""
    maps, x = layers.maps(), layers.inputs()
    found = moments_of(maps, x).kronecker
    assert found.gradients.shape == (32, 32)
    assert moments_of(maps, x, "read key").kronecker.gradients.shape == (48, 48)
    quiet: AttentionMaps = replace(maps, q=1e-4 * maps.q)
    softened = moments_of(quiet, x).kronecker.gradients.diagonal()
    assert softened[:16].max() < 1e-4 * softened[16:].min()
    assert torch.allclose(kronecker(x, torch.ones(4, 24, 3)).gradients, torch.ones(3, 3))


@pytest.mark.parametrize("still", [2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_pairs_that_are_not_rotated_need_no_rotated_key(still, bias):
    """Frequency 0, as in partial rotary embedding and without any: the latent is enough."""
    maps, x = layers.maps(bias=bias), layers.inputs()
    inv_freq = maps.inv_freq.clone()
    inv_freq[-still:] = 0
    maps = replace(maps, inv_freq=inv_freq)
    moments = moments_of(maps, x)
    assert moments.phases is not None
    components = rope_components(maps, moments.phases)
    assert sorted({*components.pair}) == [*range(4 - still)]
    assert len(components.cost) == 2 * (4 - still)
    # All that is rotated; the rest of both heads' keys, and their values, in the latent.
    rotated = 4 * (4 - still)
    whole = to_mla(maps, moments, LayerDims(32 - rotated, rotated))
    assert error(outputs(whole.expand(), x), outputs(maps, x)) < 1e-5
    less = to_mla(maps, moments, LayerDims(32 - rotated - 6, rotated))
    assert error(outputs(less.expand(), x), outputs(maps, x)) > 1e-3
    # As if rotated: a latent of the values alone would do, and now it does not.
    turning = replace(maps, inv_freq=maps.inv_freq + 0.1)
    twin = to_mla(turning, moments_of(turning, x), LayerDims(16, 16))
    assert error(outputs(twin.expand(), x), outputs(maps, x)) > 1e-2


def test_text_that_says_nothing_turns_no_pair_of_frequency_zero_off():
    """Equal tokens: no score counts, and a mean phase over nothing would be zero."""
    maps = layers.maps()
    maps = replace(maps, inv_freq=torch.tensor([1.0, 0.1, 0.0, 0.0], dtype=torch.float64))
    same = layers.inputs(1, 1).expand(3, 6, -1)
    moments = moments_of(maps, same)
    assert moments.phases is not None
    assert torch.equal(moments.phases.mean_phase[:, 2:], torch.ones(4, 2, dtype=torch.complex128))
    assert not torch.equal(moments.phases.mean_phase[:, :2].abs(), torch.ones(4, 2).double())


@pytest.mark.parametrize("form", ["mla", "mfa", "mfa-kr"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", ["head", "all"])
def test_normalised_keys_are_exact_at_full_width_and_no_maps(norm, bias, form):
    """A key is a number of the token and KV head times what is linear; both are in the layer."""
    maps, x = layers.maps(bias=bias), layers.inputs()
    shape = (lambda heads: (heads, 8)) if norm == "all" else (lambda heads: (8,))
    draw = torch.Generator().manual_seed(3)
    weights = [torch.rand(shape(count), generator=draw).double() + 0.5 for count in (4, 2)]
    maps = replace(maps, q_norm=weights[0], k_norm=weights[1], norm_eps=1e-6)
    moments = latent_moments(maps, x, torch.Generator().manual_seed(0), False)
    if form == "mla":
        layer = to_mla(maps, moments, LayerDims(16, 16))
    else:
        build = mfa_builder if form == "mfa" else mfa_kr_builder
        layer = build(maps, moments)(MFADims(16 if form == "mfa" else 32, 16, form == "mfa-kr"))
    assert layer.cache_width == 32 + (1 if norm == "all" else 2)
    wanted = attention(maps, x.double())
    for same in (layer, layer.balanced(), layer.stored(x)):
        assert error(attention(same, x.double()), wanted) < 1e-6
    # A dim that the norm takes away leaves its share of the mean square.
    weights[1][..., 3] = 0
    without = replace(maps, k_norm=weights[1])
    if form == "mla":
        found = to_mla(without, latent_moments(without, x, draw, False), LayerDims(16, 16))
        away = error(attention(found, x.double()), attention(without, x.double()))
        assert away < 1e-3 < error(attention(layer, x.double()), attention(without, x.double()))
    # Without the number, or with that of another head, it is another attention.
    twin = replace(layer, k_norm=None)
    assert error(attention(twin, x.double()), wanted) > 1e-2
    with pytest.raises(ValueError, match="no map of the input"):
        layer.expand()
