"""The capacity that a config promises is the rank that its model's weights have."""

import pytest
import sources
import tiny
import torch
from torch import nn

from rehead.evaluation import capacity, parameter_counts
from rehead.modeling import CLASSES


def ranks(scored: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int]:
    """The rank of a head's bilinear form, and of all that keys are read from.

    Args:
        scored: for each head, its queries' and its keys' map [width, hidden].
    """
    keys = torch.cat([key for _, key in scored])
    each = {int(torch.linalg.matrix_rank(query.T @ key)) for query, key in scored}
    assert len(each) == 1
    return each.pop(), int(torch.linalg.matrix_rank(keys))


def heads_of(weight: torch.Tensor, count: int) -> list[torch.Tensor]:
    return list(weight.detach().double().unflatten(0, (count, -1)))


def gqa(model):
    attention, config = model.model.layers[0].self_attn, model.config
    queries = heads_of(attention.q_proj.weight, config.num_attention_heads)
    keys = heads_of(attention.k_proj.weight, config.num_key_value_heads)
    return [(q, keys[h // (len(queries) // len(keys))]) for h, q in enumerate(queries)]


def mla(model):
    attention, config = model.model.layers[0].self_attn, model.config
    rank, nope = attention.kv_lora_rank, config.qk_nope_head_dim
    queries = heads_of(attention.q_proj.weight, config.num_attention_heads)
    down = attention.kv_a_proj_with_mqa.weight.detach().double()
    up = heads_of(attention.kv_b_proj.weight, config.num_key_value_heads)
    rotated = down[rank:]
    if attention.reads_rope:
        rotated = down[rank - attention.qk_rope_head_dim :]
    keys = [torch.cat([part[:nope] @ down[:rank], rotated]) for part in up]
    return [(q, keys[h // (len(queries) // len(keys))]) for h, q in enumerate(queries)]


def mfa(model):
    attention, config = model.model.layers[0].self_attn, model.config
    shared = attention.q_proj.weight.detach().double()
    key = attention.k_proj.weight.detach().double()
    heads = heads_of(attention.wq.weight, config.num_attention_heads)
    return [(head @ shared, key) for head in heads]


MODELS = {
    "gqa": (lambda: tiny.source(), gqa, (8, 16)),
    "decoupled": (lambda: tiny.mla(), mla, (16, 18)),
    "on_read": (lambda: tiny.mla(form="on_read"), mla, (8, 12)),
    "rope_read": (lambda: tiny.mla(form="rope_read"), mla, (12, 12)),
    "narrow latent": (lambda: tiny.mla(form="on_read", kv_lora_rank=5), mla, (5, 5)),
    "mfa": (lambda: tiny.mfa(), mfa, (9, 11)),
    "mfa_kr": (lambda: tiny.mfa(form="mfa_kr"), mfa, (9, 11)),
}


@pytest.mark.parametrize("name", MODELS)
def test_capacity_is_the_weights_rank(name):
    build, maps, expected = MODELS[name]
    model = build()
    frh, slsd = ranks(maps(model))
    found = capacity(model.config)
    assert (found.frh, found.slsd) == (frh, slsd) == expected
    assert found.ter == frh * model.config.num_attention_heads


def test_capacity_is_a_mean_over_layers():
    model = tiny.mla(form="on_read", kv_lora_rank=12, kv_lora_rank_per_layer=[12, 4])
    found = capacity(model.config)
    assert (found.frh, found.slsd) == ((8 + 4) / 2, (12 + 4) / 2)


@pytest.mark.parametrize("name", ["gqa", "decoupled", "mfa"])
def test_parameters_are_counted_without_weights(name):
    model = MODELS[name][0]()
    total, attention = parameter_counts(model.config)
    assert total == sum(p.numel() for p in model.parameters())
    assert attention == sum(
        p.numel() for layer in model.model.layers for p in layer.self_attn.parameters()
    )


def attention_parameters(model) -> int:
    """The parameters of the modules that are called attention."""
    found = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    return sum(p.numel() for module in found for p in module.parameters())


@pytest.mark.parametrize("family", sources.FAMILIES)
def test_the_attention_of_every_family_is_counted(family):
    config_class, model_class, given = sources.FAMILIES[family]
    models: list[nn.Module] = [model_class(config_class(**given))]
    models += [
        row[family][2](config)
        for row in CLASSES.values()
        if family in row
        for config in row[family][0].tiny()
    ]
    for model in models:
        total, attention = parameter_counts(model.config)
        assert 0 < attention == attention_parameters(model) < total
