"""The MFA classes against a naive fp64 reference, the stock classes, and themselves."""

import copy

import peft
import pytest
import tiny
import torch
from tiny import as_complex, block_output, error, step_by_step
from transformers import StaticCache

from rehead.modeling import LORA_TARGET_MODULES, LlamaMFAConfig, LlamaMFAForCausalLM, rope_slots
from rehead.modeling.cached_decoding import cache_of
from rehead.modeling.latent_attention import LatentAttention
from rehead.modeling.rope_slots import Rotation

FAMILIES, FORMS = list(tiny.SOURCES), list(tiny.MFA_FORMS)
WIDE = ["mfa", "mfa_kr"]


def naive(
    f: LatentAttention, x: torch.Tensor, inv_freq: torch.Tensor, twist: str = ""
) -> torch.Tensor:
    """The block's output [T, hidden] on x [T, hidden], one head and one pair of tokens at a time.

    In fp64, as `f` must be. `twist` breaks one thing on purpose: a key one slot off ("slot"), parts
    that lie otherwise ("layout") or frequencies in another order, no "scaling", "values" read from
    other dims or of "rotated" keys; and of queries as wide as the source's the "heads", the pair of
    the query that a component meets ("pair"), its factor ("synthesis", that of another KV head) or
    the factor that is left out beside it ("phase"); and keys that are not normalised ("norm").
    """
    c, x = f.config, x.double()
    heads, width, n = c.num_attention_heads, f.mfa_head_dim, f.qk_rope_head_dim
    wide, free = width >= c.head_dim or c.qk_norm, width - n
    groups = c.num_key_value_heads if wide else 1
    query = f.q_proj(x) if hasattr(f, "q_proj") else f.q_b_proj(f.q_a_proj(x))
    query, key = query.view(len(x), heads, -1), f.k_proj(x)
    query = tiny.naive_norm(f.q_norm, query) if c.qk_norm else query
    pairs = torch.tensor(c.layer_rope_pairs(f.layer_idx), dtype=torch.long)
    freqs = inv_freq.double()[pairs]
    freqs = freqs.roll(1) if twist == "frequency" else freqs
    shared = key.new_zeros(len(x), 0, dtype=torch.complex128)
    if n:
        shared = as_complex(key[:, free:], neighbours=c.key_reuse != (twist == "layout"))
    value = key if c.key_reuse else f.v_proj(x)
    if twist == "rotated":
        angles = torch.arange(len(x))[:, None] * freqs
        turned = torch.view_as_real(shared * torch.polar(torch.ones_like(angles), angles))
        value = torch.cat((key[:, :free], turned.flatten(-2)), dim=1)
    if twist == "values":
        value = value.roll(1, -1)
    if twist == "slot":
        shared = torch.cat((shared[-1:], shared[:-1]))
    if wide:
        resting, half = tiny.resting_pairs(c, f.layer_idx), c.head_dim // 2
        rest = as_complex(f.k_b_proj(key[:, :free]).view(len(x), groups, -1))
        rest = tiny.at_pairs(rest, resting, half)
        value = f.v_b_proj(value).view(len(x), groups, -1)
        query, phase = as_complex(query), tiny.at_pairs(as_complex(f.q_phase), resting, half)
        synthesis = as_complex(f.k_synthesis) if n else phase.new_zeros(groups, 0)
        plain = tiny.shared_key_score(
            query,
            torch.ones_like(phase) if twist == "phase" else phase,
            rest,
            synthesis.roll(1, 0) if twist == "synthesis" else synthesis,
            shared,
            pairs.roll(1) if twist == "pair" else pairs,
            freqs,
        )
        scales = tiny.naive_key_scales(f, rest, synthesis, shared, pairs)
        scales = torch.ones_like(scales) if twist == "norm" else scales

        def score(h, g, t, s):
            return plain(h, g, t, s) * scales[s, g]

    else:
        value = value[:, None]
        tail = as_complex(query[..., free:]) if n else shared[:, None].expand(-1, heads, -1)

        def score(h, g, t, s):
            angles = freqs * (s - t)
            turned = torch.complex(angles.cos(), angles.sin()) * shared[s]
            return query[t, h, :free] @ key[s, :free] + (tail[t, h].conj() * turned).sum().real

    of_head = [h % groups if twist == "heads" else h // (heads // groups) for h in range(heads)]
    scale = 1.0 if twist == "scaling" else c.head_dim**-0.5
    return f.o_proj(tiny.naive_mixtures(score, value, of_head, scale))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("form", "fields"), tiny.MFA_CASES)
@torch.no_grad()
def test_block_equals_naive_reference_and_no_twin_does(form, fields, implementation):
    model = tiny.mfa(form=form, **fields)
    inv_freq = model.model.rotary_emb.inv_freq
    for layer_idx, layer in enumerate(model.model.layers):
        attn, x = layer.self_attn, torch.randn(1, 7, 32)
        layout = model.config.layer_layout(layer_idx)
        assert type(attn) is tiny.ATTENTION[layout]
        exact = copy.deepcopy(attn).double()
        got = block_output(model, layer_idx, x, implementation)[0]
        assert error(got, naive(exact, x[0], inv_freq)) < 2e-6
        wide, rotated = not layout.endswith("rows"), bool(attn.qk_rope_head_dim)
        twists = ["scaling", "values"]
        twists += ["slot", "layout", "frequency"] * rotated
        twists += ["rotated"] * (rotated and model.config.key_reuse)
        twists += ["norm"] * model.config.qk_norm
        twists += ["heads", "phase"] * wide + ["pair", "synthesis"] * (wide and rotated)
        for twist in twists:
            assert error(got, naive(exact, x[0], inv_freq, twist)) > 1e-2, twist


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("form", "fields"), tiny.MFA_CASES)
def test_gradients_equal_those_of_the_naive_reference(form, fields, implementation):
    model = tiny.mfa(form=form, **fields)
    inv_freq = model.model.rotary_emb.inv_freq
    for layer_idx, layer in enumerate(model.model.layers):
        attn, x = layer.self_attn, torch.randn(1, 7, 32)
        if not attn.qk_rope_head_dim and not model.config.key_reuse:
            attn.k_proj.bias = None  # the same in all scores of a query: it has no gradient
        exact = copy.deepcopy(attn).double()
        got = tiny.gradients(block_output(model, layer_idx, x, implementation)[0], attn)
        want = tiny.gradients(naive(exact, x[0], inv_freq), exact)
        for name, grad in got.items():
            assert error(grad, want[name]) < 1e-4, name


@pytest.mark.parametrize("rope_type", list(tiny.ROPE_TYPES))
@pytest.mark.parametrize("form", WIDE)
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
@pytest.mark.parametrize(("form", "fields"), tiny.MFA_CASES)
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
    tiny.absorb(monkeypatch, LatentAttention, False)
    assert steps() < 1e-5
    monkeypatch.setattr(rope_slots, "GPU_CHUNK", 3)
    tiny.absorb(monkeypatch, LatentAttention, True)
    assert steps() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decode_over_long_context_equals_expanded(form, monkeypatch):
    """Over several chunks of keys and thousands of slots."""
    model = tiny.mfa(form=form, num_hidden_layers=1, rope_pairs=None, max_position_embeddings=4096)
    ids = torch.randint(3, 61, (1, 2500))
    prefill = model(ids[:, :-1])
    got = model(ids[:, -1:], **tiny.cached(model, copy.deepcopy(cache_of(prefill)))).logits
    tiny.absorb(monkeypatch, LatentAttention, False)
    want = model(ids[:, -1:], **tiny.cached(model, cache_of(prefill))).logits
    assert not torch.equal(got, want)  # two ways were taken
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("form", ["mfa_kr", "mfa_kr_rows"])
@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_wrong_slot_shows(form, absorbed, ids, monkeypatch):
    """The twin of the two tests above: a query one slot off must fail their tolerance."""
    model, ones = tiny.mfa(form=form), torch.ones_like(ids)
    want = model(ids, use_cache=False).logits
    tiny.absorb(monkeypatch, LatentAttention, absorbed)
    right = Rotation.at_slots
    monkeypatch.setattr(Rotation, "at_slots", lambda rope, slots: right(rope, slots + 1))
    assert error(step_by_step(model, ids, ones, 17, [1] * 3), want) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decode_step_forms_nothing_as_large_as_the_cache(form, implementation, monkeypatch):
    for name in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(rope_slots, name, 64)
    model = tiny.mfa(form=form)
    model.set_attn_implementation(implementation)
    attn, length = model.model.layers[0].self_attn, 1000
    rows = torch.randn(2, 1, length, attn.mfa_head_dim)
    reused = model.config.key_reuse
    full = tiny.FullCache(rows, rows[..., :0] if reused else torch.randn_like(rows))
    x = torch.randn(2, 1, 32)
    rope = model.model.rotary_emb(x, torch.tensor([[length - 1]]))
    with tiny.Largest() as absorbed:
        attn(x, rope, None, full)
    # The scores, heads * length, are all there is.
    assert absorbed.numel <= 2 * 4 * length < rows.numel()
    if implementation == "eager" or form != "mfa_rows":  # which sdpa reads as it is cached
        tiny.absorb(monkeypatch, LatentAttention, False)
        with tiny.Largest() as expanded:
            attn(x, rope, None, full)
        assert rows.numel() <= expanded.numel


@pytest.mark.parametrize(("form", "fields"), tiny.MFA_CASES)
@torch.no_grad()
def test_cache_holds_one_key_and_one_value_or_the_latent_alone(form, fields, ids):
    model = tiny.mfa(form=form, **fields)
    for i, layer in enumerate(cache_of(model(ids)).layers):
        width, _ = model.config.layer_dims(i)
        assert layer.keys.numel() == ids.numel() * width
        beside = (0 if model.config.key_reuse else width) + model.config.key_scales
        assert layer.values.numel() == ids.numel() * beside


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

    model = tiny.mfa(form=form, **dict(mfa_head_dim=16) if form in WIDE else {})
    attention = type(model.model.layers[0].self_attn)
    for name in ("absorbed", "expanded"):
        spy(attention, name)

    def taken(context, ids, cache=None):
        calls.clear()
        with context:
            out = model(ids, **tiny.cached(model, copy.deepcopy(cache)))
        return set(calls), cache_of(out)

    rows = {"absorbed"}
    prefill, cache = taken(torch.no_grad(), ids)
    assert prefill == {"expanded"}
    for context in (torch.no_grad, torch.inference_mode):
        assert taken(context(), ids[:, :1], cache)[0] == rows
    assert taken(torch.no_grad(), ids[:, :3], cache)[0] == rows
    assert taken(torch.no_grad(), ids[:, :12], cache)[0] == {"expanded"}
    assert taken(torch.enable_grad(), ids[:, :1], cache)[0] == {"expanded"}
    if form in WIDE:  # what a hook sees is called, not read
        for name in ("k_b_proj", "v_b_proj"):
            layer = getattr(model.model.layers[0].self_attn, name)
            hook = layer.register_forward_hook(lambda *_: None)
            assert "expanded" in taken(torch.no_grad(), ids[:, :1], cache)[0]
            hook.remove()


@pytest.mark.parametrize("form", WIDE)
@torch.no_grad()
def test_factors_that_no_checkpoint_gave_start_at_one(form, tmp_path):
    model = tiny.mfa(form=form)
    own = ("q_phase", "k_synthesis")
    state = {name: x for name, x in model.state_dict().items() if not name.endswith(own)}
    model.save_pretrained(tmp_path, state_dict=state)
    fresh = LlamaMFAForCausalLM(model.config)
    for new in (fresh, LlamaMFAForCausalLM.from_pretrained(tmp_path)):
        for layer in new.model.layers:
            for factors in (layer.self_attn.q_phase, layer.self_attn.k_synthesis):
                assert torch.equal(as_complex(factors), torch.ones_like(as_complex(factors)))


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_unmerged_adapter_counts_in_every_path(form, ids):
    plain, ones = tiny.mfa(form=form), torch.ones_like(ids)
    without = plain(ids).logits
    torch.manual_seed(3)
    targets = r".*self_attn\.(q_proj|k_proj|v_proj|k_b_proj|v_b_proj|o_proj)"
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
    for layer in LORA_TARGET_MODULES["mfa"]:
        found = getattr(merged.model.layers[0].self_attn, layer, None)
        assert found is None or type(found) is torch.nn.Linear
    assert error(step_by_step(merged, ids, ones, 12, [1] * 8), want) < 1e-5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(mfa_head_dim=0), "mfa_head_dim=0 must be at least 1"),
        (dict(share_q_dim=0), "share_q_dim=0 must be None or at least 1"),
        (dict(qk_rope_head_dim=3), "qk_rope_head_dim=3 of layer 0 must be even"),
        (dict(qk_rope_head_dim=-2, rope_pairs=None), "must be even, 0 or more"),
        (dict(mfa_head_dim=5), "qk_rope_head_dim=6 of layer 0 must not exceed its mfa_head_dim=5"),
        (dict(mfa_head_dim_per_layer=[11, 4]), "of layer 1 must not exceed its mfa_head_dim=4"),
        (dict(mfa_head_dim_per_layer=[11]), "mfa_head_dim_per_layer has 1 entries"),
        (dict(mfa_head_dim_per_layer=[9, 10]), "largest entry must be mfa_head_dim=11"),
        (dict(share_q_dim_per_layer=[9, 0]), "largest entry must be share_q_dim=None"),
        (dict(share_q_dim=9, share_q_dim_per_layer=[9, -1]), "share_q_dim_per_layer spans -1 to 9"),
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
    for form in WIDE:
        with pytest.raises(ValueError, match=message) as caught:
            LlamaMFAConfig(**tiny.BASE | tiny.MFA_FORMS[form] | fields)
        assert "\n" not in str(caught.value)


def test_config_defaults_and_plans():
    config = LlamaMFAConfig()
    assert config.layer_rope_pairs(0) == list(range(32))
    assert config.layer_dims(0) == (256, 64)
    assert [config.layer_layout(0), config.query_rank(0)] == ["mfa", None]
    plan = config.base_model_tp_plan
    assert plan["layers.*.mlp.down_proj"] == "rowwise"
    split = {k.rpartition(".")[2] for k in plan if ".self_attn." in k}
    assert split == {"q_proj", "q_b_proj", "o_proj"}
    rows = {f"{name}.weight" for name in ("q_proj", "k_proj", "o_proj")}
    wide = rows | {"k_b_proj.weight", "v_b_proj.weight", "q_phase", "k_synthesis"}
    own = {
        "mfa": wide | {"v_proj.weight"},
        "mfa_kr": wide,
        "mfa_rows": rows | {"v_proj.weight"},
        "mfa_kr_rows": rows,
    }
    for form, names in own.items():
        assert set(tiny.mfa(form=form).model.layers[0].self_attn.state_dict()) == names
    # A layer of each of both kinds, and queries of both.
    both = [layer.self_attn for layer in tiny.mfa(**tiny.MFA_UNEVEN["mfa"]).model.layers]
    assert set(both[0].state_dict()) == own["mfa"]
    low = {"q_a_proj.weight", "q_b_proj.weight"}
    assert set(both[1].state_dict()) == own["mfa_rows"] - {"q_proj.weight"} | low


def test_lora_targets_are_every_forms_linear_layers():
    queries = tiny.mla(q_lora_rank=7)
    models = {
        "gqa": [tiny.source()],
        "mqa": [tiny.source(num_key_value_heads=1)],
        "mla": [tiny.mla(), tiny.mla(form="on_read"), queries],
        "mfa": [tiny.mfa(), tiny.mfa(form="mfa_rows"), tiny.mfa(share_q_dim=9)],
        "mfa-kr": [
            tiny.mfa(form="mfa_kr"),
            tiny.mfa(form="mfa_kr_rows"),
            tiny.mfa(form="mfa_kr", share_q_dim=9),
        ],
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
