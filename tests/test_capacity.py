"""The capacity that a config promises is the rank that its model's weights have."""

import pytest
import sources
import tiny
import torch
from torch import nn
from transformers import LlamaConfig

from rehead.converters import inspection
from rehead.converters.inspection import offers, pays_from_tokens
from rehead.evaluation import (
    cache_bytes_of_config,
    capacity,
    kv_bytes_per_token,
    parameter_counts,
)
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


def times(factors: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Pairs of rows [2 m, hidden] times complex factors [2 m], real parts then imaginary parts."""
    (a, b), (c, d) = rows.chunk(2), factors.detach().double()[:, None].chunk(2)
    return torch.cat((a * c - b * d, a * d + b * c))


def shared(attention, config, rest, components):
    """Of every head, its queries' map and what they are multiplied with, both as wide as a head.

    Args:
        rest: position-free keys of each KV head, of the pairs that have any.
        components: [2 n, hidden], real parts then imaginary parts.
    """
    heads, width = config.num_attention_heads, config.head_dim
    index, resting = torch.tensor(config.layer_rope_pairs(0)), tiny.resting_pairs(config, 0)
    dims = [*resting, *(width // 2 + pair for pair in resting)]
    scored = []
    for h, query in enumerate(heads_of(attention.q_proj.weight, heads)):
        g = h // (heads // len(rest))
        key = torch.zeros(width, config.hidden_size, dtype=torch.float64)
        if len(rest[g]):
            real, imag = attention.q_phase[h].chunk(2)
            key[dims] = times(torch.cat((real, -imag)), rest[g])
        met = times(attention.k_synthesis[g], components)
        place = torch.cat((index, index + width // 2))
        scored.append((query, key.index_add(0, place, met)))
    return scored


def apart(rows: torch.Tensor) -> torch.Tensor:
    """Rows with the two parts of each pair side by side, as real parts then imaginary parts."""
    return torch.cat((rows[0::2], rows[1::2]))


def mla(model):
    attention, config = model.model.layers[0].self_attn, model.config
    rank, groups = attention.kv_lora_rank, config.num_key_value_heads
    if config.cache_codes is not None:  # less what only first tokens have
        rank -= (
            attention.stored.values.first
            if config.qk_rope_head_dim
            else attention.stored.keys.first
        )
    down = attention.kv_a_proj_with_mqa.weight.detach().double()
    up = heads_of(attention.kv_b_proj.weight[:, :rank], groups)
    if config.cache_codes is not None and config.qk_rope_head_dim:
        rest = torch.zeros(0, config.hidden_size, dtype=torch.float64)
        return shared(attention, config, [rest] * groups, apart(down[: attention.qk_rope_head_dim]))
    keys = [part[: attention.nope_head_dim] @ down[:rank] for part in up]
    if config.rope_on_read and not attention.qk_rope_head_dim:
        queries = heads_of(attention.q_proj.weight, config.num_attention_heads)
        return [(q, keys[h // (len(queries) // groups)]) for h, q in enumerate(queries)]
    tail = down[rank:]
    if config.rope_on_read:
        tail = apart(down[rank - attention.qk_rope_head_dim :])
    return shared(attention, config, keys, tail)


def mfa(model):
    attention, config = model.model.layers[0].self_attn, model.config
    key, heads = attention.k_proj.weight.detach().double(), config.num_attention_heads
    if attention.mfa_head_dim < config.head_dim:
        return [(query, key) for query in heads_of(attention.q_proj.weight, heads)]
    up = heads_of(attention.k_b_proj.weight, config.num_key_value_heads)
    free, tail = key[: attention.free], key[attention.free :]
    tail = apart(tail) if config.key_reuse else tail
    return shared(attention, config, [part @ free for part in up], tail)


TURNED = dict(
    qk_rope_head_dim=12,
    rope_pairs=[[0, 1, 1, 2, 3, 3]] * 2,
    cache_codes=[[[6, 0, 0, 2, 0, 0, 2], [2, 1, 1, 1, 0, 1, 0]]] * 2,
)
MODELS = {
    "gqa": (lambda: tiny.source(), gqa, (8, 16)),
    "decoupled": (lambda: tiny.mla(), mla, (8, 18)),
    "on_read": (lambda: tiny.mla(form="on_read"), mla, (8, 12)),
    "rope_read": (lambda: tiny.mla(form="rope_read"), mla, (8, 12)),
    "turned keys": (lambda: tiny.mla(**TURNED), mla, (8, 12)),
    "turned keys of some frequencies": (
        lambda: tiny.mla(**TURNED | dict(rope_pairs=[[0, 1, 1, 2, 0, 2]] * 2)),
        mla,
        (6, 12),
    ),
    "whole keys, coded": (
        lambda: tiny.mla(
            form="on_read",
            cache_codes=[[[3, 0, 0, 2, 1, 0, 2], [0] * 7]] * 2,
        ),
        mla,
        (8, 10),
    ),
    "narrow latent": (lambda: tiny.mla(form="on_read", kv_lora_rank=5), mla, (5, 5)),
    "mfa": (lambda: tiny.mfa(), mfa, (8, 11)),
    "mfa_kr": (lambda: tiny.mfa(form="mfa_kr"), mfa, (8, 11)),
    "mfa_rows": (lambda: tiny.mfa(form="mfa_rows"), mfa, (7, 7)),
    "mfa_kr_rows": (lambda: tiny.mfa(form="mfa_kr_rows"), mfa, (7, 7)),
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


def test_queries_of_a_low_rank_bound_a_heads_rank():
    assert capacity(tiny.mla(q_lora_rank=7).config).frh == 7
    model = tiny.mfa(share_q_dim=6, share_q_dim_per_layer=[0, 6])
    assert capacity(model.config).frh == (8 + 6) / 2
    attention = model.model.layers[1].self_attn
    up, down = (x.weight.detach().double() for x in (attention.q_b_proj, attention.q_a_proj))
    assert {int(torch.linalg.matrix_rank(head)) for head in heads_of(up @ down, 4)} == {6}


@pytest.mark.parametrize("name", MODELS)
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
def test_the_cache_of_every_family_is_measured_without_weights(family):
    config_class, model_class, given = sources.FAMILIES[family]
    model = model_class(config_class(**given)).eval()
    assert cache_bytes_of_config(model.config) == kv_bytes_per_token(model) > 0


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


def test_a_conversion_pays_from_the_context_on_at_which_it_takes_less_memory():
    kv_bytes = {"source": 100, "converted": 40}
    assert pays_from_tokens(1000, 1000, kv_bytes, 2) == 0
    tokens = pays_from_tokens(1000, 1100, kv_bytes, 2)
    for count, smaller in ((tokens, True), (tokens - 1, False)):
        assert (1100 * 2 + 40 * count <= 1000 * 2 + 100 * count) == smaller
    assert pays_from_tokens(1000, 1100, {"source": 40, "converted": 40}, 2) is None
    assert pays_from_tokens(1000, 900, {"source": 40, "converted": 40}, 2) == 0
    # A cache that is larger, by what scales keys, takes more in the end.
    assert pays_from_tokens(1000, 900, {"source": 40, "converted": 41}, 2) is None


def test_what_is_offered_says_when_it_pays_and_what_is_exact():
    """Half of a multi-head model's cache is its layers' inputs: exact, with no weight added."""
    config = LlamaConfig(**tiny.BASE | dict(num_key_value_heads=4, dtype="bfloat16"))
    count = inspection.attention_parameters
    own = count(config)
    found = {
        (offer.form, offer.rope, offer.kv_budget): (offer, count(offer.config))
        for offer in offers(config, [1.0, 0.5, 0.25])
        if offer.config is not None and offer.kv_bits == "16"
    }
    assert {key for key, (offer, _) in found.items() if offer.exact} == {
        ("gqa", "decoupled", 1.0),
        ("mla", "decoupled", 1.0),
        ("mla", "on-read", 0.5),
        ("mfa", "decoupled", 1.0),
        ("mfa-kr", "decoupled", 1.0),
    }
    # Four heads' values and keys have a bias, and so has the output.
    assert found["mla", "on-read", 0.5][1] - own in (0, 2 * 2 * 32 + 2 * 32)
    assert found["mla", "on-read", 0.25][1] < own
