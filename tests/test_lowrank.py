"""Weighted low rank: what it loses, that nothing loses less, and moments that say little."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rehead.converters.lowrank import (
    Factors,
    WeightedSVD,
    fix_signs,
    gram_svd,
    square_roots,
    weighted_svd,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed=0, spread=1.0):
    """A positive definite matrix with eigenvalues from 1 down to 10^-2 spread."""
    turn = torch.linalg.qr(draw(size, size, seed=seed))[0]
    return (turn * torch.logspace(0, -2 * spread, size, dtype=torch.float64)) @ turn.T


def truncated(factors: Factors, rank: int) -> torch.Tensor:
    return factors.up[:, :rank] @ factors.down[:rank]


def loss(weight, other, left, right):
    off = weight - other
    return float((left @ off @ right * off).sum())


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_error_is_the_energy_left_out_and_full_rank_is_the_identity(shape):
    rows, columns, seed = shape
    weight = draw(rows, columns, seed=seed)
    left, right = moment(rows, seed + 1), moment(columns, seed + 2)
    factors = weighted_svd(weight, left, right)
    full = min(rows, columns)
    assert factors.up.shape == (rows, full)
    assert factors.down.shape == (full, columns)
    assert (factors.energy.diff() <= 0).all()
    whole = loss(weight, torch.zeros_like(weight), left, right)
    for rank in range(full + 1):
        wanted = float(factors.energy[rank:].sum())
        found = loss(weight, truncated(factors, rank), left, right)
        assert found == pytest.approx(wanted, rel=1e-8, abs=1e-12 * whole)
    assert torch.allclose(truncated(factors, full), weight, rtol=0, atol=1e-10)


@given(shapes, st.integers(0, 8), st.floats(1e-4, 10))
@settings(max_examples=80, deadline=None)
def test_no_map_of_that_rank_loses_less(shape, rank, size):
    """Neither one near it, nor any random one, nor the plain SVD."""
    rows, columns, seed = shape
    rank = min(rank, rows, columns)
    weight = draw(rows, columns, seed=seed)
    left, right = moment(rows, seed + 1), moment(columns, seed + 2)
    factors = weighted_svd(weight, left, right)
    least = loss(weight, truncated(factors, rank), left, right) * (1 - 1e-9) - 1e-12
    up = factors.up[:, :rank] + size * draw(rows, rank, seed=seed + 3)
    down = factors.down[:rank] + size * draw(rank, columns, seed=seed + 4)
    plain = weighted_svd(weight, torch.eye(rows).double(), torch.eye(columns).double())
    for other in (up @ down, draw(rows, rank, seed=seed + 5) @ down, truncated(plain, rank)):
        assert loss(weight, other, left, right) >= least


@given(shapes, st.integers(0, 3), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_a_weight_less_a_product_is_factorised_as_such(shape, count, first):
    """Whichever of rows and columns are more, and whatever part of the rows it is taken from."""
    rows, columns, seed = shape
    first = min(first, rows)
    weight = draw(rows, columns, seed=seed)
    left, right = moment(rows, seed + 1), moment(columns, seed + 2)
    taken = draw(first, count, seed=seed + 3), draw(count, columns, seed=seed + 4)
    rest = weight.clone()
    rest[:first] -= taken[0] @ taken[1]
    less = WeightedSVD.of(left, right).less(weight, first)
    wanted = weighted_svd(rest, left, right)
    full = min(rows, columns)
    for rank in (1, full):
        factors = less(*taken, rank)
        assert factors.up.shape == (rows, rank)
        assert torch.allclose(factors.energy, wanted.energy, rtol=1e-8, atol=1e-10)
        found, best = (loss(rest, truncated(f, rank), left, right) for f in (factors, wanted))
        assert found == pytest.approx(best, rel=1e-6, abs=1e-10)
    assert torch.allclose(truncated(factors, full), rest, rtol=0, atol=1e-9)
    if first and count:  # twin: the product is not left in
        assert not torch.allclose(truncated(factors, full), weight, rtol=0, atol=1e-6)


@given(shapes)
@settings(max_examples=60, deadline=None)
def test_of_the_left_moment_only_what_the_weight_makes_of_it_counts(shape):
    *sides, seed = shape
    columns, rows = sorted(sides)
    weight = draw(rows, columns, seed=seed)
    left, right = moment(rows, seed + 1), moment(columns, seed + 2)
    found = gram_svd(weight, weight.T @ left @ weight, right)
    wanted = weighted_svd(weight, left, right)
    assert torch.allclose(found.energy, wanted.energy, rtol=1e-8, atol=1e-10)
    for rank in range(columns + 1):
        off, least = (loss(weight, truncated(f, rank), left, right) for f in (found, wanted))
        assert off == pytest.approx(least, rel=1e-6, abs=1e-10)
    if columns > 1:  # twin: another left moment's
        other = gram_svd(weight, weight.T @ moment(rows, seed + 3, 2.0) @ weight, right)
        assert not torch.allclose(other.energy, wanted.energy, rtol=1e-4)


def test_weights_change_what_is_kept():
    """Or the tests above would pass for a plain SVD."""
    weight, left, right = draw(6, 6), moment(6, 1), moment(6, 2)
    eye = torch.eye(6, dtype=torch.float64)
    best = loss(weight, truncated(weighted_svd(weight, left, right), 2), left, right)
    for wrong in ((eye, eye), (left, eye), (eye, right), (left.inverse(), right.inverse())):
        other = loss(weight, truncated(weighted_svd(weight, *wrong), 2), left, right)
        assert other > 1.01 * best


@pytest.mark.parametrize("left", ["none", "one direction", "ill-conditioned", "huge", "tiny"])
@pytest.mark.parametrize("right", ["none", "one direction", "ill-conditioned", "huge", "tiny"])
def test_poor_moments_give_finite_maps(left, right):
    """And at full rank still the identity: unseen directions are cheap, not free."""

    def make(kind, size):
        direction = draw(size, 1, seed=size)
        return {
            "none": torch.zeros(size, size, dtype=torch.float64),
            "one direction": direction @ direction.T,
            "ill-conditioned": moment(size, spread=10),
            "huge": 1e30 * moment(size),
            "tiny": 1e-30 * moment(size),
        }[kind]

    weight = draw(5, 7)
    factors = weighted_svd(weight, make(left, 5), make(right, 7))
    assert all(torch.isfinite(part).all() for part in vars(factors).values())
    assert torch.allclose(truncated(factors, 5), weight, rtol=0, atol=1e-7)


def test_directions_that_are_never_seen_cost_no_rank():
    weight = draw(6, 8)
    seen = draw(8, 3, seed=1)
    right = seen @ seen.T
    factors = weighted_svd(weight, moment(6), right)
    assert loss(weight, truncated(factors, 3), moment(6), right) < 1e-5 * float(
        factors.energy.sum()
    )
    assert loss(weight, truncated(factors, 2), moment(6), right) > 1e-3 * float(
        factors.energy.sum()
    )


@pytest.mark.parametrize("rows", [9, 20])
def test_a_moment_rounded_unevenly_costs_no_rank(rows):
    """As float32 products leave it: the two halves of it differ. Of rank 6, the first 6 are all."""
    weight = draw(rows, 6) @ draw(6, 10, seed=1)
    left, right = moment(rows, seed=2), moment(10, seed=3, spread=2.0)
    uneven = left + 1e-7 * draw(rows, rows, seed=4)
    off = (truncated(weighted_svd(weight, uneven, right), 6) - weight).abs().max()
    assert off < 1e-9


def test_no_data_at_all_is_the_plain_svd():
    weight = draw(5, 7)
    factors = weighted_svd(weight, torch.zeros(5, 5).double(), torch.zeros(7, 7).double())
    assert torch.allclose(factors.energy, torch.linalg.svdvals(weight).square())
    zero = weighted_svd(torch.zeros_like(weight), moment(5), moment(7))
    assert not truncated(zero, 5).any()


@given(st.integers(1, 8), st.integers(0, 10_000), st.floats(-12, 12))
@settings(max_examples=40, deadline=None)
def test_square_roots(size, seed, scale):
    wanted = moment(size, seed) * 10**scale
    root, inverse = square_roots(wanted)
    assert torch.allclose(root, root.T)
    assert torch.allclose(root @ root, wanted, rtol=0, atol=1e-12 * 10**scale)
    assert torch.allclose(root @ inverse, torch.eye(size).double(), atol=1e-10)


def test_signs_do_not_depend_on_the_decomposition():
    u, s, vh = torch.linalg.svd(draw(6, 4), full_matrices=False)
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    ours, twin = fix_signs(u, vh), fix_signs(u * flip, vh * flip[:, None])
    assert all(torch.equal(a, b) for a, b in zip(ours, twin, strict=True))
    assert torch.allclose(ours[0] * s @ ours[1], draw(6, 4))
    assert (ours[0].gather(0, ours[0].abs().argmax(0, keepdim=True)) > 0).all()
