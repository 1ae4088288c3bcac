"""What was written is what was meant, or nothing is put in place."""

import hashlib
import json
import random
from dataclasses import replace

import folders
import pytest
import tiny
import torch

from rehead.cli import main
from rehead.converters import InputError, LayerReport, convert, recipe, targets, verify, writer
from rehead.converters.mfa import MFA
from rehead.converters.mla import MLA
from rehead.converters.recipe import odd_layers
from rehead.modeling.cached_decoding import WrongDecoding
from rehead.modeling.coding import Code

WORDS = ["the", "a", "of", "tree", "river", "house", "runs", "sees", "blue", "small", "and"]
VARIANTS = {
    "mla": dict(),
    "mla on read": dict(rope="on-read"),
    "mla on read, whole keys": dict(rope="on-read", qk_rope_head_dim=0, q_lora_rank=9),
    "mla on read, inputs": dict(rope="on-read", qk_rope_head_dim=0, kv_lora_rank=32),
    "mfa": dict(to="mfa"),
    "mfa-kr": dict(to="mfa-kr"),
    "mfa rows": dict(to="mfa", head_dim=6),
    "mfa-kr rows": dict(to="mfa-kr", head_dim=6, share_q_dim=4),
    "gqa": dict(to="gqa"),
    "mla coded": dict(kv_bits="auto"),
    "mla coded, on read": dict(kv_bits="auto", rope="on-read"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny Qwen2, whose projections have biases, under YaRN's attention factor; and a text."""
    path = tmp_path_factory.mktemp("inputs")
    fields = folders.MODEL_FIELDS | dict(rope_parameters=tiny.ROPE_TYPES["yarn"])
    folders.save(path / "tiny", tiny.source("qwen2", **fields))
    (path / "text.txt").write_text(" ".join(random.Random(0).choices(WORDS, k=300)))
    return path / "tiny", path / "text.txt"


@pytest.fixture
def run(inputs, tmp_path):
    """The distances that were verified, of a conversion to tmp_path/out."""

    def run(**options):
        found = []

        def progress(stage, done, total, info):
            if stage == "verify":
                found.append(info["off by"])

        given = {"to": "mla", "calibration": str(inputs[1]), "samples": 2, "heal": 0} | options
        done = convert(str(inputs[0]), output=tmp_path / "out", progress=progress, **given)
        assert len(found) == len(done.layers)
        return found

    return run


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_written_layers_compute_what_was_meant(variant, run, tmp_path):
    """In float32 but for its rounding; in bfloat16 the bytes' own rounding shows."""
    assert max(run(**VARIANTS[variant])) < 1e-5
    found = run(**VARIANTS[variant], dtype="bfloat16", force=True)
    assert 1e-4 < min(found) <= max(found) < 0.05


def swap_heads(tensors):
    weight = tensors["o_proj.weight"].clone()
    weight[:, :8], weight[:, 8:16] = tensors["o_proj.weight"][:, 8:16], weight[:, :8].clone()
    return tensors | {"o_proj.weight": weight}


def drop_bias(tensors):
    return tensors | {"o_proj.bias": torch.zeros_like(tensors["o_proj.bias"])}


def one_number(tensors):
    weight = tensors["kv_b_proj.weight"].clone()
    weight[0, 0] += 1
    return tensors | {"kv_b_proj.weight": weight}


def conjugate_factors(tensors):
    real, imaginary = tensors["k_synthesis"].chunk(2, dim=-1)
    return tensors | {"k_synthesis": torch.cat([real, -imaginary], dim=-1)}


def no_phase(tensors):
    still = torch.zeros_like(tensors["q_phase"])
    still[:, : still.shape[1] // 2] = 1
    return tensors | {"q_phase": still}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [swap_heads, drop_bias, one_number, conjugate_factors, no_phase])
def test_a_wrong_weight_is_never_put_in_place(wrong, dtype, run, tmp_path, monkeypatch):
    right = MLA.state_dict
    monkeypatch.setattr(MLA, "state_dict", lambda self, factor=1.0: wrong(right(self, factor)))
    with pytest.raises(verify.WrittenWrongly, match="layer 0 as written"):
        run(dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_wrong_config_is_never_put_in_place(run, tmp_path, monkeypatch):
    right = targets.MLATarget.config_of

    def off_by_one(self, layers, fields):
        turned = [replace(x, rope_pairs=tuple((p + 1) % 4 for p in x.rope_pairs)) for x in layers]
        return right(self, turned, fields)

    monkeypatch.setattr(targets.MLATarget, "config_of", off_by_one)
    with pytest.raises(verify.WrittenWrongly):
        run()

    def other_scaling(self, layers, fields):
        rope = dict(fields["rope_parameters"]) | {"attention_factor": 1.05}
        return right(self, layers, fields | {"rope_parameters": rope})

    monkeypatch.setattr(targets.MLATarget, "config_of", other_scaling)
    with pytest.raises(verify.WrittenWrongly):
        run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rope", ["decoupled", "on-read"])
def test_a_code_at_the_edge_of_a_step_may_be_either_of_two(rope, run, monkeypatch):
    """A prompt and a step round such a number differently; twins allow for none, or shift all."""
    packed = Code.packed
    monkeypatch.setattr(Code, "packed", lambda code, rows: packed(code, rows + 3e-3))
    options = dict(kv_bits="auto", rope=rope, kv_budget=0.3, dtype="float32")
    run(**options)
    monkeypatch.setattr(verify, "AT_AN_EDGE", 0.0)
    with pytest.raises(WrongDecoding, match="something else through a cache"):
        run(force=True, **options)
    monkeypatch.undo()
    monkeypatch.setattr(Code, "packed", lambda code, rows: packed(code, rows + 1.0))
    with pytest.raises(WrongDecoding, match="something else through a cache"):
        run(force=True, **options)


@pytest.mark.parametrize("bits", ["16", "auto"])
def test_a_layer_that_adds_nothing_is_right(bits, inputs, tmp_path):
    """A layer whose output is zero passes, though no error can be a share of it."""
    model = tiny.source(**folders.MODEL_FIELDS)
    torch.nn.init.zeros_(model.model.layers[1].self_attn.o_proj.weight)
    folders.save(tmp_path / "source", model)
    options = dict(to="mla", kv_bits=bits, calibration=str(inputs[1]), samples=2, heal=0)
    convert(str(tmp_path / "source"), output=tmp_path / "out", **options)


@pytest.mark.parametrize("rope", ["decoupled", "on-read"])
def test_codes_of_few_words_fit_into_float16(rope, run):
    """Weights stay in float16's range where a small vocabulary leaves channels constant."""
    for budget in (0.2, 0.5):
        run(kv_bits="auto", rope=rope, kv_budget=budget, dtype="float16", force=True)


def test_a_position_free_query_must_take_the_attention_factor(run, monkeypatch):
    """The scaling of YaRN that a class gives to rotated dims only."""
    right = MFA.state_dict
    monkeypatch.setattr(MFA, "state_dict", lambda self, factor=1.0: right(self, 1.0))
    with pytest.raises(verify.WrittenWrongly):
        run(to="mfa")


def test_a_disk_that_forgets_is_told(run, tmp_path, monkeypatch):
    right = writer.Shard.close

    def flip(self):
        right(self)
        with open(self.path, "r+b") as file:
            file.seek(-100, 2)
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))

    monkeypatch.setattr(writer.Shard, "close", flip)
    with pytest.raises(InputError, match="holds other bytes than were written") as told:
        run()
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_checksums_are_those_of_the_files(run, tmp_path):
    run()
    out = tmp_path / "out"
    lines = (out / writer.SUMS).read_text().splitlines()
    found = dict(reversed(line.split("  ")) for line in lines)
    files = [path for path in out.rglob("*") if path.is_file() and path.name != writer.SUMS]
    assert found == {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= set(found)


def test_a_value_too_large_for_the_dtype_is_told(inputs, tmp_path):
    model = tiny.source(**folders.MODEL_FIELDS)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    folders.save(tmp_path / "source", model)
    options = dict(to="gqa", calibration=str(inputs[1]), samples=2, heal=0)
    with pytest.raises(InputError, match=r"up_proj\.weight has a value of 1e\+05, which float16"):
        convert(str(tmp_path / "source"), output=tmp_path / "out", dtype="float16", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(str(tmp_path / "source"), output=tmp_path / "out", dtype="bfloat16", **options)


def reports(*errors):
    return [LayerReport(i, {}, error=error) for i, error in enumerate(errors)]


def test_layers_out_of_the_ordinary_are_named():
    assert odd_layers(reports(0.01, 0.02, 0.09, None)) == []
    assert odd_layers(reports(1e-9, 2e-9, 1e-3)) == []  # many times the median, and nothing
    assert odd_layers([]) == []
    lines = odd_layers(reports(0.01, 0.02, 0.01, 0.3, 1.2, float("nan")))
    assert [line.split()[1] for line in lines] == ["3", "4", "5"]
    assert "0.3, and the median layer one of" in lines[0]
    assert "no output at all" in lines[1]


def test_a_warning_is_on_stderr(inputs, tmp_path, capsys, monkeypatch):
    for name in ("ODD_ERROR", "ODD_RATIO"):
        monkeypatch.setattr(recipe, name, 0.0)
    args = [inputs[0], "--to", "gqa", "--heal", 0, "--samples", 2, "--calibration", inputs[1]]
    args = [*map(str, args), "--output", str(tmp_path / "out"), "--json"]
    assert main.run(main.convert_app, "convert", args) == 0
    out, err = capsys.readouterr()
    warnings = json.loads(out)["warnings"]
    assert len(warnings) == 2
    assert all(f"rehead: warning: {line}" in err for line in warnings)
