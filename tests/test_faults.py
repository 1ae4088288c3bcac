"""Damaged, degenerate and ill-fitting input: no output or a whole one, one line, exit code 2."""

import hashlib
import json
import random
import shutil
import subprocess
from types import SimpleNamespace

import folders
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rehead.cli import main
from rehead.converters import InputError, Recipe, convert
from rehead.converters.targets import target_of

WORDS = ["the", "a", "of", "tree", "river", "house", "runs", "sees", "blue", "small", "and"]
VARIANTS = {
    "mla": ["--to", "mla"],
    "mla on read": ["--to", "mla", "--rope", "on-read"],
    "mfa": ["--to", "mfa"],
    "mfa-kr": ["--to", "mfa-kr"],
    "gqa": ["--to", "gqa"],
    "mqa": ["--to", "mqa"],
}
LAYER = "model.layers.1."
WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=300)))
    return path


def digest(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


@pytest.fixture
def run(text, tmp_path, capsys):
    """The command's exit code and last line on stderr; the source must be as it was."""

    def run(folder, *args, calibration=text):
        before = digest(folder)
        given = ["--output", str(tmp_path / "out"), "--samples", "2", "--heal", "1"]
        code = main.run(
            main.convert_app,
            "convert",
            [str(folder), *given, "--calibration", str(calibration), *map(str, args)],
        )
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        assert digest(folder) == before
        assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
        return code, err.strip().splitlines()[-1] if err.strip() else ""

    return run


@pytest.fixture
def refused(run, tmp_path):
    def refused(folder, message, *args, **options):
        code, line = run(folder, *(args or ("--to", "mla")), **options)
        assert code == 2, line
        assert line.startswith("rehead: ")
        assert message in line
        assert not (tmp_path / "out").exists()

    return refused


@pytest.fixture
def whole(run, tmp_path):
    def whole(folder, *args, **options):
        """The model that was written, after its logits were found to be numbers."""
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        code, line = run(folder, *args, **options)
        assert code == 0, line
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            assert model(torch.arange(40)[None]).logits.isfinite().all()
        return model

    return whole


def change(folder, edit):
    state = load_file(folder / "model.safetensors")
    edit(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_shard_cut_short_is_refused(folder, refused):
    path = folder / "model.safetensors"
    for size in (-1, -5000, 1000, 5, 0):
        path.write_bytes(path.read_bytes()[:size])
        refused(folder, "cut short")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}self_attn.k_proj.weight",
        f"{LAYER}mlp.up_proj.weight",
        f"{LAYER}input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_no_numbers_are_refused(name, value, folder, refused):
    def spoil(state):
        state[name].view(-1)[-1] = value

    change(folder, spoil)
    refused(folder, f"{name} holds values that are not finite")


def test_a_flipped_bit_in_a_header_is_refused(folder, refused):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for place in (0, 7, 8, 8 + raw[8:].index(b"F32"), 8 + raw[8:].index(b"shape") + 8):
        flipped = bytearray(raw)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        refused(folder, "model.safetensors")


def test_a_flipped_bit_in_what_was_written_is_told_by_its_checksum(folder, whole, tmp_path):
    """In the middle of the data, where every value of a byte is a number."""
    whole(folder, "--to", "gqa")
    check = ["sha256sum", "-c", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "out").returncode == 0
    path = tmp_path / "out" / "model.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-1000] ^= 1
    path.write_bytes(flipped)
    done = subprocess.run(check, cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "model.safetensors: FAILED\n"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zero", ["everything", "o_proj", "v_proj", "qk"])
def test_weights_that_are_zero_are_converted(variant, zero, folder, whole):
    """Blocks that were added to a model and not trained yet have such an output map."""
    names = {"everything": WEIGHTS, "qk": WEIGHTS[:2]}.get(zero, (zero,))

    def spoil(state):
        for name in names:
            state[f"{LAYER}self_attn.{name}.weight"].zero_()

    change(folder, spoil)
    found = whole(folder, *VARIANTS[variant])
    if zero != "qk":
        seen = []
        attention = found.model.layers[1].self_attn
        attention.register_forward_hook(lambda _, args, out: seen.append(out[0]))
        with torch.no_grad():
            found(torch.arange(40)[None])
        assert seen[0].abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_zeros_is_converted(variant, folder, whole):
    change(folder, lambda state: [tensor.zero_() for tensor in state.values()])
    assert whole(folder, *VARIANTS[variant]) is not None


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("letters", ["a" * 400, "ab" * 200])
def test_a_text_that_says_nothing_still_converts(variant, letters, folder, whole, tmp_path):
    """Statistics of rank 0, 1 and 2, of every layer's input."""
    (tmp_path / "same.txt").write_text(letters)
    assert whole(folder, *VARIANTS[variant], calibration=tmp_path / "same.txt") is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_tokens_are_enough_to_convert(variant, tmp_path, whole):
    """One window of two positions, the least there is."""
    model = tiny.source(**folders.MODEL_FIELDS | dict(max_position_embeddings=2))
    folders.save(tmp_path / "short", model)
    (tmp_path / "two.txt").write_text("ab")
    assert whole(tmp_path / "short", *VARIANTS[variant], calibration=tmp_path / "two.txt")


def test_a_text_shorter_than_a_window_is_refused(folder, refused, tmp_path):
    for content, message in (("a", "1 tokens, fewer than"), ("", "no text"), (" \n", "no text")):
        (tmp_path / "short.txt").write_text(content)
        refused(folder, message, calibration=tmp_path / "short.txt")
    (tmp_path / "short.txt").write_bytes(b"\xff\xfe\xff")
    refused(folder, "not UTF-8", calibration=tmp_path / "short.txt")


def test_a_tokenizer_of_another_model_is_refused(tmp_path, refused):
    folders.save(tmp_path / "small", tiny.source())
    refused(tmp_path / "small", "They do not belong together")


def test_every_weight_keeps_its_dtype(folder, whole, run, tmp_path):
    """Half of it bfloat16 and the norms float32: neither is rounded, and attention follows most."""

    def mix(state):
        for name in state:
            if "norm" not in name:
                state[name] = state[name].bfloat16()

    change(folder, mix)
    before = load_file(folder / "model.safetensors")
    whole(folder, "--to", "mla")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in before.items():
        if ".self_attn." not in name:
            assert after[name].dtype == tensor.dtype
            assert torch.equal(after[name], tensor)
    assert {t.dtype for n, t in after.items() if ".self_attn." in n} == {torch.bfloat16}
    whole(folder, "--to", "mla", "--dtype", "float32")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}


def test_missing_and_misshapen_tensors_are_refused(folder, refused):
    name = f"{LAYER}self_attn.v_proj.weight"
    change(folder, lambda state: state.update({name: state[name].T.contiguous()}))
    refused(folder, f"{name} has the shape [32, 16], and config.json asks for [16, 32]")
    change(folder, lambda state: state.pop(name))
    refused(folder, f"lacks 1 of the 21 tensors that its config.json asks for ({name})")


def test_a_pair_that_is_tied_and_stored_twice_is_converted(tmp_path, whole):
    """As some save it; transformers reads one of the two."""
    model = tiny.source(**folders.MODEL_FIELDS, tie_word_embeddings=True)
    folders.save(tmp_path / "tied", model)
    change(
        tmp_path / "tied",
        lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}),
    )
    found = whole(tmp_path / "tied", "--to", "gqa", "--kv-budget", "100%")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-5)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_model_without_layers_is_refused(tmp_path, refused):
    folders.save(tmp_path / "none", tiny.source(**folders.MODEL_FIELDS, num_hidden_layers=0))
    refused(tmp_path / "none", "asks for 0 layers: there is nothing to convert")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_of_one_head_is_converted(variant, tmp_path, whole):
    fields = dict(num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    folders.save(tmp_path / "one", tiny.source(**folders.MODEL_FIELDS | fields))
    budget = ["--kv-budget", "100%"] if "qa" in variant else []
    assert whole(tmp_path / "one", *VARIANTS[variant], *budget) is not None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(head_dim=1), "heads of width 1"),
        (dict(num_key_value_heads=3), "4 query heads on 3 KV heads"),
        (dict(num_attention_heads=2, num_key_value_heads=4), "2 query heads on 4 KV heads"),
    ],
)
def test_heads_that_cannot_be_are_refused(fields, message, tmp_path, refused):
    folders.save(tmp_path / "odd", tiny.source(**folders.MODEL_FIELDS | fields))
    refused(tmp_path / "odd", message)


def test_an_odd_head_is_refused_where_transformers_lets_it_pass():
    config = SimpleNamespace(**tiny.BASE | dict(head_dim=7, model_type="llama"))
    recipe = Recipe("m", "mla", "decoupled", 0.5, calibration="", samples=1, heal=0, seed=0)
    with pytest.raises(InputError, match="heads of width 7"):
        target_of(config, recipe)
    config.head_dim = 8
    assert target_of(config, recipe).head_dim == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "no finite numbers"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": -3.0}), "no finite numbers"),
        (dict(rope_parameters={"rope_type": "default", "rope_theta": 1e300}), "no finite numbers"),
        (dict(rms_norm_eps=-1e9), "layer 0 gives values that are not finite"),
        (dict(num_attention_heads=0), "config.json"),
        (dict(hidden_size=33), "config.json"),
        (dict(vocab_size=0), "does not describe a causal language model"),
        (dict(head_dim=7), "7"),
        (dict(hidden_act="magic"), "magic"),
    ],
)
def test_a_config_of_nonsense_is_refused(fields, message, folder, refused):
    edit_config(folder, **fields)
    refused(folder, message)


def test_an_output_that_cannot_be_written_is_refused(folder, run, text, capsys):
    """Where nobody may make a folder, not even root."""
    for place in ("/proc/rehead/out", "/dev/null/out"):
        args = [str(folder), "--to", "mla", "--output", place, "--calibration", str(text)]
        assert main.run(main.convert_app, "convert", [*args, "--samples", "2"]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("rehead: cannot write")


def test_the_report_of_a_degenerate_layer_is_a_number(folder, text, tmp_path):
    change(folder, lambda state: [tensor.zero_() for tensor in state.values()])
    options = dict(calibration=str(text), samples=2, heal=1)
    done = convert(str(folder), to="mla", output=tmp_path / "out", **options)
    assert [layer.error for layer in done.layers] == [0, 0]
    assert done.warnings == []
