"""Quantised linear layers, as bitsandbytes and torchao put them in: what they compute counts.

Absorbed decoding multiplies with a weight instead of calling its layer, and a quantised layer's
weight is no matrix. The stand-ins hold codes, which would do as a matrix, and apply a scale.
"""

import copy

import pytest
import tiny
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from rehead.modeling.cached_decoding import cache_of
from rehead.modeling.latent_attention import LatentAttention

IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(0))
STEP = 1 / 512


class CodedLinear(nn.Linear):
    """A layer of another class, as bitsandbytes' are; its inputs are [B, tokens, features]."""

    def forward(self, x):
        if x.dim() != 3:
            raise ValueError(f"an input of {x.dim()} dimensions")
        return linear(x, self.weight * STEP, self.bias)


class Codes(torch.Tensor):
    """A weight of another class in torch's own layer, as torchao's are."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is linear:
            x, weight = (tensor.as_subclass(torch.Tensor) for tensor in args[:2])
            return linear(x, weight * STEP, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


def coded_layer(old: nn.Linear) -> nn.Linear:
    new = CodedLinear(old.in_features, old.out_features, bias=old.bias is not None)
    new.weight, new.bias = nn.Parameter((old.weight / STEP).round(), False), old.bias
    return new


def coded_weight(old: nn.Linear) -> nn.Linear:
    codes = (old.weight.detach() / STEP).round().as_subclass(Codes)
    new = copy.deepcopy(old)
    new.weight = nn.Parameter(codes, requires_grad=False)
    return new


def quantised(model: nn.Module, coded) -> nn.Module:
    """The model with its layers' linear parts quantised, as transformers' quantisers do it."""
    for layer in model.model.layers:
        for name, part in list(layer.named_modules()):
            if isinstance(part, nn.Linear):
                layer.set_submodule(name, coded(part))
    return model


MODELS = {
    **{form: lambda form=form: tiny.mla(form=form, **tiny.BIASES) for form in tiny.FORMS},
    **{form: lambda form=form: tiny.mfa(form=form, **tiny.MFA_BIASES) for form in tiny.MFA_FORMS},
}


@torch.no_grad()
def decoded(model) -> torch.Tensor:
    """The logits of the last token, read with a cache of all others."""
    cache = cache_of(model(IDS[:, :-1]))
    return model(IDS[:, -1:], **tiny.cached(model, cache)).logits[:, -1]


@pytest.mark.parametrize("coded", [coded_layer, coded_weight])
@pytest.mark.parametrize("form", MODELS)
@torch.no_grad()
def test_decoding_is_what_the_quantised_layers_compute(form, coded, monkeypatch):
    model = MODELS[form]()
    plain = model(IDS, use_cache=False).logits[:, -1]
    quantised(model, coded)
    want = model(IDS, use_cache=False).logits[:, -1]
    assert 1e-4 < tiny.error(want, plain) < 0.2  # it is quantised, and the same model
    assert tiny.error(decoded(model), want) < 1e-5
    if not form.endswith("rows"):  # the twin: the weight read as a matrix
        tiny.absorb(monkeypatch, LatentAttention, True)
        assert tiny.error(decoded(model), want) > 1e-2


@torch.no_grad()
def test_offloaded_layers_decode_alike(tmp_path):
    """device_map puts a layer on the disk: its weights are there only while a part of it runs."""
    model = tiny.mla(form="rope_read")
    model.save_pretrained(tmp_path / "in")
    parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places = {f"model.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "in",
        device_map=places | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "off",
    )
    assert found.model.layers[1].self_attn.kv_b_proj.weight.device.type == "meta"
    assert tiny.error(decoded(found.eval()), decoded(model)) < 1e-5
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "in", device_map="auto")
    assert torch.equal(decoded(whole.eval()).cpu(), decoded(model))
