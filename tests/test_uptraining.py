"""Uptraining, on models that train in a second."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import folders
import pytest
import sources
import tiny
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM

from rehead.cli import main
from rehead.converters import convert
from rehead.converters.errors import InputError
from rehead.evaluation import load_model
from rehead.modeling.cached_decoding import cache_of
from rehead.uptraining import Interrupted, UptrainConfig, uptrain
from rehead.uptraining import loss as loss_module
from rehead.uptraining.adapters import add_trained, target_names
from rehead.uptraining.data import overlaps, prepare
from rehead.uptraining.distiller import attention_error
from rehead.uptraining.loss import NO_TARGET, Head, chunked_loss
from rehead.uptraining.precision import settle
from rehead.uptraining.states import States, has_plain_head
from rehead.uptraining.teacher import load_teacher
from rehead.uptraining.work import newest

WINDOW, STEPS = 24, 10
TEXT = " ".join(
    f"the {i} quick fox {i * 7 % 113} jumps over {i * i % 257} dogs." for i in range(400)
)
# Attention's parameters that are no linear layer's: none of them is an adapter's.
FACTORS = ("q_phase", "k_synthesis")
UPTRAIN_OPTIONS = {
    *("--data", "--output", "--merge", "--adapter", "--teacher", "--tokens", "--eval-text"),
    *("--eval-windows", "--window", "--target", "--full", "--rank", "--alpha", "--dora"),
    *("--pissa", "--rslora", "--ce-weight", "--match-weight", "--learning-rate", "--warmup"),
    *("--batch", "--micro-batch", "--evaluations", "--seed", "--dtype", "--device"),
    *("--report-to", "--resume", "--force", "--quiet", "--verbose", "--json"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A stock model, an MLA model with the same weights but for the attention's, and a text."""
    path = tmp_path_factory.mktemp("inputs")
    source = folders.save(path / "source", tiny.source(**folders.MODEL_FIELDS))
    for form in tiny.FORMS:
        student = tiny.mla(
            form=form,
            seed=3,
            conversion={"source": str(path / "source"), "format": 2},
            **folders.MODEL_FIELDS,
        )
        kept = {k: v for k, v in source.state_dict().items() if ".self_attn." not in k}
        student.load_state_dict(kept, strict=False)
        folders.save(path / form, student)
    (path / "text.txt").write_text(TEXT)
    return path


def recipe(inputs, model="decoupled", **fields):
    small = dict(
        tokens=STEPS * 4 * WINDOW,
        window=WINDOW,
        batch=4,
        micro_batch=2,
        eval_windows=8,
        evaluations=2,
        rank=4,
        learning_rate=2e-2,
        dtype="float32",
    )
    return UptrainConfig(str(inputs / model), str(inputs / "text.txt"), **small | fields)


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """One run of the default kind, as a model and as an adapter."""
    path = tmp_path_factory.mktemp("trained")
    done = uptrain(recipe(inputs), output=path / "merged")
    adapter = uptrain(recipe(inputs), output=path / "adapter", form="adapter")
    return path, done, adapter


def weights(folder):
    return load_model(folder).state_dict()


def ids(length=20, rows=2):
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(3))


# The loss


def plain_loss(states, weight, targets, other, other_weight, kl_weight, ce_weight):
    scores = linear(states, weight)
    known = targets >= 0
    loss = ce_weight * cross_entropy(scores[known], targets[known])
    if other is None:
        return loss
    likely = log_softmax(linear(other, other_weight), -1)
    each = kl_div(log_softmax(scores, -1), likely, log_target=True, reduction="none").sum(-1)
    return loss + kl_weight * each.mean()


@pytest.mark.parametrize("kind", ["kl", "ce", "both", "alone", "scores"])
def test_the_chunked_loss_and_its_gradient_are_those_of_plain_torch(monkeypatch, kind):
    monkeypatch.setattr(loss_module, "SCORES", 7 * 3)
    torch.manual_seed(0)
    states = torch.randn(11, 5, requires_grad=True)
    weight, other_weight, other = torch.randn(9, 5), torch.randn(8, 6), torch.randn(11, 6)
    targets = torch.randint(0, 8, (11,))
    targets[[3, 10]] = NO_TARGET
    weighted = dict(kl=(1.0, 0.0), ce=(0.0, 1.0), both=(1.0, 0.7), alone=(0.0, 1.0))
    kl_weight, ce_weight = weighted.get(kind, (1.0, 0.3))
    taught = kind != "alone"
    # Eight entries are common to both tables where there are two.
    vocabulary = 8 if taught else 9
    head, teacher_head = Head(weight), Head(other_weight)
    if kind == "scores":
        states = torch.randn(11, 9, requires_grad=True)
        head, weight = Head(None), torch.eye(9)
    expected = plain_loss(
        *(states, weight[:vocabulary], targets),
        *((other, other_weight) if taught else (None, None)),
        *(kl_weight, ce_weight),
    )
    loss, by_token = chunked_loss(
        *(states, head, targets),
        teacher_states=other if taught else None,
        teacher_head=teacher_head if taught else None,
        vocabulary=vocabulary,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
    )
    (gradient,) = torch.autograd.grad(3 * loss, states)
    (wanted,) = torch.autograd.grad(3 * expected, states)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)
    assert (by_token[targets < 0, 1:] == 0).all()
    # The wrong way round, the divergence is another one.
    if kind == "kl":
        wrong = kl_div(
            log_softmax(linear(other, other_weight), -1),
            log_softmax(linear(states, weight[:8]), -1),
            log_target=True,
            reduction="batchmean",
        )
        assert abs(wrong - loss) > 1e-3


def test_a_head_that_scales_its_scores_is_noticed(inputs):
    fields = {k: v for k, v in tiny.BASE.items() if k != "head_dim"}
    scaled = CohereForCausalLM(CohereConfig(**fields, logit_scale=0.25)).eval()
    assert not has_plain_head(scaled, bfloat16=False)
    assert has_plain_head(tiny.source(), bfloat16=False)
    low = tiny.source().requires_grad_(False)
    settle(low, bfloat16=True)
    assert has_plain_head(low, bfloat16=True)


def test_a_scaled_head_trains_on_its_own_scores(inputs, tmp_path):
    fields = {k: v for k, v in (tiny.BASE | folders.MODEL_FIELDS).items() if k != "head_dim"}
    torch.manual_seed(0)
    folders.save(tmp_path / "cohere", CohereForCausalLM(CohereConfig(**fields, logit_scale=0.25)))
    config = replace(recipe(inputs), model=str(tmp_path / "cohere"), teacher="none")
    done = uptrain(config, output=tmp_path / "out")
    model, rows = load_model(tmp_path / "cohere"), prepare(folders.tokenizer(), config).held_out
    batch = rows.rows.long()
    with torch.no_grad():
        scores = model(batch).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(scores, batch[:, 1:].flatten()).exp()
    assert done.before.perplexity == pytest.approx(float(expected), rel=1e-4)
    assert done.after.perplexity < done.before.perplexity


def test_attention_error_is_relative_to_the_teacher():
    one, two = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    last = torch.empty(0)
    error = attention_error(States(last, [3 * one, two]), States(last, [one, two]))
    assert float(error) == pytest.approx(4 / 2)


# The text


def test_what_is_measured_on_is_never_trained_on(inputs, tmp_path):
    rows = torch.arange(40 * 64).view(40, 64)
    held_out = rows[-4:]
    mixed = rows[:-4].clone()
    mixed[5, 10:42] = held_out[2, 20:52]
    assert overlaps(mixed, held_out, 32).nonzero().flatten().tolist() == [5]
    mixed[5, 41] = 0  # one token less in common
    assert not overlaps(mixed, held_out, 32).any()

    # The same file as training and held-out text: what they share is left out.
    data = str(inputs / "text.txt")
    config = recipe(inputs, tokens=10**6)
    same = prepare(folders.tokenizer(), replace(config, eval_text=data))
    assert same.dropped >= 8
    inside = {tuple(row.tolist()) for row in same.held_out.rows}
    assert not inside & {tuple(row.tolist()) for row in same.train.rows}
    # From one text: all windows once, the last ones held out.
    once = prepare(folders.tokenizer(), config)
    assert len(once.held_out) == 8 and len(once.train) % 4 == 0
    both = torch.cat((once.train.rows, once.held_out.rows)).flatten()
    text = torch.tensor(folders.tokenizer()(TEXT)["input_ids"])
    if not once.dropped:
        assert torch.equal(both[: once.train.rows.numel()].long(), text[: once.train.rows.numel()])
    (tmp_path / "short.txt").write_text("too short " * 10)
    with pytest.raises(InputError, match="smaller --batch or --window"):
        prepare(folders.tokenizer(), replace(config, data=str(tmp_path / "short.txt")))


def test_the_same_seed_and_budget_give_the_same_windows(inputs):
    one, two = (prepare(folders.tokenizer(), recipe(inputs)) for _ in range(2))
    assert torch.equal(one.train.rows, two.train.rows)
    assert len(one.train) == STEPS * 4


# The rate


@pytest.mark.parametrize(
    ("steps", "given", "warm_up"),
    [
        (10, None, 2),
        (50, None, 10),
        (200, None, 20),
        (1000, None, 50),
        (1000, 0.0, 0),
        (10, 0.5, 5),
    ],
)
def test_short_runs_warm_up_for_longer(inputs, steps, given, warm_up):
    config = replace(recipe(inputs), tokens=steps * 2 * 32, batch=2, window=32, warmup=given)
    assert (config.steps, config.warmup_steps) == (steps, warm_up)


# The teacher


@pytest.mark.parametrize("bfloat16", [False, True])
def test_the_teacher_holds_only_what_the_student_has_not(inputs, bfloat16):
    config = recipe(inputs).resolved(source=str(inputs / "source"), dtype="float32")
    student = add_trained(load_model(inputs / "decoupled"), config)
    settle(student, bfloat16=bfloat16)
    cpu = torch.device("cpu")
    teacher = load_teacher(str(inputs / "source"), student, device=cpu, bfloat16=bfloat16)
    own = load_teacher(str(inputs / "source"), student, device=cpu, bfloat16=bfloat16, share=False)
    mine = {p.data_ptr() for p in student.parameters()}
    for name, parameter in teacher.model.named_parameters():
        assert (parameter.data_ptr() in mine) == (".self_attn." not in name)
        assert not parameter.requires_grad
    assert own.shared_bytes == 0 < teacher.shared_bytes < teacher.bytes == own.bytes
    with torch.autocast("cpu", enabled=bfloat16), torch.no_grad():
        assert torch.equal(teacher.model(ids()).logits, own.model(ids()).logits)
        if not bfloat16:
            exact = load_model(inputs / "source")(ids()).logits
            torch.testing.assert_close(teacher.model(ids()).logits, exact)


def test_a_full_run_does_not_share_what_it_trains(inputs):
    config = recipe(inputs, "source", full=True, target="all-linear")
    student = add_trained(load_model(inputs / "source"), config)
    cpu = torch.device("cpu")
    teacher = load_teacher(str(inputs / "source"), student, device=cpu, bfloat16=False)
    ours = dict(student.named_parameters())
    for name, parameter in teacher.model.named_parameters():
        assert (parameter.data_ptr() == ours[name].data_ptr()) != ours[name].requires_grad


def test_targets(inputs):
    model = load_model(inputs / "decoupled")
    names = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {n.split(".")[-1] for n in target_names(model, "attention")} == names
    stock = load_model(inputs / "source")
    assert {n.split(".")[-1] for n in target_names(stock, "attention")} == {
        *("q_proj", "k_proj", "v_proj", "o_proj")
    }
    assert "lm_head" not in target_names(model, "all-linear")
    assert len(target_names(model, "all-linear")) == 2 * (4 + 3)
    assert len(target_names(model, r".*\.1\..*kv_b_proj")) == 1
    for target, message in ((".*_head", "the head"), ("attn", "matches no"), ("(", "no regular")):
        with pytest.raises(InputError, match=message):
            target_names(model, target)


# A run


def test_a_run_lowers_the_held_out_divergence_and_keeps_the_rest(inputs, trained):
    path, done, adapter = trained
    assert done.after.kl < 0.95 * done.before.kl
    assert [point.tokens for point in done.curve] == [0, 480, 960]
    assert adapter.after == done.after
    assert done.tokens == STEPS * 4 * WINDOW and done.shared_bytes > 0
    before, after = weights(inputs / "decoupled"), weights(path / "merged")
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == (".self_attn." not in name or name.endswith(("bias", *FACTORS)))
    record = json.loads((path / "merged" / "uptraining.json").read_text())
    assert record["recipe"]["rank"] == 4 and record["recipe"]["teacher"] == str(inputs / "source")
    assert load_model(path / "merged").config.uptraining["after"] == record["after"]
    names = {file.name for file in (path / "merged").iterdir()}
    assert {"families.py", "mla.py", "tokenizer.json", "README.md"} <= names
    assert not list(path.glob(".*"))


def test_the_measured_divergence_is_that_of_the_two_models(inputs, tmp_path):
    # A number of windows that is no multiple of the micro-batch.
    config = recipe(inputs, eval_windows=5, tokens=96, evaluations=1)
    done = uptrain(config, output=tmp_path / "out")
    batch = prepare(folders.tokenizer(), config).held_out.rows.long()
    assert len(batch) == 5
    student, teacher = load_model(inputs / "decoupled"), load_model(inputs / "source")
    with torch.no_grad():
        ours, theirs = (log_softmax(m(batch).logits, -1) for m in (student, teacher))
    kl = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).mean()
    ce = cross_entropy(theirs[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert done.before.kl == pytest.approx(float(kl), rel=1e-4)
    assert done.teacher_perplexity == pytest.approx(math.exp(ce), rel=1e-4)


def decoded(model, batch):
    """Logits with the tokens fed one at a time."""
    cache, rows = None, []
    for index in range(batch.shape[1]):
        out = model(batch[:, index : index + 1], **tiny.cached(model, cache), use_cache=True)
        cache = cache_of(out)
        rows.append(out.logits)
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize("form", list(tiny.FORMS))
def test_no_path_through_the_model_misses_an_adapter(inputs, form, tmp_path):
    for kind in ("merged", "adapter"):
        uptrain(recipe(inputs, form, tokens=384), output=tmp_path / kind, form=kind)
    with torch.no_grad():
        check_paths(inputs / form, tmp_path)


def check_paths(folder, path):
    base = load_model(folder)
    without = base(ids()).logits
    model = PeftModel.from_pretrained(base, str(path / "adapter")).eval()
    merged = load_model(path / "merged")
    full = model(ids(), use_cache=False).logits
    close = dict(rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(decoded(model, ids()), full, **close)
    torch.testing.assert_close(merged(ids()).logits, full, **close)
    torch.testing.assert_close(decoded(merged, ids()), full, **close)
    with torch.enable_grad():
        model.train()
        torch.testing.assert_close(model(ids()).logits.detach(), full, **close)
    # The tolerance tells the adapter, and kv_b_proj's share of it, from nothing.
    assert (without - full).abs().max() > 0.05
    for name, layer in model.eval().named_modules():
        if name.endswith("kv_b_proj"):
            layer.scaling["default"] = 0.0
    assert (decoded(model, ids()) - full).abs().max() > 0.01


@pytest.mark.parametrize("variant", ["dora", "pissa", "rslora"])
def test_peft_variants_train_merge_and_load(inputs, tmp_path, variant):
    config = recipe(inputs, **{variant: True}, tokens=480, evaluations=1, learning_rate=1e-2)
    for form in ("merged", "adapter"):
        done = uptrain(config, output=tmp_path / form, form=form)
    assert done.after.kl < done.before.kl
    model = PeftModel.from_pretrained(load_model(inputs / "decoupled"), str(tmp_path / "adapter"))
    expected = load_model(tmp_path / "merged")(ids()).logits
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-3, atol=2e-4)


def test_full_training_changes_the_attention_alone(inputs, tmp_path):
    config = recipe(inputs, full=True, learning_rate=5e-3, match_weight=0.1, ce_weight=0.1)
    done = uptrain(config, output=tmp_path / "out")
    assert done.after.kl < done.before.kl
    before, after = weights(inputs / "decoupled"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {n for n in before if ".self_attn." in n}
    assert {n for n in changed if n.endswith(FACTORS)}
    with pytest.raises(InputError, match="--full trains no adapter"):
        uptrain(config, output=tmp_path / "other", form="adapter")


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_merged_heads_that_are_normalised_train_in_the_familys_own_class(
    inputs, tmp_path, family, full
):
    source = folders.save(tmp_path / "source", sources.model(family, num_key_value_heads=4))
    text = str(inputs / "text.txt")
    made = dict(output=tmp_path / "gqa", calibration=text, samples=4, heal=0)
    convert(str(tmp_path / "source"), to="gqa", **made)
    config = recipe(inputs, full=full, learning_rate=2e-3 if full else 2e-2)
    config = replace(config, model=str(tmp_path / "gqa"))
    done = uptrain(config, output=tmp_path / "out")
    assert done.after.kl < 0.95 * done.before.kl
    found = load_model(tmp_path / "out")
    assert type(found) is type(source)
    assert found.config.num_key_value_heads == 2


def test_without_a_teacher_it_trains_on_the_text(inputs, tmp_path):
    done = uptrain(
        recipe(inputs, "source", teacher="none", target="all-linear"), output=tmp_path / "out"
    )
    assert done.after.perplexity < done.before.perplexity
    assert (done.after.kl, done.teacher_perplexity, done.shared_bytes) == (None, None, 0)
    with pytest.raises(InputError, match="Give --teacher MODEL, or --teacher none"):
        uptrain(recipe(inputs, "source"), output=tmp_path / "other")


def test_bfloat16_follows_float32(inputs, trained, tmp_path):
    done = uptrain(recipe(inputs, dtype="bfloat16"), output=tmp_path / "out")
    assert done.after.kl == pytest.approx(trained[1].after.kl, rel=0.05)
    # What is not trained is written as it was, not as it was rounded for training.
    before, after = weights(inputs / "decoupled"), weights(tmp_path / "out")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert torch.equal(
        before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )


# Interruption


class Killed(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"full": True}, {"pissa": True}])
def test_a_resumed_run_gives_the_same_result(inputs, tmp_path, options):
    config = recipe(inputs, **options)
    uptrain(config, output=tmp_path / "whole")

    def kill(stage, done, total, info):
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        uptrain(config, output=tmp_path / "out", progress=kill)
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.uptrain"
    assert newest(work).name == "checkpoint-5"
    # A checkpoint that a kill cut short is not used.
    (work / "checkpoint-7").mkdir()
    with pytest.raises(InputError, match=r"interrupted at step 5\. Give --resume"):
        uptrain(config, output=tmp_path / "out")
    with pytest.raises(InputError, match="had another --rank"):
        uptrain(replace(config, rank=5), output=tmp_path / "out", resume=True)
    text = inputs / "text.txt"
    text.write_text(TEXT.upper())
    with pytest.raises(InputError, match="has changed since"):
        uptrain(config, output=tmp_path / "out", resume=True)
    text.write_text(TEXT)
    seen = []
    done = uptrain(
        config,
        output=tmp_path / "out",
        resume=True,
        progress=lambda stage, done, *_: seen.append(done),
    )
    assert min(seen) > 5
    assert not work.exists()
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert [point.tokens for point in done.curve] == [0, 480, 960]


@pytest.fixture
def heeded_interrupts():
    """A shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
def test_a_signal_saves_and_the_run_goes_on_from_there(inputs, tmp_path, trained):
    def interrupt(stage, done, total, info):
        if done == 7 and signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"after step 7 of 10.*--resume"):
        uptrain(recipe(inputs), output=tmp_path / "out", progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert newest(tmp_path / ".out.uptrain").name == "checkpoint-7"
    # Fewer windows at a time give the same numbers.
    config = recipe(inputs, micro_batch=1)
    uptrain(config, output=tmp_path / "out", resume=True)
    whole, resumed = weights(trained[0] / "merged"), weights(tmp_path / "out")
    for name in whole:
        torch.testing.assert_close(whole[name], resumed[name], rtol=1e-3, atol=1e-4)


# Mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(full=True, dora=True), "--full trains no adapter, so --dora"),
        (dict(dora=True, pissa=True), "Give one"),
        (dict(teacher="none", match_weight=1.0), "--match-weight compares"),
        (dict(teacher="none", ce_weight=0.0), "nothing to train on"),
        (dict(batch=3), "not divided by 1 processes of --micro-batch 2"),
        (dict(dtype="float16"), "bfloat16 or float32"),
        (dict(learning_rate=1e30), "lower --learning-rate"),
        (dict(teacher="no/such/model"), "no such file"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(inputs, tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        uptrain(recipe(inputs, **fields), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_other_tokens_is_refused(inputs, tmp_path):
    folders.save(tmp_path / "other", tiny.source(**folders.MODEL_FIELDS))
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace("<|end|>", "<|stop|>"))
    with pytest.raises(InputError, match=r"tokenizers of .* differ"):
        uptrain(recipe(inputs, teacher=str(tmp_path / "other")), output=tmp_path / "out")


@pytest.mark.parametrize(("micro", "flag"), [(2, "Lower --micro-batch, 2"), (1, "lower --window")])
def test_running_out_of_memory_names_the_flag(inputs, tmp_path, monkeypatch, micro, flag):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("rehead.uptraining.distiller.chunked_loss", fail)
    with pytest.raises(InputError, match=flag):
        uptrain(recipe(inputs, micro_batch=micro), output=tmp_path / "out")


def test_existing_output_is_replaced_only_by_force(inputs, trained, tmp_path):
    config = recipe(inputs, tokens=96, evaluations=1)
    for form in ("merged", "adapter"):
        uptrain(config, output=tmp_path / form, form=form)
        with pytest.raises(InputError, match="--force to replace"):
            uptrain(config, output=tmp_path / form, form=form)
        uptrain(config, output=tmp_path / form, form=form, force=True)
    with pytest.raises(InputError, match="holds the source"):
        uptrain(config, output=inputs / "decoupled", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "adapter"}


# The command line and several processes


def arguments(inputs, output, *more):
    config = recipe(inputs)
    names = ("tokens", "window", "batch", "eval_windows", "evaluations", "rank", "dtype")
    options = {name: getattr(config, name) for name in names}
    options |= {"learning_rate": 0.02, "micro_batch": 2, "data": config.data, "output": output}
    flags = [part for k, v in options.items() for part in (f"--{k.replace('_', '-')}", str(v))]
    return [config.model, *flags, *more]


def test_the_command_line(inputs, tmp_path, capsys, trained, monkeypatch):
    code = main.run(main.app, "rehead", ["uptrain", *arguments(inputs, tmp_path / "out", "--json")])
    out, err = capsys.readouterr()
    assert code == 0
    result = json.loads(out)
    assert result["after"] == {"tokens": 960} | result["after"]
    assert result["after"]["kl"] == trained[1].after.kl
    assert {"output", "tokens", "tokens_per_second", "peak_rss_bytes", "recipe"} <= set(result)
    code = main.run(main.app, "rehead", ["uptrain", *arguments(inputs, tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (code, out) == (2, "") and len(err.split("rehead: ")) == 2 and "--force" in err
    monkeypatch.setenv("COLUMNS", "200")
    main.run(main.app, "rehead", ["uptrain", "--help"])
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", capsys.readouterr().out))
    assert shown == UPTRAIN_OPTIONS | {"--help"}


def test_an_interrupted_command_says_how_to_go_on(inputs, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **options):
        raise Interrupted(signal.SIGTERM, "stopped after step 3 of 9; --resume goes on.")

    monkeypatch.setattr("rehead.uptraining.uptrain", interrupted)
    code = main.run(main.app, "rehead", ["uptrain", *arguments(inputs, tmp_path / "out")])
    assert code == 143 and "--resume goes on" in capsys.readouterr().err


def test_two_processes_do_what_one_does(inputs, tmp_path, trained):
    """A half of each batch in each, by gloo.

    Started by what `accelerate launch` runs on GPUs; on a CPU it starts one process alone.
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "rehead.uptraining"),
        *arguments(inputs, tmp_path / "out", "--json"),
    ]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    both, one = json.loads(done.stdout), trained[1]
    assert both["steps"] == one.steps
    for mine, theirs in zip(one.curve, both["curve"], strict=True):
        assert theirs["kl"] == pytest.approx(mine.kl, rel=1e-4)
        assert theirs["perplexity"] == pytest.approx(mine.perplexity, rel=1e-4)
    alone, shared = weights(trained[0] / "merged"), weights(tmp_path / "out")
    for name in alone:
        torch.testing.assert_close(alone[name], shared[name], rtol=1e-3, atol=1e-4)
    assert Path(tmp_path / "out" / "uptraining.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.uptraining
