"""What is around a conversion whose cached numbers are coded: sizes, reports, exports, training."""

import json
import random
import re
import shutil

import folders
import pytest
import tiny
import torch
from peft import PeftModel
from test_processes import ALONE, LAUNCH, bytes_of
from test_processes import run as launched
from transformers import LlamaConfig

from rehead.cli import main
from rehead.converters import InputError, convert, job, plan
from rehead.converters.inspection import offers
from rehead.converters.recipe import channel_words
from rehead.evaluation import (
    charts,
    exact_bytes,
    kv_bytes_per_token,
    load_config,
    load_model,
    parameter_counts,
    report_page,
)
from rehead.modeling.cached_decoding import cache_of
from rehead.modeling.coding import BITS, Code
from rehead.uptraining import UptrainConfig, uptrain

ROPES = ("decoupled", "on-read")
WORDS = " ".join(
    random.Random(0).choices(["the", "a", "of", "tree", "river", "sees", "blue"], k=900)
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A stock model and a text."""
    place = tmp_path_factory.mktemp("inputs")
    folders.save(place / "source", tiny.source(num_hidden_layers=3, **folders.MODEL_FIELDS))
    (place / "text.txt").write_text(WORDS)
    return place


def options(inputs, **asked):
    text = str(inputs / "text.txt")
    return dict(kv_bits="auto", kv_budget=0.2, heal=0, samples=4, calibration=text) | asked


@pytest.fixture(scope="module", params=ROPES)
def coded(request, inputs, tmp_path_factory):
    """What its conversion says of a coded model, which lies at `output`."""
    output = tmp_path_factory.mktemp(request.param) / "coded"
    source = str(inputs / "source")
    return convert(source, to="mla", output=output, rope=request.param, **options(inputs))


def rehead(capsys, *args):
    code = main.run(main.app, "rehead", [str(arg) for arg in args])
    return code, *capsys.readouterr()


# Sizes


def code_bytes(config) -> int:
    return sum(Code(tuple(part)).bytes for layer in config.cache_codes for part in layer)


def test_measured_bytes_are_those_of_the_codes(coded):
    model = load_model(coded.output)
    config = model.config
    cached = coded.kv_bytes_per_token["converted"]
    assert kv_bytes_per_token(model) == cached == code_bytes(config)
    # Against the source's cache at 16 bits, whatever the weights are stored in.
    numbers = 2 * 16 * config.num_hidden_layers
    assert coded.kv_budget == cached / (2 * numbers) <= 0.2
    assert coded.kv_bytes_per_token["source"] == numbers * model.dtype.itemsize


@torch.no_grad()
def test_exact_tokens_are_those_that_a_cache_keeps_whole(coded):
    model = load_model(coded.output)
    caches = [
        cache_of(model(torch.arange(3, 3 + length)[None], use_cache=True)) for length in (9, 30)
    ]
    for cache in caches:
        found = sum(layer.first.nbytes for layer in cache.layers)
        assert found == exact_bytes(model.config) > 0
    model.config.exact_tokens = 0
    assert exact_bytes(model.config) == 0
    assert exact_bytes(tiny.mla().config) == 0


def test_evaluate_and_inspect_say_what_is_cached(coded, inputs, capsys):
    text = ("--text", inputs / "text.txt", "--window", 32, "--windows", 2, "--quiet", "--json")
    code, out, _ = rehead(capsys, "evaluate", coded.output, *text)
    assert code == 0
    each = coded.kv_bytes_per_token["converted"]
    assert json.loads(out)["kv_bytes_per_token"] == each
    code, out, _ = rehead(capsys, "inspect", coded.output, "--json")
    found = json.loads(out)
    assert (code, found["kv_bytes_per_token"], found["form"]) == (0, each, "mla")
    assert found["conversion"]["kv_bits"] == "auto"
    assert found["conversion"]["exact_tokens"] == 4
    config = load_config(coded.output)
    assert found["exact_bytes"] == exact_bytes(config)
    assert parameter_counts(config)[1] == coded.attention_parameters["converted"]
    fits = {(c["memory_gb"], c["batch"]): c["tokens"] for c in found["contexts"]}
    weights = found["parameters"] * 4
    for memory, batch in fits:
        tokens = fits[memory, batch]
        taken = [weights + batch * (found["exact_bytes"] + n * each) for n in (tokens, tokens + 1)]
        assert taken[0] <= memory * 1e9 < taken[1]


def test_coded_forms_are_offered_at_every_share_that_they_can_fill(inputs):
    config = load_config(inputs / "source")
    found = [o for o in offers(config) if o.kv_bits == "auto"]
    assert {(o.form, o.rope) for o in found} == {("mla", rope) for rope in ROPES}
    for rope in ROPES:
        own = [o for o in found if o.rope == rope]
        # All channels with 8 bits are half of the source's cache.
        assert [o.kv_budget for o in own] == [0.5, 0.25, 0.125]
        for offer in own:
            assert offer.kv_bytes_per_token == code_bytes(offer.config) == offer.kv_budget * 192
            rank, rotated = offer.dims["kv_lora_rank"], offer.dims["qk_rope_head_dim"]
            assert (rotated == 0) == (rope == "on-read")
            coded = 16 if offer.kv_budget == 0.125 else 32
            most = 16 if rope == "decoupled" else 32  # of values, or of the latent
            assert rank + rotated == coded + min(16, most - (coded - rotated))


def test_an_offer_is_about_what_a_conversion_gives(coded, inputs):
    config = load_config(inputs / "source")
    rope = coded.recipe.rope
    (offer,) = [o for o in offers(config, [0.2]) if (o.kv_bits, o.rope) == ("auto", rope)]
    assert offer.kv_bytes_per_token == pytest.approx(coded.kv_bytes_per_token["converted"], rel=0.1)
    attention = parameter_counts(offer.config)[1]
    assert attention == pytest.approx(coded.attention_parameters["converted"], rel=0.2)


def test_inspect_tells_coded_forms_from_the_others(inputs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = rehead(capsys, "inspect", inputs / "source")
    assert code == 0
    rows = [line for line in out.splitlines() if line.startswith(("mla coded", "on-read coded"))]
    assert len(rows) == 6
    assert all(" ~" in row and " about kv_lora_rank " in row for row in rows)
    assert not any("~" in line for line in out.splitlines() if line.startswith(("gqa", "mfa")))


def test_families_without_rotation_are_offered_one_way():
    config = LlamaConfig(**tiny.BASE | dict(dtype="bfloat16"))
    assert {o.kv_bits for o in offers(config) if o.form != "mla"} == {"16"}


# What a conversion says


def test_the_result_says_how_many_bits_there_are(coded):
    codes = [Code(part).by_bits() for layer in coded.layers for part in layer.code]
    assert coded.channels == {
        bits: sum(counts[place] for counts in codes) for place, bits in enumerate(BITS)
    }
    total = sum(bits * count for bits, count in coded.channels.items())
    numbers = 2 * 16 * len(coded.layers)
    assert coded.coded.startswith(f"{total / numbers:.3g} bits for each number")
    config = load_config(coded.output)
    assert config.cache_codes == [[list(part) for part in layer.code] for layer in coded.layers]
    names = ["keys and values"] if config.rope_on_read else ["keys", "values"]
    for layer in coded.layers:
        assert [*layer.codes] == names
    card = (coded.output / "README.md").read_text()
    assert f"What it caches is coded: {coded.coded}. The first 4 tokens" in card
    for layer in coded.layers:
        cells = " | ".join(map(channel_words, layer.codes.values()))
        assert f"| {cells} | {layer.error:.3g} |" in card
    assert channel_words((8, 0, 0, 0, 0, 1004, 0)) == "channels: 8 of 8, 1,004 of 2 bits"


def test_what_is_not_coded_says_nothing_of_bits(inputs, tmp_path):
    source = str(inputs / "source")
    done = convert(source, to="mla", output=tmp_path / "out", **options(inputs, kv_bits="16"))
    assert (done.channels, done.coded, done.layers[0].codes) == (None, None, {})
    assert "bits" not in (tmp_path / "out" / "README.md").read_text()
    assert "Bits of the cache" not in report_page(done)
    assert "exact_tokens" not in report_page(done)


def test_the_report_draws_bits_by_layer(coded):
    page = report_page(coded)
    assert "Bits of the cache" in page
    assert coded.coded in page
    assert ">exact_tokens<" in page
    figure = charts.bits(coded.layers)
    names = [*coded.layers[0].codes]
    assert [axes.get_ylabel() for axes in figure.axes] == [f"channels of {n}" for n in names]
    for axes, name in zip(figure.axes, names, strict=True):
        drawn = [bars.get_label() for bars in axes.containers]
        kinds = [f"{bits} bits" if bits else "first tokens alone" for bits in BITS]
        assert drawn == [
            kind
            for place, kind in enumerate(kinds)  # what no layer has is left out
            if any(of[place] for layer in coded.layers for of in layer.codes.values())
        ]
        heights = {b.get_label(): [bar.get_height() for bar in b] for b in axes.containers}
        for place, kind in enumerate(kinds):
            wanted = [layer.codes[name][place] for layer in coded.layers]
            assert heights.get(kind, [0] * len(wanted)) == wanted
        tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
        assert tops == [sum(layer.codes[name]) for layer in coded.layers]
    drawn = charts.svg(charts.bits, coded.layers)
    assert drawn == charts.svg(charts.bits, coded.layers)
    assert b"8 bits" in drawn


def test_a_dry_run_gives_the_codes_that_are_written(coded, inputs, capsys):
    asked = options(inputs, rope=coded.recipe.rope)
    planned = plan(str(inputs / "source"), to="mla", **asked)
    assert [layer.code for layer in planned.layers] == [layer.code for layer in coded.layers]
    assert planned.kv_bytes_per_token == coded.kv_bytes_per_token
    assert planned.coded == coded.coded
    assert "Bits of the cache" in report_page(planned)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items()]
    code, out, _ = rehead(
        capsys, "convert", inputs / "source", "--to", "mla", "--dry-run", "-q", *flags
    )
    out = " ".join(out.split())
    assert code == 0
    assert f"Cached numbers: {coded.coded}" in out
    for name, counts in coded.layers[0].codes.items():
        assert f"{name} in {channel_words(counts)}" in out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (dict(kv_bits="16", exact_tokens=4), "nothing is coded here. Give --kv-bits auto"),
        (dict(kv_bits=None, exact_tokens=0), "nothing is coded here"),
        (dict(exact_tokens=-1), "--exact-tokens -1 must be 0 or more"),
        (dict(exact_tokens=128), "sequences of 128 tokens. Give fewer than 128"),
        (dict(kv_bits="3"), "--kv-bits 3 is unknown. Use auto, 16, 8, 4"),
        (dict(kv_budget=0.001), "Give a larger --kv-budget"),
        (dict(native=True), "--native asks for dims of 16-bit numbers"),
        (dict(kv_lora_rank=8), "--kv-lora-rank asks for dims"),
    ],
    ids=lambda item: str(item)[:30],
)
def test_bad_values_get_one_line(inputs, tmp_path, asked, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        convert(
            str(inputs / "source"), to="mla", output=tmp_path / "out", **options(inputs, **asked)
        )
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_other_forms_code_nothing(inputs, tmp_path):
    for asked in (dict(), dict(kv_bits=None, exact_tokens=2)):
        asked = dict(kv_budget=0.5) | asked
        with pytest.raises(InputError, match="--kv-bits auto"):
            convert(
                str(inputs / "source"), to="gqa", output=tmp_path / "o", **options(inputs, **asked)
            )


# Running


def flags(rope):
    return "--to", "mla", "--heal", "2", "--kv-bits", "auto", "--kv-budget", "20%", "--rope", rope


@pytest.mark.parametrize("rope", ROPES)
def test_two_processes_write_what_one_writes(inputs, tmp_path, rope):
    told, written = [], []
    for command in (LAUNCH, ALONE):
        done = launched(command, inputs, tmp_path / "out", "--json", "--force", *flags(rope))
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout)["layers"])
        written.append(bytes_of(tmp_path / "out"))
    assert told[0] == told[1]
    assert written[0] == written[1]


@pytest.mark.parametrize("last", ["input-0001.pt", "moments-0001.pt", "fitted-0001.pt"])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    coded, inputs, tmp_path, last, monkeypatch
):
    source, output = str(inputs / "source"), tmp_path / coded.output.name
    asked = options(inputs, rope=coded.recipe.rope)
    kept = {}

    def stop(original):
        def save(file, item):
            original(file, item)
            kept[file.name] = True
            if file.name == last:
                raise KeyboardInterrupt

        return save

    from rehead.converters import fisher

    with monkeypatch.context() as patch:
        for module in (job, fisher):
            patch.setattr(module, "save", stop(module.save))
        with pytest.raises(KeyboardInterrupt):
            convert(source, to="mla", output=output, **asked)
    assert not output.exists() and last in kept
    convert(source, to="mla", output=output, resume=True, **asked)
    assert bytes_of(output) == bytes_of(coded.output)


def test_another_number_of_exact_tokens_is_another_recipe(inputs, tmp_path, monkeypatch):
    source, output, asked = str(inputs / "source"), tmp_path / "out", options(inputs)

    def save(file, item):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "save", save)
        with pytest.raises(KeyboardInterrupt):
            convert(source, to="mla", output=output, **asked)
    for other, name in ((dict(exact_tokens=2), "exact_tokens"), (dict(kv_bits="8"), "kv_bits")):
        with pytest.raises(InputError, match="another recipe") as error:
            convert(source, to="mla", output=output, resume=True, **asked | other)
        assert name in str(error.value)


@pytest.mark.parametrize("to", ["transformers", "deepseek", "gguf"])
def test_no_export_takes_a_coded_model(coded, inputs, tmp_path, to, capsys):
    output, text = tmp_path / "exported", inputs / "text.txt"
    code, out, err = rehead(
        capsys, "export", coded.output, "--to", to, "--output", output, "--calibration", text, "-q"
    )
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert "caches codes of a few bits" in line
    assert "--kv-bits 16" in line
    assert not any(tmp_path.iterdir())


def test_continuous_batches_are_refused_by_name(coded):
    attention = load_model(coded.output).model.layers[0].self_attn
    paged = type("PagedAttentionCache", (), {"update": None})()
    with pytest.raises(ValueError, match=rf"{type(attention).__name__} caches no keys and values"):
        attention(torch.zeros(1, 2, 32), (None, None, None), None, paged)


def test_no_part_of_a_coded_layer_is_split_among_devices(coded):
    config = load_config(coded.output)
    assert not [name for name in config.base_model_tp_plan if "self_attn" in name]
    # Beside the linear layers, decoupled ones hold these.
    own = {n for n, _ in load_model(coded.output).model.layers[0].self_attn.named_parameters()}
    linear = {n for n in own if n.endswith(("weight", "bias"))}
    assert own - linear == (set() if config.rope_on_read else {"k_mean", "k_synthesis"})


# Training


def recipe(folder, inputs, **fields):
    small = dict(tokens=4800, window=24, batch=4, micro_batch=2, eval_windows=8, evaluations=1)
    small |= dict(rank=4, ce_weight=0.0, dtype="float32")
    return UptrainConfig(str(folder), str(inputs / "text.txt"), **small | fields)


@torch.no_grad()
def decoded(model, ids):
    """Logits with the tokens fed one at a time."""
    cache, rows = None, []
    for index in range(ids.shape[1]):
        out = model(ids[:, index : index + 1], **tiny.cached(model, cache), use_cache=True)
        cache = cache_of(out)
        rows.append(out.logits)
    return torch.cat(rows, dim=1)


@pytest.fixture
def student(coded, inputs, tmp_path):
    """The coded model with attention that has something to learn."""
    folder = shutil.copytree(coded.output, tmp_path / "student")
    model = load_model(folder)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.o_proj.weight
            weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=draw)
    folders.save(folder, model)
    return folder


def test_gradients_pass_through_the_code(coded):
    """All of a layer's parameters have one, what stands before the code among them."""
    model = load_model(coded.output)
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(3))
    model(ids).logits.logsumexp(-1).sum().backward()
    for layer in model.model.layers:
        grads = {name: p.grad for name, p in layer.self_attn.named_parameters()}
        assert not [name for name, grad in grads.items() if grad is None or not grad.any()]


def test_full_training_teaches_all_of_the_attention(student, inputs, tmp_path):
    done = uptrain(
        recipe(student, inputs, full=True, learning_rate=1e-3), output=tmp_path / "trained"
    )
    assert done.after.kl < 0.95 * done.before.kl
    before, after = (load_model(f).state_dict() for f in (student, tmp_path / "trained"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attn." in name}
    config, trained = load_config(student), load_config(tmp_path / "trained")
    assert trained.cache_codes == config.cache_codes
    check_decoding(load_model(tmp_path / "trained"))


def check_decoding(model):
    """Cached decoding is what is computed without a cache; in float64, where no step is missed."""
    model.double().eval()
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
    assert tiny.error(decoded(model, ids), full) < 1e-5
    return full


def test_adapters_train_and_are_merged(student, inputs, tmp_path):
    asked = recipe(student, inputs, learning_rate=3e-3)
    for form in ("merged", "adapter"):
        done = uptrain(asked, output=tmp_path / form, form=form)
        assert done.after.kl < 0.95 * done.before.kl
    adapted = PeftModel.from_pretrained(load_model(student), str(tmp_path / "adapter"))
    named = {
        name.split(".lora_A")[0].split(".")[-1] for name in adapted.state_dict() if "lora_A" in name
    }
    assert named == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    full = check_decoding(adapted)
    merged = check_decoding(load_model(tmp_path / "merged"))
    # Merged weights are rounded, which may move a number into the next step.
    off = (merged - full).abs().flatten() / full.abs().max()
    assert off.median() < 1e-5
    untrained = check_decoding(load_model(student))
    assert ((untrained - full).abs().flatten() / full.abs().max()).median() > 1e-3
