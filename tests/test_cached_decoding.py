"""Decoding through a cache gives what the whole forward gives, or an error; never a wrong token."""

import functools
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import folders
import pytest
import sources
import tiny
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache

from rehead.cli import main
from rehead.evaluation import kv_bytes_per_token
from rehead.modeling import (
    GQA_CLASSES,
    MFA_CLASSES,
    MLA_CLASSES,
    LlamaMLAConfig,
    cached_decoding,
)
from rehead.modeling.cached_decoding import (
    WrongDecoding,
    cache_argument,
    cache_of,
    check_decoding,
    decoded,
    distance,
    newer_than_tested,
)
from rehead.modeling.latent_attention import LatentAttention

CLASSES = [
    classes[2] for form in (MLA_CLASSES, MFA_CLASSES, GQA_CLASSES) for classes in form.values()
]
OLDEST = "5.16.0"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def newer(monkeypatch):
    """The classes as if they had been tested on nothing as new as what is installed."""
    monkeypatch.setattr(cached_decoding, "TESTED", {"transformers": "5.1.0", "torch": "2.1.0"})
    check_decoding.cache_clear()
    yield
    check_decoding.cache_clear()


def with_layout(layout):
    """The first class, and its tiny config, whose layers have this attention."""
    return next(
        (model_class, config)
        for model_class in CLASSES
        for config in model_class.config_class.tiny()
        if config.layer_layout(0) == layout
    )


def lose_the_cache(monkeypatch, form=LatentAttention):
    """The attention as one that takes the cache by a name that no layer uses."""
    forward = form.forward

    @functools.wraps(forward)
    def deaf(self, *args, cache=None, past_key_values=None, layer_past=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(form, "forward", deaf)


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_every_class_decodes_what_it_computes_whole(model_class):
    check_decoding.__wrapped__(model_class)


@pytest.mark.parametrize("layout", tiny.ATTENTION)
def test_a_cache_that_is_lost_is_found_out(layout, monkeypatch):
    """The twin of the test above: what transformers 5.24 did to classes written for 5.23."""
    lose_the_cache(monkeypatch, tiny.ATTENTION[layout])
    model_class, _ = with_layout(layout)
    with pytest.raises(WrongDecoding, match="decodes wrongly") as told:
        check_decoding.__wrapped__(model_class)
    off = float(re.search(r"its output is (\S+) of its size", str(told.value))[1])
    assert off > 0.1  # no rounding: the tokens have nothing to do with the right ones


@pytest.mark.parametrize("value", [DynamicCache(), [DynamicCache()], {"a": (DynamicCache(),)}])
@pytest.mark.parametrize("layout", tiny.ATTENTION)
def test_a_cache_under_an_unknown_name_is_refused(layout, value):
    model_class, config = with_layout(layout)
    model, form = model_class(config).eval(), tiny.ATTENTION[layout]
    (attention,) = (m for m in model.modules() if type(m) is form and m.layer_idx == 0)
    x = torch.zeros(1, 2, config.hidden_size)
    rope = (None, None, None)
    if hasattr(model.base_model, "rotary_emb"):
        rope = model.base_model.rotary_emb(x, torch.arange(2)[None])
    attention(x, rope, None, DynamicCache())
    attention(x, rope, None, None, other={"a": [torch.zeros(1)]})
    with pytest.raises(TypeError, match=r"a cache as `kv_store`.*pip install transformers=="):
        attention(x, rope, None, None, kv_store=value)
    with pytest.raises(TypeError, match="two caches"):
        attention(x, rope, None, DynamicCache(), layer_past=DynamicCache())


def test_a_renaming_in_the_layers_fails_in_the_first_forward(ids, monkeypatch):
    """As if the next transformers called it otherwise: loudly, where it was silent once."""
    model = tiny.mla()
    layer = type(model.model.layers[0])
    forward, known = layer.forward, cache_argument(model.model.layers[0])

    def renamed(self, hidden_states, *args, **kwargs):
        kwargs["kv_store"] = kwargs.pop(known, None)
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", renamed)
    with pytest.raises(TypeError, match="MLAAttention was handed a cache as `kv_store`"):
        model(ids, use_cache=True)
    model(ids, use_cache=False)


def test_versions_newer_than_tested_are_known(monkeypatch):
    newest = {"transformers": transformers.__version__, "torch": torch.__version__}
    monkeypatch.setattr(cached_decoding, "TESTED", newest)
    assert newer_than_tested() == {}
    monkeypatch.setattr(transformers, "__version__", "99.0.0.dev0")
    assert newer_than_tested() == {"transformers": "99.0.0.dev0"}
    monkeypatch.setattr(torch, "__version__", "99.1.0+cu130")
    assert list(newer_than_tested()) == ["transformers", "torch"]
    # A local build of the tested version is no newer one.
    monkeypatch.setattr(torch, "__version__", newest["torch"].split("+")[0] + "+cu130")
    assert list(newer_than_tested()) == ["transformers"]


def test_a_load_on_newer_versions_is_checked_once(newer, tmp_path, monkeypatch):
    tiny.mla().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert check_decoding.cache_info().misses == 1
    AutoModelForCausalLM.from_pretrained(tmp_path)
    assert check_decoding.cache_info().misses == 1
    check_decoding.cache_clear()
    lose_the_cache(monkeypatch)
    with pytest.raises(WrongDecoding) as told:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    said = str(told.value)
    assert "\n" not in said
    assert f"transformers {transformers.__version__} and torch {torch.__version__}" in said
    assert "tested up to transformers 5.1.0" in said and "pip install transformers==5.1.0" in said


def test_a_load_on_tested_versions_is_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cached_decoding,
        "TESTED",
        {"transformers": transformers.__version__, "torch": torch.__version__},
    )
    monkeypatch.setattr(cached_decoding, "check_decoding", None)
    tiny.mla().save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def command(saved, tmp_path):
    (tmp_path / "text.txt").write_text("some words " * 60)
    args = ["--samples", "2", "--heal", "0", "--calibration", str(tmp_path / "text.txt")]
    return [str(saved), "--to", "mla", *args, "--output", str(tmp_path / "out")]


def test_a_conversion_on_newer_versions_is_checked_first(newer, command, capsys, monkeypatch):
    lose_the_cache(monkeypatch)
    assert main.run(main.convert_app, "convert", command) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("rehead: LlamaMLAForCausalLM decodes wrongly with transformers")


@pytest.mark.parametrize("rope", ["decoupled", "on-read"])
def test_a_conversion_is_decoded_before_it_is_put_in_place(
    rope, command, tmp_path, capsys, monkeypatch
):
    assert main.run(main.convert_app, "convert", [*command, "--rope", rope]) == 0
    capsys.readouterr()
    lose_the_cache(monkeypatch)
    again = [*command[:-1], str(tmp_path / "again"), "--rope", rope]
    assert main.run(main.convert_app, "convert", again) == 2
    err = capsys.readouterr().err
    assert "layer 0 gives something else through a cache than without one" in err
    assert "nothing is put in place" in err
    assert not (tmp_path / "again").exists()


def test_no_deprecated_name_is_used(ids, tmp_path, monkeypatch):
    """transformers 5.24 warns of the cache's older names once; our own code gives it no reason."""
    told = []
    for name in ("warning_once", "warning"):
        monkeypatch.setattr(
            "logging.Logger." + name, lambda _, text, *rest: told.append(str(text)), raising=False
        )
    for model in (tiny.mla(), tiny.mfa()):
        folder = tmp_path / type(model).__name__
        folders.save(folder, model)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        out = loaded(ids, use_cache=True)
        loaded(ids[:, :1], **{cache_argument(loaded): cache_of(out)})
        loaded.generate(ids, max_new_tokens=3, do_sample=False)
        kv_bytes_per_token(loaded)
    assert not [text for text in told if "deprecated" in text]


@pytest.mark.parametrize("form", [*tiny.FORMS, *tiny.MFA_FORMS])
@torch.no_grad()
def test_a_cache_that_is_cropped_goes_on_from_there(form, ids):
    """What a guess that was refused leaves; static layers can since transformers 5.24."""
    model = tiny.mla(form=form) if form in tiny.FORMS else tiny.mfa(form=form)
    want = model(ids, use_cache=False).logits[:, -3:]
    caches = [DynamicCache()]
    static = StaticCache(config=model.config, max_cache_len=32)
    if getattr(static.layers[0], "is_croppable", False):
        caches.append(static)
    for cache in caches:
        model(ids[:, :-3], **tiny.cached(model, cache))
        model((ids[:, -3:] + 1) % 61, **tiny.cached(model, cache))  # the guess
        cache.crop(-3)
        got = model(ids[:, -3:], **tiny.cached(model, cache)).logits
        assert tiny.error(got, want) < 1e-5, type(cache)


@torch.no_grad()
def test_continuous_batches_of_gqa_and_their_refusal_of_a_latent():
    torch.manual_seed(0)
    (config,) = GQA_CLASSES["gpt_neox"][0].tiny()
    model = tiny.fill_biases(GQA_CLASSES["gpt_neox"][2](config)).eval()
    prompts = [[5, 9, 11, 3, 8], [4, 6, 3, 21, 30, 7, 8, 9, 12]]
    want = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    chosen = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=2)
    out = model.generate_batch(prompts, generation_config=chosen)
    assert sorted(reply.generated_tokens for reply in out.values()) == sorted(want)
    x = torch.zeros(1, 2, 32)
    attention = tiny.mla().model.layers[0].self_attn
    paged = type("PagedAttentionCache", (), {"update": None})()
    with pytest.raises(ValueError, match="Use generate in place of generate_batch"):
        attention(x, (None, None, None), None, paged)


# Run by another environment's Python, of which it prints the version.
ONE_CLASS_PER_FORM = """
import sys
sys.path[:0] = [sys.argv[1]]
import tiny, torch, transformers
from rehead.modeling import GQA_CLASSES
from rehead.modeling.cached_decoding import check_decoding, decoded, distance

ids = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(7))
models = {form: tiny.mla(form=form) for form in tiny.FORMS}
models |= {form: tiny.mfa(form=form) for form in tiny.MFA_FORMS}
# In float64, whose rounding moves no number to the next step. The last one caches scales of keys.
coded = {layout: tiny.coded(layout).double() for layout in tiny.CODED}
coded["scales"] = tiny.coded("turned keys", "qwen3").double()
with torch.no_grad():
    for form, model in (models | coded).items():
        off = distance(decoded(model, ids, (12, 1, 3, 4)), model(ids, use_cache=False)[0])
        assert off < 1e-5, (form, off)
        mask = torch.ones_like(ids)
        if form in coded:
            mask[0, :6] = 0
            kept, whole = tiny.generated(model, ids, mask, cache_implementation="static")
            assert torch.equal(kept, whole), form
        kept, whole = tiny.generated(model, ids, mask, do_sample=False)
        assert torch.equal(kept, whole), form
check_decoding(GQA_CLASSES["gpt_neox"][2])
print(transformers.__version__)
"""


def environment(release: str) -> Path:
    """The Python of an environment with another transformers, and what it needs, over this one's.

    It is kept in build/, and made anew only where the release is another one. The release that is
    installed here needs none.
    """
    if Version(release) == Version(transformers.__version__):
        return Path(sys.executable)
    folder = ROOT / "build" / "releases" / f"{release}-{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, clear=True, symlinks=True)
        (packages,) = folder.glob("lib/*/site-packages")
        # What is installed here is found there too, behind what is installed there.
        here = [path for path in sys.path if path.endswith("site-packages")]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in here]
        (packages / "beside.pth").write_text("".join(lines))
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q"]
        torch_here = torch.__version__.split("+")[0]
        subprocess.run(
            [*pip, f"transformers=={release}", f"torch=={torch_here}"],
            check=True,
            capture_output=True,
        )
        (folder / "ready").touch()
    return python


def newest_release() -> str:
    """The newest transformers that pip would install."""
    pip = [sys.executable, "-m", "pip", "index", "versions", "transformers"]
    told = subprocess.run(pip, check=True, capture_output=True, text=True).stdout
    return re.search(r"transformers \(([^)]+)\)", told)[1]


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_other_releases_decode_what_they_compute_whole(which):
    """This suite runs on one transformers; users have any between these two."""
    release = OLDEST if which == "oldest" else newest_release()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [environment(release), "-c", ONE_CLASS_PER_FORM, str(ROOT / "tests")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [release], done.stderr


CAPPED = {
    "mla": (MLA_CLASSES, tiny.DECOUPLED | dict(kv_b_bias=True)),
    "mla on read": (MLA_CLASSES, tiny.ROPE_READ | dict(kv_b_bias=True)),
    "mfa": (MFA_CLASSES, tiny.FACTORED | dict(mfa_head_dim=23)),
    "mfa-kr": (MFA_CLASSES, tiny.FACTORED | dict(mfa_head_dim=23, key_reuse=True)),
}


@pytest.mark.parametrize("form", CAPPED)
@torch.no_grad()
def test_what_is_constant_in_keys_counts_where_scores_are_capped(form, ids):
    """Softmax does not see it, and the cap before it does: in absorbed steps as in the prompt."""
    classes, fields = CAPPED[form]
    config, _, causal_lm = classes["gemma2"]
    torch.manual_seed(0)
    given = sources.FAMILIES["gemma2"][2] | fields | dict(attn_logit_softcapping=2.0)
    model = tiny.fill_biases(causal_lm(config(**given))).eval()
    biases = [p for n, p in model.named_parameters() if n.endswith("b_proj.bias")]
    assert len(biases) == 2
    want = model(ids, use_cache=False)[0]
    for bias in biases:
        bias.normal_(0, 2)
    other = model(ids, use_cache=False)[0]
    assert distance(want, other) > 1e-2
    assert distance(decoded(model, ids, (12, 1, 1, 6)), other) < 1e-5


def test_gqa_models_of_the_first_format_are_read_and_latents_are_not():
    (gqa,) = GQA_CLASSES["gpt2"][0].tiny()
    assert type(gqa)(**gqa.to_dict() | dict(conversion={"form": "gqa"})).conversion
    with pytest.raises(ValueError, match="format 1, and this rehead reads format 2"):
        LlamaMLAConfig(**tiny.BASE | tiny.DECOUPLED | dict(conversion={"form": "mla"}))
