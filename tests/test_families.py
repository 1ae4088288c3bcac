"""Every family: read as transformers computes it, exact at the whole cache, sound below it."""

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import folders
import pytest
import sources
import tiny
import torch
from layers import error, inputs
from safetensors.torch import load_file, save_file
from tiny import positions_of, step_by_step
from transformers import AutoModel, AutoModelForCausalLM, StaticCache

from rehead.cli import inspect
from rehead.converters import InputError, convert, families, plan
from rehead.converters.checkpoint import open_source
from rehead.converters.families import FAMILIES, REFUSED, family_of
from rehead.converters.families import family as family_module
from rehead.converters.gqa import gqa_moments, to_gqa
from rehead.converters.inspection import offers
from rehead.converters.maps import AttentionMaps, reference_attention
from rehead.converters.stream import LayerStream
from rehead.evaluation import kv_bytes_per_token
from rehead.modeling import GQA_CLASSES, MFA_CLASSES, MLA_CLASSES, rope_slots, whole_keys
from rehead.modeling.converted_attention import ConvertedAttention

IDS = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :9] = 0
FORMS = {
    "mla": dict(to="mla"),
    "mla on read": dict(to="mla", rope="on-read"),
    "mfa": dict(to="mfa"),
    "mfa-kr": dict(to="mfa-kr"),
    "gqa": dict(to="gqa"),
}
NORMED = [family for family in FAMILIES if FAMILIES[family].qk_norm]
IMPOSSIBLE = [("gpt2", "mla on read"), ("opt", "mla on read")]  # without RoPE nothing is rotated


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["the", "a", "of", "tree", "river", "house", "runs", "sees", "blue", "small", "and"]
    path.write_text(" ".join(random.Random(0).choices(words, k=600)))
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """case -> (folder, model), made when first asked for."""
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case.replace(", ", "-").replace(" ", "-")) / "model"
            made[case] = folder, folders.save(folder, sources.model(case))
        return made[case]

    return get


def layer_of(model, layer):
    """A layer of the stock model and its attention."""
    family = family_of(model.config)
    module = model.get_submodule(f"{family.layers}.{layer}")
    return module, module.get_submodule(family.attention)


def rope_of(model, layer=1):
    """Frequencies and attention factor of a layer, which may be those of its kind."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return torch.zeros(0), 1.0
    kind = "".join(f"{kind}_" for kind in kinds_of(model, layer))
    return getattr(rotary, f"{kind}inv_freq"), float(getattr(rotary, f"{kind}attention_scaling"))


def kinds_of(model, layer=1):
    rotary = model.base_model.rotary_emb
    return [model.config.layer_types[layer]] if hasattr(rotary, "layer_types") else []


def read(model, layer=1) -> AttentionMaps:
    weights, size = layer_of(model, layer)[1].state_dict(), families.window(model.config, layer)
    return family_of(model.config).read(model.config, weights, *rope_of(model, layer), size)


@pytest.mark.parametrize("case", sources.NEW)
@torch.no_grad()
def test_the_maps_are_transformers_own_attention(case, monkeypatch):
    model = sources.model(case)
    family = FAMILIES[model.config.model_type]
    x = inputs(2, 40)
    future, window = torch.ones(40, 40).triu(1).bool(), families.window(model.config, 1)
    unseen = future if window is None else future | torch.ones(40, 40).tril(-window).bool()
    given = dict(attention_mask=torch.zeros(40, 40).masked_fill(unseen, -torch.inf)[None, None])
    if family.rotary != "none":
        rope = model.base_model.rotary_emb(x, torch.arange(40)[None], *kinds_of(model))
        given["position_embeddings"] = rope
    wanted = layer_of(model, 1)[1](x, **given)[0]
    maps = read(model)

    def distance(found):
        return error(torch.stack([reference_attention(found, row) for row in x.double()]), wanted)

    assert distance(maps) < 5e-6
    wrong = {"no scaling": replace(maps, scaling=1.0), "heads": replace(maps, q=maps.q.flip(0))}
    if family.rotary != "none":
        wrong["frequencies"] = replace(maps, inv_freq=maps.inv_freq.flip(0))
        factor = rope_of(model)[1]
        if factor != 1:
            wrong["factor"] = replace(maps, scaling=maps.scaling / factor**2)
    for name in ("q_bias", "o_bias", "q_norm", "k_norm", "window", "softcap"):
        if getattr(maps, name) is not None:
            wrong[name] = replace(maps, **{name: None})
    if 0 < family.rotary_dim(model.config) < maps.qk_dim:
        # As if a head's halves were the pairs.
        monkeypatch.setattr(family_module, "_halves", lambda width, rotated: [*range(width)])
        wrong["layout"] = read(model)
    if family.head_by_head:
        monkeypatch.setitem(FAMILIES, family.model_type, replace(family, head_by_head=False))
        wrong["fused"] = read(model)
    if family.norms_from:
        monkeypatch.setitem(FAMILIES, family.model_type, replace(family, norms_from=0.0))
        wrong["norms"] = read(model)
    for name, twin in wrong.items():
        assert distance(twin) > 1e-2, name


@pytest.mark.parametrize("case", sources.CASES)
def test_writing_is_the_inverse_of_reading(case):
    model = sources.model(case)
    found = family_of(model.config).write(read(model), rope_of(model)[1])
    wanted = layer_of(model, 1)[1].state_dict()
    assert set(found) == set(wanted)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name].double(), rtol=1e-14, atol=0)


def streamed(folder) -> LayerStream:
    source = open_source(folder)
    return LayerStream(source, FAMILIES[source.config.model_type], IDS, torch.device("cpu"))


@pytest.mark.parametrize("case", sources.NEW)
@torch.no_grad()
def test_layers_one_by_one_are_the_whole_model(case, saved, monkeypatch):
    """Embeddings, learned positions, experts put together, and what attention sees and does."""
    folder, model = saved(case)
    seen, handles = [], []
    for layer in range(2):
        module, attention = layer_of(model, layer)
        keep = lambda _, args, kwargs, out: seen.append(  # noqa: E731
            (args[0] if args else kwargs["hidden_states"], out[0])
        )
        handles.append(attention.register_forward_hook(keep, with_kwargs=True))
    last = []
    handles.append(
        module.register_forward_hook(
            lambda _, args, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
    )
    model(IDS)
    for handle in handles:
        handle.remove()

    def distance():
        stream = streamed(folder)
        found = [stream.advance(layer) for layer in range(2)]
        pairs = [(f.x, x) for f, (x, _) in zip(found, seen, strict=True)]
        pairs += [(f.y, y) for f, (_, y) in zip(found, seen, strict=True)]
        return max(error(a, b) for a, b in [*pairs, (stream.hidden, last[0])])

    assert distance() < 1e-5
    family = FAMILIES[model.config.model_type]
    twin = None
    if family.positions:
        twin = dict(first_position=family.first_position + 1)
    elif family.embed_scale(model.config) != 1:
        twin = dict(embed_scale=lambda config: 1.0)
    elif family.experts:
        parts = {k: v[::-1] for k, v in family.experts.parts.items()}
        twin = dict(experts=replace(family.experts, parts=parts))
    if twin:
        monkeypatch.setitem(FAMILIES, family.model_type, replace(family, **twin))
        assert distance() > 1e-3


@pytest.mark.parametrize("case", [f for f in FAMILIES if FAMILIES[f].post_norm])
@torch.no_grad()
def test_a_norm_after_attention_counts_in_the_weights_of_tokens(case, saved, monkeypatch):
    """An error in attention's output is divided by what that norm divides the output by."""
    folder, model = saved(case)
    family = FAMILIES[case]
    found = streamed(folder).advance(0)
    added = layer_of(model, 0)[0].get_submodule(family.post_norm)(found.y)
    gain = added.square().sum(-1) / found.y.square().sum(-1)
    wanted = gain / (model.get_input_embeddings()(IDS) + added).square().sum(-1)
    assert error(found.weights, wanted) < 1e-5
    monkeypatch.setitem(FAMILIES, case, replace(family, post_norm=None))
    assert error(streamed(folder).advance(0).weights, wanted) > 1e-1


def run(source, output, text, **options):
    return convert(
        str(source), output=output, **{"calibration": str(text), "samples": 3, "heal": 0} | options
    )


def cached_and_full(model):
    """Logits where no padding is: through a cache, in steps of one and more; and all at once."""
    real, positions = MASK.bool(), positions_of(MASK)
    full = model(IDS, attention_mask=MASK, position_ids=positions, use_cache=False).logits
    return step_by_step(model, IDS, MASK, 51, [1, 1, 1, 6])[real], full[real]


# Every form where attention is read in a way of its own, and of the rest enough to see each class.
EXACT = [
    *((f, form) for f in ("phi3", "stablelm", "gpt_neox", "gemma", "gpt2") for form in FORMS),
    *(("gemma2", form) for form in FORMS),
    *((f, form) for f in ("mixtral", "qwen2_moe", "phi", "olmo", "opt") for form in ("mla", "gqa")),
    *((f, "mfa-kr") for f in ("mixtral", "phi", "opt", "seed_oss")),
    *((family, "mla") for family in ("seed_oss", "starcoder2")),
    *((case, "mla") for case, (family, _) in sources.VARIANTS.items() if family not in NORMED),
    *((case, "mla on read") for case, (family, _) in sources.CASES.items() if family in NORMED),
    *((family, "gqa") for family in NORMED),
    *(("mistral, sliding", form) for form in FORMS if form != "mla"),
    *(("qwen2, sliding", form) for form in ("mla on read", "mfa-kr", "gqa")),
]


@pytest.mark.parametrize(("case", "form"), [pair for pair in EXACT if pair not in IMPOSSIBLE])
@torch.no_grad()
def test_the_whole_budget_is_exact(case, form, saved, text, tmp_path):
    folder, model = saved(case)
    done = run(folder, tmp_path / "out", text, kv_budget="100%", **FORMS[form])
    same = dict(attn_implementation=model.config._attn_implementation)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **same).eval()
    assert max(layer.error for layer in done.layers) < 1e-8
    cached, full = cached_and_full(found)
    wanted = cached_and_full(model)[1]
    # Experts are chosen by rounded scores: a mixture is as exact as its choices.
    assert error(full, wanted) < 2e-5
    assert error(cached, wanted) < 2e-5
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    assert kv_bytes_per_token(model) == done.kv_bytes_per_token["source"]
    family = FAMILIES[model.config.model_type]
    o = family.o if type(found) is type(model) else "o_proj"
    found.get_parameter(f"{family.prefix(1)}{o}.weight").neg_()
    assert error(cached_and_full(found)[1], wanted) > 1e-2


HALVES = [
    *((f, "mla") for f in sources.FAMILIES if f not in tiny.SOURCES and f not in NORMED),
    *((family, "mla on read") for family in ("phi3", "gpt_neox", "gemma2", *NORMED)),
    *((family, "mfa") for family in ("phi3", "stablelm", "gpt2")),
    *((family, "mfa-kr") for family in ("gpt_neox", "opt", "gemma", "gemma2", "mixtral")),
    *((family, "gqa") for family in ("phi3", "stablelm", "phi", "gpt_neox", "gpt2", "opt")),
    *(("mistral, sliding", form) for form in FORMS),
    *((case, "mla on read") for case in ("qwen2, sliding", "qwen3, sliding")),
    *((case, "gqa") for case, (family, _) in sources.CASES.items() if family in NORMED),
]


@pytest.mark.parametrize(("case", "form"), HALVES)
@torch.no_grad()
def test_half_the_cache(case, form, saved, text, tmp_path):
    """And saved, loaded, saved again: the same model, and what is no attention the same bytes."""
    folder, model = saved(case)
    family = model.config.model_type
    # A latent as wide as the input is exact, and half of what heads that share nothing cache.
    share = 0.5 if hasattr(model.config, "num_key_value_heads") else 0.3
    done = run(folder, tmp_path / "out", text, kv_budget=share, **FORMS[form])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    assert kv_bytes_per_token(found) <= share * kv_bytes_per_token(model)
    assert all(0 < layer.error < 1 for layer in done.layers)
    cached, full = cached_and_full(found)
    assert error(cached, full) < 1e-5
    assert 1e-4 < error(full, cached_and_full(model)[1]) < 1.4

    # An expert's tensors too, by the names that they are stored under.
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    prefixes = tuple(FAMILIES[family].prefix(layer) for layer in range(2))
    kept = {name for name in before if not name.startswith(prefixes)}
    assert kept == {name for name in after if not name.startswith(prefixes)}
    assert all(torch.equal(before[name], after[name]) for name in kept)

    found.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(after)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, found(IDS).logits)
    base = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(base(IDS).last_hidden_state, found.base_model(IDS).last_hidden_state)
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=256)
    plain, swift = (
        found.generate(IDS, attention_mask=MASK, use_cache=use, **options) for use in (False, True)
    )
    assert torch.equal(plain, swift)
    with torch.enable_grad():
        found.train()(IDS[:, :20], labels=IDS[:, :20]).loss.backward()
    for name, parameter in found.named_parameters():
        if name.startswith(prefixes):
            assert parameter.grad is not None, name


# With a KV head for every query head, so that there are heads to choose from.
ALL_HEADS = dict(num_key_value_heads=4)
OWN_CLASS = """
import sys
sys.modules["rehead"] = None  # importing it raises
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    ids, want, heads = torch.load(folder + ".pt")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__.startswith("transformers.models."), type(model)
    assert model.config.num_key_value_heads == heads
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want), folder
print("equal")
"""


@torch.no_grad()
def test_fewer_normalised_heads_are_the_familys_own_class(text, tmp_path):
    """GQA and MQA of every family with norms, in a process that cannot import rehead."""
    places = []
    for family in NORMED:
        folder = tmp_path / family
        source = folders.save(folder, sources.model(family, **ALL_HEADS))
        for form, heads in (("gqa", 2), ("mqa", 1)):
            places.append(tmp_path / f"{family}-{form}")
            run(folder, places[-1], text, to=form)
            found = AutoModelForCausalLM.from_pretrained(places[-1]).eval()
            assert type(found) is type(source)
            torch.save((IDS, found(IDS).logits, heads), f"{places[-1]}.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", OWN_CLASS, *map(str, places)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("pooling", ["aligned", "mean"])
@pytest.mark.parametrize("family", NORMED)
@torch.no_grad()
def test_the_familys_own_attention_computes_what_merged_heads_say(family, pooling):
    """The module with fewer KV heads and what is written for it, against the naive reference."""
    source, x = sources.model(family, **ALL_HEADS), inputs(2, 40)
    maps, factor = read(source), rope_of(source)[1]
    moments = gqa_moments(maps, x, torch.Generator().manual_seed(0))
    form = to_gqa(maps, moments, 2, pooling)
    model = sources.model(family)  # with two
    module = layer_of(model, 1)[1]
    hidden = torch.ones(40, 40).triu(1).bool()
    if maps.window is not None:
        hidden |= torch.ones(40, 40).tril(-maps.window).bool()
    mask = torch.zeros(40, 40).masked_fill(hidden, -torch.inf)[None, None]
    rope = model.base_model.rotary_emb(x, torch.arange(40)[None], *kinds_of(model))

    def distance(form):
        module.load_state_dict(FAMILIES[family].write(form.expand(), factor))
        found = module(x, attention_mask=mask, position_embeddings=rope)[0]
        return error(found, wanted)

    wanted = torch.stack([reference_attention(form.expand(), row) for row in x.double()])
    assert distance(form) < 5e-6
    assert form.q_norm.shape == maps.q_norm.shape
    if not FAMILIES[family].norms_from:
        written = FAMILIES[family].write(form.expand(), factor)
        assert all(torch.equal(t, written[name]) for name, t in form.state_dict().items())
    for name in ("q_norm", "k_norm", "k"):
        twin = replace(form, **{name: getattr(form, name).flip(-1 if "norm" in name else 0)})
        assert distance(twin) > 1e-2, name


@pytest.mark.parametrize("family", NORMED)
def test_normalised_heads_merge_better_than_by_their_mean(family, tmp_path):
    """Errors that a conversion reports, of text it has not fitted; and healing lowers them."""
    draw = torch.randint(33, 127, (24 * 128,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_text("".join(map(chr, draw)))
    folders.save(tmp_path / "model", sources.model(family, **ALL_HEADS))

    def errors(**options):
        out, text = tmp_path / "out", tmp_path / "text.txt"
        asked = dict(to="gqa", samples=24, force=True) | options
        return [layer.error for layer in run(tmp_path / "model", out, text, **asked).layers]

    mean, closed, healed = errors(pooling="mean"), errors(), errors(heal=60)
    for one, other in zip(closed, mean, strict=True):
        assert one < 0.9 * other
    assert sum(healed) < sum(closed)


@pytest.mark.parametrize("form", [*tiny.FORMS, *tiny.MFA_FORMS])
@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_a_sliding_cache_holds_all_that_is_read(form, static, monkeypatch):
    """Of one layer with a window and one without; keys turned on read by where they are now."""
    make = tiny.mla if form in tiny.FORMS else tiny.mfa
    model, ids = make("qwen2", form, **sources.LAST_SLIDES), IDS % 61
    full = model(ids, attention_mask=MASK, position_ids=positions_of(MASK), use_cache=False).logits

    def distance():
        cache = StaticCache(config=model.config, max_cache_len=64) if static else None
        cached = step_by_step(model, ids, MASK, 51, [1, 1, 1, 6], cache)
        return error(cached[MASK.bool()], full[MASK.bool()])

    assert distance() < 1e-5
    if form in ("on_read", "rope_read", "mfa_kr", "mfa_kr_rows"):
        monkeypatch.setattr(ConvertedAttention, "_slots_in", lambda self, cached, slots: slots)
    else:
        model.config.sliding_window = 12
    assert distance() > 1e-3


REMOTE = """
import sys, torch
sys.modules["rehead"] = None  # importing it raises
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    ids, want = torch.load(folder + ".pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want), folder
print("equal")
"""


@torch.no_grad()
def test_checkpoints_carry_their_code(tmp_path):
    """In a process that cannot import rehead: MLA and MFA by turns, to see every file once."""
    made = [(family, MLA_CLASSES if n % 2 else MFA_CLASSES) for n, family in enumerate(MFA_CLASSES)]
    made += [(family, MLA_CLASSES) for family in NORMED]
    made += [(family, GQA_CLASSES) for family in GQA_CLASSES]
    places = []
    for family, classes in made:
        rotated = 0 if FAMILIES[family].rotary == "none" else 2
        rope = dict(qk_rope_head_dim=rotated, rope_pairs=[[1] * (rotated // 2)] * 2)
        fields = sources.FAMILIES[family][2]
        if classes is GQA_CLASSES:
            fields = fields | dict(num_key_value_heads=2)
        elif family in NORMED:
            fields = fields | tiny.ON_READ | dict(qk_norm=True)
        else:
            fields = fields | (tiny.DECOUPLED if classes is MLA_CLASSES else tiny.FACTORED) | rope
        config, _, causal_lm = classes[family]
        model = causal_lm(config(**fields)).eval()
        places.append(tmp_path / config.model_type)
        model.save_pretrained(places[-1])
        torch.save((IDS, model(IDS).logits), f"{places[-1]}.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REMOTE, *map(str, places)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
@torch.no_grad()
def test_checkpoints_as_they_were_published_are_read(family, saved, text, tmp_path):
    """GPT-2's without the language model's prefix; and with the masks that old versions stored."""
    folder, model = saved(family)
    place = shutil.copytree(folder, tmp_path / "old")
    state = load_file(place / "model.safetensors")
    for layer in range(2):
        prefix = FAMILIES[family].prefix(layer)
        state[f"{prefix}bias"] = torch.ones(1, 1, 128, 128).tril()
        state[f"{prefix}masked_bias"] = torch.tensor(-1e9)
        if family == "gpt_neox":
            state[f"{prefix}rotary_emb.inv_freq"] = torch.ones(2)
    if family == "gpt2":
        state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
        assert "wte.weight" in state
    save_file(state, place / "model.safetensors", metadata={"format": "pt"})
    run(place, tmp_path / "out", text, kv_budget="100%")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert error(found(IDS).logits, model(IDS).logits) < 1e-5
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in names if name.endswith((".bias.bias", "masked_bias", "inv_freq"))]
    assert {name.split(".")[0] for name in names} <= {model.base_model_prefix, "embed_out"}


@pytest.mark.parametrize("inputs_cached", [False, True])
@pytest.mark.parametrize("family", NORMED)
@torch.no_grad()
def test_keys_are_normalised_wherever_they_are_formed(family, inputs_cached, monkeypatch):
    """Absorbed over several chunks, and expanded; from a latent, and from the layer's input."""
    config, _, causal_lm = MLA_CLASSES[family]
    fields = sources.FAMILIES[family][2] | tiny.ON_READ | dict(qk_norm=True)
    if inputs_cached:
        fields |= dict(kv_lora_rank=fields["hidden_size"])
    torch.manual_seed(0)
    model = tiny.fill_biases(causal_lm(config(**fields | dict(kv_b_bias=True)))).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.uniform_(parameter, 0.2, 2)
    monkeypatch.setattr(rope_slots, "CPU_CHUNK", 7)
    for always in (True, False):
        tiny.absorb(monkeypatch, whole_keys.WholeKeyAttention, always)
        cached, full = cached_and_full(model)
        assert error(cached, full) < 1e-5
    right = rope_slots.slot_scores
    tiny.absorb(monkeypatch, whole_keys.WholeKeyAttention, True)
    monkeypatch.setattr(whole_keys, "slot_scores", lambda *args: right(*args[:-1], None))
    cached, full = cached_and_full(model)
    assert error(cached, full) > 1e-2
    kind = whole_keys.InputAttention if inputs_cached else whole_keys.WholeKeyAttention
    assert [type(m) for m in model.modules() if isinstance(m, ConvertedAttention)] == [kind] * 2
    with pytest.raises(ValueError, match="rope_on_read=True"):
        config(**sources.FAMILIES[family][2] | tiny.ROPE_READ | dict(qk_norm=True))


def test_every_family_has_classes_and_a_row_here():
    assert list(FAMILIES) == list(sources.FAMILIES) == list(MLA_CLASSES)
    assert list(FAMILIES) == list(MFA_CLASSES)
    assert list(GQA_CLASSES) == ["gpt_neox", "gpt2", "opt"]  # whose own class has no KV heads
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.parametrize("family", sources.FAMILIES)
def test_what_is_offered_is_what_a_family_can_have(family):
    config_class, _, given = sources.FAMILIES[family]
    offered = {offer.form for offer in offers(config_class(**given)) if not offer.refused}
    assert offered == {"gqa", "mqa", "mla", "mfa", "mfa-kr"}


@pytest.mark.parametrize("family", ["qwen3", "stablelm", "gpt2"])
def test_what_inspect_recommends_can_be_had(family, saved):
    folder = str(saved(family)[0])
    found = inspect._inspect(folder)
    asked = found["recommended"].partition("  (")[0].split()
    assert asked[:4] == ["convert", "--to", "mla", folder]
    options = dict(zip(asked[4::2], asked[5::2], strict=True))
    assert [*options] == ["--kv-bits", "--kv-budget"]
    bits, budget = options.values()
    offer = plan(folder, to="mla", kv_bits=bits, kv_budget=budget)
    assert offer.kv_bytes_per_token["converted"] < 0.34 * offer.kv_bytes_per_token["source"]


UNSUPPORTED = [
    ("mistral", dict(sliding_window=0), "slides a window of 0 tokens"),
    ("llama", dict(sliding_window=[]), r"slides a window of \[\] tokens"),
    ("llama", dict(sliding_window=1.5), "slides a window of 1.5 tokens"),
    ("llama", dict(sliding_window=2**63), f"slides a window of {2**63} tokens"),
    ("qwen2", dict(layer_types=["full_attention", "chunked_attention"]), "chunked_attention"),
    ("stablelm", dict(qk_layernorm=True), "qk_layernorm"),
    ("phi", dict(qk_layernorm=True), "qk_layernorm"),
    ("olmo", dict(clip_qkv=3.0), "clip_qkv"),
    ("olmoe", dict(clip_qkv=3.0), "clip_qkv"),
    ("gemma", dict(use_bidirectional_attention=True), "attends to later tokens"),
    ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
    ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "layer by layer"),
    ("gpt2", dict(add_cross_attention=True), "attends to an encoder"),
    ("opt", dict(word_embed_proj_dim=16), "word_embed_proj_dim"),
    ("llama", sources.PART, r"rotates a part of its heads \(0.5\)"),
]


@pytest.mark.parametrize(("family", "fields", "message"), UNSUPPORTED)
def test_what_cannot_be_carried_is_refused_by_name(family, fields, message):
    config_class, _, given = sources.FAMILIES[family]
    with pytest.raises(InputError, match=message) as told:
        family_of(config_class(**given | fields))
    assert "\n" not in str(told.value)
    family_of(config_class(**given))  # and nothing else is


@pytest.mark.parametrize("family", NORMED)
def test_a_number_of_heads_that_does_not_divide_is_refused(family, saved, text, tmp_path):
    message = "--num-key-value-heads 3 does not divide the source's 2 KV heads. Use one of 1, 2"
    with pytest.raises(InputError, match=message) as told:
        run(saved(family)[0], tmp_path / "out", text, to="gqa", num_key_value_heads=3)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_forms_that_a_family_cannot_have_are_refused(case, saved, text, tmp_path):
    family, form = case
    with pytest.raises(InputError, match="Leave out --rope on-read") as told:
        run(saved(family)[0], tmp_path / "out", text, **FORMS[form])
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("deepseek_v3", "latent attention already"),
        ("minicpm3", "latent attention already"),
        ("mamba", "no cache of keys"),
        ("rwkv", "no cache of keys"),
        ("t5", "no causal decoder"),
        ("bert", "no causal decoder"),
        ("hunyuan_v1_dense", "normalises queries and keys"),
        ("cohere2", "in some of its layers only"),
        ("gemma3", "reads images too"),
        ("bloom", "ALiBi"),
    ],
)
def test_model_types_that_cannot_be_converted_say_why(model_type, why, text, tmp_path):
    """From the config alone: the weights, here none, are not looked at."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    with pytest.raises(InputError, match=f"^{model_type} .*{why}") as told:
        run(tmp_path / "model", tmp_path / "out", text)
    assert "\n" not in str(told.value)
