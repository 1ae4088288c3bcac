"""What the classes of every form owe to those who load, train and look into them."""

import copy
from functools import partial

import pytest
import tiny
import torch
from tiny import error, step_by_step
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from rehead.modeling import GQA_CLASSES, MFA_CLASSES, MLA_CLASSES
from rehead.modeling.cached_decoding import cache_of

MODELS = {form: partial(tiny.mla, form=form) for form in tiny.FORMS}
MODELS |= {form: partial(tiny.mfa, form=form) for form in tiny.MFA_FORMS}
EXACT = {form: partial(tiny.exact, form=form) for form in tiny.FORMS}
EXACT |= {form: partial(tiny.exact_mfa, form=form) for form in tiny.MFA_FORMS}
CASES = [*tiny.CASES, *((form, f) for form in tiny.MFA_FORMS for f in tiny.MFA_VARIANTS)]


CLASSES = {"mla": MLA_CLASSES, "mfa": MFA_CLASSES, "gqa": GQA_CLASSES}


@pytest.mark.parametrize(
    "form, family", [(form, family) for form, families in CLASSES.items() for family in families]
)
def test_a_config_of_defaults_has_the_familys_head_width(form, family):
    """transformers makes one to see what differs from it, 5.16 whenever a model is saved."""
    source = CONFIG_MAPPING[family]()
    width = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    assert CLASSES[form][family][0]().head_dim == width


@pytest.mark.parametrize("form", MODELS)
@torch.no_grad()
def test_attentions_are_recorded_and_sum_to_one(form, ids):
    model = MODELS[form]()
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
    fields = tiny.UNEVEN[form] | tiny.BIASES if form in tiny.FORMS else tiny.MFA_VARIANTS[1]
    model = MODELS[form](family, rope_parameters=tiny.ROPE_TYPES["yarn"], **fields)
    model.config.conversion = {"form": form, "kv_budget": 0.5}
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
    modules = (*shared, *forms, "families", "read_kernel", "rope_slots")
    assert code == {f"{name}.py" for name in modules}
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", *code):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("family", "form"),
    [("llama", "decoupled"), ("qwen2", "on_read"), ("mistral", "mfa"), ("qwen2", "mfa_kr")],
)
def test_checkpoint_carries_its_code(family, form, ids, tmp_path):
    """In a process that cannot import rehead."""
    tiny.load_without_rehead(MODELS[form](family), ids, tmp_path)


@pytest.mark.parametrize("form", MODELS)
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
