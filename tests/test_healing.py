"""Healing: nearer on text it has not seen, the same from the same seed, nothing without steps."""

from dataclasses import replace

import layers
import pytest
import torch

from rehead.converters import healing
from rehead.converters.activations import Activations
from rehead.converters.healing import _orders, _rate, heads_of, heal, output_error
from rehead.converters.latent import with_low_rank_queries
from rehead.converters.maps import reference_attention
from rehead.converters.mfa import MFADims, to_mfa
from rehead.converters.mla import to_mla
from rehead.converters.moments import latent_moments
from rehead.converters.plan import LayerDims

MAPS = layers.maps(bias=True)


def activations(sequences, seed):
    x = layers.inputs(sequences, seed=seed)
    y = torch.stack([reference_attention(MAPS, row) for row in x.double()]).float()
    weights = 0.5 + torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(seed))
    return Activations(x, y, weights)


ALL = activations(200, 1)
SEEN, UNSEEN = ALL[:160], ALL[160:]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def form(rope_on_read=False, queries=None):
    moments = latent_moments(MAPS, SEEN.x[:8], seeded(), rope_on_read)
    found = to_mla(MAPS, moments, LayerDims(10, 4, on_read=rope_on_read))
    rank = lambda energy: queries  # noqa: E731
    return with_low_rank_queries(found, SEEN.x[:8], seeded(), rank, "q_lora_rank")


def healed(start, steps=40, seed=0, seen=SEEN, **options):
    return heal(start, seen, steps=steps, generator=seeded(seed), low_precision=False, **options)


@pytest.mark.parametrize("queries", [None, 12])
@pytest.mark.parametrize("rope_on_read", [False, True])
def test_healing_brings_unseen_outputs_nearer(rope_on_read, queries):
    start = form(rope_on_read, queries)
    before = output_error(start, UNSEEN).relative
    after = output_error(healed(start), UNSEEN).relative
    assert after < 0.9 * before
    # A target that is not the layer's own is not come near to.
    other = replace(SEEN, y=SEEN.y.flip(0))
    assert output_error(healed(start, seen=other), UNSEEN).relative > before


def test_no_steps_are_no_change():
    start = form()
    assert healed(start, steps=0) is start


def test_the_same_generator_gives_the_same_bits():
    start = form()
    one, other = healed(start, steps=6), healed(start, steps=6)
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, other.tensors()[name]), name


def test_what_is_fitted_and_what_is_kept():
    start = form(queries=12)
    found = healed(start, steps=3)
    assert found.tensors().keys() == start.tensors().keys()
    for name, tensor in found.tensors().items():
        assert tensor.dtype == torch.float64
        assert not tensor.requires_grad
        assert not torch.equal(tensor, start.tensors()[name]), name
    assert found.rope_pairs == start.rope_pairs
    assert torch.equal(found.inv_freq, start.inv_freq)


def unequal(mfa):
    """The same layer in a basis of channels 400 times as large as others."""
    scale = torch.logspace(-1.3, 1.3, mfa.head_dim).double()
    turned = 2 * len(mfa.rope_pairs)
    scale[-turned:] = scale[-turned // 2 :].repeat(2)  # both parts of a pair
    return replace(
        mfa,
        k=mfa.k * scale[:, None],
        k_b=mfa.k_b / scale[:-turned],
        synthesis=mfa.synthesis / scale[-turned:],
    )


def test_healing_does_not_depend_on_the_channels_sizes(monkeypatch):
    plain = replace(MAPS, q_bias=None, k_bias=None)
    y = torch.stack([reference_attention(plain, row) for row in ALL.x.double()]).float()
    seen, unseen = replace(SEEN, y=y[:160]), replace(UNSEEN, y=y[160:])
    start = to_mfa(plain, latent_moments(plain, seen.x[:8], seeded(), False), MFADims(12, 8))
    other = unequal(start)
    same = output_error(start, unseen).relative
    assert output_error(other, unseen).relative == pytest.approx(same, rel=1e-3)
    as_good = output_error(healed(start, seen=seen), unseen).relative
    assert output_error(healed(other, seen=seen), unseen).relative < 1.2 * as_good
    whole = lambda tensor: tensor.square().mean().sqrt()  # noqa: E731
    monkeypatch.setattr(healing, "_sizes", whole)
    assert output_error(healed(other, seen=seen), unseen).relative > 2 * as_good


def test_an_exact_layer_stays_exact():
    """The rate falls with the error that is left."""
    moments = latent_moments(MAPS, SEEN.x[:8], seeded(), False)
    exact = to_mla(MAPS, moments, LayerDims(16, 16))
    assert output_error(exact, UNSEEN).relative < 1e-10
    assert output_error(healed(exact, steps=10), UNSEEN).relative < 1e-6


def test_low_precision_heals_too():
    start = form()
    found = heal(start, SEEN, steps=20, generator=seeded(), low_precision=True)
    assert output_error(found, UNSEEN).relative < output_error(start, UNSEEN).relative


def test_output_error_is_that_of_the_definition():
    start = form()
    wrong = total = 0.0
    for x, y, weights in zip(UNSEEN.x.double(), UNSEEN.y.double(), UNSEEN.weights, strict=True):
        off = reference_attention(start.expand(), x) - y
        wrong += float((off.square().sum(-1) * weights).sum())
        total += float((y.square().sum(-1) * weights).sum())
    found = output_error(start, UNSEEN)
    assert found.relative == pytest.approx(wrong / total, rel=1e-4)
    assert found.absolute == pytest.approx(wrong / UNSEEN.weights.numel(), rel=1e-4)
    plain = replace(UNSEEN, weights=torch.ones_like(UNSEEN.weights))
    assert output_error(start, plain).relative != pytest.approx(found.relative, rel=1e-3)
    assert output_error(start, replace(UNSEEN, weights=3 * UNSEEN.weights)).relative == (
        pytest.approx(found.relative, rel=1e-5)
    )


def test_heads_in_bfloat16_are_those_of_float32_rounded():
    start = form()
    wanted, found = heads_of(start, UNSEEN.x), heads_of(start, UNSEEN.x, torch.bfloat16)
    assert found.dtype == torch.float32
    assert 1e-4 < float((found - wanted).norm() / wanted.norm()) < 3e-2
    assert output_error(start, UNSEEN, found) == output_error(start, UNSEEN, dtype=torch.bfloat16)
    assert output_error(start, UNSEEN, wanted) == output_error(start, UNSEEN)


def test_output_error_of_nothing_is_finite():
    silent = Activations(0 * UNSEEN.x, 0 * UNSEEN.y, UNSEEN.weights)
    assert output_error(form(), silent).relative >= 0


def test_every_sequence_comes_before_any_comes_again():
    order = _orders(5, 2, seeded())
    rows = [row for _ in range(5) for row in next(order)]
    assert sorted(rows[:5]) == sorted(rows[5:]) == list(range(5))
    # More rows than there are: the same ones come again.
    assert len(next(_orders(3, 8, seeded()))) == 8


@pytest.mark.parametrize("steps", [1, 2, 10, 60])
def test_the_rate_rises_and_falls(steps):
    rates = [_rate(step, steps) for step in range(steps)]
    assert max(rates) == 1
    assert min(rates) > 0
    peak = rates.index(1)
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
