"""Perplexity, the bytes of the cache, and loading."""

import math

import folders
import pytest
import tiny
import torch
from transformers import DynamicCache, GenerationConfig, LlamaConfig

from rehead.converters.errors import InputError
from rehead.evaluation import (
    continuation,
    kv_bytes_per_token,
    load_model,
    load_tokenizer,
    own_texts,
    perplexity,
)

WINDOWS = torch.randint(0, 61, (3, 300), generator=torch.Generator().manual_seed(0))


def reference(model, windows, *, first=0, by_window=False):
    """Perplexity in float64, one prediction after the other.

    Args:
        first, by_window: wrong on purpose: predictions left out at each window's start; the mean
            of the windows' perplexities.
    """
    means = []
    for row in windows:
        logits = model(row[None]).logits[0].double()
        losses = [
            -torch.log_softmax(logits[t], -1)[row[t + 1]].item() for t in range(first, len(row) - 1)
        ]
        means.append(sum(losses) / len(losses))
    if by_window:
        return sum(math.exp(mean) for mean in means) / len(means)
    return math.exp(sum(means) / len(means))


@torch.no_grad()
def test_perplexity_is_that_of_the_definition():
    model = tiny.source().eval()
    found = perplexity(model, WINDOWS)
    assert (found.tokens, found.windows, found.window) == (3 * 299, 3, 300)

    def close(value):
        return found.perplexity == pytest.approx(value, rel=1e-5)

    assert close(reference(model, WINDOWS))
    assert not close(reference(model, WINDOWS, first=1))
    assert not close(reference(model, WINDOWS, by_window=True))
    # Windows do not see each other.
    assert not close(reference(model, WINDOWS.view(1, -1)))
    turned = perplexity(model, WINDOWS.flip(0)).perplexity
    assert turned == pytest.approx(found.perplexity, rel=1e-12)


def test_perplexity_of_known_predictors():
    """A uniform prediction is as perplexed as its choices are many."""
    model = tiny.source().eval()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity(model, WINDOWS).perplexity == pytest.approx(61, rel=1e-6)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, WINDOWS).perplexity)


def test_half_precision_is_summed_in_float32():
    """Logits are bfloat16's, the log-softmax is not: the loss is exact for the logits given."""
    model = tiny.source().to(torch.bfloat16).eval()
    with torch.no_grad():
        expected = reference(model, WINDOWS)
        logits = model(WINDOWS[:1]).logits[0, :-1]
        coarse = -torch.log_softmax(logits, -1).gather(1, WINDOWS[0, 1:, None]).mean()
    found = perplexity(model, WINDOWS).perplexity
    assert found == pytest.approx(expected, rel=1e-5)
    exact = perplexity(model, WINDOWS[:1]).perplexity
    assert math.exp(float(coarse)) != pytest.approx(exact, rel=1e-5)


def test_perplexity_tells_its_progress_and_foreign_tokens():
    seen = []
    model = tiny.source().eval()
    perplexity(model, WINDOWS, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(InputError, match="the id 61, and the model has 61 embeddings"):
        perplexity(model, torch.tensor([[3, 61]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.SOURCES)
def test_the_cache_is_measured(family, dtype):
    size = dtype.itemsize
    stock = tiny.source(family).to(dtype).eval()
    keys_and_values, layers = 2 * 2 * 8, 2
    assert kv_bytes_per_token(stock) == layers * keys_and_values * size
    fewer = tiny.source(family, num_key_value_heads=1).to(dtype).eval()
    assert kv_bytes_per_token(fewer) == layers * keys_and_values // 2 * size
    config, model = tiny.MLA[family]
    fields = tiny.BASE | tiny.DECOUPLED | {"rope_parameters": tiny.ROPE_TYPES["default"]}
    if family == "mistral":
        fields["sliding_window"] = None
    mla = model(config(**fields)).to(dtype).eval()
    assert kv_bytes_per_token(mla) == layers * (12 + 6) * size


class Odd:
    """A cache of no known class: tensors in nested containers, one of them twice."""

    def __init__(self, length, fixed=100):
        buffer = torch.zeros(length, 3)
        self.parts = {"a": [buffer, buffer[:, :1]], "b": (torch.zeros(length, dtype=torch.int8),)}
        self.state = torch.zeros(fixed)
        self.itself = self


class Model:
    """Leaves the cache that `make` returns for a prompt's length."""

    device = torch.device("cpu")

    def __init__(self, make, name="cache"):
        self.make, self.name = make, name

    def get_input_embeddings(self):
        return torch.nn.Embedding(61, 2)

    def __call__(self, input_ids, use_cache):
        assert use_cache
        return type("Output", (), {self.name: self.make(input_ids.shape[1])})


def test_any_cache_is_measured_by_its_tensors():
    assert kv_bytes_per_token(Model(Odd)) == 3 * 4 + 1
    assert kv_bytes_per_token(Model(Odd, "past_key_values")) == 3 * 4 + 1  # its older name
    assert kv_bytes_per_token(Model(lambda length: None)) == 0

    def uneven(length):
        cache = DynamicCache()
        cache.update(torch.zeros(1, 1, length, 5), torch.zeros(1, 1, length, 0), 0)
        cache.update(torch.zeros(1, 1, length, 7), torch.zeros(1, 1, length, 2), 1)
        return cache

    assert kv_bytes_per_token(Model(uneven)) == (5 + 7 + 2) * 4
    with pytest.raises(RuntimeError, match="token by token"):
        kv_bytes_per_token(Model(lambda length: torch.zeros(length // 3, dtype=torch.int8)))


def test_continuation_is_the_most_likely_text():
    tokenizer = folders.tokenizer()
    model = tiny.source(**folders.MODEL_FIELDS).eval()
    ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 256:
                break
    expected = tokenizer.decode(ids[0, 5:], skip_special_tokens=True)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 9.0
    assert continuation(model, tokenizer, "Hello", 6) == expected


def test_a_folder_is_loaded_as_it_is_stored_or_as_asked(tmp_path):
    saved = folders.save(tmp_path, tiny.source(**folders.MODEL_FIELDS).to(torch.bfloat16))
    loaded = load_model(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert torch.equal(loaded.lm_head.weight, saved.lm_head.weight)
    assert load_model(tmp_path, dtype="float32").dtype == torch.float32
    for dtype in ("float31", "int8", "nn", "float8_e4m3fn"):
        with pytest.raises(InputError, match=f"{dtype} is unknown. Use float32"):
            load_model(tmp_path, dtype=dtype)
    for device in ("cuda:99", "cloud", "meta"):
        with pytest.raises(InputError, match=f"--device {device}.*Use cpu"):
            load_model(tmp_path, device=device)


def test_a_converted_folder_is_loaded_by_its_own_class(tmp_path):
    config, model = tiny.MLA["llama"]
    torch.manual_seed(0)
    saved = model(config(**(tiny.BASE | tiny.DECOUPLED | folders.MODEL_FIELDS))).eval()
    folders.save(tmp_path, saved)
    loaded = load_model(tmp_path)
    assert type(loaded).__name__ == "LlamaMLAForCausalLM"
    ids = torch.arange(30)[None]
    assert torch.equal(loaded(ids).logits, saved(ids).logits)


def test_a_folder_that_lacks_something_is_told(tmp_path):
    folders.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="cut short"):
        load_model(tmp_path)


def own(model, tokens, **options):
    return [*own_texts(model, folders.tokenizer(), tokens, length=12, batch=4, **options)]


def test_own_texts_are_what_the_model_says_after_a_bos():
    model = tiny.source(**folders.MODEL_FIELDS).eval()
    ids = torch.tensor([[256]])
    with torch.no_grad():
        while ids.shape[1] <= 12:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    expected = folders.tokenizer().decode(ids[0, 1:], skip_special_tokens=True)
    # So cold that only the most likely token is drawn.
    assert own(model, 30, temperature=1e-3) == [(expected, 12)] * 3
    assert own(model, 30, temperature=3.0) != [(expected, 12)] * 3
    seen = []
    own(model, 30, temperature=1e-3, progress=seen.append)
    assert seen == [3 * step for step in range(1, 13)]
    assert own(model, 30, seed=1) == own(model, 30, seed=1) != own(model, 30, seed=2)


def test_own_texts_end_where_the_model_ends_them():
    h, i, end = folders.tokenizer()("Hi.")["input_ids"]

    class Model:
        device, config = torch.device("cpu"), LlamaConfig()
        generation_config = GenerationConfig(eos_token_id=[end])

        def generate(self, **options):
            return torch.tensor([[256, h, i, 256, h], [256, end, 0, 0, 0], [256, h, end, 7, 7]])

    assert own(Model(), 3) == [("Hi", 2), ("H", 1)]
    assert own(Model(), 4) == [("Hi", 2), ("H", 1), ("Hi", 2)]
    Model.generation_config = GenerationConfig(eos_token_id=h)
    Model.generate = lambda self, **options: torch.tensor([[256, h]])
    with pytest.raises(InputError, match="before the first word"):
        own(Model(), 3)
    nameless = folders.tokenizer()
    nameless.bos_token = nameless.eos_token = None
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        next(own_texts(Model(), nameless, 3))


def test_own_texts_are_no_longer_than_the_model_sees():
    model = tiny.source(**folders.MODEL_FIELDS | dict(max_position_embeddings=9)).eval()
    assert [size for _, size in own(model, 20, temperature=1e-3)] == [8, 8, 8]
