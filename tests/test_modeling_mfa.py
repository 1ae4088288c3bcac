"""The MFA classes against a naive fp64 reference, the stock classes, and themselves."""

import copy

import peft
import pytest
import tiny
import torch
from tiny import block_output, error, step_by_step, turn
from transformers import StaticCache

from rehead.modeling import (
    LORA_TARGET_MODULES,
    LlamaMFAConfig,
    LlamaMFAForCausalLM,
    MFAAttention,
    rope_slots,
)
from rehead.modeling.cached_decoding import cache_of

FAMILIES, FORMS = list(tiny.SOURCES), list(tiny.MFA_FORMS)


def naive(
    attn: MFAAttention, x: torch.Tensor, inv_freq: torch.Tensor, twist: str = ""
) -> torch.Tensor:
    """The block's output [T, hidden] on x [T, hidden], one head and one pair of tokens at a time.

    `twist` breaks one thing on purpose: a key one slot off ("slot"), pairs of neighbours ("layout")
    or frequencies in another order, the "scaling" by C, no "alpha", values of "rotated" keys.
    """
    c, f = attn.config, copy.deepcopy(attn).double()
    x, freqs = x.double(), inv_freq.double()[c.layer_rope_pairs(attn.layer_idx)]
    width, still = f.mfa_head_dim, f.mfa_head_dim - f.qk_rope_head_dim
    q = f.q_proj(x)
    if c.use_inter_norm:
        q = q / (q.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * f.inter_norm.weight
    q, k = f.wq(q).view(len(x), -1, width), f.k_proj(x)
    if twist == "frequency":
        freqs = freqs.roll(1)

    def placed(vector, position):
        tail = vector[still:]
        if twist == "layout":
            tail = tail.view(-1, 2).T.flatten()
        return torch.cat((vector[:still], turn(tail, position * freqs)))

    keys = torch.stack([placed(row, s + (twist == "slot")) for s, row in enumerate(k)])
    if c.key_reuse:
        read = keys if twist == "rotated" else k
        alpha = torch.ones(width) if twist == "alpha" else f.kr_alpha
        value = read + (read @ f.kr_proj.weight.T) * alpha
    else:
        value = f.v_proj(x)
    scale = (width if twist == "scaling" else c.head_dim) ** -0.5
    out = []
    for t in range(len(x)):
        parts = []
        for h in range(c.num_attention_heads):
            scores = [placed(q[t, h], t) @ keys[s] * scale for s in range(t + 1)]
            parts.append(torch.stack(scores).softmax(0) @ value[: t + 1])
        out.append(torch.cat(parts))
    return f.o_proj(torch.stack(out))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", tiny.MFA_VARIANTS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_block_equals_naive_reference_and_no_twin_does(form, fields, implementation):
    model = tiny.mfa(form=form, **fields)
    inv_freq = model.model.rotary_emb.inv_freq
    for layer_idx, layer in enumerate(model.model.layers):
        attn, x = layer.self_attn, torch.randn(1, 7, 32)
        got = block_output(model, layer_idx, x, implementation)[0]
        assert error(got, naive(attn, x[0], inv_freq)) < 2e-6
        twists = ["scaling"]
        if attn.qk_rope_head_dim:
            twists += ["slot", "layout", "frequency"]
        if form == "mfa_kr":
            twists += ["alpha"] + ["rotated"] * bool(attn.qk_rope_head_dim)
        for twist in twists:
            assert error(got, naive(attn, x[0], inv_freq, twist)) > 1e-2, twist


@pytest.mark.parametrize("rope_type", list(tiny.ROPE_TYPES))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lossless_layout_equals_the_stock_model(family, form, rope_type, ids, left_padding):
    """All KV heads side by side in one are the identity, for any kind of RoPE, cached or not."""
    stock = tiny.source(family, rope_parameters=tiny.ROPE_TYPES[rope_type])
    ours = tiny.exact_mfa(stock, family, form)
    padded = dict(attention_mask=left_padding, position_ids=tiny.positions_of(left_padding))
    want, real = stock(ids, **padded).logits, left_padding.bool()
    assert error(ours(ids, **padded).logits[real], want[real]) < 1e-5
    cached = step_by_step(ours, ids, left_padding, 15, [1, 1, 3])
    assert error(cached[real], want[real]) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", tiny.MFA_VARIANTS)
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(
    form, fields, implementation, ids, left_padding, monkeypatch
):
    yarn = tiny.ROPE_TYPES["yarn"]  # its factor is for the rotated part alone
    model = tiny.mfa(form=form, rope_parameters=yarn, **fields)
    model.set_attn_implementation(implementation)
    real, positions = left_padding.bool(), tiny.positions_of(left_padding)
    want = model(ids, attention_mask=left_padding, position_ids=positions, use_cache=False).logits

    def steps():
        return error(step_by_step(model, ids, left_padding, 14, [1, 1, 4])[real], want[real])

    assert steps() < 1e-5
    tiny.absorb(monkeypatch, MFAAttention, False)
    assert steps() < 1e-5
    monkeypatch.setattr(rope_slots, "GPU_CHUNK", 3)
    tiny.absorb(monkeypatch, MFAAttention, True)
    assert steps() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decode_over_long_context_equals_expanded(form, monkeypatch):
    """Over several chunks of keys and thousands of slots."""
    model = tiny.mfa(form=form, num_hidden_layers=1, rope_pairs=None, max_position_embeddings=4096)
    ids = torch.randint(3, 61, (1, 2500))
    prefill = model(ids[:, :-1])
    got = model(ids[:, -1:], **tiny.cached(model, copy.deepcopy(cache_of(prefill)))).logits
    tiny.absorb(monkeypatch, MFAAttention, False)
    want = model(ids[:, -1:], **tiny.cached(model, cache_of(prefill))).logits
    assert error(got, want) < 1e-5


@torch.no_grad()
def test_wrong_slot_shows(ids, monkeypatch):
    """The twin of the two tests above: a query one slot off must fail their tolerance."""
    model, ones = tiny.mfa(form="mfa_kr"), torch.ones_like(ids)
    want = model(ids, use_cache=False).logits
    right = MFAAttention._turned_at
    monkeypatch.setattr(MFAAttention, "_turned_at", lambda self, q, s, a: right(self, q, s + 1, a))
    assert error(step_by_step(model, ids, ones, 17, [1] * 3), want) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decode_step_forms_nothing_as_large_as_the_cache(form, implementation, monkeypatch):
    model = tiny.mfa(form=form)
    model.set_attn_implementation(implementation)
    attn, length = model.model.layers[0].self_attn, 1000
    rows = torch.randn(2, 1, length, 11)
    full = tiny.FullCache(rows, rows[..., :0] if form == "mfa_kr" else torch.randn_like(rows))
    x = torch.randn(2, 1, 32)
    rope = model.model.rotary_emb(x, torch.tensor([[length - 1]]))
    with tiny.Largest() as absorbed:
        attn(x, rope, None, full)
    # The scores, heads * length, are all there is; of rows that turn, every row once more.
    most = rows.numel() if form == "mfa_kr" else 2 * 4 * length
    assert absorbed.numel <= most <= rows.numel()
    if implementation == "eager":
        tiny.absorb(monkeypatch, MFAAttention, False)
        with tiny.Largest() as expanded:
            attn(x, rope, None, full)
        assert most < expanded.numel


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_cache_holds_one_key_and_one_value_or_the_latent_alone(form, ids):
    model = tiny.mfa(form=form, **tiny.MFA_UNEVEN)
    cache = cache_of(model(ids))
    for width, layer in zip(tiny.MFA_UNEVEN["mfa_head_dim_per_layer"], cache.layers, strict=True):
        assert layer.keys.numel() == ids.numel() * width
        assert layer.values.numel() == (0 if form == "mfa_kr" else ids.numel() * width)


CHUNKED = dict(do_sample=False, cache_implementation="static", prefill_chunk_size=8)


@pytest.mark.parametrize("kind", [*tiny.GENERATE, "chunked"])
@pytest.mark.parametrize("form", FORMS)
def test_generate_agrees_with_and_without_cache(form, kind, ids, left_padding):
    model = tiny.mfa(form=form)
    if kind == "chunked":
        want = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)
        got = model.generate(ids, max_new_tokens=12, min_new_tokens=12, **CHUNKED)
    else:
        got, want = tiny.generated(model, ids, left_padding, **tiny.GENERATE[kind])
    assert got.shape == (2, 32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_static_cache_and_compiled_decode_equal_the_full_forward(form, ids):
    torch.compiler.reset()
    model = tiny.mfa(form=form, rope_parameters=tiny.ROPE_TYPES["yarn"])
    want = model(ids, use_cache=False).logits
    # With room enough that the prefill has fewer queries than slots, and no mask of its own.
    cache = StaticCache(model.config, max_cache_len=100)
    got = [model(ids[:, :12], **tiny.cached(model, cache)).logits]
    step = torch.compile(model, backend="eager", fullgraph=True)
    for t in range(12, 20):
        got.append(step(ids[:, t : t + 1], **tiny.cached(model, cache)).logits)
    assert error(torch.cat(got, dim=1), want) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_decode_takes_heads_as_rows_and_training_does_not(form, ids, monkeypatch):
    calls = []

    def spy(owner, name):
        original = getattr(owner, name)

        def called(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    spy(MFAAttention, "_attend")
    spy(MFAAttention, "_attend_as_rows")
    model = tiny.mfa(form=form)

    def taken(context, ids, cache=None):
        calls.clear()
        with context:
            out = model(ids, **tiny.cached(model, copy.deepcopy(cache)))
        return set(calls), cache_of(out)

    rows = {"_attend_as_rows"}
    prefill, cache = taken(torch.no_grad(), ids)
    assert prefill == {"_attend"}
    for context in (torch.no_grad, torch.inference_mode):
        assert taken(context(), ids[:, :1], cache)[0] == rows
    assert taken(torch.no_grad(), ids[:, :3], cache)[0] == rows
    assert taken(torch.no_grad(), ids[:, :12], cache)[0] == {"_attend"}
    assert taken(torch.enable_grad(), ids[:, :1], cache)[0] == {"_attend"}


@torch.no_grad()
def test_map_that_no_checkpoint_gave_starts_at_the_key_itself(tmp_path):
    model = tiny.mfa(form="mfa_kr")
    state = {k: v for k, v in model.state_dict().items() if ".kr_" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    fresh = LlamaMFAForCausalLM(model.config)
    for new in (fresh, LlamaMFAForCausalLM.from_pretrained(tmp_path)):
        for layer in new.model.layers:
            assert not layer.self_attn.kr_alpha.any()
            assert 0.2 < layer.self_attn.kr_proj.weight.std() < 0.4


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_unmerged_adapter_counts_in_every_path(form, ids):
    plain, ones = tiny.mfa(form=form), torch.ones_like(ids)
    without = plain(ids).logits
    torch.manual_seed(3)
    value = "kr_proj" if form == "mfa_kr" else "v_proj"
    targets = rf".*self_attn\.({value}|q_proj|wq|k_proj|o_proj)"
    model = peft.get_peft_model(
        plain, peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
    ).eval()
    want = model(ids, use_cache=False).logits
    assert error(want, without) > 1e-2
    assert error(step_by_step(model, ids, ones, 12, [1] * 8), want) < 1e-5
    with torch.enable_grad():
        assert error(model.train()(ids).logits, want) < 1e-5
    with model.eval().disable_adapter():
        assert error(step_by_step(model, ids, ones, 12, [1] * 8), without) < 1e-5
    merged = model.merge_and_unload()
    assert type(getattr(merged.model.layers[0].self_attn, value)) is torch.nn.Linear
    assert error(step_by_step(merged, ids, ones, 12, [1] * 8), want) < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mfa_head_dim=0), "mfa_head_dim=0 must be at least 1"),
        (dict(share_q_dim=0), "share_q_dim=0 must be at least 1"),
        (dict(qk_rope_head_dim=3), "qk_rope_head_dim=3 of layer 0 must be even"),
        (dict(qk_rope_head_dim=-2, rope_pairs=None), "must be even, 0 or more"),
        (dict(mfa_head_dim=5), "qk_rope_head_dim=6 of layer 0 must not exceed its mfa_head_dim=5"),
        (dict(mfa_head_dim_per_layer=[11, 4]), "of layer 1 must not exceed its mfa_head_dim=4"),
        (dict(mfa_head_dim_per_layer=[11]), "mfa_head_dim_per_layer has 1 entries"),
        (dict(mfa_head_dim_per_layer=[9, 10]), "largest entry must be mfa_head_dim=11"),
        (dict(share_q_dim_per_layer=[9, 0]), "share_q_dim_per_layer spans 0 to 9"),
        (dict(share_q_dim_per_layer=[9, 9, 9]), "share_q_dim_per_layer has 3 entries"),
        (dict(qk_rope_head_dim_per_layer=[6, 8]), "largest entry must be qk_rope_head_dim=6"),
        (dict(rope_pairs=[[0, 1, 2]]), "rope_pairs has 1 lists for num_hidden_layers=2"),
        (dict(rope_pairs=[[0, 1], [0, 1, 2]]), r"rope_pairs\[0\] has 2 entries.*needs 3"),
        (dict(rope_pairs=[[0, 1, 4], [0, 1, 2]]), r"rope_pairs\[0\] spans 0 to 4.*0 to 3"),
        (
            dict(
                rope_parameters=dict(rope_type="default", rope_theta=1.0, partial_rotary_factor=0.5)
            ),
            "partial_rotary_factor",
        ),
    ],
)
def test_impossible_configs_are_refused(fields, message):
    for form in FORMS:
        with pytest.raises(ValueError, match=message) as caught:
            LlamaMFAConfig(**tiny.BASE | tiny.MFA_FORMS[form] | fields)
        assert "\n" not in str(caught.value)


def test_config_defaults_and_plans():
    config = LlamaMFAConfig()
    assert config.layer_rope_pairs(0) == list(range(32))
    assert config.layer_dims(0) == (256, 1024, 64)
    plan = config.base_model_tp_plan
    assert plan["layers.*.mlp.down_proj"] == "rowwise"
    assert {k.rpartition(".")[2] for k in plan if ".self_attn." in k} == {"wq", "o_proj"}
    config = LlamaMFAConfig(**tiny.BASE | tiny.FACTORED)
    names = {name.rpartition(".")[0] for name in MFAAttention(config, 0).state_dict()}
    assert names == {"q_proj", "wq", "k_proj", "v_proj", "o_proj"}
    config = LlamaMFAConfig(**tiny.BASE | tiny.MFA_FORMS["mfa_kr"], use_inter_norm=True)
    weights = set(MFAAttention(config, 0).state_dict())
    names = ("q_proj", "inter_norm", "wq", "k_proj", "kr_proj", "o_proj")
    assert weights == {f"{name}.weight" for name in names} | {"kr_alpha"}


def test_lora_targets_are_every_forms_linear_layers():
    queries = tiny.mla(q_lora_rank=7)
    models = {
        "gqa": [tiny.source()],
        "mqa": [tiny.source(num_key_value_heads=1)],
        "mla": [tiny.mla(), tiny.mla(form="on_read"), queries],
        "mfa": [tiny.mfa()],
        "mfa-kr": [tiny.mfa(form="mfa_kr")],
    }
    assert set(LORA_TARGET_MODULES) == set(models)
    for form, made in models.items():
        linear = {
            name
            for model in made
            for name, layer in model.model.layers[0].self_attn.named_modules()
            if isinstance(layer, torch.nn.Linear)
        }
        assert linear == set(LORA_TARGET_MODULES[form])
    config = peft.LoraConfig(target_modules=LORA_TARGET_MODULES["mla"])
    adapted = peft.get_peft_model(queries, config)
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * 5
