"""Decoding through a coded cache gives what the whole forward gives, in as few bytes as it says."""

import copy
import pickle

import pytest
import tiny
import torch
import transformers
from coded_models import EVERY, SOME, made
from tiny import error
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    DynamicLayer,
    QuantizedCache,
    StaticCache,
)
from transformers.cache_utils import Cache

from rehead.modeling.cached_decoding import cache_of, distance
from rehead.modeling.coding import Code
from rehead.modeling.latent_attention import LatentAttention

# Prompts of one token, of two, of three and of many, and then tokens one by one and in pieces.
SIZES = ((1,) * 20, (2,) + (1,) * 18, (3,) + (1,) * 17, (12,) + (1,) * 8, (5, 1, 3, 8, 3))


def new_cache(kind: str, model: torch.nn.Module) -> Cache | None:
    return {
        "none": lambda: None,
        "dynamic": DynamicCache,
        "of the config": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }[kind]()


KINDS = ["none", "dynamic", "of the config", "static"]


def in_pieces(model, ids, sizes, cache=None, **kwargs) -> torch.Tensor:
    """Logits of pieces of these sizes through the cache, one that holds others perhaps."""
    logits = []
    for piece in ids.split(sizes, dim=1):
        out = model(piece, use_cache=True, **tiny.cached(model, cache), **kwargs)
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(("case", "layout"), EVERY)
@torch.no_grad()
def test_cached_pieces_equal_the_full_forward(case, layout, ids):
    model = made(case, layout)
    want = model(ids, use_cache=False).logits
    for sizes in SIZES:
        for kind in KINDS:
            got = in_pieces(model, ids, sizes, new_cache(kind, model))
            assert error(got, want) < 1e-5, (sizes, kind)
    # The twin: first tokens that are lost.
    cache = cache_of(model(ids[:, :6]))
    for layer in cache.layers:
        assert layer.first.shape[:2] == (2, 4)
        layer.first.zero_()
    assert error(in_pieces(model, ids[:, 6:], (5, 9), cache), want[:, 6:]) > 1e-2


@pytest.mark.parametrize("exact_tokens", [0, 1, 30])
@pytest.mark.parametrize(("case", "layout"), SOME)
@torch.no_grad()
def test_any_number_of_first_tokens_is_exact(case, layout, exact_tokens, ids, left_padding):
    model = made(case, layout, exact_tokens=exact_tokens)
    want = model(ids, attention_mask=left_padding, use_cache=False).logits[left_padding.bool()]
    for kind in KINDS:
        cache = new_cache(kind, model)
        got = tiny.step_by_step(model, ids, left_padding, 3, [1, 5, 1, 8, 1, 1], cache)
        assert error(got[left_padding.bool()], want) < 1e-5, kind


@pytest.mark.parametrize(("case", "layout"), SOME)
@torch.no_grad()
def test_a_padded_row_gives_what_it_gives_alone(case, layout, ids, left_padding):
    """With positions and without, in pieces of which the first is all padding, or right padding."""
    model = made(case, layout)
    want = model(ids[:1, 6:], use_cache=False).logits
    positions = tiny.positions_of(left_padding)
    for given_too in ({}, dict(position_ids=positions), dict(position_ids=positions + 7)):
        out = model(ids, attention_mask=left_padding, use_cache=False, **given_too)
        assert error(out.logits[:1, 6:], want) < 1e-5
    for first, sizes in ((14, [1, 1, 4]), (1, [1] * 19), (3, [2, 5, 1, 9]), (6, [14])):
        for kind in KINDS:
            got = tiny.step_by_step(model, ids, left_padding, first, sizes, new_cache(kind, model))
            assert error(got[:1, 6:], want) < 1e-5, (first, kind)
    # A mask of its own, for one sequence or for all.
    seen = (left_padding.bool()[:, None, None] & torch.ones(20, 20).tril().bool())[:1]
    if model.config.to_dict().get("sliding_window"):
        seen = seen & ~torch.ones(20, 20).tril(-6).bool()
    twice = ids[:1].expand(2, -1)
    for mask in (seen, *(torch.where(seen, 0.0, least).double() for least in (-1e9, -torch.inf))):
        got = model(twice, attention_mask=mask, use_cache=False).logits
        assert error(got[1:, 6:], want) < 1e-5
        cache = tiny.cached(model, DynamicCache())  # which keeps what a window has left
        model(twice[:, :9], attention_mask=mask[:, :, :9, :9], **cache)
        got = model(twice[:, 9:], attention_mask=mask[:, :, 9:], **cache).logits
        assert error(got[1:], want[:, 3:]) < 1e-5
    # Another start is another code.
    shifted = torch.ones_like(left_padding)
    assert error(model(ids, attention_mask=shifted).logits[:1, 6:], want) > 1e-2
    right = left_padding.flip(-1)
    want = model(ids[:1, :14]).logits
    assert error(model(ids, attention_mask=right).logits[:1, :14], want) < 1e-5


@pytest.mark.parametrize("layout", tiny.CODED)
@torch.no_grad()
def test_flex_attention_knows_where_a_padded_row_begins(layout, ids, left_padding):
    model, real = made("llama", layout, torch.float32), left_padding.bool()
    given = dict(attention_mask=left_padding, position_ids=tiny.positions_of(left_padding))
    want = model(ids, use_cache=False, **given).logits[real]
    model.set_attn_implementation("flex_attention")
    for use_cache in (False, True):
        assert error(model(ids, use_cache=use_cache, **given).logits[real], want) < 1e-4


@pytest.mark.parametrize("way", tiny.GENERATE)
@pytest.mark.parametrize(("case", "layout"), SOME)
def test_generate_agrees_with_and_without_cache(case, layout, way, ids, left_padding):
    model = made(case, layout)
    for mask in (torch.ones_like(ids), left_padding):
        with_cache, without = tiny.generated(model, ids, mask, **tiny.GENERATE[way])
        assert torch.equal(with_cache, without)
    if way == "greedy":  # the first piece of a prompt is all padding
        chosen = dict(max_new_tokens=12, min_new_tokens=12, prefill_chunk_size=5, do_sample=False)
        assert torch.equal(model.generate(ids, attention_mask=left_padding, **chosen), without)


@pytest.mark.parametrize(("case", "layout"), SOME)
def test_guesses_that_are_refused_leave_no_trace(case, layout, ids):
    """Prompt lookup and an assistant crop the cache."""
    model, chosen = made(case, layout), dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    want = model.generate(ids[:1], use_cache=False, **chosen)
    assistant = made(case, layout)
    torch.nn.init.normal_(assistant.lm_head.weight, std=0.3)
    for guessed in (dict(prompt_lookup_num_tokens=3), dict(assistant_model=assistant)):
        assert torch.equal(model.generate(ids[:1], **chosen, **guessed), want)


@pytest.mark.parametrize("kind", ["dynamic", "of the config", "static"])
@pytest.mark.parametrize(("case", "layout"), SOME)
@torch.no_grad()
def test_a_cache_is_cropped_reset_and_copied(case, layout, kind, ids, left_padding):
    model = made(case, layout)
    want, wrong = model(ids, use_cache=False).logits, (ids + 1) % 61
    for length in (2, 11):  # into the first tokens, and behind them
        cache = new_cache(kind, model)
        cache.activate_past_recording()
        model(ids[:, :length], **tiny.cached(model, cache))
        model(wrong[:, length : length + 3], **tiny.cached(model, cache))
        if cache.is_croppable:  # not behind a static window
            cache.crop(-3)
            got = in_pieces(model, ids[:, length:], (1, 3, 16 - length), cache)
            assert error(got, want[:, length:]) < 1e-5
    cache = new_cache(kind, model)
    model(wrong[:, :12], attention_mask=left_padding[:, :12], **tiny.cached(model, cache))
    cache.reset()
    prefix = in_pieces(model, ids[:, :9], (9,), cache)
    for _ in range(2):
        again = copy.deepcopy(cache)
        for tokens in (ids, wrong):
            model(tokens[:, 9:12], **tiny.cached(model, copy.deepcopy(again)))
        got = in_pieces(model, ids[:, 9:], (1, 1, 9), again)
        assert error(torch.cat((prefix, got), 1), want) < 1e-5


@pytest.mark.parametrize(("case", "layout"), SOME)
@torch.no_grad()
def test_sequences_of_a_cache_are_chosen(case, layout, ids, left_padding):
    model = made(case, layout)
    positions = tiny.positions_of(left_padding)
    padded = dict(attention_mask=left_padding, position_ids=positions)
    want = model(ids, use_cache=False, **padded).logits
    for kind in ("dynamic", "of the config"):
        cache = new_cache(kind, model)
        tiny.step_by_step(model, ids[:, :12], left_padding, 9, [3], cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 1]))
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        rows = torch.tensor([0, 0, 1])
        for t in range(12, 20):
            new = slice(t, t + 1)
            more = dict(
                attention_mask=left_padding[rows, : t + 1], position_ids=positions[rows, new]
            )
            got = model(ids[rows, new], **more, **tiny.cached(model, cache)).logits
            assert error(got, want[rows, new]) < 1e-5, (kind, t)


@pytest.mark.parametrize(
    ("case", "kind"), [("window", "dynamic"), ("window", "static"), ("norm of a head", "static")]
)
@pytest.mark.parametrize("layout", tiny.CODED)
@torch.no_grad()
def test_compiled_steps_equal_the_full_forward(case, layout, kind, ids):
    """Whose number changes nothing that is compiled, also where a window is full."""
    torch.compiler.reset()
    model = made(case, layout)
    want, cache = model(ids, use_cache=False).logits, new_cache(kind, model)
    model(ids[:, :5], **tiny.cached(model, cache))
    step = torch.compile(model, backend="eager", fullgraph=True)
    got = [step(ids[:, t : t + 1], **tiny.cached(model, cache)).logits for t in range(5, 18)]
    got.append(model(ids[:, 18:], **tiny.cached(model, cache)).logits)  # not compiled any more
    assert error(torch.cat(got, dim=1), want[:, 5:]) < 1e-5


@pytest.mark.parametrize("layout", tiny.CODED)
@torch.no_grad()
def test_what_inference_mode_cached_is_used_outside_of_it(layout, ids):
    model, cache = made("llama", layout), DynamicCache()
    want = model(ids, use_cache=False).logits
    with torch.inference_mode():
        model(ids[:, :2], **tiny.cached(model, cache))
    assert error(in_pieces(model, ids[:, 2:], (1, 8, 9), cache), want[:, 2:]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("case", "layout"), SOME)
def test_gradients_through_a_cache_are_those_without(case, layout, kind, ids, left_padding):
    model = made(case, layout).train()
    padded = dict(attention_mask=left_padding, position_ids=tiny.positions_of(left_padding))

    def grads(**kwargs):
        logits = model(ids, **kwargs).logits
        return tiny.gradients(logits.log_softmax(-1)[left_padding.bool()], model)

    for mask in ({}, padded):
        want = grads(use_cache=False, **mask)
        got = grads(use_cache=True, **mask, **tiny.cached(model, new_cache(kind, model)))
        for name, grad in want.items():
            assert error(got[name], grad) < 1e-4, name


@pytest.mark.parametrize(("case", "layout"), SOME)
@torch.no_grad()
def test_cache_holds_as_many_bytes_as_the_config_says(case, layout, ids, monkeypatch):
    model = made(case, layout, torch.float32)
    config, clamped, packed = model.config, [], Code.packed

    def counted(code, rows):
        clamped.append(int((rows.abs() > tiny.half_steps(code))[..., : code.coded].sum()))
        return packed(code, rows)

    monkeypatch.setattr(Code, "packed", counted)
    cache = cache_of(model(ids))
    for i, layer in enumerate(cache.layers):
        codes = [Code(tuple(counts)) for counts in config.cache_codes[i]]
        tokens = layer.keys.shape[2]
        assert tokens == (5 if case == "window" else 20)
        assert layer.keys.dtype == torch.uint8
        assert layer.keys.nbytes == 2 * tokens * sum(code.bytes for code in codes)
        scales = config.key_scales if layout != "whole keys" else 0
        assert layer.values.nbytes == 2 * tokens * scales * 4
        assert layer.first.nbytes == 2 * 4 * sum(code.channels for code in codes) * 4
    assert sum(clamped)  # so that the models of this file are ones in which it counts


@torch.no_grad()
def test_a_growing_cache_is_copied_seldom(ids):
    model = made("norm of a head", "turned keys")
    cache, places = cache_of(model(ids)), []
    for _ in range(130):
        model(ids[:, :1], **tiny.cached(model, cache))
        layer = cache.layers[0]
        places.append((layer.keys.data_ptr(), layer.values.data_ptr()))
        held = layer.keys.untyped_storage().nbytes() / layer.keys.nbytes
        assert held < 4.3
    assert len(set(places)) <= 3 and layer.keys.shape[2] == 150
    # A longer one has little room beside what it holds.
    model(ids[:, :1].repeat(1, 900), **tiny.cached(model, cache))
    assert layer.keys.untyped_storage().nbytes() < 1.2 * layer.keys.nbytes


def test_caches_that_cannot_hold_codes_are_refused(ids):
    model = made("llama", "whole keys", torch.float32)
    other = type("OtherLayer", (DynamicLayer,), {})
    refused = [Cache(layer_class_to_replicate=other)]
    if hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        refused.append(QuantizedCache("fp8", model.config))
    for cache in refused:
        with pytest.raises(ValueError, match=r"Cache with a \w+Layer cannot hold .* coded already"):
            model(ids, **tiny.cached(model, cache))
    plain, cache = tiny.mla(), DynamicCache()
    plain(ids, **tiny.cached(plain, cache))
    with pytest.raises(ValueError, match=r"holds what another model cached.*Give an empty one"):
        model(ids, **tiny.cached(model, cache))
    early = StaticCache(config=model.config, max_cache_len=32)
    early.early_initialization(2, 1, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"This StaticCache holds .* or room for it"):
        model(ids, **tiny.cached(model, early))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("case", "layout"), SOME)
@torch.no_grad()
def test_absorbed_expanded_and_eager_agree(
    case, layout, implementation, ids, left_padding, monkeypatch
):
    model, real = made(case, layout, torch.float32), left_padding.bool()
    positions = tiny.positions_of(left_padding)
    given = dict(attention_mask=left_padding, position_ids=positions, use_cache=False)
    want = made(case, layout)(ids, **given).logits[real]
    model.set_attn_implementation(implementation)
    assert error(model(ids, **given).logits[real], want) < 1e-4
    for always in (True, False):
        tiny.absorb(monkeypatch, LatentAttention, always)
        got = tiny.step_by_step(model, ids, left_padding, 12, [1, 1, 3, 1, 1, 1])
        assert error(got[real], want) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("case", "layout"), SOME)
@torch.no_grad()
def test_half_precision_decodes_as_well_as_it_computes_whole(case, layout, dtype, ids):
    want = made(case, layout)(ids, use_cache=False).logits
    half = made(case, layout, dtype)
    # Where rounding moves a number to the next step, it is by much.
    budget = max(0.05, 1.5 * distance(half(ids, use_cache=False).logits, want))
    assert distance(in_pieces(half, ids, (12,) + (1,) * 8), want) < budget < 0.5


@pytest.mark.parametrize(("case", "layout"), [("norm of a head", "turned keys"), ("llama", "mla")])
@torch.no_grad()
def test_a_saved_model_is_the_same(case, layout, ids, tmp_path):
    model = made(case, layout, torch.float32)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    for config in (loaded.config, pickle.loads(pickle.dumps(model.config))):
        assert config.cache_codes == model.config.cache_codes
        assert config.exact_tokens == 4 and type(config) is type(model.config)
    tiny.load_without_rehead(model, ids, tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(cache_codes=[[[12] + [0] * 6, [0] * 7]]), "cache_codes has 1 entries"),
        (dict(exact_tokens=-1), "exact_tokens=-1; give one for each layer, and 0 or more"),
        (dict(kv_lora_rank=13), r"cache_codes\[0\] has .* channels .* and the layer caches"),
        (dict(cache_codes=[[[11, 1], [0] * 7]] * 2), "Give 7 counts of 0 or more"),
    ],
)
@pytest.mark.parametrize("layout", tiny.CODED)
def test_codes_that_do_not_fit_the_layer_are_refused(layout, fields, message):
    with pytest.raises(ValueError, match=message):
        made("llama", layout, **fields)
