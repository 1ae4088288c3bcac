"""What the classes of every form owe to those who load, train and look into them."""

import copy
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from tiny import error, step_by_step
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
)

from rehead.modeling import GQA_CLASSES, MFA_CLASSES, MLA_CLASSES
from rehead.modeling.cached_decoding import cache_of, distance

MODELS = {form: partial(tiny.mla, form=form) for form in tiny.FORMS}
MODELS |= {form: partial(tiny.mfa, form=form) for form in tiny.MFA_FORMS}
EXACT = {form: partial(tiny.exact, form=form) for form in tiny.FORMS}
EXACT |= {form: partial(tiny.exact_mfa, form=form) for form in ("mfa", "mfa_kr")}
CASES = [*tiny.CASES, *tiny.MFA_CASES]
# One for each class of attention.
LAYOUTS = {form: (make, {}) for form, make in MODELS.items()}
LAYOUTS |= {"inputs": (MODELS["on_read"], dict(kv_lora_rank=32)), "turned keys": (tiny.coded, {})}
CLASSES = {"mla": MLA_CLASSES, "mfa": MFA_CLASSES, "gqa": GQA_CLASSES}


@pytest.mark.parametrize(
    "form, family", [(form, family) for form, families in CLASSES.items() for family in families]
)
def test_a_config_of_defaults_has_the_familys_head_width(form, family):
    """transformers makes one to see what differs from it, 5.16 whenever a model is saved."""
    source = CONFIG_MAPPING[family]()
    width = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    assert CLASSES[form][family][0]().head_dim == width


def test_layouts_are_all_there_are():
    """The list of them in this file, but for GQA, which is the stock classes' own."""
    models = [make(**fields) for make, fields in LAYOUTS.values()]
    found = {type(model.model.layers[0].self_attn) for model in models}
    assert found == set(tiny.ATTENTION.values()) - {tiny.ATTENTION["gqa"]}


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_attentions_are_recorded_and_sum_to_one(layout, ids):
    make, fields = LAYOUTS[layout]
    model = make(**fields)
    model.set_attn_implementation("eager")
    out = model(ids, output_attentions=True, output_hidden_states=True)
    step = model(ids[:, :1], **tiny.cached(model, cache_of(out)), output_attentions=True)
    assert len(out.hidden_states) == 3
    for attentions, shape in ((out.attentions, (2, 4, 20, 20)), (step.attentions, (2, 4, 1, 21))):
        assert len(attentions) == 2
        for weights in attentions:
            assert weights.shape == shape
            torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:-1]))


@pytest.mark.parametrize("form", MODELS)
@pytest.mark.parametrize("family", tiny.SOURCES)
@torch.no_grad()
def test_saved_model_loads_equal_with_auto_classes(family, form, ids, tmp_path):
    if form in tiny.FORMS:
        fields = tiny.UNEVEN[form] | tiny.BIASES
    else:
        fields = tiny.MFA_UNEVEN[form] | tiny.MFA_BIASES
    model = MODELS[form](family, rope_parameters=tiny.ROPE_TYPES["yarn"], **fields)
    model.config.conversion = {"form": form, "kv_budget": 0.5, "format": 2}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.conversion == model.config.conversion
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    base = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    code = {path.name for path in tmp_path.glob("*.py")}
    shared = ("cached_decoding", "converted_attention", "converted_config", "converted_model")
    forms = (f"{form}{kind}" for form in ("gqa", "mfa", "mla") for kind in ("", "_config"))
    layouts = ("latent_attention", "shared_key", "key_norm", "on_read", "whole_keys", "mfa_kr")
    coded = ("coded_cache", "coding", "rows", "turned_keys")
    modules = (*shared, *forms, *layouts, *coded, "families", "read_kernel", "rope_slots")
    assert code == {f"{name}.py" for name in modules}
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", *code):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", "decoupled"),
        ("qwen2", "on_read"),
        ("mistral", "rope_read"),
        ("mistral", "mfa"),
        ("qwen2", "mfa_kr"),
        ("llama", "mfa_kr_rows"),
    ],
)
def test_checkpoint_carries_its_code(family, form, ids, tmp_path):
    """In a process that cannot import rehead."""
    tiny.load_without_rehead(MODELS[form](family), ids, tmp_path)


@pytest.mark.parametrize("form", EXACT)
@torch.no_grad()
def test_bfloat16_is_as_good_as_its_rounding(form, ids, tmp_path):
    """No worse than three times what the stock class loses in the same dtype."""
    stock = tiny.source()
    ours = EXACT[form](stock, "llama")
    want = stock(ids).logits
    budget = 3 * error(copy.deepcopy(stock).bfloat16()(ids).logits, want)
    ours.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    got = step_by_step(half, ids, torch.ones_like(ids), 12, [1] * 8)
    assert got.dtype == torch.bfloat16
    assert error(got, want) < budget < 0.2


@pytest.mark.parametrize("form", MODELS)
@torch.no_grad()
def test_bfloat16_decodes_as_well_as_it_computes_whole(form, ids):
    """Every layout, those that no stock model can be written as among them."""
    model = MODELS[form]()
    want = model(ids, use_cache=False).logits
    half = copy.deepcopy(model).bfloat16()
    budget = 1.5 * distance(half(ids, use_cache=False).logits, want)
    got = step_by_step(half, ids, torch.ones_like(ids), 12, [1] * 8)
    assert got.dtype == torch.bfloat16
    assert distance(got, want) < budget < 0.2


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_prefill_has_the_sources_width(layout, cached, monkeypatch):
    """No weights of all pairs of tokens, and nothing wider than a head of twice the source's."""
    make, fields = LAYOUTS[layout]
    model, length = make(**fields), 600
    attn, x = model.model.layers[0].self_attn, torch.randn(2, length, 32)
    rope = model.model.rotary_emb(x, torch.arange(length)[None])
    most, head = 2 * 4 * length * 2 * 8, 8
    assert most < length * length
    seen, right = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, *args, **kwargs):
        seen.append([x.shape[-1] for x in (query, key, value)])
        assert kwargs["attn_mask"] is None and kwargs["is_causal"]
        return right(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)

    def largest():
        with tiny.Largest() as found:
            attn(x, rope, None, DynamicCache(config=model.config) if cached else None)
        return found.numel

    model.set_attn_implementation("sdpa")
    assert largest() <= most
    ((query, key, value),) = seen
    assert query == key == value <= 2 * head
    # A component more costs no width: a frequency that it has, once.
    turned, resting = head, 0
    if hasattr(attn, "q_phase"):
        turned = 2 * len(set(model.config.layer_rope_pairs(0)))
        resting = 2 * len(tiny.resting_pairs(model.config, 0))
    rows = model.config.layer_layout(0).endswith("rows")
    assert query == (attn.mfa_head_dim if rows else max(head, resting + turned))
    model.set_attn_implementation("eager")
    assert largest() >= length * length  # the twin


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prefill_of_a_batch_that_is_trained_has_the_sources_width_too(layout):
    make, fields = LAYOUTS[layout]
    model, length = make(**fields).train(), 600
    attn, x = model.model.layers[0].self_attn, torch.randn(2, length, 32)
    rope = model.model.rotary_emb(x, torch.arange(length)[None])
    with tiny.Largest() as found:
        attn(x, rope, None)[0].sum().backward()
    assert found.numel <= 2 * 4 * length * 2 * 8


@pytest.mark.parametrize(("form", "fields"), CASES)
def test_gradients_are_those_of_the_eager_path(form, fields, ids):
    model = MODELS[form](**fields).train()
    grads = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        logits = model(ids, use_cache=False).logits
        grads.append(tiny.gradients(logits.log_softmax(-1), model))
    for name, grad in grads[0].items():
        if name.endswith("k_proj.bias") and not model.config.key_reuse:
            layer = model.get_submodule(name.removesuffix(".k_proj.bias"))
            if not layer.qk_rope_head_dim:
                continue  # the same in all scores of a query: rounding is all it has
        assert error(grads[1][name], grad) < 1e-4, name


@pytest.mark.parametrize("conversion", [{}, {"form": "mla"}, {"format": 1}, {"format": 3}])
@pytest.mark.parametrize("form", CLASSES)
def test_another_format_is_refused_by_both_numbers(form, conversion, tmp_path):
    """Tensors of another layout would be read as this one's, or as missing."""
    config_class = CLASSES[form]["gpt_neox"][0]
    config = config_class.tiny()[0]
    if form.lower() == "gqa" and "format" not in conversion:  # whose layout never changed
        assert config_class(**config.to_dict() | dict(conversion=conversion)).conversion is not None
        return
    found = conversion.get("format", 1)
    with pytest.raises(ValueError, match=f"format {found}, .*format 2") as told:
        config_class(**config.to_dict() | dict(conversion=conversion))
    assert "\n" not in str(told.value)
    config.conversion = {"format": 2}
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).conversion == {"format": 2}
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | dict(conversion=conversion)))
    with pytest.raises(ValueError, match=f"format {found}, .*format 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("form", "fields"), CASES)
def test_gradient_reaches_every_weight_with_and_without_checkpointing(form, fields, ids):
    model = MODELS[form](**fields).train()
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        assert error(grads[1][name], grad) < 1e-5, name


# Run by two processes, which hold a half of the heads each where a form's plan splits them.
HALVES = """
import os, sys
sys.path[:0] = [sys.argv[1]]
import tiny, torch
from transformers import AutoModelForCausalLM

for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    ids, want, grads = torch.load(folder + "/want.pt")
    with torch.no_grad():
        assert tiny.error(model(ids, use_cache=False).logits, want) < 1e-5, folder
        cached = tiny.step_by_step(model, ids, torch.ones_like(ids), 12, [1] * 8)
        assert tiny.error(cached, want) < 1e-5, folder
    model(ids, use_cache=False).logits.square().sum().backward()
    split = 0
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        split += hasattr(grad, "full_tensor") and ".self_attn." in name
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        assert tiny.error(grad, grads[name]) < 1e-4, (folder, name)
    if os.environ["RANK"] == "0":
        print(os.path.basename(folder), split > 0)
"""


def test_tensor_parallel_halves_compute_what_the_whole_does(ids, tmp_path):
    for form, make in MODELS.items():
        model = make(**dict(q_lora_rank=7) if form in tiny.FORMS else dict(share_q_dim=9))
        model.save_pretrained(tmp_path / form)
        logits = model(ids, use_cache=False).logits
        logits.square().sum().backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.save((ids, logits.detach(), grads), tmp_path / form / "want.pt")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--no-python", sys.executable, "-c", HALVES, Path(__file__).parent),
        *(tmp_path / form for form in MODELS),
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    # A rotated key within the latent is every head's: that attention is not split.
    told = [f"{form} {form != 'rope_read'}" for form in MODELS]
    assert done.stdout.splitlines() == told
