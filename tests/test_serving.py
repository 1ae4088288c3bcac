"""Exported folders, and classes, are laid out as serving engines read them.

The rules are data, with the version and file they were read from; no engine is imported. Whoever
reads a newer version changes them here.
"""

import ast
import inspect
import json
import re
import subprocess
import sys
import textwrap
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import engines
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from rehead.export import export
from rehead.modeling import GQA_CLASSES, GQAAttention

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())

DENSE = {
    "model.embed_tokens.weight": ("vocab_size", "hidden_size"),
    "model.norm.weight": ("hidden_size",),
    "lm_head.weight": ("vocab_size", "hidden_size"),
}
IN_LAYER = {
    "input_layernorm.weight": ("hidden_size",),
    "post_attention_layernorm.weight": ("hidden_size",),
    "self_attn.q_proj.weight": ("heads * (nope + rope)", "hidden_size"),
    "self_attn.kv_a_proj_with_mqa.weight": ("rank + rope", "hidden_size"),
    "self_attn.kv_a_layernorm.weight": ("rank",),
    "self_attn.kv_b_proj.weight": ("heads * (nope + value)", "rank"),
    "self_attn.o_proj.weight": ("hidden_size", "heads * value"),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
}
SHORT = {
    "heads": "num_attention_heads",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
    "rank": "kv_lora_rank",
}

# What the engines' own DeepSeek classes read of config.json without a default, and what they take
# for granted: a value, or the field that it must equal.
NATIVE = {
    # vllm/model_executor/models/deepseek_v2.py: a tied head is not filled; biases in the file are
    # dropped without a word; any rope type but default is taken for DeepSeek's YaRN; pairs are
    # interleaved; `index_topk` would mean DeepSeek-V3.2; experts are counted though no layer has
    # any. vllm/transformers_utils/model_arch_config_convertor.py: MLA goes by the model_type.
    "vllm 0.33.0": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "q_lora_rank": None,
        "attention_bias": False,
        "rope_interleave": True,
        "rope_parameters.rope_type": "default",
        "first_k_dense_replace": "num_hidden_layers",
        "num_key_value_heads": "num_attention_heads",
        "num_nextn_predict_layers": 0,
        "n_routed_experts": 1,
        "n_shared_experts": 1,
    },
    # sglang/srt/models/deepseek_v2.py, srt/configs/model_config.py, srt/eplb/expert_location.py,
    # which divides by the number of experts.
    "sglang 0.5.23": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "q_lora_rank": None,
        "rope_interleave": True,
        "rope_parameters.rope_type": "default",
        "first_k_dense_replace": "num_hidden_layers",
        "moe_layer_freq": 1,
        "n_routed_experts": 1,
        "n_group": 1,
        "pad_token_id": None,
    },
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folders that both formats make of one conversion, its embeddings tied."""
    base = tmp_path_factory.mktemp("serving")
    engines.save(base / "in", tie_word_embeddings=True)
    draw = torch.randint(33, 127, (128 * 20,), generator=torch.Generator().manual_seed(1))
    (base / "text.txt").write_text("".join(map(chr, draw)))
    options = dict(calibration=str(base / "text.txt"), samples=4, norm_rows=4)
    for to in ("transformers", "deepseek"):
        export(base / "in", to=to, output=base / to, **options)
    return base


def misfits(config: dict, rules: dict) -> list[str]:
    """The fields of a config that are not as an engine takes for granted."""

    def field(name: str):
        found = config
        for part in name.split("."):
            found = found.get(part, "missing")
        return found

    wanted = {k: config[v] if isinstance(v, str) and v in config else v for k, v in rules.items()}
    return [name for name, value in wanted.items() if field(name) != value]


@pytest.mark.parametrize("engine", NATIVE)
def test_the_config_is_what_native_deepseek_classes_read(engine, exported):
    config = json.loads((exported / "deepseek" / "config.json").read_text())
    assert misfits(config, NATIVE[engine]) == []
    assert not {"index_topk", "compress_ratios", "auto_map"} & set(config)
    assert config["rope_parameters"]["rope_theta"] > 1
    youtu = json.loads((exported / "transformers" / "config.json").read_text())
    assert {"architectures", "rope_parameters.rope_type"} <= set(misfits(youtu, NATIVE[engine]))


def test_the_file_holds_what_native_deepseek_classes_fill(exported):
    """Every parameter once, in its shape, and nothing else: no bias and no expert."""
    config = json.loads((exported / "deepseek" / "config.json").read_text())
    letters = config | {short: config[name] for short, name in SHORT.items()}
    names = DENSE | {
        f"model.layers.{index}.{name}": shape
        for index in range(config["num_hidden_layers"])
        for name, shape in IN_LAYER.items()
    }
    wanted = {name: [eval(width, {}, letters) for width in shape] for name, shape in names.items()}
    with safe_open(exported / "deepseek" / "model.safetensors", "pt") as file:
        stored = list(file.keys())
        found = {name: file.get_slice(name).get_shape() for name in stored}
    assert found == wanted


@pytest.mark.parametrize("to", ["transformers", "deepseek"])
def test_vllm_can_fuse_the_attention(to, exported):
    """vllm 0.33.0, model_executor/models/transformers/fusers/mla.py and base.py (`MLAFuser`).

    One linear layer wider than the norm that reads a part of it; one method of two arguments that
    calls `kv_b_proj` and returns a pair, called once; the dims in the config.
    """
    model = AutoModelForCausalLM.from_pretrained(exported / to)
    attention, config = model.model.layers[0].self_attn, model.config
    down, norm = attention.kv_a_proj_with_mqa, attention.kv_a_layernorm
    assert down.out_features == norm.weight.numel() + config.qk_rope_head_dim
    assert config.kv_lora_rank == norm.weight.numel() == attention.kv_b_proj.in_features
    assert config.qk_nope_head_dim + config.qk_rope_head_dim == attention.qk_head_dim
    assert config.v_head_dim * config.num_attention_heads == attention.o_proj.in_features
    code = type(attention).expand_kv.__code__
    assert code.co_argcount == 3
    assert "kv_b_proj" in code.co_names
    forward = inspect.getsource(type(attention).forward)
    assert len(re.findall(r"self\.expand_kv\(", forward)) == 1
    assert dispatches(type(attention))


def dispatches(attention: type) -> bool:
    """Whether vLLM serves the class: its `forward` itself looks the interface up and calls it once.

    vllm 0.33.0, model_executor/models/transformers/fusers/attention.py. The scale is `self.<name>`.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(attention.forward)))
    lookups = [
        node.targets[0] if isinstance(node, ast.Assign) else node.target
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
    ]
    names = {ast.unparse(name) for name in lookups}
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    ]
    scales = {ast.unparse(k.value) for call in calls for k in call.keywords if k.arg == "scaling"}
    return len(calls) == 1 and scales == {"self.scaling"}


def test_vllm_can_dispatch_gqa():
    assert dispatches(GQAAttention)


@pytest.fixture
def plugin():
    points = PROJECT["project"]["entry-points"]["vllm.general_plugins"]
    return EntryPoint("rehead", points["rehead"], "vllm.general_plugins").load()


def test_the_plugin_names_what_vllm_can_run(plugin, monkeypatch):
    """vllm 0.33.0, model_executor/models/registry.py: an architecture, and `module:class`."""
    told: dict[str, str] = {}
    registry = types.SimpleNamespace(register_model=told.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    plugin()
    plugin()  # vLLM calls it in every process, and perhaps twice
    backend = "vllm.model_executor.models.transformers:TransformersForCausalLM"
    names = ("GPT2GQAForCausalLM", "GPTNeoXGQAForCausalLM", "OPTGQAForCausalLM")
    assert told == dict.fromkeys(names, backend)
    assert {model.__name__ for _, _, model in GQA_CLASSES.values()} == set(names)


def test_without_vllm_the_plugin_does_nothing(plugin, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it raises
    plugin()


def test_with_the_plugin_no_remote_code_is_needed(tmp_path):
    """Importing it is enough for the Auto classes, in a process of its own."""
    engines.save(tmp_path / "in")
    code = (
        "import sys\nfrom rehead.modeling import register_in_vllm\nregister_in_vllm()\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "print(type(config).__module__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in")], capture_output=True, text=True
    )
    assert done.stdout.strip() == "rehead.modeling.families", done.stderr
