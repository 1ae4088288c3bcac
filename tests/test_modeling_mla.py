"""The MLA classes against a naive fp64 reference, the stock classes, and themselves."""

import copy
import itertools
from functools import partial

import peft
import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import as_complex, block_output, error, step_by_step
from transformers import AutoModelForCausalLM, StaticCache

from rehead.modeling import LlamaMLAConfig, LlamaMLAForCausalLM, on_read, rope_slots, whole_keys
from rehead.modeling.cached_decoding import cache_of, distance
from rehead.modeling.converted_attention import ConvertedAttention
from rehead.modeling.latent_attention import LatentAttention
from rehead.modeling.rope_slots import Rotation

FAMILIES, FORMS = list(tiny.SOURCES), list(tiny.FORMS)
# Every layout, "inputs" too: a latent that is the layer's input.
LAYOUTS = {form: (form, {}) for form in FORMS} | {"inputs": ("on_read", dict(kv_lora_rank=32))}


def made(layout: str, **fields) -> torch.nn.Module:
    form, own = LAYOUTS[layout]
    return tiny.mla(form=form, **own | fields)


def naive(
    f: LatentAttention, x: torch.Tensor, inv_freq: torch.Tensor, twist: str = ""
) -> torch.Tensor:
    """The block's output [T, hidden] on x [T, hidden], one head and one pair of tokens at a time.

    In fp64, as `f` must be. `twist` breaks one thing on purpose: "frequency", "heads", "scaling",
    "values" read from other dims; and where a component is shared, the pair of the query that it
    meets ("pair"), how its parts lie ("layout"), its factor ("synthesis", that of another KV head)
    or the factor that is left out beside it ("phase"); and keys that are not normalised ("norm").
    """
    c, x, inv_freq = f.config, x.double(), inv_freq.double()
    heads, groups, dim, n = c.num_attention_heads, c.num_key_value_heads, 8, f.qk_rope_head_dim
    query = f.q_proj(x) if c.q_lora_rank is None else f.q_b_proj(f.q_a_proj(x))
    query = query.view(len(x), heads, dim)
    query = as_complex(tiny.naive_norm(f.q_norm, query) if c.qk_norm else query)
    row = f.kv_a_proj_with_mqa(x) if c.layer_layout(f.layer_idx) != "inputs" else x
    rank = f.kv_lora_rank
    read = f.kv_b_proj(row[:, :rank]).view(len(x), groups, -1)
    rest, value = as_complex(read[..., :-dim]), read[..., -dim:]
    if twist == "values":
        value = value.roll(1, -1)
    of_head = [h % groups if twist == "heads" else h // (heads // groups) for h in range(heads)]
    if c.rope_on_read and not n:
        freqs = inv_freq.roll(1) if twist == "frequency" else inv_freq

        def score(h, g, t, s):
            angles = freqs * (s - t)
            turned = torch.complex(angles.cos(), angles.sin()) * rest[s, g]
            return (query[t, h].conj() * turned).sum().real

    else:
        pairs = torch.tensor(c.layer_rope_pairs(f.layer_idx), dtype=torch.long)
        freqs = inv_freq[:n].flip(0)[: len(pairs)] if twist == "frequency" else inv_freq[pairs]
        resting = tiny.resting_pairs(c, f.layer_idx)
        phase = tiny.at_pairs(as_complex(f.q_phase), resting, dim // 2)
        rest = tiny.at_pairs(rest, resting, dim // 2)
        synthesis, shared = phase.new_zeros(groups, 0), phase.new_zeros(len(x), 0)
        if n:
            synthesis = as_complex(f.k_synthesis)
            tail = row[:, rank - n :] + f.k_rope_bias if c.rope_on_read else row[:, rank:]
            shared = as_complex(tail, neighbours=c.rope_on_read != (twist == "layout"))
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

    scale = 1.0 if twist == "scaling" else dim**-0.5
    return f.o_proj(tiny.naive_mixtures(score, value, of_head, scale))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("form", "fields"), tiny.CASES)
@torch.no_grad()
def test_block_equals_naive_reference_and_no_twin_does(form, fields, implementation):
    model = tiny.mla(form=form, **fields)
    inv_freq = model.model.rotary_emb.inv_freq
    for layer_idx, layer in enumerate(model.model.layers):
        attn, x = layer.self_attn, torch.randn(1, 7, 32)
        layout = model.config.layer_layout(layer_idx)
        assert type(attn) is tiny.ATTENTION[layout]
        exact = copy.deepcopy(attn).double()
        got = block_output(model, layer_idx, x, implementation)[0]
        assert error(got, naive(exact, x[0], inv_freq)) < 2e-6
        twists = ["heads", "scaling", "values"]
        if layout in ("whole keys", "inputs"):
            twists += ["frequency"]
        else:
            twists += ["phase"] + ["norm"] * model.config.qk_norm
            if attn.qk_rope_head_dim:
                twists += ["frequency", "pair", "layout", "synthesis"]
        for twist in twists:
            assert error(got, naive(exact, x[0], inv_freq, twist)) > 1e-2, twist


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("form", "fields"), tiny.CASES)
def test_gradients_equal_those_of_the_naive_reference(form, fields, implementation):
    model = tiny.mla(form=form, **fields)
    inv_freq = model.model.rotary_emb.inv_freq
    for layer_idx, layer in enumerate(model.model.layers):
        x, exact = torch.randn(1, 7, 32), copy.deepcopy(layer.self_attn).double()
        got = tiny.gradients(block_output(model, layer_idx, x, implementation)[0], layer.self_attn)
        want = tiny.gradients(naive(exact, x[0], inv_freq), exact)
        for name, grad in got.items():
            assert error(grad, want[name]) < 1e-4, name


@pytest.mark.parametrize("rope_type", list(tiny.ROPE_TYPES))
@pytest.mark.parametrize("layout", ["mla", "whole keys", "inputs", "key in latent"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_lossless_layout_equals_the_stock_model(family, layout, rope_type, ids, left_padding):
    """Every pair of every head kept is the identity, for any kind of RoPE, cached or not."""
    form = {"mla": "decoupled", "key in latent": "rope_read"}.get(layout, "on_read")
    # The keys and values of one KV head are narrower than the model, of two as wide.
    heads = dict(num_key_value_heads=1 if layout == "whole keys" else 2)
    stock = tiny.source(family, rope_parameters=tiny.ROPE_TYPES[rope_type], **heads)
    ours = tiny.exact(stock, family, form)
    assert ours.config.layer_layout(0) == layout
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
        short = tiny.source(family, rope_parameters=tiny.ROPE_TYPES["default"], **heads)
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
    tiny.absorb(monkeypatch, LatentAttention, False)
    assert error(step_by_step(model, ids, left_padding, 14, [1, 1, 4])[real], want) < 1e-5
    for name in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(rope_slots, name, 3)
    tiny.absorb(monkeypatch, LatentAttention, True)
    got = step_by_step(model, ids, left_padding, 14, [1, 1, 4])[real]
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_absorbed_long_context_equals_expanded(layout, monkeypatch):
    """Over several chunks of keys and thousands of slots."""
    long = dict(num_hidden_layers=1, rope_pairs=None, max_position_embeddings=4096)
    model = made(layout, **long)
    ids = torch.randint(3, 61, (1, 2500))
    prefill = model(ids[:, :-1])
    got = model(ids[:, -1:], **tiny.cached(model, copy.deepcopy(cache_of(prefill)))).logits
    tiny.absorb(monkeypatch, LatentAttention, False)
    want = model(ids[:, -1:], **tiny.cached(model, cache_of(prefill))).logits
    assert not torch.equal(got, want)  # two ways were taken
    assert error(got, want) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        partial(tiny.mla, form="rope_read"),
        partial(tiny.mfa, form="mfa_kr"),
        partial(tiny.mfa, form="mfa_kr_rows"),
    ],
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
    monkeypatch.setattr(on_read, "turned_scores", lambda *args: (used.append(1), right(*args))[1])
    got = steps(model)
    assert used
    assert distance(got, want) <= max(1e-5, 1.2 * distance(widened, want))
    monkeypatch.setattr(on_read, "turned_scores", lambda *args: right(*args[:-1], 1.0))
    assert distance(steps(model), want) > max(1e-2, 2 * distance(widened, want))


@pytest.mark.parametrize("layout", ["on_read", "rope_read", "inputs"])
@pytest.mark.parametrize("absorbed", [False, True])
@torch.no_grad()
def test_wrong_slot_shows(layout, absorbed, ids, monkeypatch):
    """The twin of the tests above: a query one slot off must fail their tolerance."""
    model, ones = made(layout), torch.ones_like(ids)
    want = model(ids, use_cache=False).logits
    tiny.absorb(monkeypatch, LatentAttention, absorbed)
    right = Rotation.at_slots
    monkeypatch.setattr(Rotation, "at_slots", lambda rope, slots: right(rope, slots + 1))
    assert error(step_by_step(model, ids, ones, 14, [1] * 6), want) > 1e-2


@torch.no_grad()
def test_wrong_slot_of_whole_keys_shows(ids, monkeypatch):
    """The same in the absorbed scores, which turn keys chunk by chunk."""
    model, ones = tiny.mla(form="on_read"), torch.ones_like(ids)
    want = model(ids, use_cache=False).logits
    right = rope_slots.slot_scores
    monkeypatch.setattr(
        whole_keys, "slot_scores", lambda *args: right(*args[:4], args[4] + 1, *args[5:])
    )
    assert error(step_by_step(model, ids, ones, 14, [1] * 6), want) > 1e-2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_decode_step_forms_nothing_as_large_as_the_cache(layout, implementation, monkeypatch):
    for name in ("CPU_CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(rope_slots, name, 64)
    model = made(layout)
    model.set_attn_implementation(implementation)
    attn, length = model.model.layers[0].self_attn, 1000
    width = 32 if layout == "inputs" else attn.kv_a_proj_with_mqa.out_features
    rows = torch.randn(2, 1, length, width)
    full = tiny.FullCache(rows, rows[..., :0])
    x = torch.randn(2, 1, 32)
    rope = model.model.rotary_emb(x, torch.tensor([[length - 1]]))
    with tiny.Largest() as absorbed:
        attn(x, rope, None, full)
    tiny.absorb(monkeypatch, LatentAttention, False)
    with tiny.Largest() as expanded:
        attn(x, rope, None, full)
    # The scores, heads * length, are all there is.
    assert absorbed.numel <= 2 * 4 * length < rows.numel() <= expanded.numel


@pytest.mark.parametrize(("form", "fields"), tiny.CASES)
@torch.no_grad()
def test_cache_holds_the_latent_and_the_rotated_key_alone(form, fields, ids):
    model = tiny.mla(form=form, **fields)
    cache = cache_of(model(ids))
    for i, layer in enumerate(cache.layers):
        held = sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
        rank, rotated = model.config.layer_dims(i)
        width = rank if model.config.rope_on_read else rank + rotated
        width += model.config.key_scales
        assert held == ids.numel() * width * 4


@pytest.mark.parametrize("kind", tiny.GENERATE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_agrees_with_and_without_cache(layout, kind, ids, left_padding):
    with_cache, without = tiny.generated(made(layout), ids, left_padding, **tiny.GENERATE[kind])
    assert with_cache.shape == (2, 32)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_static_cache_and_compiled_decode_equal_the_full_forward(layout, ids):
    torch.compiler.reset()
    model = made(layout)
    want = model(ids, use_cache=False).logits
    cache = StaticCache(model.config, max_cache_len=32)
    got = [model(ids[:, :12], **tiny.cached(model, cache)).logits]
    step = torch.compile(model, backend="eager", fullgraph=True)
    for t in range(12, 20):
        got.append(step(ids[:, t : t + 1], **tiny.cached(model, cache)).logits)
    assert error(torch.cat(got, dim=1), want) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_absorbs_and_training_does_not(layout, ids, monkeypatch):
    calls = []
    model = made(layout)
    attention = type(model.model.layers[0].self_attn)
    for name in ("absorbed", "expanded"):
        original = getattr(attention, name)

        def spy(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(attention, name, spy)

    def taken(context, cache=None, **kwargs):
        calls.clear()
        with context:
            out = model(**tiny.cached(model, cache), **kwargs)
        return set(calls), cache_of(out)

    prefill, cache = taken(torch.no_grad(), input_ids=ids)
    assert prefill == {"expanded"}
    step = dict(input_ids=ids[:, :1])
    assert taken(torch.no_grad(), copy.deepcopy(cache), **step)[0] == {"absorbed"}
    assert taken(torch.inference_mode(), copy.deepcopy(cache), **step)[0] == {"absorbed"}
    assert taken(torch.enable_grad(), copy.deepcopy(cache), **step)[0] == {"expanded"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert taken(torch.no_grad(), input_ids=ids)[0] == {"expanded"}
    hook = model.model.layers[0].self_attn.kv_b_proj.register_forward_hook(lambda *_: None)
    assert "expanded" in taken(torch.no_grad(), cache, **step)[0]
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
        "coded_cache.py",
        "coding.py",
        "converted_attention.py",
        "converted_config.py",
        "converted_model.py",
        "families.py",
        "gqa.py",
        "gqa_config.py",
        "key_norm.py",
        "latent_attention.py",
        "mfa.py",
        "mfa_config.py",
        "mfa_kr.py",
        "mla.py",
        "mla_config.py",
        "on_read.py",
        "read_kernel.py",
        "rope_slots.py",
        "rows.py",
        "shared_key.py",
        "turned_keys.py",
        "whole_keys.py",
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(loaded.config.auto_map) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_unmerged_adapter_counts_in_every_path(layout, ids):
    plain = made(layout)
    without = plain(ids).logits
    torch.manual_seed(3)
    model = peft.get_peft_model(
        plain,
        peft.LoraConfig(
            r=3,
            target_modules=r".*self_attn\.(kv_a_proj_with_mqa|kv_b_proj|q_proj|o_proj)",
            init_lora_weights=False,
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
    for layout, inference in itertools.product(LAYOUTS, (torch.no_grad, torch.inference_mode)):
        model = made(layout)
        with inference():
            before = step_by_step(model, ids, torch.ones_like(ids), 12, [1] * 8)
        for name in ("kv_b_proj.weight", "q_phase", "k_synthesis", "k_rope_bias"):
            owned = [p for full, p in model.named_parameters() if full.endswith(name)]
            with torch.no_grad():
                for parameter in owned:
                    parameter.mul_(-0.5)
            with inference():
                want = model(ids, use_cache=False).logits
                got = step_by_step(model, ids, torch.ones_like(ids), 12, [1] * 8)
            assert error(got, want) < 1e-5
            assert not owned or error(before, want) > 1e-2
            before = got


@torch.no_grad()
def test_factors_that_no_checkpoint_gave_start_at_one(tmp_path):
    model = tiny.mla(form="rope_read")
    own = ("q_phase", "k_synthesis", "k_rope_bias")
    state = {name: x for name, x in model.state_dict().items() if not name.endswith(own)}
    model.save_pretrained(tmp_path, state_dict=state)
    fresh = LlamaMLAForCausalLM(model.config)
    for new in (fresh, LlamaMLAForCausalLM.from_pretrained(tmp_path)):
        for layer in new.model.layers:
            for factors in (layer.self_attn.q_phase, layer.self_attn.k_synthesis):
                assert torch.equal(as_complex(factors), torch.ones_like(as_complex(factors)))
            assert not layer.self_attn.k_rope_bias.any()


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
        (dict(qk_nope_head_dim=10), "qk_nope_head_dim=10 must be the source's head_dim=8"),
        (dict(v_head_dim=4), "v_head_dim=4 must be the source's head_dim=8"),
        (dict(kv_lora_rank=0), "kv_lora_rank=0 must be at least 1"),
        (dict(q_lora_rank=0), "q_lora_rank=0 must be None or at least 1"),
        (dict(num_key_value_heads=3), "not a multiple of num_key_value_heads=3"),
        (dict(rope_on_read=True, qk_norm=True), "forms keys whole when they are read"),
        (
            dict(rope_on_read=True, kv_lora_rank=4),
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
    linear = {"q_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight", "o_proj.weight"}
    own = {
        "decoupled": linear | {"q_phase", "k_synthesis"},
        "on_read": linear,
        "rope_read": linear | {"q_phase", "k_synthesis", "k_rope_bias"},
        "inputs": linear - {"kv_a_proj_with_mqa.weight"},
    }
    for layout, names in own.items():
        assert set(made(layout).model.layers[0].self_attn.state_dict()) == names
    # Without a rotated component there is nothing to spread.
    still = tiny.mla(**tiny.UNEVEN["decoupled"]).model.layers[1].self_attn
    assert set(still.state_dict()) == linear | {"q_phase"}
    low = tiny.mla(q_lora_rank=7).model.layers[0].self_attn
    queries = {"q_a_proj.weight", "q_b_proj.weight"}
    assert set(low.state_dict()) == own["decoupled"] - {"q_proj.weight"} | queries


def test_rotated_key_in_kv_b_proj_keeps_attention_whole_under_tensor_parallelism():
    config = LlamaMLAConfig(rope_on_read=True, head_dim=128)
    assert not any("self_attn" in name for name in config.base_model_tp_plan)
    assert config.base_model_tp_plan["layers.*.mlp.down_proj"] == "rowwise"
    assert "base_model_tp_plan" not in config.to_dict()
    assert "layers.*.self_attn.kv_b_proj" in LlamaMLAConfig().base_model_tp_plan
