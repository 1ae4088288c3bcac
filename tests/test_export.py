"""Converted checkpoints in stock classes: the same logits, in a process that has no rehead."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import folders
import pytest
import sources
import tiny
import torch
from layers import error
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rehead.modeling
from rehead.converters import InputError
from rehead.converters.checkpoint import open_source
from rehead.converters.families import FAMILIES
from rehead.evaluation import kv_bytes_per_token
from rehead.export import export, latent, native
from rehead.export.latent import LatentModel
from rehead.export.past_norm import CONSTANT, past_norm
from rehead.modeling.converted_config import FORMAT

IDS = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(0))
NATIVE = dict(rope_pairs=[[3, 0, 0]] * 2)


def save(folder: Path, family: str = "llama", **fields) -> torch.nn.Module:
    """A tiny model with one list of frequencies, with random weights, as a conversion has it."""
    fields = folders.MODEL_FIELDS | NATIVE | fields
    model = tiny.mla(family, **fields)
    for layer in model.model.layers:  # transformers leaves norms at one, and a padding row at zero
        torch.nn.init.uniform_(layer.input_layernorm.weight, 0.3, 3.0)
    torch.nn.init.normal_(model.model.embed_tokens.weight.data[model.config.pad_token_id])
    return folders.save(folder, model)


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(ids).logits


def loaded(folder: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__ == "transformers.models.youtu.modeling_youtu"
    return model


EXACT = [
    *(("llama", rope, {}) for rope in ("default", "yarn", "llama3", "longrope")),
    ("llama", "yarn", dict(tie_word_embeddings=True) | tiny.BIASES),
    ("llama", "default", dict(q_lora_rank=9, hidden_act="gelu")),
    ("llama", "default", dict(q_lora_rank=9, kv_b_bias=True, o_bias=True) | tiny.BIASES),
    ("llama", "default", dict(num_key_value_heads=4)),
    ("mistral", "default", dict(tie_word_embeddings=True, o_bias=True)),
    ("mistral", "yarn", {}),
    ("qwen2", "longrope", dict(tie_word_embeddings=True) | tiny.BIASES),
    ("qwen2", "default", tiny.BIASES),
]


@pytest.mark.parametrize(("family", "rope", "fields"), EXACT)
def test_logits_are_those_of_the_converted_model(family, rope, fields, tmp_path):
    """Within and, with longrope, beyond the original context of 32 tokens; and token by token."""
    model = save(tmp_path / "in", family, rope_parameters=tiny.ROPE_TYPES[rope], **fields)
    done = export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    found = loaded(tmp_path / "out")
    for length in (20, 60):
        assert error(logits(found, IDS[:, :length]), logits(model, IDS[:, :length])) < 2e-5
    assert kv_bytes_per_token(found) == done.kv_bytes_per_token["exported"]
    assert kv_bytes_per_token(model) == done.kv_bytes_per_token["converted"]
    tied = bool(fields.get("tie_word_embeddings"))
    assert (found.lm_head.weight is found.model.embed_tokens.weight) == tied
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(found.generate(IDS[:, :9], **options), model.generate(IDS[:, :9], **options))


def without_biases(layer):
    return replace(layer, q_bias=None, latent_bias=None, rope_bias=None, kv_bias=None, o_bias=None)


def not_interleaved(layer):
    return replace(layer, rope=torch.cat([layer.rope[0::2], layer.rope[1::2]]))


def unscaled(layer):
    return replace(layer, q=layer.q * (8 / 14) ** 0.5)


def without_rotary_factor(layer):
    q = layer.q.unflatten(0, (4, 14)).clone()
    q[:, 8:] /= (0.1 * torch.tensor(4.0).log() + 1) ** 2
    return replace(layer, q=q.flatten(0, 1))


def heads_swapped(layer):
    return replace(layer, kv=layer.kv.unflatten(0, (4, -1))[[0, 2, 1, 3]].flatten(0, 1))


WRONG = (without_biases, not_interleaved, unscaled, without_rotary_factor, heads_swapped)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_layer_is_seen(wrong, tmp_path, monkeypatch):
    fields = dict(rope_parameters=tiny.ROPE_TYPES["yarn"]) | tiny.BIASES
    model = save(tmp_path / "in", **fields)
    right = LatentModel.layer
    monkeypatch.setattr(LatentModel, "layer", lambda self, index: wrong(right(self, index)))
    export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 1e-3


def conjugate(factors):
    return torch.cat([factors.chunk(2, -1)[0], -factors.chunk(2, -1)[1]], -1)


def no_factors(factors):
    return torch.cat(
        [torch.ones_like(part) * (1 - n) for n, part in enumerate(factors.chunk(2, -1))], -1
    )


@pytest.mark.parametrize("wrong", [conjugate, no_factors])
@pytest.mark.parametrize("width", [8, 6], ids=["phase", "synthesis"])
def test_wrong_factors_are_seen(wrong, width, tmp_path, monkeypatch):
    """A stock class has rows for what is stored as factors of the source's queries."""
    model = save(tmp_path / "in", **tiny.BIASES)
    right = latent.multiplied

    def spoilt(x, factors):
        return right(x, wrong(factors) if factors.shape[-1] == width else factors)

    monkeypatch.setattr(latent, "multiplied", spoilt)
    export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 1e-3


def test_the_padding_token_keeps_its_embedding(tmp_path, monkeypatch):
    """Its id is left to the generation config: in Youtu's own, loading would zero its row."""
    model = save(tmp_path / "in", tie_word_embeddings=True)
    (tmp_path / "in" / "generation_config.json").unlink()
    export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert error(logits(found), logits(model)) < 2e-5
    assert found.generation_config.pad_token_id == model.config.pad_token_id == 0
    monkeypatch.setattr(native, "CARRIED", (*native.CARRIED, "pad_token_id"))
    export(tmp_path / "in", to="transformers", output=tmp_path / "out", force=True)
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 1e-3


def test_wrong_frequencies_and_a_small_constant_are_seen(tmp_path, monkeypatch):
    model = save(tmp_path / "in")
    right = native.rope_parameters

    def reversed_factors(model):
        found = right(model)
        return found | {"short_factor": found["short_factor"][::-1]}

    monkeypatch.setattr(native, "rope_parameters", reversed_factors)
    export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 1e-3
    monkeypatch.undo()
    monkeypatch.setattr("rehead.export.past_norm.CONSTANT", 64.0)
    monkeypatch.setattr("rehead.export.past_norm.HEADROOM", 0.5)
    export(tmp_path / "in", to="transformers", output=tmp_path / "out", force=True)
    assert error(logits(loaded(tmp_path / "out")), logits(model)) > 1e-3


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """RMSNorm as stock classes compute it, with their epsilon."""
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_any_map_is_led_past_the_norm(size, dtype):
    """Within the bound, 2^-17, however large the channels are; and every weight has its dtype."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    down, bias, up, up_bias = size * draw(12, 32), size * draw(12), draw(20, 12), draw(20)
    gain = draw(32).exp()
    x = draw(200, 32)
    x = x / x.square().mean(-1, keepdim=True).sqrt() * gain
    want = (x @ down.T + bias) @ up.T + up_bias
    made = past_norm(down, bias, up, up_bias, gain, dtype)
    found = norm(x @ made.down.T + made.bias, made.weight) @ made.up.T
    assert error(found, want) < 2**-17
    assert torch.equal(made.weight, made.weight.to(dtype).double())
    assert torch.equal(made.bias[-1:].to(dtype).double(), torch.tensor([CONSTANT]).double())
    for tensor in (made.down, made.bias, made.weight):
        assert tensor.abs().max() < torch.finfo(torch.float16).max
    plain = norm(x @ down.T + bias, torch.ones(12)) @ up.T + up_bias
    assert error(plain, want) > 0.05


def test_half_precision_loses_what_its_rounding_loses(tmp_path):
    """No more than twice the error of the converted model itself in that dtype."""
    for dtype in (torch.bfloat16, torch.float16):
        model = save(tmp_path / f"in-{dtype}", **tiny.BIASES).to(dtype)
        folders.save(tmp_path / f"in-{dtype}", model)
        wanted = logits(model.double())
        own = error(logits(model.to(dtype)), wanted)
        export(tmp_path / f"in-{dtype}", to="transformers", output=tmp_path / f"out-{dtype}")
        found = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{dtype}", dtype="auto")
        assert found.dtype == dtype
        assert error(logits(found), wanted) < 2 * own


def test_a_window_in_use_is_not_exported(tmp_path):
    config, _, causal_lm = rehead.modeling.MLA_CLASSES["mistral"]
    fields = sources.FAMILIES["mistral"][2] | tiny.DECOUPLED | NATIVE
    for window in (16, 128):  # no text outgrows the second
        folders.save(
            tmp_path / str(window), causal_lm(config(**fields | {"sliding_window": window}))
        )
    with pytest.raises(InputError, match="slides a window of 16 tokens"):
        export(tmp_path / "16", to="transformers", output=tmp_path / "out")
    export(tmp_path / "128", to="transformers", output=tmp_path / "out")


@pytest.mark.parametrize("family", rehead.modeling.MLA_CLASSES)
def test_no_family_is_exported_wrongly(family, tmp_path):
    """One with another decoder is refused, though its weights may have the same names."""
    config, _, causal_lm = rehead.modeling.MLA_CLASSES[family]
    fields = sources.FAMILIES[family][2] | tiny.DECOUPLED | NATIVE
    torch.manual_seed(0)
    model = tiny.fill_biases(causal_lm(config(**fields)).eval())
    folders.save(tmp_path / "in", model)
    if FAMILIES[family].llama_decoder:
        export(tmp_path / "in", to="transformers", output=tmp_path / "out")
        assert error(logits(loaded(tmp_path / "out")), logits(model)) < 2e-5
        return
    for to in ("transformers", "deepseek", "gguf"):
        with pytest.raises(InputError, match=rf"is a {family} model.*Llama's decoder"):
            export(tmp_path / "in", to=to, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", rehead.modeling.GQA_CLASSES)
def test_a_gqa_class_of_our_own_is_no_stock_class(family, tmp_path):
    config, _, causal_lm = rehead.modeling.GQA_CLASSES[family]
    folders.save(tmp_path / "in", causal_lm(config(**sources.FAMILIES[family][2])))
    with pytest.raises(InputError, match=rf"is a {family} model.*runs in rehead's own"):
        export(tmp_path / "in", to="transformers", output=tmp_path / "out")


def test_the_folder_is_whole(tmp_path):
    """Tokenizer, generation config, licence, recipe and card come along; code does not."""
    source = tmp_path / "in"
    conversion = dict(form="mla", native=True, format=FORMAT)
    save(source, conversion=conversion)
    GenerationConfig(bos_token_id=256, max_length=33).save_pretrained(source)
    (source / "LICENSE").write_text("yours\n")
    front, recipe = "---\nbase_model: some/one\n---\n", "\nRecipe: native.\n\n| a table |\n"
    (source / "README.md").write_text(f"{front}\n# in\n\nload me so\n{recipe}")
    export(source, to="transformers", output=tmp_path / "out")
    for name in ("generation_config.json", "LICENSE", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not list((tmp_path / "out").glob("*.py"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "youtu"
    assert config["architectures"] == ["YoutuForCausalLM"]
    assert "auto_map" not in config
    assert config["conversion"] == conversion
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith(front)
    assert text.endswith(recipe)
    assert "load me so" not in text
    tokens = [
        AutoTokenizer.from_pretrained(tmp_path / at)("a tree")["input_ids"] for at in ("in", "out")
    ]
    assert tokens[0] == tokens[1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in", "out"]


STOCK = """
import sys, torch
sys.modules["rehead"] = None  # importing it raises
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
ids, want = torch.load(folder + ".pt")
model = AutoModelForCausalLM.from_pretrained(folder)
with torch.no_grad():
    print(float((model(ids).logits - want).abs().max() / want.abs().max()))
"""


def run_without_rehead(code: str, folder: Path, *about) -> float:
    """What `code` prints about the folder and what is told it, in a process of its own."""
    torch.save(about, f"{folder}.pt")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": f"{folder}.home", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=env, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_process_without_rehead_loads_it(tmp_path):
    model = save(tmp_path / "in", "qwen2", **tiny.BIASES)
    export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    assert run_without_rehead(STOCK, tmp_path / "out", IDS, logits(model)) < 2e-5


def test_only_one_layer_is_in_memory(tmp_path, monkeypatch):
    """What is read before something is written is one layer's attention, or one tensor."""
    save(tmp_path / "in", num_hidden_layers=6, rope_pairs=[[3, 0, 0]] * 6)
    model = LatentModel(open_source(tmp_path / "in"))
    read = []
    real = type(model.source).tensor
    monkeypatch.setattr(
        type(model.source), "tensor", lambda self, name: read.append(name) or real(self, name)
    )
    most = 0
    for _ in native.stock_tensors(model, torch.float32):
        most = max(most, len(read))
        read.clear()
    assert most == 7  # q and its two kinds of factors, kv_a, kv_b, o and the norm


def add_bias(folder: Path) -> None:
    path = folder / "model.safetensors"
    config = json.loads((folder / "config.json").read_text()) | {"mlp_bias": True}
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(path)
    for layer in range(2):
        for name, width in (("gate_proj", 48), ("up_proj", 48), ("down_proj", 32)):
            state[f"model.layers.{layer}.mlp.{name}.bias"] = torch.ones(width)
    save_file(state, path, metadata={"format": "pt"})


def of(make):
    return lambda folder: folders.save(folder, make())


FIELDS = folders.MODEL_FIELDS
MISTAKES = {
    "stock": (of(lambda: tiny.source(**FIELDS)), "is LlamaForCausalLM already, a stock class"),
    "mfa": (of(lambda: tiny.mfa(**FIELDS)), "is MFA, which no stock class holds.*--native"),
    "mfa-kr": (of(lambda: tiny.mfa(form="mfa_kr", **FIELDS)), "is MFA-KR"),
    "on read": (of(lambda: tiny.mla(form="on_read", **FIELDS)), "on read.*--to mla --native"),
    "frequencies": (of(lambda: tiny.mla(**FIELDS)), "has 2 lists of rotary freq.*--native"),
    "widths": (
        of(lambda: tiny.mla(kv_lora_rank_per_layer=[12, 7], **FIELDS | NATIVE)),
        "different widths.*--native",
    ),
    "nothing rotated": (
        of(lambda: tiny.mla(qk_rope_head_dim=0, **FIELDS | dict(rope_pairs=[[], []]))),
        "rotates nothing",
    ),
    "dynamic": (
        of(lambda: tiny.mla(rope_parameters=tiny.ROPE_TYPES["dynamic"], **FIELDS | NATIVE)),
        "rope_type dynamic",
    ),
    "mlp bias": (
        lambda folder: (save(folder), add_bias(folder)),
        r"model.layers.0.mlp.(gate|down|up)_proj.bias, for which YoutuForCausalLM has no place",
    ),
    "no model": (lambda folder: folder.mkdir(), "no config.json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_a_stock_class_cannot_hold_is_one_line_and_leaves_nothing(case, tmp_path):
    make, message = MISTAKES[case]
    make(tmp_path / "in")
    with pytest.raises(InputError, match=message) as told:
        export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class Hub:
    """Stands in for huggingface_hub's client, and writes down what it is asked."""

    calls: ClassVar[list] = []
    fault: ClassVar[Exception | None] = None

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, repo, *, private, exist_ok):
        assert exist_ok
        if self.fault:
            raise self.fault
        self.calls.append((repo, private))
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))


def test_it_is_pushed_to_the_hub_when_it_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr("rehead.export.hub.HfApi", Hub)
    save(tmp_path / "in")
    options = dict(to="transformers", output=tmp_path / "out", push_to_hub="you/tiny")
    done = export(tmp_path / "in", private=True, **options)
    assert done.url == "https://hub/you/tiny"
    who, made, sent = Hub.calls
    assert (who, made) == ("whoami", ("you/tiny", True))
    assert sent == ("you/tiny", sorted(path.name for path in (tmp_path / "out").iterdir()))
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(sent[1])

    monkeypatch.setattr(Hub, "fault", OSError("no right to it"))
    with pytest.raises(InputError, match=r"is written, and the hub refuses.*no right to it"):
        export(tmp_path / "in", force=True, **options)
    loaded(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match="is no id such as"):
        export(tmp_path / "in", **options | dict(push_to_hub="a/b/c"))

    def nobody(self):
        raise OSError("401")

    monkeypatch.setattr(Hub, "whoami", nobody)
    with pytest.raises(InputError, match=r"needs the hub and a login.*hf auth login"):
        export(tmp_path / "in", **options)
    assert not (tmp_path / "out").exists()


def test_what_stands_at_the_output_is_replaced_only_when_asked(tmp_path, monkeypatch):
    save(tmp_path / "in")
    with pytest.raises(InputError, match="--to onnx is unknown"):
        export(tmp_path / "in", to="onnx", output=tmp_path / "out")
    shutil.copytree(tmp_path / "in", tmp_path / "out")
    with pytest.raises(InputError, match="--force"):
        export(tmp_path / "in", to="transformers", output=tmp_path / "out")
    with pytest.raises(InputError, match="holds the source itself"):
        export(tmp_path / "in", to="transformers", output=tmp_path / "in", force=True)

    def fault(*args):
        raise RuntimeError("a fault")

    monkeypatch.setattr("rehead.export.run.stock_card", fault)
    with pytest.raises(RuntimeError, match="a fault"):
        export(tmp_path / "in", to="transformers", output=tmp_path / "out", force=True)
    assert (
        type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")).__name__
        == "LlamaMLAForCausalLM"
    )
    monkeypatch.undo()
    export(tmp_path / "in", to="transformers", output=tmp_path / "out", force=True)
    loaded(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
