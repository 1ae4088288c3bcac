"""Channels of one size on both sides: the same function, and a basis that training likes."""

from dataclasses import replace

import layers
import pytest
import torch
from layers import error

from rehead.converters.balance import evening, paired, size
from rehead.converters.maps import reference_attention
from rehead.converters.mfa import MFADims, mfa_moments, to_mfa, with_shared_queries
from rehead.converters.mla import mla_moments, to_mla, with_low_rank_queries
from rehead.converters.plan import LayerDims

MLA = {
    "decoupled": LayerDims(14, 6),
    "no rotated key": LayerDims(14, 0),
    "whole keys": LayerDims(14, 0, on_read=True),
    "read key": LayerDims(14, 6, on_read=True),
    "settled": LayerDims(14, 6, on_read=True),
}
MFA = {"mfa": MFADims(12, 6), "mfa-kr": MFADims(12, 6, True), "unrotated": MFADims(12, 0)}


def seeded():
    return torch.Generator().manual_seed(5)


def form_of(kind, bias, low):
    maps, x = layers.maps(bias=bias), layers.inputs()
    if kind in MFA:
        form = to_mfa(maps, mfa_moments(maps, x, seeded()), MFA[kind])
        return with_shared_queries(form, x, seeded(), share_q_dim=20) if low else form
    dims = MLA[kind]
    form = to_mla(maps, mla_moments(maps, x, seeded(), dims.on_read), dims)
    form = with_low_rank_queries(form, x, seeded(), 20) if low else form
    return form.settled(x) if kind == "settled" else form


def outputs(form):
    maps = form.expand()
    return torch.stack([reference_attention(maps, row) for row in layers.inputs(seed=3).double()])


@pytest.mark.parametrize("low", [False, True], ids=["", "low-rank queries"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("kind", [*MLA, *MFA])
def test_the_function_stays(kind, bias, low):
    form = form_of(kind, bias, low)
    found = form.balanced()
    assert error(outputs(found), outputs(form)) < 1e-10
    assert found.tensors().keys() == form.tensors().keys()
    for name, tensor in form.tensors().items():
        assert found.tensors()[name].shape == tensor.shape
        same = name in ("o_bias", "reuse_gate") or (kind == "mfa-kr" and name == "o")
        if not same and tensor.any():
            assert not torch.equal(found.tensors()[name], tensor), name
    # Each map's new basis counts: one of them in the old one would be seen.
    q = replace(found, q=form.q)
    assert error(outputs(q), outputs(form)) > 1e-3


def test_normalised_keys_and_pairs_at_rest_stay_too():
    """Keys that are normalised have no size of their own; pairs of frequency 0 do."""
    form = form_of("whole keys", bias=True, low=True)
    still = replace(form, inv_freq=torch.cat([form.inv_freq[:2], 0 * form.inv_freq[2:]]))
    assert error(outputs(still.balanced()), outputs(still)) < 1e-10
    width = form.qk_nope_head_dim
    norms = 0.5 + torch.rand(2, width, generator=seeded()).double()
    normed = replace(form, q_norm=norms[0], k_norm=norms[1], norm_eps=1e-6)
    assert error(outputs(normed.balanced()), outputs(normed)) < 1e-10
    # Evened as if there were no norm, they would be others.
    wrong = replace(form.balanced(), q_norm=norms[0], k_norm=norms[1], norm_eps=1e-6)
    assert error(outputs(wrong), outputs(normed)) > 1e-3


@pytest.mark.parametrize("kind", ["decoupled", "read key", "settled", "mfa", "mfa-kr"])
def test_what_is_made_large_is_read_as_large(kind):
    """Rotated components a thousand times as large as what reads them come to one size."""
    form = form_of(kind, bias=False, low=False)
    turned = 2 * len(form.rope_pairs)
    made = {"decoupled": "kv_a", "settled": "kv_a", "read key": "k_rope"}.get(kind, "k")

    def ratio(form):
        rows, queries = getattr(form, made)[-turned:], form.q[:, -turned:]
        if kind == "settled":
            rows = torch.cat([rows[0::2], rows[1::2]])
        return paired(size(rows, -1)) / paired(size(queries, (0, 2)))

    grow = torch.ones(len(getattr(form, made)), dtype=torch.float64)
    grow[-turned:] = 1000
    shrink = torch.ones(form.q.shape[1], dtype=torch.float64)
    shrink[-turned:] = 1e-3
    changed = {made: getattr(form, made) * grow[:, None], "q": form.q * shrink[:, None]}
    if kind == "mfa-kr":
        eye = torch.eye(form.head_dim).double()
        changed["reuse"] = (eye + form.reuse) / grow - eye
    if kind in ("read key", "settled"):
        changed["k_rope_bias"] = 1000 * form.k_rope_bias
    if kind == "settled":
        changed |= {"kv_a_bias": form.kv_a_bias * grow, "kv_b": form.kv_b / grow}
    far = replace(form, **changed)
    assert error(outputs(far), outputs(form)) < 1e-9
    assert ratio(far).min() > 1e4
    # The latent's own scale follows, for a key that is read from it; values read a settled one too.
    low, high = (0.2, 5) if kind in ("read key", "settled") else (0.999, 1.001)
    assert ratio(far.balanced()).min() > low and ratio(far.balanced()).max() < high


def test_channels_without_use_stay():
    made, read = torch.tensor([4.0, 0.0, 3.0]), torch.tensor([1.0, 2.0, 0.0])
    assert evening(made, read).tolist() == [0.5, 1.0, 1.0]
    # Rounding has a size, and no meaning: to blow it up would shrink what is on the other side.
    made, read = torch.tensor([4.0, 1e-8, 3.0]), torch.tensor([1.0, 2.0, 1e-9])
    assert evening(made, read).tolist() == [0.5, 1.0, 1.0]
    assert evening(torch.zeros(2, 0), torch.zeros(2, 0)).shape == (2, 0)
    assert paired(torch.tensor([3.0, 1.0, 4.0, 1.0])).tolist() == pytest.approx(
        [12.5**0.5, 1.0, 12.5**0.5, 1.0]
    )
    assert paired(torch.zeros(2, 0)).shape == (2, 0)
