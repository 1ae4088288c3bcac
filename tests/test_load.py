"""`generate` under load: 64 left-padded prompts of mixed length, and thousands of steps.

What the cache gives is held to what the whole sequence gives at once. How far the two may differ
is measured on the original's class. `REHEAD_STEPS=2000` is the length of `make nightly`.
"""

import gc
import os

import psutil
import pytest
import tiny
import torch

from rehead.converters.memory import release
from rehead.modeling.cached_decoding import cache_of

STEPS = int(os.environ.get("REHEAD_STEPS", "200"))
PROMPTS, LONGEST = 64, 24
ROOM = dict(max_position_embeddings=4096)
FORMS = ["decoupled", "on_read", "rope_read", "mfa", "mfa_kr"]
# Rounding of another order of operations is no more than so many times the original's.
MARGIN = 4.0


def model_of(form, dtype):
    if form == "original":
        model = tiny.source(**ROOM)
    elif form in tiny.MFA_FORMS:
        model = tiny.mfa(form=form, **ROOM)
    else:
        model = tiny.mla(form=form, **ROOM)
    return model.to(dtype).eval()


def prompts():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, LONGEST + 1, (PROMPTS,), generator=generator)
    lengths[0] = LONGEST
    mask = (torch.arange(LONGEST) >= LONGEST - lengths[:, None]).long()
    ids = torch.randint(3, tiny.BASE["vocab_size"], (PROMPTS, LONGEST), generator=generator)
    return ids * mask, mask


@torch.no_grad()
def generate(model, kind, steps):
    """(sequences [B, T], the logits of every step [B, N, V], the cache)."""
    ids, mask = prompts()
    torch.manual_seed(1)
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=True,
        cache_implementation="static" if kind == "static" else None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1), cache_of(out)


@torch.no_grad()
def whole(model, sequences, mask, positions):
    """Logits [B, N, V] of every step, from the whole sequences at once."""
    found = []
    for rows in range(0, PROMPTS, 4):  # of 64 sequences scores would take gigabytes
        at = slice(rows, rows + 4)
        out = model(
            sequences[at, :-1],
            attention_mask=mask[at, :-1],
            position_ids=positions[at, :-1],
            use_cache=False,
        )
        found.append(out.logits[:, LONGEST - 1 :].float())
    return torch.cat(found)


def apart(found, wanted):
    """Of every step, the largest difference of a logit over the largest logit."""
    return (found.float() - wanted).abs().amax((0, 2)) / wanted.abs().max()


def drift(model, kind, steps, padded=True):
    sequences, found, _ = generate(model, kind, steps)
    mask = torch.cat((prompts()[1], torch.ones(PROMPTS, steps, dtype=torch.long)), dim=1)
    mask = mask if padded else torch.ones_like(mask)
    return apart(found, whole(model, sequences, mask, tiny.positions_of(mask)))


@pytest.fixture(scope="module")
def allowed():
    """What the original's class loses, in each dtype: to its cache, and to the rounding of angles.

    Scores depend on differences of positions alone, but transformers rounds a position's angle to
    float32: the same sequences further on give other logits. A key that is turned when it is read
    stands at its slot, which is further on by the padding.
    """
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = model_of("original", dtype)
        sequences, found, _ = generate(model, "dynamic", STEPS)
        mask = torch.cat((prompts()[1], torch.ones(PROMPTS, STEPS, dtype=torch.long)), dim=1)
        positions = tiny.positions_of(mask)
        wanted = whole(model, sequences, mask, positions)
        slots = torch.arange(positions.shape[1]).expand_as(positions)
        moved = whole(model, sequences, mask, slots)
        losses[dtype] = float(max(apart(found, wanted).max(), apart(moved, wanted).max()))
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("form", FORMS)
def test_the_cache_does_not_drift(form, kind, dtype, allowed):
    assert drift(model_of(form, dtype), kind, STEPS).max() <= MARGIN * allowed[dtype]


# How far beyond what is allowed a mistake must show: bfloat16 allows much.
SHOWS = {torch.float32: 100 * MARGIN, torch.bfloat16: MARGIN}


@pytest.mark.parametrize("dtype", SHOWS, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_padding_that_is_forgotten_shows(form, dtype, allowed):
    worst = drift(model_of(form, dtype), "dynamic", 8, padded=False)
    assert worst.max() > SHOWS[dtype] * allowed[dtype]


@pytest.mark.parametrize("form", FORMS)
def test_the_cache_holds_what_was_promised(form):
    model = model_of(form, torch.float32)
    _, _, cache = generate(model, "dynamic", STEPS)
    tokens = PROMPTS * (LONGEST + STEPS - 1)  # the last one's row is not needed
    config = model.config
    if form in tiny.MFA_FORMS:
        width = config.mfa_head_dim * (1 if config.key_reuse else 2)
    else:
        width = config.kv_lora_rank + (0 if config.rope_on_read else config.qk_rope_head_dim)
    for layer in cache.layers:
        assert layer.keys.numel() + layer.values.numel() == tokens * width


def growth(model, kept):
    """Of the process by six generations, as a share of what they made; `kept` holds on to it."""
    resident = psutil.Process().memory_info
    gc.collect()
    release()
    before, made = resident().rss, 0
    for _ in range(6):
        _, logits, cache = generate(model, "dynamic", min(STEPS, 400))
        made += logits.nbytes + sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
        kept(logits, cache)
        del logits, cache
    gc.collect()
    release()
    return (resident().rss - before) / made


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_of_a_generation(form):
    model = model_of(form, torch.float32)
    generate(model, "dynamic", 20)  # what is made once
    assert growth(model, kept=lambda *items: None) < 0.5


def test_what_is_left_would_be_seen():
    model, held = model_of("decoupled", torch.float32), []
    generate(model, "dynamic", 20)
    assert growth(model, kept=lambda *items: held.append(items)) > 0.5
