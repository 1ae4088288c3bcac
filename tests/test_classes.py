"""The converted classes that the table of families and the table of forms make."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import sources
import tiny
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
)

import rehead.modeling
from rehead.converters import families as converted_families
from rehead.modeling import CLASSES, MLAAttention, families
from rehead.modeling.cached_decoding import check_decoding
from rehead.modeling.converted_model import ConvertedForCausalLM, ConvertedModel
from rehead.modeling.families import FAMILIES, FORMS, Family, Form, converted
from rehead.modeling.mla_config import MLAConfigMixin

ROWS = [(family, form) for form in CLASSES for family in CLASSES[form]]


@pytest.mark.parametrize(("family", "form"), ROWS)
def test_a_row_has_classes_of_its_names_before_transformers_own(family, form):
    row = FAMILIES[family]
    config, model, causal_lm = CLASSES[form][family]
    source = CONFIG_MAPPING[family]
    assert config.__bases__ == (FORMS[form].config, source)
    body = ConvertedModel if row.decoder is None else ConvertedForCausalLM
    assert model.__bases__ == (body, MODEL_MAPPING[source])
    assert causal_lm.__bases__ == (ConvertedForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING[source])
    assert config.model_type == f"rehead_{family}_{form.lower()}"
    assert model.config_class is causal_lm.config_class is config
    assert causal_lm.model_class is model
    holder = model if row.decoder is None else model.model_class
    assert holder.layouts is FORMS[form].layouts
    for made, kind in ((config, "Config"), (model, "Model"), (causal_lm, "ForCausalLM")):
        assert made.__name__ == made.__qualname__ == f"{row.prefix}{form}{kind}"
        assert made.__module__ == "rehead.modeling.families"
        assert getattr(families, made.__name__) is getattr(rehead.modeling, made.__name__) is made
    assert CONFIG_MAPPING[config.model_type] is config
    assert MODEL_MAPPING[config] is model and MODEL_FOR_CAUSAL_LM_MAPPING[config] is causal_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_says_what_transformers_and_the_converters_say(family):
    row, known = FAMILIES[family], converted_families.FAMILIES[family]
    config = sources.FAMILIES[family][0](**sources.FAMILIES[family][2])
    names = {field.name for field in fields(config)}
    assert row.has_kv_heads == ("num_key_value_heads" in names)
    assert row.partial_rotary == (known.rotary == "partial")
    assert row.caps_scores == (known.softcap(config) is not None)
    assert row.qk_norm == known.qk_norm
    assert row.attention_name == known.attention
    assert row.layers_name == known.layers.split(".")[-1]


@pytest.mark.parametrize(
    "name",
    [
        "LlamaGQAConfig",  # transformers' own class has KV heads
        "Qwen3GQAConfig",  # as does Qwen3's
        "LlamaMLADecoder",  # the model itself holds the layers
        "LlamaMLA",
        "CohereMLAConfig",
    ],
)
def test_what_no_row_names_is_no_attribute(name):
    for module in (families, rehead.modeling):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)


@pytest.mark.parametrize("form", ["MLA", "MFA"])
def test_a_new_family_is_one_row(form, monkeypatch):
    monkeypatch.setitem(FAMILIES, "granite", Family("Granite"))
    config, model, causal_lm = converted("granite", form)
    assert getattr(families, f"Granite{form}ForCausalLM") is causal_lm
    assert config.model_type == f"rehead_granite_{form.lower()}"
    assert issubclass(model, MODEL_MAPPING[CONFIG_MAPPING["granite"]])
    check_decoding(causal_lm)
    with pytest.raises(AttributeError):
        _ = families.GraniteGQAConfig  # transformers' own class has KV heads


class HalfConfigMixin(MLAConfigMixin):
    form_name = "HALF"
    # Coded rows are of layouts by their names.
    tiny_layouts = tuple(x for x in MLAConfigMixin.tiny_layouts if "cache_codes" not in x)

    def layer_layout(self, layer_idx):
        return "half"


class HalfAttention(MLAAttention):
    """MLA whose output is halved."""

    def forward(self, *args, **kwargs):
        output, weights = super().forward(*args, **kwargs)
        return output / 2, weights


@torch.no_grad()
def test_a_new_form_is_one_row(monkeypatch, ids):
    monkeypatch.setitem(FORMS, "HALF", Form(HalfConfigMixin, {"half": HalfAttention}))
    config, _, causal_lm = converted("llama", "HALF")
    assert families.LlamaHALFForCausalLM is causal_lm
    with pytest.raises(AttributeError):
        _ = families.Qwen3HALFConfig  # the row does not say that it holds norms
    check_decoding(causal_lm)
    mla = tiny.mla()
    half = causal_lm(config(**tiny.BASE | mla.config.to_dict() | dict(auto_map=None))).eval()
    half.load_state_dict(mla.state_dict())
    assert tiny.error(half(ids).logits, mla(ids).logits) > 1e-2
    for layer in mla.model.layers:
        layer.self_attn.o_proj.weight.div_(2)
    assert tiny.error(half(ids).logits, mla(ids).logits) < 1e-6


@pytest.mark.parametrize(("family", "form"), ROWS)
@torch.no_grad()
def test_configs_and_models_are_pickled_and_copied(family, form):
    _, _, causal_lm = CLASSES[form][family]
    config = causal_lm.config_class.tiny()[0]
    model = causal_lm(config).eval()
    ids = torch.arange(8)[None]
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is causal_lm
        assert again.config.to_dict() == model.config.to_dict()
        assert torch.equal(again(ids).logits, model(ids).logits)
    for twin in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert type(twin) is type(config) and twin.to_dict() == config.to_dict()


LOADS = """
import copy, pickle, sys
sys.modules["rehead"] = None  # importing it raises
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
for cls in (type(model), type(model.base_model), type(model.config)):
    assert cls.__module__.startswith("transformers_modules"), cls
    assert cls.__module__.endswith(".families"), cls
    assert getattr(sys.modules[cls.__module__], cls.__name__) is cls
assert type(pickle.loads(pickle.dumps(model))) is type(copy.deepcopy(model)) is type(model)
print(*(name for name in sys.modules if name.startswith("transformers.models")))
"""


def run_without_rehead(code, *args, cwd):
    """What a process without rehead prints that runs the code."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("family", "form"), [("phi", "MFA"), ("opt", "GQA"), ("qwen3", "MLA")])
def test_a_folder_loads_its_own_family_alone(family, form, tmp_path):
    """By its own code, in a process without rehead."""
    config, _, causal_lm = CLASSES[form][family]
    causal_lm(config.tiny()[0]).save_pretrained(tmp_path / "model")
    pattern = r"transformers\.models\.(\w+)\.modeling_"
    loaded = set(re.findall(pattern, run_without_rehead(LOADS, tmp_path / "model", cwd=tmp_path)))
    code = "".join(path.read_text() for path in (tmp_path / "model").glob("*.py"))
    assert family in loaded
    assert loaded - {family, "auto"} <= set(re.findall(pattern, code))
    assert not loaded & {"mixtral", "gpt_neox", "olmo2"}


@torch.no_grad()
def test_a_folder_with_a_file_of_its_family_loads_and_is_renewed(tmp_path):
    """Before `families.py` was carried, `auto_map` named a file of the one family."""
    folder = tmp_path / "model"
    config, _, causal_lm = CLASSES["MLA"]["phi"]
    model = causal_lm(config.tiny()[0]).eval()
    model.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"families.Phi', '"phi.Phi'))
    (folder / "families.py").rename(folder / "phi.py")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(8)[None]
    assert type(loaded) is causal_lm and torch.equal(loaded(ids).logits, model(ids).logits)
    # As docs/troubleshooting.md has it.
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    assert json.loads(path.read_text())["auto_map"]["AutoConfig"] == "families.PhiMLAConfig"
    assert AutoConfig.from_pretrained(folder).architectures == ["PhiMLAForCausalLM"]
    run_without_rehead(LOADS, folder, cwd=tmp_path)
