"""Moments of the calibration text, against autograd, loops and closed forms."""

from dataclasses import replace

import layers
import pytest
import torch
from layers import error

from rehead.converters import calibration
from rehead.converters.calibration import (
    add_by_lag,
    attend,
    kronecker,
    output_norms,
    phase_moments,
    probe_gradients,
    query_factors,
    query_gradients,
    score_importance,
)
from rehead.converters.lowrank import weighted_svd
from rehead.converters.maps import (
    capped,
    normalised,
    position_angles,
    project,
    reference_attention,
    rotate,
)

SHAPES = {
    "grouped": {},
    "biases": dict(bias=True),
    "a head each": dict(groups=4),
    "wide values": dict(width=4, v_dim=10, bias=True),
}


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def probed(maps, x, generator, free=None, twist=""):
    """sum_t z_t . y_t by autograd: its gradients to queries, keys and values of every sequence.

    Args:
        free: position-free queries, whose keys are zero here: what they would add.
        twist: a mistake to be made.
    """
    grads = []
    for row in x:
        z = torch.randn(len(row), maps.hidden, generator=generator)
        q, k, v = (
            project(row, getattr(maps, n), getattr(maps, f"{n}_bias")).detach().requires_grad_()
            for n in "qkv"
        )
        angles = position_angles(maps.inv_freq, len(row))[:, None]
        turned_q, turned_k = rotate(q, angles), rotate(k, -angles if twist == "turned" else angles)
        spread = lambda t: t.repeat_interleave(maps.repeats, 1)  # noqa: E731
        scores = torch.einsum("the,she->hts", turned_q, spread(turned_k))
        k_free = None
        if free is not None:
            q_free = project(row, *free)
            k_free = torch.zeros(len(row), maps.kv_heads, q_free.shape[-1], requires_grad=True)
            scores = scores + torch.einsum("the,she->hts", q_free, spread(k_free))
        future = torch.ones(len(row), len(row), dtype=torch.bool).triu(1)
        scaling = 1.0 if twist == "scaling" else maps.scaling
        scores = capped(scores * scaling, None if twist == "softcap" else maps.softcap)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        y = torch.einsum("hts,shv,dhv->td", weights, spread(v), maps.o)
        leaves = (q, k if k_free is None else k_free, v)
        grads.append(torch.autograd.grad((z * y).sum(), leaves))
    return [torch.stack(part) for part in zip(*grads, strict=True)]


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_probe_and_query_gradients_are_autograds(shape, softcap):
    maps, x = layers.maps(**SHAPES[shape]).to(torch.float32), layers.inputs(3)
    maps = replace(maps, softcap=softcap)
    queries, keys, values = probed(maps, x, seeded())
    found_keys, found_values = probe_gradients(maps, x, seeded())
    assert error(found_keys, keys) < 1e-5
    assert error(found_values, values) < 1e-5
    assert error(query_gradients(maps, x, seeded()), queries) < 1e-5
    for twist in ("turned", "scaling", *(() if softcap is None else ("softcap",))):
        wrong = probed(maps, x, seeded(), twist=twist)
        assert error(found_keys, wrong[1]) > 1e-2
    assert error(found_values, probed(maps, x, seeded(4))[2]) > 1e-2


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_of_position_free_keys_are_autograds(bias):
    maps, x = layers.maps(bias=bias).to(torch.float32), layers.inputs(2)
    other = layers.maps(bias=bias, width=6, seed=9).to(torch.float32)
    free = (other.q, other.q_bias)
    _, keys, values = probed(maps, x, seeded(), free)
    found_keys, found_values = probe_gradients(maps, x, seeded(), other.queries)
    assert error(found_keys, keys) < 1e-5
    assert error(found_values, values) < 1e-5
    assert error(found_keys[..., :6], probe_gradients(maps, x, seeded())[0][..., :6]) > 1e-2


def test_attend_gives_softmax_weights():
    maps, x = layers.maps(bias=True).to(torch.float32), layers.inputs(1)[0]
    (seen,) = attend(maps, x)
    assert torch.allclose(seen.weights.sum(-1), torch.ones(4, len(x)), atol=1e-6)
    assert not seen.weights.triu(1).any()
    y = torch.einsum("hts,hsv,dhv->td", seen.weights, seen.v.repeat_interleave(2, 0), maps.o)
    assert error(y + maps.o_bias, reference_attention(maps.to(torch.float64), x.double())) < 1e-5


@pytest.mark.parametrize("length", [1, 2, 7])
def test_sums_by_lag_are_a_loops(length):
    j = torch.rand(3, length, length, generator=seeded())
    wanted = torch.zeros(3, length, dtype=torch.float64)
    for t in range(length):
        for s in range(t + 1):
            wanted[:, t - s] += j[:, t, s]
    found, blocks, causal = (torch.zeros_like(wanted) for _ in range(3))
    add_by_lag(found, j)
    assert torch.allclose(found, wanted, rtol=1e-6)
    # What has s > t counts nowhere.
    add_by_lag(causal, j.tril())
    assert torch.equal(found, causal)
    for start in range(0, length, 3):
        stop = min(start + 3, length)
        add_by_lag(blocks, j[:, start:stop, :stop])
    assert torch.allclose(blocks, wanted, rtol=1e-6)


def test_blocks_of_queries_change_nothing(monkeypatch):
    """Sequences longer than a block, and not a multiple of it, as one block sees them."""
    maps, x = layers.maps(bias=True).to(torch.float32), layers.inputs(2, 11)

    def everything():
        phases = phase_moments(maps, x)
        phases = replace(phases, mean_phase=torch.view_as_real(phases.mean_phase))
        gradients = (*probe_gradients(maps, x, seeded()), query_gradients(maps, x, seeded()))
        return [*vars(phases).values(), *gradients]

    whole = everything()
    monkeypatch.setattr(calibration, "QUERIES_AT_ONCE", 4)
    assert [seen.weights.shape[1:] for seen in attend(maps, x[0])] == [(4, 4), (4, 8), (3, 11)]
    for one, many in zip(whole, everything(), strict=True):
        assert error(many, one) < 1e-5


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_output_change_is_the_squared_derivative_of_the_output(softcap):
    """J_ts = |d y_t / d score_ts|^2 for the head alone."""
    maps, x = layers.maps(v_dim=6).to(torch.float32), layers.inputs(1, 5)[0]
    maps = replace(maps, softcap=softcap)
    (seen,) = attend(maps, x)
    emphasis = seen.per_score(seen.weights).square()
    found = score_importance(maps, seen, output_norms(maps), emphasis)
    v = seen.v.repeat_interleave(maps.repeats, 0)
    scores = (seen.q @ seen.k.repeat_interleave(maps.repeats, 0).mT) * maps.scaling
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def outputs(scores):
        scores = capped(scores, softcap).masked_fill(future, -torch.inf)
        return torch.einsum("hts,hsv,dhv->htd", scores.softmax(-1), v, maps.o)

    jacobian = torch.autograd.functional.jacobian(outputs, scores)  # [h t d, h t s]
    own = torch.einsum("htdhts->htsd", jacobian)
    assert torch.allclose(found, own.square().sum(-1), rtol=1e-3, atol=1e-6 * float(found.max()))


def test_phase_moments_go_back_through_a_cap():
    maps, x = layers.maps(v_dim=6).to(torch.float32), layers.inputs(1, 5)
    maps = replace(maps, softcap=0.5)
    found = phase_moments(maps, x).inputs

    def wanted(slope):
        (seen,) = attend(maps, x[0])
        assert seen.slopes is not None
        emphasis = (seen.weights * seen.slopes**slope).square()
        read = score_importance(maps, seen, output_norms(maps), emphasis).sum((0, 1))
        keyed = torch.cat([x[0], torch.ones(5, 1)], dim=1)
        return (keyed * read[:, None]).T @ keyed / read.sum()

    assert error(found, wanted(1)) < 1e-5
    assert error(found, wanted(0)) > 1e-3


def uniform(length, heads=2, width=4):
    """Attention without any preference over one-hot tokens: v_s = e_s, and o adds them up.

    |v_s - o_t|^2 = 1 - 1 / (t + 1), counting t from 0, whatever s <= t is.
    """
    maps = layers.maps(heads, heads, width=width, v_dim=length, hidden=length)
    eye = torch.eye(length, dtype=torch.float64)
    maps = replace(
        maps,
        k=torch.zeros_like(maps.k),
        v=eye.expand(heads, -1, -1).clone(),
        o=eye[:, None].expand(-1, heads, -1).clone(),
    )
    counts = torch.arange(1, length + 1, dtype=torch.float64)
    j = (counts**-2 * (1 - 1 / counts))[:, None].expand(-1, length).tril()
    return maps, eye.float()[None], j


def test_phase_moments_of_a_uniform_attention_are_known():
    length = 12
    maps, x, j = uniform(length)
    found = phase_moments(maps.to(torch.float32), x)
    lags = torch.arange(length, dtype=torch.float64)
    lags = lags[:, None] - lags
    for pair, frequency in enumerate(maps.inv_freq.tolist()):
        phase = (j * torch.polar(torch.ones_like(lags), frequency * lags)).sum() / j.sum()
        assert torch.allclose(found.mean_phase[:, pair], phase.expand(2), atol=1e-6)
    # A sum of a geometric series, for one head and row, without a loop over lags.
    theta = torch.polar(torch.ones(()).double(), maps.inv_freq[0])
    rows = (1 - theta ** torch.arange(1, length + 1)) / (1 - theta)
    closed = (j[:, 0] * rows).sum() / j.sum()
    assert torch.allclose(found.mean_phase[0, 0], closed, atol=1e-6)

    queries = maps.q.mT.square()  # token t is e_t, so its query is column t
    energy = torch.einsum("t,htp->hp", j.sum(1), queries.unflatten(-1, (2, -1)).sum(-2)) / length
    assert torch.allclose(found.query_energy, energy * maps.scaling**2, rtol=1e-5)
    wanted = torch.zeros(length + 1, length + 1, dtype=torch.float64)
    weights = j.sum(0) / j.sum()
    wanted[:length, :length] = torch.diag(weights)
    wanted[length, :length] = wanted[:length, length] = weights
    wanted[length, length] = 1
    assert torch.allclose(found.inputs, wanted, atol=1e-6)


def test_what_is_not_rotated_has_a_mean_phase_of_one():
    maps = layers.maps(bias=True)
    still = replace(maps, inv_freq=maps.inv_freq * torch.tensor([1.0, 0.0, 1.0, 0.0]))
    phases = phase_moments(still.to(torch.float32), layers.inputs(2)).mean_phase
    assert torch.allclose(phases[:, [1, 3]], torch.ones(4, 2).to(phases.dtype), atol=1e-12)
    assert (phases.abs() <= 1 + 1e-9).all()
    assert (phases[:, 0].abs() < 0.99).all()


def test_phase_moments_of_one_token_are_finite():
    """There is nothing to attend to, so no score matters."""
    found = phase_moments(layers.maps().to(torch.float32), layers.inputs(2, 1))
    assert all(torch.isfinite(moment.abs()).all() for moment in vars(found).values())


def test_kronecker_of_equal_gradients_is_the_covariance():
    x = layers.inputs(3)
    signs = torch.randn(3, 24, 5, generator=seeded()).sign()
    found = kronecker(x, signs)
    flat = x.flatten(0, 1)
    assert torch.allclose(found.mean, flat.mean(0), atol=1e-5)
    assert torch.allclose(found.inputs, torch.cov(flat.T, correction=0), atol=1e-4)


def test_kronecker_weighs_each_side_by_the_other():
    """A token without gradient says nothing about x, one at the mean nothing about gradients."""
    x, gradients = layers.inputs(1, 12), torch.randn(1, 12, 5, generator=seeded())
    gradients[0, 3] = 0
    moved = x.clone()
    moved[0, 3] += 100
    assert torch.allclose(kronecker(moved, gradients).inputs, kronecker(x, gradients).inputs)
    plain = kronecker(x, gradients)
    at_mean = torch.cat([x, plain.mean.float().expand(1, 1, -1)], 1)
    found = kronecker(at_mean, torch.cat([gradients, 10 * gradients[:, :1]], 1))
    assert error(found.mean, plain.mean) < 1e-4
    assert error(found.gradients, plain.gradients) < 1e-4


def test_kronecker_does_not_depend_on_the_gradients_unit():
    x, gradients = layers.inputs(2), torch.randn(2, 24, 5, generator=seeded())
    one, other = kronecker(x, gradients), kronecker(x, 100 * gradients)
    assert error(other.inputs, one.inputs) < 1e-5
    assert error(other.gradients, 1e4 * one.gradients) < 1e-5
    for moment in (one.inputs, one.gradients):
        assert torch.linalg.eigvalsh(moment).min() > -1e-6 * moment.norm()


def test_kronecker_of_no_gradients_is_finite():
    found = kronecker(layers.inputs(2), torch.zeros(2, 24, 5))
    assert all(torch.isfinite(part).all() for part in vars(found).values())


@pytest.mark.parametrize("hidden", [20, 32, 48])
@pytest.mark.parametrize("laid_out", [False, True])
def test_queries_are_factorised_under_all_heads_gradients(hidden, laid_out):
    """Whether they are more than their inputs, where only their sum is kept, or fewer.

    Of a layout of their own too: every head's maps, here wider, are another product of them.
    """
    maps, x = layers.maps(width=10, hidden=hidden), layers.inputs(3, hidden=hidden)
    q, layout = maps.q, torch.eye(10).expand(4, -1, -1)
    if laid_out:
        layout = torch.randn(4, 10, 8, generator=seeded())
        q = maps.q[:, :8].contiguous()
        maps = replace(maps, q=layout.double() @ q)
    narrow, rows = maps.to(torch.float32), min(16, hidden)
    found, mean = query_factors(narrow, q, x, seeded(), layout)
    gradients = torch.einsum("nthk,hkq->nthq", query_gradients(narrow, x, seeded()), layout)
    moments = kronecker(x, gradients.flatten(2))
    wanted = weighted_svd(q.flatten(0, 1), moments.gradients.double(), moments.inputs.double())
    assert error(mean, moments.mean) < 1e-6
    assert torch.allclose(found.energy[:rows], wanted.energy[:rows], rtol=1e-4)
    for rank in (4, 16):
        products = [f.up[:, :rank] @ f.down[:rank] for f in (found, wanted)]
        assert error(*products) < 1e-3
    # Twins: dims in another order, and other heads', meet other gradients.
    for twisted in (layout.flip(2), layout.flip(0) if laid_out else layout.roll(1, 2)):
        twin = query_factors(narrow, q, x, seeded(), twisted)[0]
        assert not torch.allclose(twin.energy[:rows], wanted.energy[:rows], rtol=1e-2)


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("together", [False, True])
def test_gradients_before_a_norm_are_those_of_autograd(which, together):
    """Of the probe, through a norm of every head, or of all together: as if the maps' bias had
    moved token by token."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (4, 8), "k": (2, 8)} if together else {"q": (8,), "k": (8,)}
    weights = {
        name: 0.5 + torch.rand(shape, generator=generator).double()
        for name, shape in shapes.items()
    }
    maps = replace(
        layers.maps(bias=True), q_norm=weights["q"], k_norm=weights["k"], norm_eps=1e-3
    ).to(torch.float32)
    x = layers.inputs(1, 12)
    z = project(x, getattr(maps, which), getattr(maps, f"{which}_bias"))
    direction = torch.randn(12, maps.hidden, generator=seeded())
    leaf = z.clone().requires_grad_()
    weight = getattr(maps, f"{which}_norm")
    other = maps.keys(x) if which == "q" else maps.queries(x)
    mine = normalised(leaf, weight, maps.norm_eps)
    q, k = (mine, other) if which == "q" else (other, mine)
    angles = position_angles(maps.inv_freq, 12)[:, None]
    q, k = (rotate(part, angles).transpose(1, 2) for part in (q, k))
    v = project(x, maps.v, maps.v_bias).transpose(1, 2)
    heads = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=maps.scaling, enable_gqa=True
    )
    y = torch.einsum("bhtv,dhv->btd", heads, maps.o)
    (wanted,) = torch.autograd.grad((y * direction).sum(), leaf)
    found = (
        query_gradients(maps, x, seeded())
        if which == "q"
        else probe_gradients(maps, x, seeded())[0]
    )
    assert error(found, wanted) < 1e-5
    # An error along a key itself is taken away by its norm; without the norm it counts.
    over = (-2, -1) if together else -1
    along = (found * z).sum(over).abs().max() / (found.norm(dim=over) * z.norm(dim=over)).max()
    assert along < 1e-3
    plain = replace(maps, **{f"{which}_norm": None})
    twin = (
        query_gradients(plain, x, seeded())
        if which == "q"
        else probe_gradients(plain, x, seeded())[0]
    )
    assert error(twin, wanted) > 1e-2
