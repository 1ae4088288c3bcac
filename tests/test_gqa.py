"""GQA and MQA from any attention's maps: what merging loses, what it must not, stock classes."""

import itertools
from dataclasses import replace

import layers
import pytest
import tiny
import torch
from layers import error

from rehead.converters.activations import Activations
from rehead.converters.calibration import attend, in_precision, output_norms
from rehead.converters.errors import InputError
from rehead.converters.families import family_of
from rehead.converters.gqa import (
    TEMPER,
    aligned,
    gqa_moments,
    key_problem,
    mean_pooled,
    merge_values,
    merging_cost,
    similar_heads,
    source_keys,
    to_gqa,
)
from rehead.converters.grouping import best_partition
from rehead.converters.healing import heal, output_error
from rehead.converters.lowrank import weighted_svd
from rehead.converters.maps import (
    AttentionMaps,
    augmented,
    position_angles,
    reference_attention,
    rotate,
)
from rehead.converters.refit import by_features, by_tokens, refit_output
from rehead.converters.shared_key import SharedKey, commuting_key, score_error, shared_key

SHAPES = {
    "a head each": dict(heads=4, groups=4),
    "grouped": dict(heads=8, groups=4),
    "biases": dict(heads=8, groups=4, bias=True),
    "wide values": dict(heads=4, groups=4, width=4, v_dim=10, bias=True),
    "a norm of each head": dict(heads=8, groups=4, bias=True, norm="head"),
    "a norm of all heads": dict(heads=8, groups=4, norm="all"),
}
NORMS = ("head", "all")


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def moments_of(maps, x):
    return in_precision(gqa_moments(maps, x, seeded()), torch.float64)


def outputs(maps, x):
    return torch.stack([reference_attention(maps, row) for row in x.double()])


def seen_by(maps, x):
    y = outputs(maps, x).float()
    return Activations(x, y, torch.ones(x.shape[:2]))


def without_output_bias(maps):
    """As Qwen2 has it: biases of q, k and v only."""
    return replace(maps, o_bias=None)


def twins(partition, repeats=1, bias=False, seed=0, norm=None, phases=False):
    """Maps whose KV heads of one group differ only by what attention does not care about.

    Keys are those of the group's first head, every pair times a complex number, and values those of
    the first head times a matrix.

    Args:
        norm: as in `layers.maps`; both dims of a pair then have one weight.
        phases: whether the complex numbers have length 1.
    """
    count = sum(map(len, partition))
    maps = layers.maps(count * repeats, count, hidden=48, bias=bias, seed=seed, norm=norm)
    if norm:
        even = {name: getattr(maps, name)[..., :4] for name in ("q_norm", "k_norm")}
        maps = replace(maps, **{name: torch.cat([w, w], -1) for name, w in even.items()})
    generator = seeded(seed + 1)
    tensors = {name: getattr(maps, name) for name in ("k", "v", "k_bias", "v_bias")}
    tensors = {name: t.clone() for name, t in tensors.items() if t is not None}
    for group in partition:
        for head in group[1:]:
            turn = torch.randn(2, 4, generator=generator, dtype=torch.float64)
            turn = turn / turn.norm(dim=0) if phases else turn
            mix = torch.randn(8, 8, generator=generator, dtype=torch.float64)
            for name, tensor in tensors.items():
                first = tensor[group[0]]
                if name.startswith("v"):
                    tensor[head] = mix @ first
                    continue
                re, im = first.chunk(2)
                a, b = (t.view(4, *[1] * (first.ndim - 1)) for t in turn)
                tensor[head] = torch.cat([a * re - b * im, a * im + b * re])
    return replace(maps, **tensors)


@pytest.mark.parametrize("pooling", ["aligned", "mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_sources_number_of_heads_is_the_identity(shape, pooling):
    maps = layers.maps(**SHAPES[shape])
    gqa = to_gqa(maps, None, 4, pooling)
    assert gqa.num_key_value_heads == 4
    assert gqa.cache_width == 4 * (maps.qk_dim + maps.v_dim)
    for name, tensor in vars(gqa.expand()).items():
        wanted = getattr(maps, name)
        assert torch.equal(tensor, wanted) if torch.is_tensor(wanted) else tensor == wanted


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2])
def test_mean_pooling_is_the_papers(shape, count):
    """One KV head from neighbours by their mean, all else as it was (2305.13245, section 2.1)."""
    maps = layers.maps(**SHAPES[shape])
    gqa, size = to_gqa(maps, None, count, "mean"), 4 // count
    averaged = ["k", "v", "k_bias", "v_bias"]
    kept = ["q", "o", "q_bias", "o_bias", "q_norm"]
    (averaged if SHAPES[shape].get("norm") == "all" else kept).append("k_norm")
    for name in averaged:
        source, found = getattr(maps, name), getattr(gqa, name)
        if source is None:
            assert found is None
            continue
        for head in range(count):
            total = torch.zeros_like(source[0])
            for member in range(head * size, (head + 1) * size):
                total += source[member]
            assert error(found[head], total / size) < 1e-15
        if count == 2:
            assert error(found[0], (source[0] + source[2]) / 2) > 1e-2  # not every other head
    for name in kept:
        assert getattr(gqa, name) is getattr(maps, name)


@pytest.mark.parametrize("count", [0, -1, 3, 8])
def test_a_number_that_does_not_divide_is_refused(count):
    maps = layers.maps(4, 4)
    with pytest.raises(InputError, match=rf"num_key_value_heads={count} .* Use one of 1, 2, 4\."):
        to_gqa(maps, None, count)


def test_unknown_pooling_is_refused():
    with pytest.raises(InputError, match=r"pooling 'sum' is unknown\. Use one of aligned, mean\."):
        to_gqa(layers.maps(4, 4), None, 2, "sum")


@pytest.mark.parametrize("kind", ["no biases", "all biases", "q, k, v biases"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_heads_that_differ_by_a_commuting_map_merge_without_loss(repeats, kind):
    """Heads 0, 3 and 1, 2 are one head each: found, put side by side, and nothing is lost."""
    partition = ((0, 3), (1, 2))
    maps = twins(partition, repeats, bias=kind != "no biases")
    if kind == "q, k, v biases":
        maps = without_output_bias(maps)
    x = layers.inputs(hidden=48)
    moments, wanted = moments_of(maps, x), outputs(maps, x)
    assert similar_heads(maps, moments, 2) == partition
    gqa = to_gqa(maps, moments, 2)
    assert error(outputs(gqa.expand(), x), wanted) < 1e-6
    # Any other text will do as well, and positions that the moments have not seen.
    other = layers.inputs(2, 60, hidden=48, seed=9)
    assert error(outputs(gqa.expand(), other), outputs(maps, other)) < 1e-5
    # Query heads have moved; with o or q alone in the source's order the output is another.
    heads = torch.tensor([0, 3, 1, 2])[:, None] * repeats + torch.arange(repeats)
    back = heads.flatten().argsort()
    assert error(outputs(replace(gqa, o=gqa.o[:, back]).expand(), x), wanted) > 1e-1
    assert error(outputs(replace(gqa, q=gqa.q[back]).expand(), x), wanted) > 1e-2
    # Neighbours do not merge without loss, nor do means, nor pairs of another frequency.
    neighbours = aligned(maps, moments, ((0, 1), (2, 3)))
    assert error(outputs(neighbours.expand(), x), wanted) > 1e-2
    assert error(outputs(to_gqa(maps, moments, 2, "mean").expand(), x), wanted) > 1e-1
    turned = replace(gqa, inv_freq=gqa.inv_freq.flip(0))
    assert error(outputs(turned.expand(), x), wanted) > 1e-2


def mean_key(problem, count):
    """Mean pooling, as a shared key of `count` source heads."""
    eye = torch.eye(problem.width, dtype=torch.float64)
    return SharedKey(eye.repeat(1, count) / count, eye.expand_as(problem.queries))


def value_error(maps, moments, group, up, down):
    """tr(A (W - up down) C (W - up down)^T) of a group's stacked values."""
    rows = [head * maps.v_dim + row for head in group for row in range(maps.v_dim)]
    factors = moments.values
    off = (maps.v[list(group)] - up @ down).flatten(0, 1)
    inputs = factors.inputs
    if maps.o_bias is None:
        inputs = inputs + torch.outer(factors.mean, factors.mean)
    return float((factors.gradients[rows][:, rows] @ off @ inputs * off).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", ["a head each", "grouped", "biases"])
def test_aligned_is_predicted_to_lose_less_than_the_mean(shape, seed):
    maps = layers.maps(**SHAPES[shape], seed=seed)
    moments = moments_of(maps, layers.inputs(6, 32))
    whole = key_problem(maps, moments)
    for size in (2, 4):
        group = tuple(range(size))
        problem = whole.of_group(group)
        commuting = score_error(problem, commuting_key(problem))
        fitted = score_error(problem, shared_key(problem))
        assert fitted < commuting < score_error(problem, mean_key(problem, size))
        values = merge_values(maps, moments, group)
        down = values.down[:, :-1]
        mean = maps.v[list(group)].mean(0)
        own = value_error(maps, moments, group, values.up, down)
        assert own < value_error(maps, moments, group, torch.eye(8).double(), mean)
        assert own < value_error(maps, moments, group, values.up, 1.1 * down)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("norm", [None, *NORMS])
@pytest.mark.parametrize("bias", [False, True])
def test_aligned_loses_less_than_the_mean(bias, norm, seed):
    """Heads that resemble each other but for a commuting map, on text the moments have not seen."""
    maps = similar(bias, norm, seed)
    moments = moments_of(maps, layers.inputs(6, 32, hidden=48))
    unseen = layers.inputs(2, 32, hidden=48, seed=7)
    wanted = outputs(maps, unseen)
    for count in (1, 2):
        found, mean = (
            error(outputs(to_gqa(maps, moments, count, pooling).expand(), unseen), wanted)
            for pooling in ("aligned", "mean")
        )
        assert 1e-2 < found < 0.7 * mean


def similar(bias=False, norm=None, seed=0):
    """Four KV heads that resemble each other but for a commuting map."""
    alike = twins(((0, 1, 2, 3),), 2, bias, seed)
    other = layers.maps(8, 4, hidden=48, seed=seed + 9, norm=norm)
    norms = {name: getattr(other, name) for name in ("q_norm", "k_norm", "norm_eps")}
    return replace(alike, k=alike.k + 0.3 * other.k, v=alike.v + 0.3 * other.v, **norms)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_normalised_heads_that_differ_by_what_passes_their_norm_merge_without_loss(norm, bias):
    """Phases, where each head is normalised by itself; complex multiples where all are together."""
    partition = ((0, 1, 2, 3),) if norm == "head" else ((0, 3), (1, 2))
    maps = twins(partition, 2, bias, norm=norm, phases=norm == "head")
    x, other = layers.inputs(hidden=48), layers.inputs(2, 60, hidden=48, seed=9)
    moments, wanted = moments_of(maps, x), outputs(maps, other)
    gqa = to_gqa(maps, moments, len(partition))
    assert error(outputs(gqa.expand(), x), outputs(maps, x)) < 1e-5
    assert error(outputs(gqa.expand(), other), wanted) < 1e-4
    # Without the norms, with their weights in another order, or too large, the output is another.
    wrong = {
        "no norm": dict(q_norm=None, k_norm=None),
        "queries": dict(q_norm=gqa.q_norm.flip(-1)),
        "keys": dict(k_norm=gqa.k_norm.flip(-1)),
        "larger": dict(q_norm=1.1 * gqa.q_norm),
    }
    for name, twin in wrong.items():
        assert error(outputs(replace(gqa, **twin).expand(), other), wanted) > 1e-2, name
    mean = to_gqa(maps, moments, len(partition), "mean")
    assert error(outputs(mean.expand(), other), wanted) > 1e-1


@pytest.mark.parametrize("norm", NORMS)
def test_linear_keys_are_the_nearest_up_to_a_number_a_token(norm):
    maps, x = similar(norm=norm), layers.inputs(6, 32, hidden=48)
    moments = moments_of(maps, x)
    read = torch.stack([brute_weights(maps.to(torch.float32), row).sum((0, 1)) for row in x])
    number = maps.key_scales(x.double()).log().mean(-1).exp()
    keys = maps.keys(x.double())
    keyed = torch.cat([x.double(), torch.ones_like(x[..., :1])], -1) * number[..., None]
    weight = read / read.sum()
    cross = torch.einsum("nt,ntge,ntd->ged", weight, keys, keyed).flatten(0, 1)
    inputs = torch.einsum("nt,ntc,ntd->cd", weight, keyed, keyed)
    assert error(moments.keys, cross) < 1e-5
    assert error(moments.key_inputs, inputs) < 1e-5

    def off(linear):
        missing = (keys - torch.einsum("ged,ntd->ntge", linear, keyed)).square().sum((2, 3))
        return float((missing * weight).sum())

    linear = source_keys(maps, moments)
    own = augmented(maps.k, maps.k_bias) * maps.k_norm.expand(4, 8)[..., None]
    if norm == "all":  # they are linear but for that number
        assert error(linear, own) < 1e-4
        return
    assert off(linear) < 0.9 * off(own)
    for scale in (0.95, 1.05):
        assert off(linear) < off(scale * linear)


@pytest.mark.parametrize("norm", NORMS)
def test_the_norms_weights_give_queries_and_keys_the_energy_that_is_asked_for(norm):
    maps, x = similar(norm=norm), layers.inputs(6, 32, hidden=48)
    moments, unseen = moments_of(maps, x), layers.inputs(4, 32, hidden=48, seed=7)
    gqa, wanted = to_gqa(maps, moments, 2), outputs(maps, unseen)
    assert gqa.q_norm.shape == maps.q_norm.shape
    assert gqa.k_norm.shape == ((8,) if norm == "head" else (2, 8))
    found = error(outputs(gqa.expand(), unseen), wanted)
    for scale in (0.8, 1.3):
        twin = replace(gqa, q_norm=scale * gqa.q_norm)
        assert error(outputs(twin.expand(), unseen), wanted) > found
    # What a pair's keys are multiplied with, its queries are divided by.
    factor = torch.rand(4, generator=seeded(), dtype=torch.float64).add(0.5).repeat(2)
    twin = replace(gqa, q_norm=gqa.q_norm * factor, k_norm=gqa.k_norm / factor)
    assert error(outputs(twin.expand(), unseen), outputs(gqa.expand(), unseen)) < 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_healing_fits_the_norms_too(norm):
    maps = similar(norm=norm)
    x, unseen = layers.inputs(160, 24, hidden=48), layers.inputs(8, 24, hidden=48, seed=7)
    gqa, seen = to_gqa(maps, moments_of(maps, x[:8]), 2), seen_by(maps, x)
    healed = heal(gqa, seen, steps=60, generator=seeded(), low_precision=False)
    other, before = seen_by(maps, unseen), output_error(gqa, seen).relative
    assert output_error(healed, other).relative < 0.99 * output_error(gqa, other).relative
    # A target that is not the layer's own is not come near to.
    strange = replace(seen, y=seen.y.flip(0))
    twin = heal(gqa, strange, steps=60, generator=seeded(), low_precision=False)
    assert output_error(twin, seen).relative > before
    assert {"q_norm", "k_norm"} <= set(gqa.tensors())
    for name, tensor in healed.tensors().items():
        assert tensor.shape == gqa.tensors()[name].shape
        assert not torch.equal(tensor, gqa.tensors()[name])


def brute_weights(maps, sequence):
    """a^TEMPER / sum a^TEMPER |o_h (v_s - o_t)|^2, one number at a time."""
    (seen,), norms = attend(maps, sequence), output_norms(maps)
    length = len(sequence)
    weights = torch.zeros(maps.heads, length, length, dtype=torch.float64)
    for h, t in itertools.product(range(maps.heads), range(length)):
        v = seen.v[h // maps.repeats]
        a = seen.weights[h, t]
        for s in range(t + 1):
            off = v[s] - a @ v
            weights[h, t, s] = (off @ norms[h] @ off) * a[s] ** TEMPER / (a**TEMPER).sum()
    return weights


def test_moments_are_their_definitions():
    maps, x = layers.maps(4, 2, bias=True), layers.inputs(2, 10)
    found, narrow = moments_of(maps, x), maps.to(torch.float32)
    queries, lags = torch.zeros(4, 8, 8).double(), torch.zeros(4, 10).double()
    inputs = torch.zeros(33, 33).double()
    turned = torch.zeros_like(queries)
    for sequence in x:
        weights = brute_weights(narrow, sequence)
        q = next(attend(narrow, sequence)).q.double()
        plain = rotate(q, -position_angles(maps.inv_freq, 10))
        for h, t, s in itertools.product(range(4), range(10), range(10)):
            w, key = weights[h, t, s], torch.cat([sequence[s].double(), torch.ones(1).double()])
            queries[h] += w * torch.outer(plain[h, t], plain[h, t])
            turned[h] += w * torch.outer(q[h, t], q[h, t])
            inputs += w * torch.outer(key, key)
            if s <= t:
                lags[h, t - s] += w
    scale = maps.scaling**2 / 20
    assert error(found.queries, queries * scale) < 1e-5
    assert error(found.queries, turned * scale) > 1e-2  # rotated queries are not what is wanted
    assert error(found.lags, lags / lags.sum(1, keepdim=True)) < 1e-5
    assert error(found.key_inputs, inputs / inputs[-1, -1]) < 1e-5


def problem_of(heads=6, groups=3, seed=0):
    maps = layers.maps(heads, groups, seed=seed)
    moments = moments_of(maps, layers.inputs(3, 16))
    return maps, moments, key_problem(maps, moments)


@pytest.mark.parametrize("fitted", [False, True])
def test_score_error_is_the_mean_over_lags(fitted):
    """Against the definition: every lag by itself, keys rotated one by one."""
    maps, moments, problem = problem_of()
    key = shared_key(problem) if fitted else commuting_key(problem)

    def brute(sign):
        total = 0.0
        root = torch.linalg.cholesky(problem.keys + 1e-12 * torch.eye(24).double())  # samples of k
        for h, lag in itertools.product(range(6), range(moments.lags.shape[1])):
            angles = sign * lag * maps.inv_freq
            k = rotate(root[h // 2 * 8 : h // 2 * 8 + 8].mT, angles)
            z = rotate((key.analysis @ root).mT, angles)
            off = k - z @ key.synthesis[h].mT
            total += moments.lags[h, lag] * ((off @ moments.queries[h]) * off).sum()
        return float(total)

    assert score_error(problem, key) == pytest.approx(brute(-1), rel=1e-8)
    assert score_error(problem, key) != pytest.approx(brute(1), rel=1e-4)


def test_fitting_keys_and_queries_in_turn_only_helps():
    _, _, problem = problem_of()
    errors = [score_error(problem, shared_key(problem, steps)) for steps in (0, 1, 2, 10, 40)]
    assert score_error(problem, commuting_key(problem)) > errors[0]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    # Where it ends, no small change of either map helps.
    key, generator = shared_key(problem, 400), seeded()
    least = score_error(problem, key)
    for name in ("analysis", "synthesis"):
        tensor = getattr(key, name)
        for _ in range(20):
            change = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            near = replace(key, **{name: tensor + 1e-2 * tensor.std() * change})
            assert score_error(problem, near) > least * (1 - 1e-6)


def test_the_commuting_key_is_the_best_of_its_kind():
    """No other complex factors leave less, where pairs' phases say nothing."""
    maps, moments, _ = problem_of()
    energy = moments.queries.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, 4)).sum(1) / 2
    round_queries = energy.repeat(1, 2).diag_embed()
    problem = key_problem(maps, replace(moments, queries=round_queries))
    key, generator = commuting_key(problem), seeded()
    least = score_error(problem, key)
    left = torch.stack([energy_left(problem, pair) for pair in range(4)]).sum()
    assert least == pytest.approx(float(left), rel=1e-8)
    for _ in range(20):
        change = torch.view_as_complex(torch.randn(9, 4, 2, generator=generator).double())
        change = 1e-2 * real_matrix(change)
        analysis = key.analysis + change[:3].transpose(0, 1).flatten(1)
        assert score_error(problem, replace(key, analysis=analysis)) > least
        synthesis = key.synthesis + change[3:]
        assert score_error(problem, replace(key, synthesis=synthesis)) > least


def real_matrix(factor):
    """Multiplying every pair with its complex number, written out."""
    found = torch.zeros(len(factor), 8, 8, dtype=torch.float64)
    for head, pair in itertools.product(range(len(factor)), range(4)):
        c = factor[head, pair]
        found[head, pair, pair], found[head, pair, pair + 4] = c.real, -c.imag
        found[head, pair + 4, pair], found[head, pair + 4, pair + 4] = c.imag, c.real
    return found


def energy_left(problem, pair):
    """What is left of one frequency without its first component, by a plain SVD."""
    rows = [head * 8 + part * 4 + pair for part in (0, 1) for head in range(3)]
    root = torch.linalg.cholesky(problem.keys)[rows]
    weight = problem.queries[:, pair, pair].unflatten(0, (3, 2)).sum(1).sqrt()
    k = torch.complex(root[:3], root[3:]) * weight[:, None]
    return torch.linalg.svdvals(k)[1:].square().sum()


def test_merging_cost_is_what_is_left_out():
    maps = layers.maps(8, 4)
    moments = moments_of(maps, layers.inputs())
    cost = merging_cost(maps, moments)
    values = merge_values(maps, moments, (1, 2))
    lost = value_error(maps, moments, (1, 2), values.up, values.down[:, :-1])
    silent = replace(moments, queries=torch.zeros_like(moments.queries))
    assert merging_cost(maps, silent)((1, 2)) == pytest.approx(lost, rel=1e-4)
    assert cost((1, 2)) > lost
    assert cost((2,)) == pytest.approx(0, abs=1e-6 * lost)


@pytest.mark.parametrize(("count", "size"), [(6, 2), (8, 4), (16, 4), (24, 2), (5, 5), (4, 1)])
def test_best_partition_finds_what_was_planted(count, size):
    order = torch.randperm(count, generator=seeded()).tolist()
    wanted = sorted(tuple(sorted(order[i : i + size])) for i in range(0, count, size))
    home = {item: index for index, group in enumerate(wanted) for item in group}

    def cost(group):
        return float(sum(home[a] != home[b] for a, b in itertools.combinations(group, 2)))

    found = best_partition(cost, count, size)
    assert sorted(found) == wanted
    assert all(group == tuple(sorted(group)) for group in found)


def test_the_search_comes_near_the_best_partition(monkeypatch):
    distance = torch.randn(8, 8, generator=seeded()).square()

    def cost(group):
        return float(distance[list(group)][:, list(group)].sum())

    def total(partition):
        return sum(map(cost, partition))

    best = total(best_partition(cost, 8, 2))
    every = [total([order[i : i + 2] for i in (0, 2, 4, 6)]) for order in orders_of(8)]
    assert best == pytest.approx(min(every))
    monkeypatch.setattr("rehead.converters.grouping.MOST_PARTITIONS", 0)
    searched = best_partition(cost, 8, 2)
    assert sorted(sum(searched, ())) == list(range(8))
    assert best <= total(searched) < 1.2 * best < sum(every) / len(every)


def orders_of(count):
    """Every way to write pairs one after the other, 0 and then the least that is left first."""

    def more(left):
        if not left:
            yield ()
            return
        for other in left[1:]:
            rest = [item for item in left[1:] if item != other]
            yield from ((left[0], other, *tail) for tail in more(rest))

    return list(more(list(range(count))))


def constant_output(maps, mean):
    """What the layer puts out where all tokens are the mean."""
    return reference_attention(maps, mean[None].double())[0]


def test_what_is_constant_in_the_values_is_kept():
    maps, x = layers.maps(8, 4, bias=True), layers.inputs()
    moments = moments_of(maps, x)
    mean = moments.values.mean
    gqa = to_gqa(maps, moments, 2)
    assert error(constant_output(gqa.expand(), mean), constant_output(maps, mean)) < 1e-9
    lost = replace(gqa, o_bias=maps.o_bias)
    assert error(constant_output(lost.expand(), mean), constant_output(maps, mean)) > 1e-2
    # Without a bias of o the values' own biases do what they can.
    maps = without_output_bias(maps)
    gqa = to_gqa(maps, moments, 2)
    assert gqa.biases() == dict(q_bias=True, k_bias=True, v_bias=True, o_bias=False)
    wanted = constant_output(maps, mean)
    least = error(constant_output(gqa.expand(), mean), wanted)
    for _ in range(10):
        off = 0.01 * torch.randn(gqa.v_bias.shape, generator=seeded(), dtype=torch.float64)
        near = replace(gqa, v_bias=gqa.v_bias + off)
        assert error(constant_output(near.expand(), mean), wanted) > least


def test_no_bias_is_invented():
    maps, x = layers.maps(8, 4), layers.inputs()
    for pooling in ("aligned", "mean"):
        gqa = to_gqa(maps, moments_of(maps, x), 2, pooling)
        assert not any(gqa.biases().values())
        assert set(gqa.tensors()) == {"q", "k", "v", "o"}


STOCK = {
    "llama": {},
    "llama, biases": dict(attention_bias=True),
    "mistral": {},
    "qwen2": {},
    "yarn": dict(rope_parameters=tiny.ROPE_TYPES["yarn"]),
}


@pytest.mark.parametrize("pooling", ["aligned", "mean"])
@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_the_stock_class_computes_what_the_maps_say(name, pooling):
    """The family's own model with fewer KV heads and `state_dict()` loaded, against `expand()`."""
    family = name.split(",")[0] if name != "yarn" else "llama"
    stock = tiny.source(family, **STOCK[name], num_key_value_heads=4)
    x = layers.inputs(2, 20)
    rotary = stock.model.rotary_emb
    maps = family_of(stock.config).read(
        stock.config,
        stock.model.layers[0].self_attn.state_dict(),
        rotary.inv_freq,
        float(rotary.attention_scaling),
    )
    gqa = to_gqa(maps, moments_of(maps, x), 2, pooling)
    model = tiny.source(family, **STOCK[name], num_key_value_heads=2, seed=3)
    module = model.model.layers[0].self_attn
    turned = model.model.rotary_emb(x, torch.arange(20)[None])
    future = torch.full((20, 20), -torch.inf).triu(1)[None, None]

    def computed(form):
        module.load_state_dict(form.state_dict())  # strict: every name is there and no other
        return module(x, turned, future)[0]

    wanted = outputs(gqa.expand(), x)
    assert error(computed(gqa), wanted) < 5e-6
    assert error(computed(replace(gqa, k=gqa.k.flip(0))), wanted) > 1e-2


@pytest.mark.parametrize("bias", [False, True])
def test_refitting_o_is_the_regression(bias):
    maps = layers.maps(8, 4, bias=bias)
    x, unseen = layers.inputs(24, 24), layers.inputs(8, 24, seed=7)
    gqa = to_gqa(maps, moments_of(maps, x), 2)
    seen, other = seen_by(maps, x), seen_by(maps, unseen)
    fitted = refit_output(gqa, seen)
    assert fitted.tensors().keys() == gqa.tensors().keys()
    assert output_error(fitted, seen).relative < output_error(gqa, seen).relative
    assert output_error(fitted, other).relative < 0.99 * output_error(gqa, other).relative
    assert all(getattr(fitted, name) is getattr(gqa, name) for name in "qkv")
    # Nothing to gain, nothing changed; too little text, nothing changed.
    exact = to_gqa(maps, None, 4)
    assert error(refit_output(exact, seen).o, maps.o) < 1e-4
    assert refit_output(gqa, seen[:1]) is gqa


@pytest.mark.parametrize("count", [8, 60])
def test_a_regression_by_tokens_is_the_one_by_features(count):
    """With fewer tokens than features, and with more."""
    x = layers.inputs(4, count // 4)
    even = Activations(x, x.roll(1, 2) + x.tanh(), torch.ones(x.shape[:2]))
    seen = replace(even, weights=torch.logspace(-2, 1, count).view(4, -1))
    o = torch.zeros(x.shape[-1], 2 * x.shape[-1])

    def features(x):
        return torch.cat([x, x.sin()], dim=1)

    found, wanted = (f(features, o, seen, 1) for f in (by_tokens, by_features))
    assert error(found, wanted) < 2e-3
    assert error(by_tokens(features, o, even, 1), wanted) > 1e-2


def test_refitting_respects_the_weights_of_tokens():
    maps, x = layers.maps(8, 4), layers.inputs(16, 24)
    gqa, seen = to_gqa(maps, moments_of(maps, x), 1), seen_by(maps, x)
    weights = torch.ones_like(seen.weights)
    weights[:, :12] = 1e-6
    late = replace(seen, weights=weights)
    assert output_error(refit_output(gqa, late), late).relative < (
        output_error(refit_output(gqa, seen), late).relative
    )


def test_healing_fits_every_tensor():
    maps, x = layers.maps(8, 4), layers.inputs(8, 24)
    gqa, seen = to_gqa(maps, moments_of(maps, x), 2), seen_by(maps, x)
    healed = heal(gqa, seen, steps=20, generator=seeded(), low_precision=False)
    assert output_error(healed, seen).relative < output_error(gqa, seen).relative
    assert not any(torch.equal(t, gqa.tensors()[n]) for n, t in healed.tensors().items())


def test_the_same_seed_gives_the_same_layer():
    maps, x = layers.maps(8, 4, bias=True), layers.inputs()
    one, other = (to_gqa(maps, moments_of(maps, x), 2) for _ in range(2))
    for name, tensor in one.tensors().items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, other.tensors()[name])


def test_text_that_says_nothing_gives_a_layer_all_the_same():
    """Equal tokens: no covariance, and scores do not count."""
    for options in ({}, dict(bias=True), *(dict(norm=norm) for norm in NORMS)):
        maps = layers.maps(8, 4, **options)
        x = layers.inputs(1, 1).expand(2, 6, -1)
        gqa = to_gqa(maps, moments_of(maps, x), 2)
        assert all(torch.isfinite(tensor).all() for tensor in gqa.tensors().values())
        assert error(outputs(gqa.expand(), x), outputs(maps, x)) < 1e-5


def test_maps_hold_what_is_merged():
    maps: AttentionMaps = layers.maps(8, 4)
    pooled = mean_pooled(maps, 2)
    assert pooled.expand().repeats == 4
    assert pooled.cache_width == 2 * 16


@pytest.mark.parametrize("seed", range(3))
def test_a_shared_key_of_heads_without_rope_is_the_best_there_is(seed):
    """Frequency 0: any mix of pairs is free, and Eckart and Young's bound is reached."""
    maps = layers.maps(8, 4, seed=seed)
    maps = replace(maps, inv_freq=torch.zeros_like(maps.inv_freq))
    problem = key_problem(maps, moments_of(maps, layers.inputs(6, 48))).of_group((0, 1))
    energy = torch.block_diag(*problem.queries.unflatten(0, (2, 2)).sum(1))
    factors = weighted_svd(torch.eye(16, dtype=torch.float64), energy, problem.keys)
    found = score_error(problem, shared_key(problem))
    assert found == pytest.approx(float(factors.energy[8:].sum()), rel=1e-3)
    # A multiple frequency by frequency, which is all that rotated heads have, is far from it.
    assert score_error(problem, commuting_key(problem)) > 5 * found
