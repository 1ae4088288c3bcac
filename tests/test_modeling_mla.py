"""The MLA classes against a naive fp64 reference, the stock classes, and themselves."""

import copy
import itertools
from functools import partial

import peft
import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import block_output, error, step_by_step, turn
from transformers import AutoModelForCausalLM, StaticCache

from rehead.modeling import (
    LlamaMLAConfig,
    MLAAttention,
    rope_slots,
)
from rehead.modeling import mfa as mfa_module
from rehead.modeling import mla as mla_module
from rehead.modeling.cached_decoding import cache_of
from rehead.modeling.converted_attention import ConvertedAttention

FAMILIES, FORMS = list(tiny.SOURCES), list(tiny.FORMS)


def naive(
    attn: MLAAttention, x: torch.Tensor, inv_freq: torch.Tensor, twist: str = ""
) -> torch.Tensor:
    """The block's output [T, hidden] on x [T, hidden], one head and one pair of tokens at a time.

    `twist` breaks one thing on purpose: "frequency", "heads" or "scaling".
    """
    c, f = attn.config, copy.deepcopy(attn).double()
    x, inv_freq = x.double(), inv_freq.double()
    heads, groups = c.num_attention_heads, c.num_key_value_heads
    r, n, v = f.kv_lora_rank, c.qk_nope_head_dim, c.v_head_dim
    q = f.q_proj(x) if c.q_lora_rank is None else f.q_b_proj(f.q_a_proj(x))
    q = q.view(len(x), heads, -1)
    a = f.kv_a_proj_with_mqa(x)
    b = f.kv_b_proj(a[:, :r]).view(len(x), groups, n + v)
    whole = c.rope_on_read and not f.qk_rope_head_dim
    key = a[:, r:]
    if f.reads_rope:
        key = a[:, r - f.qk_rope_head_dim :] + f.k_rope_bias
        key = torch.cat((key[:, 0::2], key[:, 1::2]), dim=1)
    shared = inv_freq if whole else inv_freq[c.layer_rope_pairs(f.layer_idx)]
    if twist == "frequency":
        shared = shared.roll(1) if whole else inv_freq[: len(shared)].flip(0)
    scale = 1.0 if twist == "scaling" else c.head_dim**-0.5
    out = []
    for t in range(len(x)):
        parts = []
        for h in range(heads):
            g = h % groups if twist == "heads" else h // (heads // groups)
            scores = []
            for s in range(t + 1):
                if whole:
                    score = turn(q[t, h], t * shared) @ turn(b[s, g, :n], s * shared)
                else:
                    score = q[t, h, :n] @ b[s, g, :n]
                    score = score + turn(q[t, h, n:], t * shared) @ turn(key[s], s * shared)
                scores.append(score * scale)
            parts.append(torch.stack(scores).softmax(0) @ b[: t + 1, g, n:])
        out.append(torch.cat(parts))
    return f.o_proj(torch.stack(out))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("form", "fields"), tiny.CASES)
@torch.no_grad()
def test_block_equals_naive_reference_and_no_twin_does(form, fields, implementation):
    model = tiny.mla(form=form, **fields)
    inv_freq = model.model.rotary_emb.inv_freq
    for layer_idx, layer in enumerate(model.model.layers):
        x = torch.randn(1, 7, 32)
        got = block_output(model, layer_idx, x, implementation)[0]
        assert error(got, naive(layer.self_attn, x[0], inv_freq)) < 2e-6
        for twist in ("frequency", "heads", "scaling"):
            if (
                twist == "frequency"
                and form == "decoupled"
                and not layer.self_attn.rope_index.numel()
            ):
                continue
            assert error(got, naive(layer.self_attn, x[0], inv_freq, twist)) > 1e-2


@pytest.mark.parametrize("rope_type", list(tiny.ROPE_TYPES))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lossless_layout_equals_the_stock_model(family, form, rope_type, ids, left_padding):
    """Every pair of every head kept is the identity, for any kind of RoPE, cached or not."""
    stock = tiny.source(family, rope_parameters=tiny.ROPE_TYPES[rope_type])
    ours = tiny.exact(stock, family, form)
    positions = tiny.positions_of(left_padding)
    want = stock(ids, attention_mask=left_padding, position_ids=positions).logits
    real = left_padding.bool()
    assert (
        error(
            ours(ids, attention_mask=left_padding, position_ids=positions).logits[real], want[real]
        )
        < 1e-5
    )
    cached = step_by_step(ours, ids, left_padding, 15, [1, 1, 3])
    assert error(cached[real], want[real]) < 1e-5
    if rope_type == "longrope":  # past the length at which the long factors take over
        long = ids.repeat(1, 2)
        assert error(ours(long).logits, stock(long).logits) < 1e-5
        short = tiny.source(family, rope_parameters=tiny.ROPE_TYPES["default"])
        short.load_state_dict(stock.state_dict())
        assert error(ours(long).logits, short(long).logits) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("form", "fields"), tiny.CASES)
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(
    form, fields, implementation, ids, left_padding, monkeypatch
):
    model = tiny.mla(form=form, **fields)
    model.set_attn_implementation(implementation)
    real = left_padding.bool()
    positions = tiny.positions_of(left_padding)
    want = model(ids, attention_mask=left_padding, position_ids=positions, use_cache=False).logits[
        real
    ]
    assert error(step_by_step(model, ids, left_padding, 14, [1, 1, 4])[real], want) < 1e-5
    tiny.absorb(monkeypatch, MLAAttention, False)
    assert error(step_by_step(model, ids, left_padding, 14, [1, 1, 4])[real], want) < 1e-5
    monkeypatch.setattr(rope_slots, "CPU_CHUNK", 3)
    tiny.absorb(monkeypatch, MLAAttention, True)
    got = step_by_step(model, ids, left_padding, 14, [1, 1, 4])[real]
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_absorbed_long_context_equals_expanded(form, monkeypatch):
    """Over several chunks of keys and thousands of slots."""
    model = tiny.mla(form=form, num_hidden_layers=1, rope_pairs=None, max_position_embeddings=4096)
    ids = torch.randint(3, 61, (1, 2500))
    prefill = model(ids[:, :-1])
    got = model(ids[:, -1:], **tiny.cached(model, copy.deepcopy(cache_of(prefill)))).logits
    tiny.absorb(monkeypatch, MLAAttention, False)
    want = model(ids[:, -1:], **tiny.cached(model, cache_of(prefill))).logits
    assert not torch.equal(got, want)  # two ways were taken
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make", [partial(tiny.mla, form="rope_read"), partial(tiny.mfa, form="mfa_kr")]
)
@torch.no_grad()
def test_scores_made_apart_are_those_of_the_widened_rows(
    make, dtype, implementation, ids, left_padding, monkeypatch
):
    """Also no further from float32 than those are; a scale that is left out shows."""
    exact = make()
    model = copy.deepcopy(exact).to(dtype)
    for each in (exact, model):
        each.set_attn_implementation(implementation)

    def steps(each):
        return step_by_step(each, ids, left_padding, 14, [1] * 6)[left_padding.bool()].float()

    monkeypatch.setattr(ConvertedAttention, "_scores_apart", staticmethod(lambda query: False))
    want, widened = steps(exact), steps(model)
    monkeypatch.undo()
    used = []
    right = rope_slots.turned_scores
    for module in (mla_module, mfa_module):
        monkeypatch.setattr(
            module, "turned_scores", lambda *args: (used.append(1), right(*args))[1]
        )
    got = steps(model)
    assert used
    assert error(got, want) <= max(1e-5, 1.2 * error(widened, want))
    for module in (mla_module, mfa_module):
        monkeypatch.setattr(module, "turned_scores", lambda *args: right(*args[:-1], 1.0))
    assert error(steps(model), want) > max(1e-2, 2 * error(widened, want))


@torch.no_grad()
def test_wrong_slot_shows(ids, monkeypatch):
    """The twin of the two tests above: a query one slot off must fail their tolerance."""
    model, ones = tiny.mla(form="on_read"), torch.ones_like(ids)
    want = model(ids, use_cache=False).logits
    right = rope_slots.slot_scores
    monkeypatch.setattr(
        mla_module,
        "slot_scores",
        lambda *args: right(*args[:4], args[4] + 1, args[5]),
    )
    assert error(step_by_step(model, ids, ones, 14, [1] * 6), want) > 1e-2


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decode_step_forms_nothing_as_large_as_the_cache(form, monkeypatch):
    for name in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(rope_slots, name, 64)
    model = tiny.mla(form=form)
    attn, length = model.model.layers[0].self_attn, 1000
    rows = torch.randn(2, 1, length, attn.kv_a_proj_with_mqa.out_features)
    full = tiny.FullCache(rows, rows[..., :0])
    x = torch.randn(2, 1, 32)
    rope = model.model.rotary_emb(x, torch.tensor([[length - 1]]))
    with tiny.Largest() as absorbed:
        attn(x, rope, None, full)
    tiny.absorb(monkeypatch, MLAAttention, False)
    with tiny.Largest() as expanded:
        attn(x, rope, None, full)
    # The scores, heads * length, are all there is.
    assert absorbed.numel <= 2 * 4 * length < rows.numel() <= expanded.numel


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_cache_holds_the_latent_and_the_rotated_key_alone(form, ids):
    model = tiny.mla(form=form, **tiny.UNEVEN[form])
    cache = cache_of(model(ids))
    for i, layer in enumerate(cache.layers):
        held = sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
        rank, rotated = model.config.layer_dims(i)
        width = rank if model.config.rope_on_read else rank + rotated
        assert held == ids.numel() * width * 4


@pytest.mark.parametrize("kind", tiny.GENERATE)
@pytest.mark.parametrize("form", FORMS)
def test_generate_agrees_with_and_without_cache(form, kind, ids, left_padding):
    with_cache, without = tiny.generated(
        tiny.mla(form=form), ids, left_padding, **tiny.GENERATE[kind]
    )
    assert with_cache.shape == (2, 32)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_static_cache_and_compiled_decode_equal_the_full_forward(form, ids):
    torch.compiler.reset()
    model = tiny.mla(form=form)
    want = model(ids, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=32)
    got = [model(ids[:, :12], **tiny.cached(model, cache)).logits]
    step = torch.compile(model, backend="eager", fullgraph=True)
    for t in range(12, 20):
        got.append(step(ids[:, t : t + 1], **tiny.cached(model, cache)).logits)
    assert error(torch.cat(got, dim=1), want) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_decode_absorbs_and_training_does_not(form, ids, monkeypatch):
    calls = []
    for name in ("_absorbed", "_expanded"):
        original = getattr(MLAAttention, name)

        def spy(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(MLAAttention, name, spy)
    model = tiny.mla(form=form)

    def taken(context, cache=None, **kwargs):
        calls.clear()
        with context:
            out = model(**tiny.cached(model, cache), **kwargs)
        return set(calls), cache_of(out)

    prefill, cache = taken(torch.no_grad(), input_ids=ids)
    assert prefill == {"_expanded"}
    step = dict(input_ids=ids[:, :1])
    assert taken(torch.no_grad(), copy.deepcopy(cache), **step)[0] == {"_absorbed"}
    assert taken(torch.inference_mode(), copy.deepcopy(cache), **step)[0] == {"_absorbed"}
    assert taken(torch.enable_grad(), copy.deepcopy(cache), **step)[0] == {"_expanded"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert taken(torch.no_grad(), input_ids=ids)[0] == {"_expanded"}
    hook = model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *_: None)
    assert "_expanded" in taken(torch.no_grad(), cache, **step)[0]
    hook.remove()


@torch.no_grad()
def test_config_alone_writes_what_loading_needs(ids, tmp_path):
    """A converter that streams weights never builds the model that would save itself."""
    stock = tiny.source(rope_parameters=tiny.ROPE_TYPES["llama3"])
    model = tiny.exact(stock, "llama", "on_read")
    model.config.architectures = ["LlamaMLAForCausalLM"]
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert {p.name for p in tmp_path.glob("*.py")} == {
        "cached_decoding.py",
        "converted_attention.py",
        "converted_config.py",
        "converted_model.py",
        "families.py",
        "gqa.py",
        "gqa_config.py",
        "mfa.py",
        "mfa_config.py",
        "mla.py",
        "mla_config.py",
        "read_kernel.py",
        "rope_slots.py",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(loaded.config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_unmerged_adapter_counts_in_every_path(form, ids):
    plain = tiny.mla(form=form)
    without = plain(ids).logits
    torch.manual_seed(3)
    model = peft.get_peft_model(
        plain,
        peft.LoraConfig(
            r=3, target_modules=r".*self_attn\.(kv_b_proj|q_proj|o_proj)", init_lora_weights=False
        ),
    ).eval()
    want = model(ids, use_cache=False).logits
    assert error(want, without) > 1e-2
    ones = torch.ones_like(ids)
    assert error(step_by_step(model, ids, ones, 12, [1] * 8), want) < 1e-5
    with torch.enable_grad():
        assert error(model.train()(ids).logits, want) < 1e-5
    with model.eval().disable_adapter():
        assert error(step_by_step(model, ids, ones, 12, [1] * 8), without) < 1e-5
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].self_attn.kv_b_proj) is torch.nn.Linear
    assert error(step_by_step(merged, ids, ones, 12, [1] * 8), want) < 1e-5


def test_changed_weights_are_seen_by_the_next_step(ids):
    """Nothing derived from the weights is kept from one step to the next."""
    for form, inference in itertools.product(FORMS, (torch.no_grad, torch.inference_mode)):
        model = tiny.mla(form=form)
        with inference():
            step_by_step(model, ids, torch.ones_like(ids), 12, [1] * 8)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.kv_b_proj.weight.mul_(-0.5)
        with inference():
            want = model(ids, use_cache=False).logits
            assert error(step_by_step(model, ids, torch.ones_like(ids), 12, [1] * 8), want) < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(rope_pairs=[[0, 1, 2]]), "rope_pairs has 1 lists for num_hidden_layers=2"),
        (dict(rope_pairs=[[0, 1], [0, 1, 2]]), r"rope_pairs\[0\] has 2 entries.*needs 3"),
        (dict(rope_pairs=[[0, 1, 4], [0, 1, 2]]), r"rope_pairs\[0\] spans 0 to 4.*0 to 3"),
        (dict(rope_pairs=[[0, 1, 2], [0, -1, 2]]), r"rope_pairs\[1\] spans -1 to 2"),
        (dict(kv_lora_rank_per_layer=[12]), "kv_lora_rank_per_layer has 1 entries"),
        (dict(kv_lora_rank_per_layer=[12, 0]), "kv_lora_rank_per_layer spans 0 to 12"),
        (dict(kv_lora_rank_per_layer=[8, 9]), "largest entry must be kv_lora_rank=12"),
        (dict(qk_rope_head_dim_per_layer=[6, 8]), "largest entry must be qk_rope_head_dim=6"),
        (dict(qk_rope_head_dim_per_layer=[6, 3]), "qk_rope_head_dim=3 of layer 1 must be even"),
        (dict(qk_rope_head_dim=-2, rope_pairs=None), "must be even, 0 or more"),
        (dict(qk_rope_head_dim=0, rope_pairs=None, qk_nope_head_dim=0), "neither rotated nor"),
        (dict(kv_lora_rank=0), "kv_lora_rank=0 must be at least 1"),
        (dict(q_lora_rank=0), "q_lora_rank=0 must be None or at least 1"),
        (dict(num_key_value_heads=3), "not a multiple of num_key_value_heads=3"),
        (
            dict(rope_on_read=True, qk_rope_head_dim=0, rope_pairs=None),
            "qk_nope_head_dim=10 to be the source's head_dim=8",
        ),
        (
            dict(rope_on_read=True, kv_lora_rank=4, qk_nope_head_dim=8),
            "qk_rope_head_dim=6 of layer 0 must not exceed its kv_lora_rank=4",
        ),
        (
            dict(
                rope_parameters=dict(rope_type="default", rope_theta=1.0, partial_rotary_factor=0.5)
            ),
            "partial_rotary_factor",
        ),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        LlamaMLAConfig(**tiny.BASE | tiny.DECOUPLED | fields)
    assert "\n" not in str(caught.value)


def test_config_defaults_and_plans():
    config = LlamaMLAConfig()
    assert config.layer_rope_pairs(0) == list(range(32))
    assert config.qk_head_dim == 192
    plan = config.base_model_tp_plan
    assert plan["layers.*.self_attn.kv_a_proj_with_mqa"] == "mla_kv_a_proj"
    assert plan["layers.*.mlp.down_proj"] == "rowwise"
    assert "layers.*.self_attn.k_proj" not in plan
    names = {name.rpartition(".")[0] for name in MLAAttention(config, 0).state_dict()}
    assert names == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}


def test_rotated_key_in_kv_b_proj_keeps_attention_whole_under_tensor_parallelism():
    config = LlamaMLAConfig(rope_on_read=True, head_dim=128)
    assert not any("self_attn" in name for name in config.base_model_tp_plan)
    assert config.base_model_tp_plan["layers.*.mlp.down_proj"] == "rowwise"
    assert "base_model_tp_plan" not in config.to_dict()
    assert "layers.*.self_attn.kv_b_proj" in LlamaMLAConfig().base_model_tp_plan
