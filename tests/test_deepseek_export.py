"""Converted checkpoints in DeepSeek-V3's class compute what engines do from the GGUF file."""

import json
from dataclasses import replace

import folders
import pytest
import torch
from emulate import emulated
from engines import IDS, KINDS, logits, save
from layers import error
from safetensors.torch import load_file
from test_export import STOCK, run_without_rehead
from transformers import AutoModelForCausalLM, AutoTokenizer

from rehead.converters import InputError
from rehead.evaluation import kv_bytes_per_token
from rehead.export import deepseek3
from rehead.modeling.converted_config import FORMAT


@pytest.fixture
def run(export_tiny):
    return lambda to="deepseek", output="out", **options: export_tiny(to, output, **options)


def loaded(folder, **options) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    assert type(model).__module__ == "transformers.models.deepseek_v3.modeling_deepseek_v3"
    return model


@pytest.mark.parametrize(("family", "rope", "fields"), KINDS)
def test_it_computes_what_the_gguf_file_does(family, rope, fields, run, tmp_path):
    """The same logits, and token by token the same continuation; the same numbers cached."""
    model = save(tmp_path / "in", family, rope, **fields)
    done = run()
    other = run("gguf", "out.gguf")
    found, file = loaded(tmp_path / "out"), emulated(tmp_path / "out.gguf")
    assert error(logits(found), logits(file)) < 1e-4
    assert error(logits(found), logits(model)) > 1e-3
    assert done.norm_spread == other.norm_spread
    assert done.kv_bytes_per_token == other.kv_bytes_per_token
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["exported"]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(found.generate(IDS[:, :9], **options), file.generate(IDS[:, :9], **options))


def test_with_a_row_for_every_direction_it_is_exact(run, steadied, tmp_path):
    model = save(tmp_path / "in", tie_word_embeddings=True)
    run(**steadied)
    found = loaded(tmp_path / "out")
    assert error(logits(found), logits(model)) < 5e-3
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(found.generate(IDS[:, :9], **options), model.generate(IDS[:, :9], **options))
    run(output="few", norm_rows=2)
    assert error(logits(loaded(tmp_path / "few")), logits(model)) > 0.02


def not_interleaved(layer):
    return replace(layer, rope=torch.cat([layer.rope[0::2], layer.rope[1::2]]))


def heads_swapped(layer):
    return replace(layer, kv=layer.kv.unflatten(0, (4, -1))[[0, 2, 1, 3]].flatten(0, 1))


def norm_forgotten(layer):
    return replace(layer, weight=1.5 * layer.weight)


@pytest.mark.parametrize("wrong", [not_interleaved, heads_swapped, norm_forgotten])
def test_a_wrong_layer_is_seen(wrong, run, steadied, tmp_path, monkeypatch):
    model = save(tmp_path / "in")
    right = deepseek3.deepseek_attention
    monkeypatch.setattr(deepseek3, "deepseek_attention", lambda layer: right(wrong(layer)))
    run(**steadied)
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 0.02


WRONG_FIELDS = {"rope_interleave": False, "rope_parameters": {"rope_theta": 200.0}}


@pytest.mark.parametrize("field", WRONG_FIELDS)
def test_a_wrong_field_is_seen(field, run, steadied, tmp_path):
    model = save(tmp_path / "in")
    run(**steadied)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    if isinstance(config[field], dict):
        config[field] |= WRONG_FIELDS[field]
    else:
        config[field] = WRONG_FIELDS[field]
    path.write_text(json.dumps(config))
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_what_its_rounding_loses(dtype, run, steadied, tmp_path):
    """No more than twice the error of the converted model itself in that dtype."""
    model = save(tmp_path / "in").to(dtype)
    folders.save(tmp_path / "in", model)
    wanted = logits(model.double())
    own = error(logits(model.to(dtype)), wanted)
    run(**steadied)
    found = loaded(tmp_path / "out", dtype="auto")
    assert found.dtype == dtype
    assert error(logits(found), wanted) < 2 * own


def test_the_folder_is_whole(run, tmp_path):
    """Tokenizer, recipe and card come along, code does not; a tied head is written out."""
    recipe = dict(form="mla", format=FORMAT)
    save(tmp_path / "in", tie_word_embeddings=True, conversion=recipe)
    (tmp_path / "in" / "README.md").write_text("# in\n\nRecipe: engine.\n")
    run()
    assert not list((tmp_path / "out").glob("*.py"))
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "DeepseekV3ForCausalLM" in text
    assert text.endswith("\nRecipe: engine.\n")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["conversion"] == recipe
    tokens = [AutoTokenizer.from_pretrained(tmp_path / at)("a tree") for at in ("in", "out")]
    assert tokens[0]["input_ids"] == tokens[1]["input_ids"]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out", "text.txt"]


def test_a_process_without_rehead_loads_it(run, steadied, tmp_path):
    model = save(tmp_path / "in")
    run(**steadied)
    assert run_without_rehead(STOCK, tmp_path / "out", IDS, logits(model)) < 5e-3


MISTAKES = {
    "biases": (dict(o_bias=True), {}, "has biases .o_bias.*--preset engine"),
    "queries": (dict(q_lora_rank=9), {}, "low-rank queries.*--preset engine"),
    "frequencies": (dict(rope_pairs=[[3, 0, 0]] * 2), {}, "no powers of one base.*--preset engine"),
    "activation": (dict(hidden_act="gelu"), {}, "the activation gelu, and DeepSeek silu"),
    "rows": ({}, dict(norm_rows=33), "--norm-rows 33 must be at least 0 and at most 32"),
    "source": ({}, dict(output="in", force=True), "holds the source itself"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_the_class_cannot_hold_is_one_line_and_leaves_nothing(case, run, tmp_path):
    fields, options, message = MISTAKES[case]
    save(tmp_path / "in", **fields)
    with pytest.raises(InputError, match=message) as told:
        run(**options)
    assert "\n" not in str(told.value)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "text.txt"]


def test_a_fault_leaves_what_stood_there(run, tmp_path, monkeypatch):
    save(tmp_path / "in")
    run()
    before = (tmp_path / "out" / "SHA256SUMS").read_text()
    with pytest.raises(InputError, match="--force"):
        run()

    def fault(layer):
        raise RuntimeError("a fault")

    monkeypatch.setattr(deepseek3, "deepseek_attention", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        run(force=True)
    assert (tmp_path / "out" / "SHA256SUMS").read_text() == before
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out", "text.txt"]
