"""Channels of one size on both sides: the same function, and a basis that training likes."""

from dataclasses import replace

import layers
import pytest
import torch
from layers import error

from rehead.converters.balance import evening, paired, size
from rehead.converters.latent import with_low_rank_queries
from rehead.converters.maps import reference_attention
from rehead.converters.mfa import MFADims, mfa_builder
from rehead.converters.mfa_kr import mfa_kr_builder
from rehead.converters.mla import to_mla
from rehead.converters.moments import latent_moments
from rehead.converters.plan import LayerDims

MLA = {
    "decoupled": LayerDims(14, 6),
    "no rotated key": LayerDims(14, 0),
    "whole keys": LayerDims(14, 0, on_read=True),
    "inputs": LayerDims(32, 0, on_read=True),
    "read key": LayerDims(14, 6, on_read=True),
    "stored": LayerDims(14, 6, on_read=True),
}
MFA = {
    "mfa": MFADims(12, 6),
    "mfa-kr": MFADims(12, 6, True),
    "unrotated": MFADims(12, 0),
    "mfa rows": MFADims(6, 4),
    "mfa-kr rows": MFADims(6, 4, True),
}
# What a layout has in a basis of its own: the rest is the source's.
OWN = {
    "decoupled": {"kv_a", "kv_a_bias", "kv_b", "synthesis"},
    "no rotated key": {"kv_a", "kv_b"},
    "whole keys": {"kv_a", "kv_b"},
    "inputs": set(),
    "read key": set(),  # it gets one when it is stored
    "stored": {"kv_a", "kv_a_bias", "kv_b", "synthesis", "k_rope_bias"},
    "mfa": {"k", "k_b", "k_bias", "v", "v_b", "synthesis"},
    "mfa-kr": {"k", "k_b", "k_bias", "v_b", "synthesis"},
    "unrotated": {"k", "k_b", "v", "v_b"},
    "mfa rows": {"q", "q_bias", "k", "k_bias", "v", "o"},
    "mfa-kr rows": {"q", "q_bias", "k", "k_bias", "o"},
}


def seeded():
    return torch.Generator().manual_seed(5)


def form_of(kind, bias, low):
    maps, x = layers.maps(bias=bias), layers.inputs()
    dims = MFA.get(kind) or MLA[kind]
    moments = latent_moments(maps, x, seeded(), getattr(dims, "on_read", False))
    if kind in MFA:
        form = (mfa_kr_builder if dims.key_reuse else mfa_builder)(maps, moments)(dims)
    else:
        form = to_mla(maps, moments, dims)
    form = with_low_rank_queries(form, x, seeded(), lambda _: 20, "") if low else form
    return form.stored(x) if kind == "stored" else form


def outputs(form):
    maps = form.expand()
    return torch.stack([reference_attention(maps, row) for row in layers.inputs(seed=3).double()])


def uneven(form):
    """The same layer, with channels 25 times as large as others that had their size."""

    def sizes(count):
        return torch.logspace(-0.7, 0.7, max(1, count), dtype=torch.float64)[:count]

    pairs = sizes(len(form.rope_pairs)).repeat(2)
    bias = lambda name, scale: (  # noqa: E731
        {} if getattr(form, name, None) is None else {name: getattr(form, name) * scale}
    )
    changed = {"synthesis": form.synthesis / pairs} if hasattr(form, "synthesis") else {}
    if hasattr(form, "kv_b") and hasattr(form, "kv_a"):
        rank = form.kv_b.shape[2]
        if hasattr(form, "k_rope_bias"):  # the latent's last dims are the rotated key
            tail = pairs.unflatten(0, (2, -1)).mT.flatten()
            scale = torch.cat([sizes(rank - len(pairs)), tail])
            changed |= bias("k_rope_bias", tail)
            cached = scale
        else:
            scale = sizes(rank)
            cached = torch.cat([scale, pairs])
        changed |= dict(kv_a=form.kv_a * cached[:, None], kv_b=form.kv_b / scale)
        changed |= bias("kv_a_bias", cached)
    if hasattr(form, "k"):
        scale = torch.cat([sizes(form.free), pairs])
        changed |= dict(k=form.k * scale[:, None]) | bias("k_bias", scale)
        value = sizes(form.head_dim) if hasattr(form, "v") else scale
        if hasattr(form, "v"):
            changed["v"] = form.v * value[:, None]
        if hasattr(form, "k_b"):
            changed |= dict(k_b=form.k_b / scale[: form.free], v_b=form.v_b / value)
        else:
            changed |= dict(q=form.q / scale[:, None], o=form.o / value)
            changed |= bias("q_bias", 1 / scale)
    if form.q_down is not None:
        low = sizes(len(form.q_down))
        q = changed.get("q", form.q)
        changed |= dict(q=q / low, q_down=form.q_down * low[:, None])
    return replace(form, **changed)


@pytest.mark.parametrize("low", [False, True], ids=["", "low-rank queries"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
@pytest.mark.parametrize("kind", [*MLA, *MFA])
def test_the_function_stays(kind, bias, low):
    form = form_of(kind, bias, low)
    if kind == "stored":  # balanced already
        form = uneven(form)
    found = form.balanced()
    assert error(outputs(found), outputs(form)) < 1e-10
    assert found.tensors().keys() == form.tensors().keys()
    own = OWN[kind] | ({"q", "q_down"} if low and kind != "read key" else set())
    for name, tensor in form.tensors().items():
        assert found.tensors()[name].shape == tensor.shape
        if tensor.any():
            assert torch.equal(found.tensors()[name], tensor) == (name not in own), name
    # Each map's new basis counts: one of them in the old one would be seen.
    for name in own & {"q", "kv_a", "k", "synthesis"}:
        old = replace(found, **{name: getattr(form, name)})
        assert error(outputs(old), outputs(form)) > 1e-3, name


def test_normalised_keys_and_pairs_at_rest_stay_too():
    """Keys that are normalised have no size of their own; what they are read from has."""
    form = form_of("whole keys", bias=True, low=True)
    still = replace(form, inv_freq=torch.cat([form.inv_freq[:2], 0 * form.inv_freq[2:]]))
    assert error(outputs(still.balanced()), outputs(still)) < 1e-10
    norms = 0.5 + torch.rand(2, 8, generator=seeded()).double()
    normed = replace(form, q_norm=norms[0], k_norm=norms[1], norm_eps=1e-6)
    assert error(outputs(normed.balanced()), outputs(normed)) < 1e-10
    # One of a head's dims made larger than the others would be another one after the norm.
    grown = torch.ones(16, 1).double()
    grown[0] = 2
    wrong = replace(normed.balanced(), kv_b=normed.balanced().kv_b * grown)
    assert error(outputs(wrong), outputs(normed)) > 1e-3


# Rows are evened by the sizes that low-rank queries have before they are evened themselves.
UNEVEN = [
    (kind, low)
    for kind in OWN
    for low in (False, True)
    if OWN[kind] and not (low and kind.endswith("rows"))
]


@pytest.mark.parametrize(("kind", "low"), UNEVEN)
def test_what_is_made_large_is_read_as_large(kind, low):
    """Channels that were made larger or smaller come to the sizes that they had."""
    form = form_of(kind, bias=True, low=low)
    far = uneven(form)
    assert error(outputs(far), outputs(form)) < 1e-9
    found, wanted = far.balanced(), form.balanced()
    own = OWN[kind] | ({"q", "q_down"} if low else set())
    if kind != "stored":  # there the key's dims are read as values too, and count in its latent
        for name in own:
            assert error(getattr(found, name), getattr(wanted, name)) < 1e-9, name
            assert error(getattr(far, name), getattr(wanted, name)) > 0.1, name
    if hasattr(form, "kv_a"):
        rank = form.kv_b.shape[2] - (2 * len(form.rope_pairs) if kind == "stored" else 0)
        made, read = size(found.kv_a[:rank], -1), size(found.kv_b[..., :rank], (0, 1))
    elif hasattr(form, "k_b"):
        made, read = size(found.k[: form.free], -1), size(found.k_b, (0, 1))
    else:
        made, read = (
            paired(size(found.k, -1)[form.free :]),
            paired(size(found.q, (0, 2))[form.free :]),
        )
    assert torch.allclose(made, read, rtol=1e-6)
    if hasattr(form, "v_b") and hasattr(form, "v"):
        assert torch.allclose(size(found.v, -1), size(found.v_b, (0, 1)), rtol=1e-6)
    if "synthesis" in own:
        # A rotated component is as large as the keys that it is part of.
        square = found.synthesis.square().unflatten(-1, (2, -1)).sum(1).mean(0)
        assert torch.allclose(square, torch.ones_like(square))
        before = far.synthesis.square().unflatten(-1, (2, -1)).sum(1).mean(0)
        assert before.max() > 100 * before.min()


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
