"""What holds for every form, whatever the shapes, heads, budget, dtype and kind of RoPE.

`REHEAD_EXAMPLES` is how many layers are drawn (`make nightly`: 2,000), and a twentieth of it how
many whole conversions.
"""

import os
import random
import shutil
from dataclasses import dataclass

import folders
import layers
import pytest
import tiny
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from rehead.converters import InputError, LayerReport, Recipe, convert
from rehead.converters.activations import Activations
from rehead.converters.convert import converted_config
from rehead.converters.healing import output_error, reader_in
from rehead.converters.maps import AttentionMaps, attention
from rehead.converters.targets import TARGETS, target_of
from rehead.evaluation import kv_bytes_per_token

EXAMPLES = int(os.environ.get("REHEAD_EXAMPLES", "200"))
FORMS = {form: dict(form=form) for form in TARGETS} | {"on read": dict(form="mla", rope="on-read")}
ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
TOKENS = 12


def drawn(examples):
    return settings(
        max_examples=max(1, examples),
        deadline=None,
        derandomize=EXAMPLES <= 200,  # CI draws the same examples every time
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )


def rope_parameters(kind, half):
    found = {"rope_type": kind, "rope_theta": 100.0, "factor": 2.0}
    if kind in ("yarn", "llama3", "longrope"):
        found["original_max_position_embeddings"] = 64
    if kind == "llama3":
        found |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "longrope":
        found |= {
            "short_factor": [1 + 0.1 * i for i in range(half)],
            "long_factor": [2 + 0.5 * i for i in range(half)],
        }
    return {k: v for k, v in found.items() if kind != "default" or k != "factor"}


@st.composite
def models(draw):
    """(family, fields of its config): up to 6 query heads of up to 8 dims."""
    groups, repeats, half = (draw(st.integers(1, most)) for most in (3, 2, 4))
    hidden = groups * repeats * draw(st.integers(1, 6))
    # transformers divides by head_dim - 2 there.
    rope = draw(st.sampled_from(ROPES if half > 1 else [r for r in ROPES if r != "dynamic"]))
    return draw(st.sampled_from(sorted(tiny.SOURCES))), dict(
        num_attention_heads=groups * repeats,
        num_key_value_heads=groups,
        head_dim=2 * half,
        hidden_size=hidden,
        intermediate_size=8,
        num_hidden_layers=1,
        rope_parameters=rope_parameters(rope, half),
        tie_word_embeddings=draw(st.booleans()),
    )


BUDGETS = st.one_of(st.just(1.0), st.floats(0.05, 1.0))


@dataclass
class Drawn:
    """One attention layer, what it sees, and the form that it was made into."""

    target: object
    recipe: Recipe
    maps: AttentionMaps
    seen: Activations
    form: object
    dims: object
    factor: float


def layer_of(model, asked, budget, seed, bias):
    """The layer and its form.

    Raises:
        InputError: there is no such form of it.
    """
    family, fields = model
    config = tiny.SOURCES[family][0](**tiny.BASE | fields)
    recipe = Recipe(
        **{"source": "m", "rope": "decoupled", "calibration": "", "samples": 1, "heal": 0}
        | {"kv_budget": budget, "seed": seed}
        | asked
    )
    target = target_of(config, recipe)
    rotary = LlamaRotaryEmbedding(config)
    factor = rotary.attention_scaling**2
    drawn = layers.maps(
        config.num_attention_heads,
        config.num_key_value_heads,
        width=config.head_dim,
        v_dim=config.head_dim,
        hidden=config.hidden_size,
        bias=bias,
        seed=seed,
    )
    maps = AttentionMaps(
        **vars(drawn)
        | {"inv_freq": rotary.inv_freq.double(), "scaling": config.head_dim**-0.5 * factor}
    )
    x = layers.inputs(5, TOKENS, config.hidden_size, seed=seed + 1)
    seen = Activations(x, attention(maps.to(torch.float32), x), torch.ones(x.shape[:2]))
    generator = torch.Generator().manual_seed(seed)
    moments = target.moments(maps, x, generator)
    dims = target.fixed[0] if target.fixed else target.dims(target.width, target.splits[0])
    form = target.builder(maps, moments)(dims)
    form = target.finish(form, x, output_error(form, seen).relative, generator)
    form = target.settled(form, x)
    return Drawn(target, recipe, maps, seen, form, dims, factor)


LAYERS = dict(
    model=models(),
    form=st.sampled_from(sorted(FORMS)),
    budget=BUDGETS,
    seed=st.integers(0, 2**20),
    bias=st.booleans(),
)


@drawn(EXAMPLES)
@given(**LAYERS)
@torch.no_grad()
def test_every_layer_keeps_the_invariants(model, form, budget, seed, bias):
    try:
        layer = layer_of(model, FORMS[form], budget, seed, bias)
    except InputError as error:
        event(f"{form}: refused")
        assert "\n" not in str(error)
        assert budget < 1 or form in ("mfa", "mfa-kr"), error  # all of it is always to be had
        return
    event(f"{form}: made")
    target, made = layer.target, layer.form
    assert layer.dims.width <= budget * target.source + 1e-9
    assert all(tensor.isfinite().all() for tensor in made.tensors().values())

    # The same again, to the last bit.
    again = layer_of(model, FORMS[form], budget, seed, bias).form
    assert all(torch.equal(a, again.tensors()[name]) for name, a in made.tensors().items())

    # The class that its config makes takes its weights, all of them, and computes its maps.
    report = LayerReport(0, target.named(made, layer.dims), getattr(made, "rope_pairs", ()))
    config = converted_config(target, layer.recipe, [report], made.biases(), torch.float32)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    module = built.model.layers[0].self_attn
    state = {name: tensor.float() for name, tensor in made.state_dict(layer.factor).items()}
    if not any(name.endswith("bias") for name in module.state_dict()):
        state = {name: t for name, t in state.items() if not name.endswith("bias") or bias}
    if set(state) != set(module.state_dict()):
        # A stock class has biases where its family has, which random maps do not ask.
        assert form in ("gqa", "mqa")
        event("gqa: biases of another family")
        return
    module.load_state_dict(state)
    x = layer.seen.x
    rope = built.model.rotary_emb(x, torch.arange(TOKENS)[None])
    found = module(hidden_states=x, position_embeddings=rope, attention_mask=None)[0]
    meant = attention(made.expand().to(torch.float32), x)
    assert layers.error(found, meant) < 1e-4
    assert layers.error(attention(reader_in(made, torch.float32), x), meant) < 1e-4

    # Nothing is lost where nothing is left out, on text that was never seen.
    heads = target.kv_heads
    exact = layer.dims.width >= (target.source if form in ("gqa", "mqa") else target.most)
    if exact and not (form == "mqa" and heads > 1):
        event(f"{form}: exact")
        unseen = layers.inputs(2, TOKENS, target.config.hidden_size, seed=seed + 2).double()
        assert layers.error(attention(made.expand(), unseen), attention(layer.maps, unseen)) < 1e-5


def test_the_tolerances_can_fail():
    """Two heads swapped, and a form that leaves something out."""
    fields = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_size=32)
    fields |= dict(num_hidden_layers=1, rope_parameters=rope_parameters("default", 4))
    whole = layer_of(("llama", fields), FORMS["mla"], 1.0, 0, False)
    x = whole.seen.x.double()
    right = attention(whole.maps, x)
    assert layers.error(attention(whole.form.expand(), x), right) < 1e-4
    swapped = AttentionMaps(**vars(whole.maps) | {"o": whole.maps.o.flip(1)})
    assert layers.error(attention(swapped, x), right) > 0.1
    half = layer_of(("llama", fields), FORMS["mla"], 0.5, 0, False)
    assert layers.error(attention(half.form.expand(), x), right) > 0.01


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(0)
    path.write_text("".join(draw.choices("abcdefgh ", k=300)))
    return path


@drawn(EXAMPLES // 20)
@given(
    model=models(),
    form=st.sampled_from(sorted(FORMS)),
    budget=BUDGETS,
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    dtype=st.sampled_from([None, None, "float32", "bfloat16", "float16"]),
    heal=st.integers(0, 2),
    uniform=st.booleans(),
)
def test_every_conversion_is_whole_or_leaves_nothing(
    model, form, budget, stored, dtype, heal, uniform, text, tmp_path
):
    """And loads, caches what it says, and gives numbers."""
    family, fields = model
    for item in tmp_path.iterdir():
        shutil.rmtree(item)
    source = tiny.source(family, **folders.MODEL_FIELDS | fields).to(stored)
    folders.save(tmp_path / "source", source)
    asked = dict(FORMS[form])
    options = dict(to=asked.pop("form"), **asked, calibration=str(text), samples=2)
    try:
        done = convert(
            str(tmp_path / "source"),
            output=tmp_path / "out",
            kv_budget=budget,
            heal=heal,
            dtype=dtype,
            uniform_rank=uniform,
            **options,
        )
    except InputError as error:
        assert "\n" not in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
        return
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert done.kv_budget <= budget + 1e-9
    assert all(layer.error >= 0 for layer in done.layers)  # not a number is not
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    with torch.no_grad():
        assert found.float()(torch.arange(20)[None]).logits.isfinite().all()
