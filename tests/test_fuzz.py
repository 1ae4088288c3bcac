"""Configs and headers changed at random: one line or a plan, at once, and in little memory.

`REHEAD_FUZZ` is how many cases of each kind are run (`make nightly`: 10,000 in all).
"""

import copy
import itertools
import json
import os
import random
import shutil
import signal
from pathlib import Path

import folders
import pytest
import tiny
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from rehead.converters import InputError, convert
from rehead.converters.checkpoint import open_source
from rehead.converters.inspection import describe, offers

CASES = int(os.environ.get("REHEAD_FUZZ", "150"))
SECONDS = 5
MIB = 1024
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    derandomize=CASES <= 150,  # CI runs the same cases every time
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny model of one layer, and a text."""
    root = tmp_path_factory.mktemp("fuzz")
    folders.save(root / "tiny", tiny.source(num_hidden_layers=1, **folders.MODEL_FIELDS))
    draw = random.Random(0)
    (root / "text.txt").write_text("".join(draw.choices("abcdefgh ", k=300)))
    shutil.copytree(root / "tiny", root / "mutated")
    return root


@pytest.fixture(scope="module")
def memory():
    """At the end: no case has taken much."""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")

    def kib(key):
        return int(status.read_text().split(f"{key}:")[1].split()[0])

    before = kib("VmRSS")
    yield
    assert (kib("VmHWM") - before) >> 10 < MIB


class TooLong(BaseException):
    """Not an Exception, which the code at work may take for bad input."""


def told(place):
    """What becomes of the mutated folder: a line of refusal, or a plan. Anything else is raised."""

    def late(*_):
        raise TooLong(f"more than {SECONDS} s")

    folder, text = place / "mutated", place / "text.txt"
    # Of processor time, so that a busy machine is no hang.
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        config = open_source(folder).config
        describe(config)
        offers(config)
        options = dict(output=place / "out", calibration=str(text), samples=1, heal=0)
        done = convert(str(folder), to="mla", dry_run=True, **options)
        return f"a plan for {len(done.layers)} layers"
    except InputError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 2000
        return f"refused: {error}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


# What may stand anywhere in JSON, the numbers near every limit among it.
NUMBERS = st.one_of(
    st.integers(-3, 70),
    st.sampled_from([2**31, 2**63, -(2**63), 10**9, 10**30, 4096, 65536]),
    st.sampled_from([0.0, -0.0, 0.5, 1.5, -1.0, 1e-300, 1e300, float("inf"), float("nan")]),
)
WORDS = st.sampled_from(
    [
        *("", "llama", "qwen2", "mistral", "gpt2", "rehead_llama_mla", "yarn", "dynamic", "linear"),
        *("longrope", "llama3", "float16", "int8", "silu", "../x", "\0", "ü\n", "x" * 300),
    ]
)
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
FURTHER = [
    *("sliding_window", "use_sliding_window", "layer_types", "quantization_config", "auto_map"),
    *("dtype", "torch_dtype", "rope_scaling", "rope_theta", "partial_rotary_factor", "num_layers"),
    *("attention_bias", "num_experts", "text_config", "is_decoder", "attn_implementation"),
    *("tokenizer_file", "id2label", "num_labels", "output_attentions", "return_dict"),
]
ROPE = ["rope_type", "rope_theta", "factor", "short_factor", "long_factor", "low_freq_factor"]
ROPE += ["high_freq_factor", "original_max_position_embeddings", "attention_factor", "mscale"]
ROPE += ["beta_fast", "beta_slow", "partial_rotary_factor"]


@fuzzed
@given(data=st.data())
def test_any_config_is_refused_in_one_line_or_planned(data, place, memory):
    config = json.loads((place / "tiny" / "config.json").read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        inside = data.draw(st.booleans()) and isinstance(config.get("rope_parameters"), dict)
        part = config["rope_parameters"] if inside else config
        key = data.draw(st.sampled_from(ROPE if inside else sorted(config) + FURTHER))
        if data.draw(st.integers(0, 9)) == 0:
            part.pop(key, None)
        else:
            part[key] = data.draw(st.one_of(NUMBERS, JUNK))
    raw = bytearray(json.dumps(config).encode())
    if data.draw(st.integers(0, 9)) == 0:
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    target = place / "mutated" / "config.json"
    target.write_bytes(raw)
    try:
        event(told(place).partition(":")[0])
    finally:
        shutil.copy(place / "tiny" / "config.json", target)


@fuzzed
@given(data=st.data())
def test_any_header_is_refused_in_one_line_or_planned(data, place, memory):
    raw = (place / "tiny" / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    length = None
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(header)))
        how = data.draw(st.sampled_from(["field", "entry", "drop", "copy", "body", "length"]))
        if how == "field" and isinstance(header[name], dict):
            field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))
            kinds = st.sampled_from(["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "F4", "I64"])
            sizes = st.lists(NUMBERS, max_size=4)
            header[name][field] = data.draw({"dtype": kinds}.get(field, st.one_of(sizes, JUNK)))
        elif how == "entry":
            header[name] = data.draw(JUNK)
        elif how == "drop" and len(header) > 1:
            del header[name]
        elif how == "copy":
            header[data.draw(WORDS)] = copy.deepcopy(header[name])
        elif how == "body":
            body = body[: data.draw(st.integers(0, len(body)))]
        else:
            length = data.draw(st.one_of(st.integers(0, 2 * size), st.sampled_from([2**63, 2**25])))
    encoded = bytearray(json.dumps(header).encode())
    if data.draw(st.integers(0, 4)) == 0:
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    target = place / "mutated" / "model.safetensors"
    target.write_bytes(folders.safetensors_header(bytes(encoded), body, length))
    try:
        event(told(place).partition(":")[0])
    finally:
        shutil.copy(place / "tiny" / "model.safetensors", target)


def test_a_hang_and_a_fault_would_be_seen(place, monkeypatch):
    """And the folder as it is gives a plan."""
    assert told(place) == "a plan for 1 layers"
    monkeypatch.setitem(globals(), "SECONDS", 0.2)
    monkeypatch.setitem(globals(), "describe", lambda config: [0 for _ in itertools.count()])
    with pytest.raises(TooLong):
        told(place)
    monkeypatch.setitem(globals(), "describe", lambda config: [][0])
    with pytest.raises(IndexError):
        told(place)
