"""How a budget is read, split and spent."""

import itertools
import math
from types import SimpleNamespace

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Qwen3Config

from rehead.converters.budget import Budget
from rehead.converters.errors import InputError
from rehead.converters.plan import LayerDims, parse_budget, spend, split_width
from rehead.converters.recipe import Recipe
from rehead.converters.targets import target_of


@pytest.mark.parametrize(
    ("given_as", "share"),
    [
        ("50%", 0.5),
        (" 12.5 % ", 0.125),
        ("0.5", 0.5),
        (0.25, 0.25),
        (1, 1.0),
        ("100%", 1.0),
        ("1e-1", 0.1),
    ],
)
def test_budgets_are_shares(given_as, share):
    assert parse_budget(given_as) == share


@pytest.mark.parametrize(
    ("given_as", "message"),
    [
        ("half", "--kv-budget half is no share. Give one such as 50% or 0.5."),
        ("", "is no share"),
        ("%", "is no share"),
        ("50%%", "is no share"),
        ("50", "--kv-budget 50 must be above 0% and at most 100%. Did you mean 50%?"),
        (50, "Did you mean 50%?"),
        ("101%", "must be above 0% and at most 100%."),
        ("0", "must be above 0%"),
        ("-5%", "must be above 0%"),
        ("nan", "must be above 0%"),
        ("inf", "must be above 0%"),
    ],
)
def test_what_is_no_share_is_refused_in_one_line(given_as, message):
    with pytest.raises(InputError) as caught:
        parse_budget(given_as)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 500), st.floats(0, 1), st.integers(0, 100), st.integers(1, 500))
@settings(max_examples=300)
def test_a_width_is_split_into_an_even_number_of_rotated_dims(width, share, pairs, most_rank):
    dims = split_width(width, share, 2 * pairs, most_rank)
    assert dims.qk_rope_head_dim % 2 == 0
    assert 0 <= dims.qk_rope_head_dim <= 2 * pairs
    assert 1 <= dims.kv_lora_rank <= most_rank
    assert dims.width <= width
    if width <= most_rank:
        assert dims.width == width
        if 2 <= 2 * round(share * width / 2) <= min(2 * pairs, width - 1):
            assert abs(dims.qk_rope_head_dim - share * width) <= 1


def test_splits_by_example():
    assert split_width(192, 0.25, 192, 384) == LayerDims(144, 48)
    assert split_width(192, 0.0, 0, 384) == LayerDims(192, 0)
    assert split_width(10, 0.9, 4, 384) == LayerDims(6, 4)
    assert split_width(3, 1.0, 64, 384) == LayerDims(1, 2)
    # What a latent cannot use is rotated, where there is something to rotate.
    assert split_width(40, 0.2, 32, 24) == LayerDims(24, 16)


def curve(sensitivity, decay, widths=(24, 40, 60)):
    return {width: sensitivity * math.exp(-decay * width) for width in widths}


sensitivities = st.tuples(st.floats(1e-3, 1e3), st.floats(0.01, 0.2))


@given(
    st.lists(sensitivities, min_size=1, max_size=12),
    st.integers(3, 20),
    st.integers(0, 80),
    st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_spending_keeps_to_the_budget(layers, least, more, share):
    most = least + more
    measured = [curve(*layer) for layer in layers]
    count = len(measured)
    total = count * least + round(share * count * more)
    widths = spend(measured, total, least, most)
    assert len(widths) == count
    assert sum(widths) <= total
    assert all(least <= width <= most for width in widths)
    # Nothing is left that would carry any layer a step further.
    grid = sorted({*range(least, most, 4), most})
    steps = [grid[grid.index(w) + 1] - w for w in widths if w < most]
    assert not steps or min(steps) > total - sum(widths)


def test_equal_layers_get_equal_widths():
    assert spend([curve(1, 0.05)] * 6, 6 * 40, 20, 120) == [40] * 6


def test_more_for_layers_that_need_more():
    loud, quiet = curve(10, 0.05), curve(0.1, 0.05)
    widths = spend([quiet, loud, quiet, loud], 4 * 40, 20, 120)
    assert widths[0] == widths[2] < 40 < widths[1] == widths[3]
    # An error that does not fall is given no more, however large it is.
    flat = {24: 50.0, 40: 50.0, 60: 50.0}
    assert spend([flat, curve(1, 0.05)], 80, 20, 120)[0] == 20


def test_a_budget_for_all_gives_all():
    assert spend([curve(1, 0.05)] * 3, 10_000, 20, 62) == [62] * 3
    assert spend([curve(1, 0.05)] * 3, 3 * 20, 20, 62) == [20] * 3


@given(st.lists(sensitivities, min_size=3, max_size=3), st.integers(3, 15))
@settings(max_examples=40, deadline=None)
def test_no_other_widths_lose_less(layers, steps):
    """Against every allocation on the grid, for errors that fall exponentially."""
    measured = [curve(*layer) for layer in layers]
    total = 3 * 20 + 4 * steps
    widths = spend(measured, total, 20, 40)

    def summed(allocation):
        return sum(a * math.exp(-b * w) for (a, b), w in zip(layers, allocation, strict=True))

    every = itertools.product(range(20, 41, 4), repeat=3)
    best = min(summed(allocation) for allocation in every if sum(allocation) <= total)
    assert summed(widths) <= best * (1 + 1e-6)


CONFIG = SimpleNamespace(
    model_type="llama",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    hidden_size=32,
    num_hidden_layers=3,
)


def budget(rope="decoupled", share=0.5, config=CONFIG, **fields):
    recipe = Recipe("m", "mla", rope, share, "default", 4, 0, 0, **fields)
    return Budget.of(config, recipe)


def test_a_share_is_a_mean_width():
    found = budget(share=0.5)
    assert (found.source, found.width, found.fixed) == (32, 16, None)
    assert (found.rotatable, found.rank) == (16, 32)
    assert (budget("on-read").rotatable, budget("on-read").width) == (16, 16)
    # A third in floats is a little less than a third.
    assert (
        budget(share=3 * 0.1, config=SimpleNamespace(**vars(CONFIG) | {"head_dim": 10})).width == 12
    )
    assert budget(config=SimpleNamespace(**vars(CONFIG) | {"head_dim": None})).source == 32


def test_the_whole_budget_keeps_everything():
    assert budget(share=1.0).fixed == [LayerDims(16, 16)] * 3
    assert budget("on-read", 1.0).fixed == [LayerDims(32, on_read=True)] * 3
    # More keys and values than inputs: the latent is exact at the inputs' width.
    small = SimpleNamespace(**vars(CONFIG) | {"hidden_size": 12})
    assert budget("on-read", 1.0, small).fixed == [LayerDims(12, on_read=True)] * 3
    assert budget("decoupled", 1.0, small).fixed == [LayerDims(12, 16)] * 3
    assert budget("on-read", 0.4, small).fixed == [LayerDims(12, on_read=True)] * 3
    assert budget("decoupled", 0.9, small).fixed == [LayerDims(12, 16)] * 3
    assert budget("decoupled", 0.8, small).fixed is None


def test_what_is_not_rotated_shares_the_latent_with_the_values():
    half = dict(model_type="phi", rope_parameters=dict(partial_rotary_factor=0.5))
    half = SimpleNamespace(**vars(CONFIG) | half)
    assert budget(share=1.0, config=half).fixed == [LayerDims(24, 8)] * 3
    assert budget("on-read", 1.0, half).fixed == [LayerDims(32, on_read=True)] * 3
    none = SimpleNamespace(**vars(CONFIG) | dict(model_type="gpt2"))
    assert budget(share=1.0, config=none).fixed == [LayerDims(32, 0)] * 3
    with pytest.raises(InputError, match="=10 must be even and at most 8, the rotated width of"):
        budget(config=half, qk_rope_head_dim=10)


def test_explicit_dims_override_the_budget():
    assert budget(kv_lora_rank=9, qk_rope_head_dim=6).fixed == [LayerDims(9, 6)] * 3
    assert budget(kv_lora_rank=9, qk_rope_head_dim=6).width == 15
    # One alone leaves the rest of the budget to the other.
    assert budget(kv_lora_rank=9).fixed == [LayerDims(9, 6)] * 3
    assert budget(kv_lora_rank=20).fixed == [LayerDims(20, 0)] * 3
    assert budget(qk_rope_head_dim=6).fixed == [LayerDims(10, 6)] * 3
    # On-read one says nothing of the other, which is measured.
    assert (budget("on-read", kv_lora_rank=9).fixed, budget("on-read", kv_lora_rank=9).width) == (
        None,
        9,
    )
    assert budget("on-read", qk_rope_head_dim=6).fixed is None
    both = budget("on-read", kv_lora_rank=9, qk_rope_head_dim=6)
    assert (both.fixed, both.width) == ([LayerDims(9, 6, on_read=True)] * 3, 9)
    assert budget(share=1.0, kv_lora_rank=4).fixed == [LayerDims(4, 16)] * 3


def test_what_scales_keys_is_of_the_budget():
    """A number for each of two KV heads, but for the whole cache, which it stands beside."""
    normed = Qwen3Config(**tiny.BASE)
    for options in ({}, dict(kv_lora_rank=8), dict(qk_rope_head_dim=6)):
        recipe = Recipe("", "mla", "decoupled", 0.5, "", 0, 0, 0, **options)
        target = target_of(normed, recipe)
        dims = target.fixed[0] if target.fixed else target.dims(target.width, 0.3)
        assert dims.scales == 2 and dims.width <= 16 == target.source // 2
    whole = target_of(normed, Recipe("", "mla", "decoupled", 1.0, "", 0, 0, 0))
    assert whole.fixed == [LayerDims(16, 16, scales=2)] * 2 and whole.exact
    plain = target_of(LlamaConfig(**tiny.BASE), Recipe("", "mla", "decoupled", 0.5, "", 0, 0, 0))
    assert plain.dims(16, 0.3).scales == 0


@pytest.mark.parametrize("width", [1, 3, 8, 15, 32])
def test_a_key_that_is_read_is_no_wider_than_the_latent(width):
    recipe = Recipe("", "mla", "on-read", 0.5, calibration="", samples=0, heal=0, seed=0)
    target = target_of(LlamaConfig(**tiny.BASE), recipe)
    for share in (*target.splits, 0.99):
        dims = target.dims(width, share)
        rotated = 2 * round(share * 16 / 2)
        assert dims.kv_lora_rank == width
        assert dims.qk_rope_head_dim == min(rotated, width // 2 * 2)
    assert target.dims(width, 1.0).qk_rope_head_dim == 0  # every key whole


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(qk_rope_head_dim=5), "qk_rope_head_dim=5 must be even and at most 16"),
        (dict(qk_rope_head_dim=18), "qk_rope_head_dim=18 must be even and at most 16"),
        (dict(rope="on-read", qk_rope_head_dim=18), "qk_rope_head_dim=18 must be even"),
        (dict(kv_lora_rank=33), "kv_lora_rank=33"),
        (dict(kv_lora_rank=27, qk_rope_head_dim=6), "kv_lora_rank=27 with qk_rope_head_dim=6.*26"),
        (dict(qk_rope_head_dim=16), "kv_lora_rank=0 with qk_rope_head_dim=16"),
        (dict(rope="on-read", kv_lora_rank=0), "kv_lora_rank=0"),
        # The rotated key is a part of the latent: its width neither counts nor is it another's.
        (
            dict(rope="on-read", kv_lora_rank=33, qk_rope_head_dim=6),
            "^kv_lora_rank=33 is not between 1 and 32",
        ),
        (
            dict(rope="on-read", kv_lora_rank=5, qk_rope_head_dim=6),
            "at most kv_lora_rank=5.*latent",
        ),
        (dict(share=0.05), "--kv-budget 5.00% leaves 1 of the 32 numbers.*Give a larger one"),
        (dict(rope="on-read", share=0.02), "--kv-budget 2.00% leaves 0 of the 32"),
    ],
)
def test_dims_that_do_not_fit_are_refused_in_one_line(fields, message):
    with pytest.raises(InputError, match=message) as caught:
        budget(**fields)
    assert "\n" not in str(caught.value)
