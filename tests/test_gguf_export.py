"""GGUF files: what llama.cpp's deepseek2 computes from them is what the converted model computes.

The file is read back and run by transformers, with the engine's norms and frequencies.
"""

import json

import folders
import gguf
import pytest
import tiny
import torch
from emulate import emulated
from engines import KINDS, logits, save
from layers import error
from transformers import AutoTokenizer

from rehead.converters import InputError
from rehead.converters.checkpoint import open_source
from rehead.export import deepseek2, steady
from rehead.export.gguf_tokenizer import SPLITS, split_name
from rehead.export.latent import LatentModel


@pytest.fixture
def run(export_tiny):
    return lambda output="out.gguf", **options: export_tiny("gguf", output, **options)


@pytest.mark.parametrize(("family", "rope", "fields"), KINDS)
def test_with_a_row_for_every_direction_it_is_exact(family, rope, fields, run, steadied, tmp_path):
    model = save(tmp_path / "in", family, rope, **fields)
    done = run(**steadied)
    assert max(done.norm_spread) < 1e-3
    assert error(logits(emulated(tmp_path / "out.gguf")), logits(model)) < 5e-3
    fewer = run("fewer.gguf", norm_rows=2)
    assert min(fewer.norm_spread) > 0.01
    assert error(logits(emulated(tmp_path / "fewer.gguf")), logits(model)) > 0.02


WRONG = {
    "frequencies": ("check_engine", lambda base: base * 2),
    "heads": ("layer_tensors", lambda t: t | {"attn_v_b.weight": t["attn_v_b.weight"].flip(0)}),
    "norm": (
        "layer_tensors",
        lambda t: t | {"attn_kv_a_norm.weight": 1.5 * t["attn_kv_a_norm.weight"]},
    ),
    "pairs": (
        "layer_tensors",
        lambda t: t | {"attn_kv_a_mqa.weight": t["attn_kv_a_mqa.weight"].roll(1, 0)},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_seen(case, run, steadied, tmp_path, monkeypatch):
    model = save(tmp_path / "in")
    name, spoil = WRONG[case]
    right = getattr(deepseek2, name)
    monkeypatch.setattr(deepseek2, name, lambda *args: spoil(right(*args)))
    run(**steadied)
    assert error(logits(emulated(tmp_path / "out.gguf")), logits(model)) > 0.02


def test_more_rows_steady_the_norm(run, tmp_path):
    save(tmp_path / "in")
    spreads = [sum(run(force=True, norm_rows=rows).norm_spread) for rows in (0, 8, 24)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[-1] < 0.5 * spreads[0]


def test_shares_are_least_squares(monkeypatch):
    """A row that is constant takes all that the others need not have."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.randn(500, 6, generator=generator, dtype=torch.float64).square()
    squares[:, 2] = 1
    shares = steady._shares(squares)
    least = steady.LEAST_SHARE / 6
    assert shares.min() >= least
    assert shares[2] == pytest.approx(1 - 5 * least, abs=0.02)
    even = (squares.mean(1) - 1).square().mean()
    assert (squares @ shares - 1).square().mean() < 0.05 * even


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_says_what_llama_cpp_reads(dtype, run, tmp_path):
    model = save(tmp_path / "in").to(dtype)
    folders.save(tmp_path / "in", model)
    done = run(norm_rows=5)
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "deepseek2"
    expected = {
        "block_count": 2,
        "leading_dense_block_count": 2,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "expert_feed_forward_length": 48,
        "expert_shared_count": 0,
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 0,
        "attention.kv_lora_rank": 17,
        "attention.key_length": 23,
        "attention.value_length": 17,
        "attention.key_length_mla": 14,
        "attention.value_length_mla": 8,
        "rope.dimension_count": 6,
        "rope.freq_base": pytest.approx(100**0.75),
        "vocab_size": len(folders.VOCABULARY),
    }
    assert {k: value[f"deepseek2.{k}"] for k in expected} == expected
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
    assert kinds["blk.1.attn_k_b.weight"] == name
    assert kinds["blk.0.attn_kv_a_norm.weight"] == "F32"
    # ggml's dims are the other way round.
    shapes = {t.name: tuple(t.shape.tolist()) for t in reader.tensors}
    assert shapes["blk.0.attn_k_b.weight"] == (8, 17, 4)
    assert shapes["blk.0.attn_v_b.weight"] == (17, 8, 4)
    assert shapes["blk.0.attn_kv_a_mqa.weight"] == (32, 23)
    size = dtype.itemsize
    assert done.kv_bytes_per_token == {"converted": 2 * 18 * size, "exported": 2 * 23 * size}
    tokens = value["tokenizer.ggml.tokens"]
    assert tokens == folders.VOCABULARY
    text = "the tree sees"
    ids = AutoTokenizer.from_pretrained(tmp_path / "in")(text)["input_ids"]
    assert "".join(tokens[i] for i in ids).replace("Ġ", " ") == text
    assert value["tokenizer.ggml.pre"] == "gpt-2"
    assert value["tokenizer.ggml.eos_token_id"] == 256
    assert value["tokenizer.ggml.add_bos_token"] is False
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out.gguf", "text.txt"]


def test_pre_tokenizers_are_known_or_refused():
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    pattern, name = next(iter(SPLITS.items()))
    split = {"type": "Split", "pattern": {"Regex": pattern}, "invert": False}
    bytes_alone = plain | {"use_regex": False}

    def sequence(*steps):
        return {"type": "Sequence", "pretokenizers": list(steps)}

    assert split_name(plain) == "gpt-2"
    assert split_name(sequence(digits, plain)) == "smollm"
    assert split_name(sequence(split, bytes_alone)) == name == "llama-bpe"
    assert split_name(sequence(split | {"pattern": {"Regex": r"\d"}}, bytes_alone)) is None
    assert split_name(sequence(split, plain)) is None
    assert split_name(plain | {"add_prefix_space": True}) is None
    assert split_name({"type": "Whitespace"}) is None
    assert split_name(None) is None


MISTAKES = {
    "biases": (dict(o_bias=True), {}, "has biases .o_bias.*--preset engine"),
    "queries": (dict(q_lora_rank=9), {}, "low-rank queries.*--preset engine"),
    "frequencies": (
        dict(rope_pairs=[[3, 0, 0]] * 2),
        {},
        "no powers of one base.*--preset engine",
    ),
    "two lists": (
        dict(rope_parameters=tiny.ROPE_TYPES["longrope"]),
        {},
        "no powers of one base",
    ),
    "activation": (dict(hidden_act="gelu"), {}, "the activation gelu, and llama.cpp silu"),
    "suffix": ({}, dict(output="out"), "must end in .gguf"),
    "rows": ({}, dict(norm_rows=33), "--norm-rows 33 must be at least 0 and at most 32"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_llama_cpp_cannot_hold_is_one_line_and_leaves_nothing(case, run, tmp_path):
    fields, options, message = MISTAKES[case]
    save(tmp_path / "in", **fields)
    with pytest.raises(InputError, match=message) as told:
        run(**options)
    assert "\n" not in str(told.value)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "text.txt"]


def test_a_tokenizer_of_another_kind_is_refused(run, tmp_path):
    save(tmp_path / "in")
    file = tmp_path / "in" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tokenizer of .* is of a kind"):
        run()
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_is_replaced_only_when_asked_and_whole(run, tmp_path, monkeypatch):
    save(tmp_path / "in")
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(InputError, match="--force"):
        run()

    def fault(*args):
        raise RuntimeError("a fault")

    monkeypatch.setattr(deepseek2, "layer_tensors", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        run(force=True)
    assert (tmp_path / "out.gguf").read_text() == "mine"
    monkeypatch.undo()
    run(force=True)
    emulated(tmp_path / "out.gguf")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out.gguf", "text.txt"]


def test_tensors_come_as_they_were_planned(tmp_path):
    save(tmp_path / "in")
    model = LatentModel(open_source(tmp_path / "in"))
    tokens = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    made = deepseek2.gguf_tensors(model, tokens, 3, [], lambda *args: None)
    shapes = {name: tuple(tensor.shape) for name, tensor in made}
    assert list(shapes.items()) == list(deepseek2.planned_shapes(model, 3).items())
