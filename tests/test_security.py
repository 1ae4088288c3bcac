"""Folders from strangers: nothing outside of them is read, nothing in them is run."""

import ast
import json
import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import folders
import pytest
import tiny
from transformers import AutoTokenizer

from rehead.cli import main
from rehead.converters import shards
from rehead.converters.checkpoint import copy_side_files, locate, open_source
from rehead.converters.errors import InputError

ROOT = Path(__file__).parents[1]
PACKAGES = ("converters", "modeling", "evaluation", "export", "uptraining", "cli")


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_rsa").write_text('{"a secret": 1}')
    return tmp_path / "private" / "id_rsa"


def edit(path, **fields):
    content = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(content | fields))


def one_line(told):
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_of_mine.json",
        "LICENSE",
        "generation_config.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "tokenizer.model",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("target", ["../private/id_rsa", "absolute", "itself"])
def test_a_link_that_leads_out_is_refused(name, target, folder, secret):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    places = {"absolute": secret, "itself": file}
    relative = os.path.relpath(secret, file.parent)
    file.symlink_to(places.get(target, relative))
    with pytest.raises(InputError, match="a link that leads out of its folder") as told:
        open_source(folder)
    one_line(told)
    assert str(file) in str(told.value)


def test_a_folder_of_links_leads_out_as_well(folder, secret):
    (secret.parent / "rag.jinja").write_text("a secret")
    (folder / "additional_chat_templates").symlink_to(secret.parent, target_is_directory=True)
    with pytest.raises(InputError, match="leads out of its folder"):
        locate(folder)


def test_links_inside_and_those_of_the_hubs_cache_are_followed(folder, tmp_path):
    (folder / "model.safetensors").rename(folder / "weights.bin")
    (folder / "model.safetensors").symlink_to("weights.bin")
    open_source(folder)
    (tmp_path / "way").symlink_to(folder, target_is_directory=True)
    open_source(tmp_path / "way")

    cached = tmp_path / "models--a--b"
    snapshot = cached / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for file in list(folder.iterdir()):
        shutil.copy(file, cached / "blobs" / f"hash-of-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
    open_source(snapshot)
    assert not any(p.is_symlink() for p in _copied(snapshot, tmp_path / "copy"))
    (snapshot / "LICENSE").symlink_to("../../../private")
    with pytest.raises(InputError, match="leads out"):
        open_source(snapshot)


def _copied(folder, dest):
    dest.mkdir()
    return [dest / name for name in copy_side_files(folder, dest)]


@pytest.mark.parametrize(
    "named", ["../private/id_rsa", "{secret}", ["a.json", "../private/id_rsa"]]
)
@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "fast_tokenizer_files"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_name_that_leads_out_is_refused(file, key, named, folder, secret):
    if isinstance(named, str):
        named = named.format(secret=secret)
    edit(folder / file, **{key: named})
    with pytest.raises(
        InputError, match=rf"{file} names a file outside its folder \({key}"
    ) as told:
        open_source(folder)
    one_line(told)


def test_the_tokenizer_would_follow_such_a_name(folder, secret):
    """transformers joins the names in `fast_tokenizer_files` to the folder without a look."""
    outside = folder.parent / "private" / "tokenizer.4.0.0.json"
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["stolen"] = len(content["model"]["vocab"])
    outside.write_text(json.dumps(content))
    name = "../private/tokenizer.4.0.0.json"
    edit(folder / "tokenizer_config.json", fast_tokenizer_files=[name])
    with pytest.raises(InputError, match="outside its folder"):
        locate(folder)


def test_places_of_another_machine_are_no_harm(folder):
    """Many a real folder names the cache of whoever saved it."""
    edit(folder / "tokenizer_config.json", special_tokens_map_file="/root/.cache/hub/x.json")
    edit(folder / "config.json", _name_or_path="/home/somebody/model")
    open_source(folder)
    assert AutoTokenizer.from_pretrained(folder)("a").input_ids


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_pickle_is_refused_unread_with_the_way_to_convert_it(name, folder, tmp_path, capsys):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    args = [str(folder), "--to", "mla", "--output", str(tmp_path / "out")]
    assert main.run(main.convert_app, "convert", args) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "reading a pickle runs code" in told
    assert "save_pretrained" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    # Beside safetensors it is not looked at.
    folders.save(folder)
    open_source(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_under_another_name_is_no_safetensors_file(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError):
        open_source(folder)
    assert not (tmp_path / "ran").exists()


def _calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            name = owner.id if isinstance(owner, ast.Name) else ""
            if name.startswith("Auto") and node.func.attr in ("from_pretrained", "from_config"):
                yield node


def _trusts(call):
    given = {word.arg: word.value for word in call.keywords}
    value = given.get("trust_remote_code")
    return not (isinstance(value, ast.Constant) and value.value is False)


def test_code_that_comes_with_a_model_is_never_trusted():
    """Every call says so: left out, transformers may ask the terminal."""
    calls = [
        (path.name, call)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for call in _calls(ast.parse(path.read_text()))
    ]
    assert len(calls) >= 8
    assert [(name, call.lineno) for name, call in calls if _trusts(call)] == []
    for code in ("AutoModel.from_pretrained(x)", "AutoConfig.from_config(x, trust_remote_code=y)"):
        assert all(map(_trusts, _calls(ast.parse(code))))


def header(path, content, data=b""):
    path.write_bytes(folders.safetensors_header(content, data))


TWO = b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
HEADERS = {
    "twice": (TWO + TWO[1:-1] + b"}", b"1234", "a is there twice"),
    "overlap": (
        TWO + b'"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
        b"123456",
        "before b belong to no tensor or to two",
    ),
    "hole": (
        TWO + b'"b":{"dtype":"U8","shape":[2],"data_offsets":[6,8]}}',
        b"12345678",
        "before b belong",
    ),
    "tail": (TWO[:-1] + b"}", b"12345678", "before the end belong"),
    "head": (
        b'{"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        b"1234",
        "before b belong",
    ),
    "float": (b'{"a":{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}}', b"1234", "no size"),
    "text": (b'{"a":{"dtype":"U8","shape":["4"],"data_offsets":[0,4]}}', b"1234", "no size"),
    "flag": (b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', b"1", "no size"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_says_one_thing_of_every_byte(case, tmp_path):
    content, data, message = HEADERS[case]
    header(tmp_path / "x.safetensors", content, data)
    with pytest.raises(InputError, match=message) as told:
        shards.read_header(tmp_path / "x.safetensors")
    one_line(told)


def peak_of(action):
    """Seconds and MiB that it took at most, and what it raised."""
    Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status")

    def kib(key):
        return int(status.read_text().split(f"{key}:")[1].split()[0])

    before, began = kib("VmRSS"), time.monotonic()
    with pytest.raises(InputError) as told:
        action()
    one_line(told)
    return time.monotonic() - began, (kib("VmHWM") - before) >> 10, str(told.value)


def test_sizes_are_checked_before_memory_is_taken(folder):
    """Headers that ask for a terabyte, or for a number of a billion digits."""
    weights = folder / "model.safetensors"
    claims = struct.pack("<Q", shards.MAX_HEADER + 1)
    with open(weights, "wb") as file:  # sparse: the file is as large as it says, and empty
        file.write(claims)
        file.truncate(1 << 33)
    seconds, mib, told = peak_of(lambda: open_source(folder))
    assert (seconds < 5, mib < 64) == (True, True), told
    sizes = ",".join(["4611686018427387904"] * 400_000)
    header(weights, b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % sizes.encode())
    seconds, mib, told = peak_of(lambda: open_source(folder))
    assert (seconds < 5, mib < 512) == (True, True), (seconds, mib)
    with open(folder / "config.json", "r+b") as file:
        file.truncate(1 << 33)
    seconds, mib, told = peak_of(lambda: open_source(folder))
    assert (seconds < 5, mib < 64) == (True, True), told
    assert "larger than any file of its kind" in told


@pytest.mark.parametrize("layers", [5000, 10**6, 10**12])
def test_layers_that_are_not_there_are_not_built(layers, folder):
    edit(folder / "config.json", num_hidden_layers=layers)
    seconds, mib, told = peak_of(lambda: open_source(folder))
    assert (seconds < 5, mib < 64) == (True, True), told
    assert f"asks for {layers} layers" in told or f"num_hidden_layers={layers}, beyond" in told


@pytest.mark.parametrize("place", ["config", "nested"])
def test_labels_that_a_config_counts_are_not_made(place, folder):
    """transformers makes a dict of them; found by fuzzing."""
    many = {"num_labels": 10**9}
    edit(folder / "config.json", **many if place == "config" else {"text_config": [many]})
    seconds, mib, told = peak_of(lambda: open_source(folder))
    assert (seconds < 5, mib < 64) == (True, True), told
    assert "num_labels=1000000000, beyond" in told


def gguf(path, *, tensors=0, fields=(), version=3):
    body = b"".join(struct.pack("<Q", len(k)) + k + v for k, v in fields)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensors, len(fields)) + body)


BOMBS = {
    "endless list": dict(fields=[(b"a", struct.pack("<IIQ", 9, 0, 1 << 60))]),
    "long list": dict(fields=[(b"a", struct.pack("<IIQ", 9, 0, 1 << 23) + bytes(1 << 23))]),
    "endless text": dict(fields=[(b"a", struct.pack("<IQ", 8, 1 << 60))]),
    "endless texts": dict(fields=[(b"a", struct.pack("<IIQ", 9, 8, 1 << 40))]),
    "list of lists": dict(fields=[(b"a", struct.pack("<IIQIQIQ", 9, 9, 1, 9, 1, 9, 1))]),
    "unknown kind": dict(fields=[(b"a", struct.pack("<I", 77))]),
    "endless tensors": dict(tensors=1 << 60),
    "old": dict(version=1),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_gguf_header_is_checked_before_it_is_believed(case, tmp_path):
    gguf(tmp_path / "x.gguf", **BOMBS[case])
    seconds, mib, told = peak_of(lambda: open_source(tmp_path / "x.gguf", cache_dir=tmp_path / "c"))
    assert "cannot be read as a GGUF model" in told
    assert (seconds < 5, mib < 128) == (True, True), (seconds, mib)
    assert not (tmp_path / "c").exists()


def test_a_gguf_file_brings_no_code_from_its_folder(tmp_path, monkeypatch):
    """Its neighbours are whatever else was downloaded."""
    marker = tmp_path / "ran"
    folders.save_gguf(tmp_path / "tiny.gguf", tiny.source(**folders.MODEL_FIELDS))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json"):
        edit(
            tmp_path / name,
            model_type="evil",
            auto_map={k: "evil.X" for k in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")},
        )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    try:
        open_source(tmp_path / "tiny.gguf", cache_dir=tmp_path / "cache")
    except InputError as error:
        assert "\n" not in str(error)
    assert not marker.exists()
