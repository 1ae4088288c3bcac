"""The transform code of a layer's keys and values, and how its bits are dealt out."""

import itertools
import random
import re
from dataclasses import replace

import folders
import layers
import pytest
import sources
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import error
from transformers import AutoModelForCausalLM

from rehead.converters import InputError, coding, convert, plan
from rehead.converters.calibration import in_precision
from rehead.converters.coded import CodedDims, JointTransform, TurnedTransform
from rehead.converters.coding import Channels, Dealt, deal
from rehead.converters.fisher import moments_of
from rehead.converters.maps import attention, reference_attention
from rehead.converters.moments import CodingTokens
from rehead.evaluation import kv_bytes_per_token
from rehead.modeling.coding import BITS, BYTES, Code

SHAPES = {
    "grouped": {},
    "grouped, biases": dict(bias=True),
    "a head each": dict(groups=4, hidden=48),
    "cache wider than the input": dict(groups=4, hidden=24, bias=True),
    "one key head": dict(groups=1, bias=True),
}


def tokens_of(maps, x, seed=3):
    """Tokens with inputs x, and gradients that are like nothing else."""
    generator = torch.Generator().manual_seed(seed)
    width = maps.k[..., 0].numel() + maps.v[..., 0].numel()
    draw = torch.randn(x[..., 0].numel(), width, generator=generator, dtype=torch.float64)
    gradients = draw * torch.logspace(1, -1, width, dtype=torch.float64)
    gradients = gradients @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    positions = torch.arange(x.shape[1], dtype=torch.float64).repeat(len(x))
    return CodingTokens(x.flatten(0, 1).double(), gradients, positions)


def layer(shape, kind, **fields):
    """(maps, inputs, transform, tokens) of one layer."""
    fields = SHAPES[shape] | fields
    maps = layers.maps(**fields)
    if kind == "position-free":
        maps = replace(maps, inv_freq=torch.zeros_like(maps.inv_freq))
    x = layers.inputs(6, 40, fields.get("hidden", layers.HIDDEN), dtype=torch.float64)
    seen = tokens_of(maps, x)
    moments = in_precision(moments_of(seen), torch.float64)
    transform = TurnedTransform.of if kind == "turned" else JointTransform
    return maps, x, transform(maps, moments), seen


# Bytes whose channels all have so many bits.
KIND_OF = {8: 0, 4: 3, 2: 5}


def dims_of(transform, seen, kind, share=1.0, bits=8, exact=4):
    """The channels of each code that matter most, all with so many bits."""
    codes = []
    for channels in transform.channels(seen):
        count = int(share * len(channels.left) * channels.unit) // 8 * 8
        each = BYTES[KIND_OF[bits]]
        first = channels.left[:, -1].argsort(descending=True)[: count // channels.unit]
        order = (first[:, None] * channels.unit + torch.arange(channels.unit)).flatten()
        steps = channels.steps[first, BITS.index(bits)].repeat_interleave(channels.unit)
        of_none = min(channels.first, len(channels.left) * channels.unit - count)
        counts = [0] * len(BYTES) + [of_none]
        counts[KIND_OF[bits]] = count // len(each)
        codes.append(Dealt(Code(tuple(counts)), tuple(order.tolist()), tuple(steps.tolist())))
    return CodedDims(codes[0], codes[1] if kind == "turned" else Dealt(), exact, kind == "turned")


KINDS = ["turned", "whole keys", "position-free"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_channels_are_the_source(shape, kind):
    """Before they are rounded; with a channel fewer they are not."""
    maps, x, transform, seen = layer(shape, kind)
    dims = dims_of(transform, seen, kind)
    everything = [len(c.left) * c.unit for c in transform.channels(seen)]
    assert [Code(counts).channels for counts in dims.codes][: len(everything)] == everything
    meant = reference_attention(maps, x[0])
    whole = reference_attention(transform.build(dims).expand(), x[0])
    assert error(whole, meant) < 1e-6
    fewer = transform.build(dims_of(transform, seen, kind, share=0.8))
    assert error(reference_attention(fewer.expand(), x[0]), meant) > 1e-4


@pytest.mark.parametrize("norm", [None, "head", "all"])
@pytest.mark.parametrize("kind", ["turned", "whole keys"])
def test_coding_costs_what_its_bits_say(kind, norm):
    """Near the source with 8 bits, further with 4, far with 2; and the first tokens are exact."""
    maps, x, transform, seen = layer("grouped", kind, norm=norm)
    meant = attention(maps, x)
    off = {}
    for bits in (8, 4, 2):
        form = transform.build(dims_of(transform, seen, kind, bits=bits))
        found = attention(form.reader(), x)
        off[bits] = error(found[:, 8:], meant[:, 8:])
        assert error(found[:, :4], meant[:, :4]) < 1e-6
    assert 4 * off[8] < 2 * off[4] < off[2] and off[8] < 0.03
    bare = transform.build(dims_of(transform, seen, kind, bits=4, exact=0))
    assert error(attention(bare.reader(), x)[:, :4], meant[:, :4]) > 0.01


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_channels_are_uncorrelated_of_unit_size_and_weighed_apart(shape, kind):
    """What the Karhunen-Loeve transform under the importance is."""
    maps, _, transform, _ = layer(shape, kind)
    moments, keys = transform.moments, maps.k[..., 0].numel()
    own = slice(keys, None) if kind == "turned" else slice(None)
    factors = transform.values if kind == "turned" else transform.factors
    count = int((factors.energy > 1e-5 * factors.energy[0]).sum())
    down, up = factors.down[:count], factors.up[:, :count]
    eye = torch.eye(count, dtype=torch.float64)
    assert error(down @ moments.covariance @ down.T, eye) < 1e-4
    weight = up.T @ moments.importance[own, own] @ up
    assert error(weight, torch.diag(factors.energy[:count])) < 1e-4


def test_a_component_is_a_mix_of_one_frequency():
    maps, x, transform, _ = layer("a head each", "turned")
    components = transform.components
    half, groups = maps.qk_dim // 2, maps.kv_heads
    assert sorted(components.pairs) == sorted([*range(half)] * groups)
    keys = maps.k @ x[0].T  # [G, E, T]
    keys = torch.complex(keys[:, :half], keys[:, half:])
    for pair in range(half):
        mine = [i for i, p in enumerate(components.pairs) if p == pair]
        z = components.analysis[mine] @ keys[:, pair]
        made = components.synthesis[mine].mT @ z
        assert error(torch.view_as_real(made), torch.view_as_real(keys[:, pair])) < 1e-6
        # Of all components of its frequency, the first is worth most.
        assert mine == sorted(mine, key=lambda i: -components.energy[i])


def some_channels(count, generator, unit=1, tokens=64):
    """Channels of very different size, some with long tails."""
    shape = tokens, count * unit
    draw = torch.randn(*shape, generator=generator, dtype=torch.float64)
    sizes = torch.rand(count, generator=generator, dtype=torch.float64).pow(5)
    numbers = draw * draw.abs().pow(0.3) * sizes.repeat_interleave(unit)
    gradients = torch.randn(*shape, generator=generator).double()
    return Channels.measured((numbers, gradients), unit=unit)


def left_by(dealt, channels):
    """The error that a code leaves of its channels."""
    bits = torch.full((len(channels.left),), BITS.index(0))
    for place, index in enumerate(dealt.order):
        bits[index // channels.unit] = BITS.index(dealt.code.bits()[place])
    return float(channels.left.gather(1, bits[:, None]).sum())


def test_bits_are_dealt_where_they_take_away_most():
    """No code of one or two widths leaves less; hardly any two channels are better swapped."""
    channels = some_channels(64, torch.Generator().manual_seed(0))
    for size in (8, 16, 20, 24, 28, 32, 48):
        ((dealt,),) = deal([[channels]], size)
        assert dealt.code.bytes <= size
        left = left_by(dealt, channels)
        for widths in ((8,), (4,), (8, 4)):
            ((other,),) = deal([[channels]], size, widths)
            assert left <= left_by(other, channels)
        bits, swaps, better = dealt.code.bits(), 0, 0
        for one, other in itertools.combinations(range(len(bits)), 2):
            if bits[one] != bits[other]:
                order = list(dealt.order)
                order[one], order[other] = order[other], order[one]
                after = left_by(replace(dealt, order=tuple(order)), channels)
                assert after >= left * 0.98
                swaps, better = swaps + 1, better + (after < left * (1 - 1e-3))
        assert better <= 0.01 * swaps


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.5), st.sampled_from([coding.CODED, (8,), (4,)]))
def test_the_budget_is_kept_and_used(seed, share, allowed):
    generator = torch.Generator().manual_seed(seed)
    codes = [
        [some_channels(32, generator, 2), replace(some_channels(48, generator), first=16)]
        for _ in range(3)
    ]
    most = share * 2 * 3 * (64 + 48)
    found = deal(codes, most, allowed)
    pairs = [
        (dealt, channels)
        for row, channels_of_layer in zip(found, codes, strict=True)
        for dealt, channels in zip(row, channels_of_layer, strict=True)
    ]
    for dealt, channels in pairs:
        width = len(channels.left) * channels.unit
        assert 0 < len(dealt.order) == len(set(dealt.order)) == dealt.code.coded <= width
        assert {*dealt.code.bits()} <= {*allowed, 0}
        assert dealt.code.first == min(channels.first, width - len(dealt.order))
        if channels.unit == 2:  # the parts of a pair are alike, and lie side by side
            bits = dealt.code.bits()
            assert bits[::2] == bits[1::2] and dealt.steps[::2] == dealt.steps[1::2]
            assert [i + 1 for i in dealt.order[::2]] == [*dealt.order[1::2]]
    used = sum(dealt.code.bytes for dealt, _ in pairs)
    assert used <= most
    # What is left of it is less than whole bytes of every code of a layer, or all channels that
    # gain by it have as many bits as they may.
    every = [b in allowed for b in BITS]
    gaining = sum(
        channels.unit * int((channels.left[:, every].min(1).values < channels.left[:, -1]).sum())
        for _, channels in pairs
    )
    assert used > most - 40 or used >= gaining * max(allowed) // 8


def test_a_budget_below_a_channel_each_is_refused():
    channels = some_channels(8, torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"need \d+. Give a larger --kv-budget"):
        deal([[channels]] * 4, 3)


def test_tails_are_measured():
    """At 4 bits a channel with rare large numbers loses more than a normal one."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4000, generator=generator, dtype=torch.float64)
    rare = torch.where(torch.rand(4000, generator=generator) < 0.01, 10.0, 0.1) * plain
    numbers = torch.stack([plain / plain.std(), rare / rare.std()], 1)
    gradients = torch.randn(4000, 2, generator=generator, dtype=torch.float64)
    channels = Channels.measured((numbers, gradients))
    left = channels.left / channels.left[:, -1:] * coding.COHERENT
    assert left[1, BITS.index(4)] > 2 * left[0, BITS.index(4)]
    # A step's square over 12, and what is clamped, of a normal distribution.
    for bits, lost in ((8, 5.3e-4), (6, 3.3e-3), (4, 0.026), (3, 0.06), (2, 0.12)):
        assert left[0, BITS.index(bits)] == pytest.approx(lost, rel=0.2)


def test_first_channels_hold_what_tokens_have():
    """As many channels as tokens hold everything, and fewer hold what matters most."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.logspace(0, -2, 12, dtype=torch.float64)
    numbers = torch.randn(5, 12, generator=generator).double() / weights.sqrt()
    missed = []
    for count in range(1, 6):
        to, back = coding.first_channels(numbers, weights, count)
        held = numbers @ to.mT
        assert float(held.square().mean(0).max()) == pytest.approx(1, rel=1e-6)
        missed.append(float(((held @ back.mT - numbers) * weights).square().sum()))
    assert missed[-1] < 1e-18 * missed[0] and missed == sorted(missed, reverse=True)
    alike, even = coding.first_channels(numbers, torch.ones(12).double(), 1)
    twin = float(((numbers @ alike.mT @ even.mT - numbers) * weights).square().sum())
    assert missed[0] < 0.8 * twin
    to, _ = coding.first_channels(numbers * 1e-9, weights, 5)  # what is next to nothing stays small
    assert to.abs().max() <= 1 / coding.SMALLEST


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_first_tokens_have_what_is_left_out_of_others(shape, kind):
    """First tokens have whole values where half of the channels have bits; the twin has not."""
    maps, x, transform, seen = layer(shape, kind)
    first = replace(seen, **{name: part[:4] for name, part in vars(seen).items()})
    whole = replace(transform, moments=replace(transform.moments, first=first))
    meant = attention(maps, x)[0, :1]  # a first token reads none but its own value
    off = []
    for some in (whole, transform):
        dims = dims_of(some, seen, kind, share=0.5)
        assert (dims.values if kind == "turned" else dims.keys).code.first == (
            4 if some is whole else 0
        )
        form = some.build(dims)
        assert form.cache_width == sum(Code(counts).channels for counts in dims.codes)
        off.append(error(attention(form.reader(), x)[0, :1], meant))
    assert off[0] < 1e-6 and off[1] > 1e-3


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(words(0, 1200))
    return path


CODED = dict(to="mla", kv_bits="auto", heal=0, kv_budget=0.25)
WORDS = ["the", "a", "of", "tree", "river", "house", "runs", "sees", "blue", "small", "and"]


def words(seed, count):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


# Of the calibration text's kind, but not of it.
IDS = torch.tensor(folders.tokenizer()(words(1, 40)).input_ids)[:100].view(2, 50)


WITHOUT_ROPE = [case for case in sources.CASES if sources.CASES[case][0] in ("gpt2", "opt")]


@pytest.mark.parametrize("case", WITHOUT_ROPE)
def test_nothing_is_rotated_on_read_without_rope(case, tmp_path, text):
    folders.save(tmp_path / "source", sources.model(case))
    options = CODED | dict(rope="on-read", calibration=str(text))
    with pytest.raises(InputError, match=r"has no RoPE, .* Leave out --rope on-read"):
        convert(str(tmp_path / "source"), output=tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("case", "rope"),
    [
        (case, rope)
        for case in sources.CASES
        for rope in (["decoupled"] if case in WITHOUT_ROPE else ["decoupled", "on-read"])
    ],
)
@torch.no_grad()
def test_every_family_is_coded(case, rope, tmp_path, text):
    """The budget is kept, the cache holds it, and more of it is nearer to the source."""
    model = folders.save(tmp_path / "source", sources.model(case))
    logits, off = model(IDS, use_cache=False).logits, {}
    for budget in (0.5, 0.15):
        options = CODED | dict(rope=rope, kv_budget=budget, calibration=str(text))
        out = tmp_path / f"{budget}"
        done = convert(str(tmp_path / "source"), output=out, **options)
        assert done.kv_budget <= budget
        coded = AutoModelForCausalLM.from_pretrained(out).eval()
        scale = model.dtype.itemsize
        assert kv_bytes_per_token(coded) == done.kv_bytes_per_token["converted"]
        assert (
            done.kv_bytes_per_token["converted"]
            <= budget * (done.kv_bytes_per_token["source"] * 2 / scale)
            + coded.config.key_scales * (scale - 2) * coded.config.num_hidden_layers
        )
        off[budget] = error(coded(IDS, use_cache=False).logits, logits)
        whole = coded.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(coded.generate(IDS, max_new_tokens=6, do_sample=False), whole)
    assert off[0.5] < off[0.15]
    assert off[0.5] < 0.25


def divergence(model, other):
    """The mean KL divergence of the other's predictions from the model's, on held-out text."""
    wanted, found = (m(IDS, use_cache=False).logits.log_softmax(-1) for m in (model, other))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@torch.no_grad()
def test_bits_go_by_importance(tmp_path, text, monkeypatch):
    """Twins in as many bytes are worse: other channels' bits, and equal bits for all."""
    model = folders.save(tmp_path / "source")
    off = {}

    def coded(name, bits):
        options = CODED | dict(kv_bits=bits, kv_budget=0.2, calibration=str(text))
        convert(str(tmp_path / "source"), output=tmp_path / name, **options)
        made = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        off[name] = divergence(model, made)
        return made.config.cache_codes

    coded("auto", "auto")
    for bits in ("8", "4"):
        codes = [Code(tuple(part)) for row in coded(bits, bits) for part in row]
        assert {b for code in codes for b in code.bits()} <= {int(bits), 0}
    measured = Channels.measured

    def mistaken(tokens, **options):
        right = measured(tokens, **options)
        return replace(right, left=right.left.flip(0))

    monkeypatch.setattr(Channels, "measured", mistaken)
    coded("mistaken", "auto")
    assert off["auto"] < min(off["8"], off["mistaken"])


def test_a_plan_has_the_bytes_of_the_conversion(tmp_path, text):
    folders.save(tmp_path / "source")
    options = CODED | dict(calibration=str(text))
    planned = plan(str(tmp_path / "source"), **options)
    done = convert(str(tmp_path / "source"), output=tmp_path / "out", **options)
    assert planned.kv_bytes_per_token == done.kv_bytes_per_token
    assert planned.attention_parameters["converted"] == pytest.approx(
        done.attention_parameters["converted"], rel=0.05
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(to="mfa"), "--kv-bits auto means nothing to mfa. It belongs to mla."),
        (dict(kv_lora_rank=8), "--kv-lora-rank asks for dims of 16-bit numbers"),
        (dict(native=True), "--native asks for dims of 16-bit numbers"),
        (dict(kv_bits=3), "--kv-bits 3 is unknown. Use auto, 16, 8, 4."),
        (dict(kv_budget="0.1%"), "Give a larger"),
    ],
)
def test_what_cannot_be_coded_is_refused_in_one_line(options, line, tmp_path, text):
    folders.save(tmp_path / "source")
    with pytest.raises(InputError, match=re.escape(line)) as told:
        convert(
            str(tmp_path / "source"),
            output=tmp_path / "out",
            **CODED | dict(calibration=str(text)) | options,
        )
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
