"""Conversions that are killed, and what the next run makes of what they left."""

import fcntl
import hashlib
import inspect
import json
import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path

import folders
import layers
import pytest
import test_coded as coded
import tiny
import torch
from safetensors.torch import load_file, save_file

from rehead.cli import main
from rehead.converters import InputError, convert, work
from rehead.converters.checkpoint import Writer
from rehead.converters.latent import LatentAttention
from rehead.converters.mfa import MFADims, mfa_builder
from rehead.converters.mfa_kr import mfa_kr_builder
from rehead.converters.mla import mla_builder
from rehead.converters.moments import latent_moments
from rehead.converters.plan import LayerDims

WORDS = ["the", "a", "of", "tree", "river", "house", "runs", "sees", "blue", "small", "and"]
KILLS = 20


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=800)))
    return path


@pytest.fixture
def source(tmp_path):
    folders.save(tmp_path / "source", tiny.source(num_hidden_layers=3, **folders.MODEL_FIELDS))
    return tmp_path / "source"


@pytest.fixture
def run(text, source):
    def run(output, **options):
        given = {"calibration": str(text), "samples": 4, "heal": 0, "to": "mla"} | options
        return convert(str(source), output=output, **given)

    return run


def stop(stage, done, total, info):
    """Presses Ctrl-C when the first layer is surveyed."""
    raise KeyboardInterrupt


def interrupt(run, output, **options):
    with pytest.raises(KeyboardInterrupt):
        run(output, progress=stop, **options)
    return output.with_name(f".{output.name}.work")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# One process that has imported everything forks the conversions, so that what is killed is a
# conversion and not an import. Each is the console script's own function.
FORKS = """
import json, os, random, shutil, signal, sys, time
from pathlib import Path
import rehead.converters.convert
from rehead.cli import main

source, text, root, kills = sys.argv[1:]
root, draw = Path(root), random.Random(0)
FORMS = (["--to", "mla", "--heal", "3"], ["--to", "gqa", "--heal", "0"], ["--to", "mfa-kr"])


def start(place, options):
    child = os.fork()
    if child:
        return child
    sys.argv[1:] = [source, "--output", str(root / place / "out"), "--calibration", text,
                    "--samples", "4", "--heal", "2", *options]
    os.dup2(os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.dup2(2, 1)
    try:
        main.convert_main()
    except SystemExit as end:
        os._exit(end.code or 0)
    os._exit(99)


def bytes_of(place):
    return {str(p): p.read_bytes() for p in sorted((root / place / "out").iterdir())}


def names(place):
    return sorted(p.name for p in (root / place).iterdir()) if (root / place).is_dir() else []


seen = []
for number in range(1000):
    options = FORMS[number % len(FORMS)]
    whole, place = f"whole-{number % len(FORMS)}", f"killed-{number}"
    if number < len(FORMS):
        began = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(start(whole, options), 0)[1]) == 0
        took = time.monotonic() - began
    while True:
        child = start(place, [*options, "--resume"])
        time.sleep(draw.uniform(0, took))
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL or (root / place / "out").exists():
            break
        assert names(place) in ([], [".out.work"]), names(place)
        work = root / place / ".out.work"
        seen.append(sorted(p.stem for p in work.glob("*.pt")) if work.is_dir() else None)
    assert code in (0, -signal.SIGKILL), (code, (root / "log").read_text()[-2000:])
    wanted = {p.replace(whole, place): data for p, data in bytes_of(whole).items()}
    assert bytes_of(place) == wanted, place
    assert names(place) == ["out"] or code
    if len(seen) >= int(kills):
        break
    shutil.rmtree(root / place)
print(json.dumps({"seen": seen, "finished": number + 1}))
"""


def test_a_killed_conversion_ends_in_the_same_bytes(source, text, tmp_path):
    """Killed at random moments and begun again until it ends, all in all 20 times or more."""
    (tmp_path / "root").mkdir()
    before = digest(source)
    done = subprocess.run(
        [sys.executable, "-c", FORKS, source, text, tmp_path / "root", str(KILLS)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert len(told["seen"]) >= KILLS
    # Some were killed when a part of the layers was done, or this would show nothing.
    assert sum(bool(files) for files in told["seen"]) >= KILLS // 4
    assert digest(source) == before


def layouts(kind=LatentAttention):
    """Every class of a layer that can be written, or fitted."""
    below = [found for sub in kind.__subclasses__() for found in layouts(sub)]
    return below if inspect.isabstract(kind) else [kind, *below]


def test_every_layout_is_kept_and_read_again(tmp_path, monkeypatch):
    found = {kind.__name__ for kind in layouts()}
    assert found == {kind.__name__ for kind in work.KEPT if issubclass(kind, LatentAttention)}
    maps, x = layers.maps(bias=True), layers.inputs()
    made = []
    for on_read in (False, True):
        seeded = torch.Generator().manual_seed(0)
        moments = latent_moments(maps, x, seeded, on_read)
        made.append(moments)
        if on_read:
            build = mla_builder(maps, moments)
            dims = [LayerDims(13, rotated, on_read=True) for rotated in (0, 6)]
            made += [build(dim) for dim in (*dims, LayerDims(32, on_read=True))]
            made.append(made[-2].stored(x))
            continue
        made.append(mla_builder(maps, moments)(LayerDims(13, 6)))
        for width in (12, 6):
            made.append(mfa_builder(maps, moments)(MFADims(width, 4)))
            made.append(mfa_kr_builder(maps, moments)(MFADims(width, 4, True)))
    for kind in coded.KINDS:
        _, _, transform, seen = coded.layer("grouped", kind)
        made.append(transform.build(coded.dims_of(transform, seen, kind)))
    assert found == {type(form).__name__ for form in made if isinstance(form, LatentAttention)}
    for form in made:
        work.save(tmp_path / "layer.pt", (form, 0.5))
        again, error = work.load(tmp_path / "layer.pt", torch.device("cpu"))
        assert (type(again), error) == (type(form), 0.5)
        for name, value in vars(form).items():
            same = (
                torch.equal
                if isinstance(value, torch.Tensor)
                else lambda *x: str(x[0]) == str(x[1])
            )
            assert same(getattr(again, name), value), name
    monkeypatch.setattr(work, "KEPT", [kind for kind in work.KEPT if kind is not type(made[-1])])
    with pytest.raises(pickle.UnpicklingError, match=type(made[-1]).__name__):
        work.load(tmp_path / "layer.pt", torch.device("cpu"))


def test_what_differs_is_named(run, source, text, tmp_path, monkeypatch):
    options = dict(calibration=str(tmp_path / "own.txt"))
    (tmp_path / "own.txt").write_text(text.read_text())
    left = interrupt(run, tmp_path / "out", **options)
    before = digest(left)

    def refused(message, **changed):
        with pytest.raises(InputError, match=message) as told:
            run(tmp_path / "out", resume=True, **options | changed)
        assert "\n" not in str(told.value)
        assert digest(left) == before
        assert not (tmp_path / "out").exists()

    refused(
        r"another recipe: kv_budget was 0\.5 and is 0\.4\. .* leave out --resume", kv_budget=0.4
    )
    refused("seed was 0 and is 1", seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        refused(r"torch was .* and is 9\.9")
    (tmp_path / "own.txt").write_text(text.read_text()[::-1])
    refused("calibration text's digest was")
    (tmp_path / "own.txt").write_text(text.read_text())
    state = load_file(source / "model.safetensors")
    state["model.norm.weight"] += 1
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    refused("source's digest was")


def test_a_folder_that_is_not_ours_is_left_alone(run, tmp_path):
    """Whatever its name: only what convert has made is ever removed."""
    place = tmp_path / ".out.work"
    place.mkdir()
    (place / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(InputError, match="in the way: convert works there"):
            run(tmp_path / "out", resume=resume)
    (place / "thesis.tex").rename(tmp_path / "thesis.tex")
    place.rmdir()
    place.symlink_to(tmp_path / "source", target_is_directory=True)
    with pytest.raises(InputError, match="in the way"):
        run(tmp_path / "out")
    place.unlink()
    place.write_text("a file")
    with pytest.raises(InputError, match="in the way"):
        run(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.work", "source", "thesis.tex"]


def test_two_conversions_to_one_place_do_not_mix(run, tmp_path):
    left = interrupt(run, tmp_path / "out")
    with open(left / work.MARKER) as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(InputError, match="another conversion is at work in"):
                run(tmp_path / "out", resume=resume)
        assert list(left.glob("moments-*.pt"))
    run(tmp_path / "out", resume=True)


def test_a_mistake_while_resuming_loses_nothing(run, tmp_path, monkeypatch):
    left = interrupt(run, tmp_path / "out")
    before = digest(left)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1}))
    with pytest.raises(InputError, match="Make room"):
        run(tmp_path / "out", resume=True)
    assert digest(left) == before
    monkeypatch.undo()
    run(tmp_path / "out", resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_a_recipe_that_was_cut_off_is_begun_anew(run, tmp_path):
    """The recipe is on disk before anything else is; half of one means that nothing was done."""
    left = tmp_path / ".out.work"
    left.mkdir()
    (left / work.MARKER).write_text('{"form": "m')
    run(tmp_path / "out", resume=True)
    left.mkdir()
    (left / work.MARKER).write_text('{"form": "m')
    (left / "moments-0000.pt").write_bytes(b"half")
    with pytest.raises(InputError, match="source was None"):
        run(tmp_path / "out", resume=True, force=True)
    run(tmp_path / "out", force=True)


def test_a_replacement_killed_in_the_middle_is_undone(tmp_path):
    """--force moves the old model aside, then the new one in: a kill between the two."""
    with Writer(tmp_path / "out") as writer:
        writer.add("w", torch.zeros(2))
        writer.finish({"config.json": {}})
    before = digest(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old-0123abcd")
    with pytest.raises(InputError, match="Give --force"):
        Writer(tmp_path / "out")
    assert digest(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("limit", [100, 20_000, 90_000])  # recipe, survey, weights
def test_a_full_disk_is_one_line_and_leaves_nothing(limit, source, text, tmp_path):
    """The operating system stops every file from growing, as a full disk does."""
    args = [source, "--to", "mla", "--calibration", text, "--samples", 4, "--heal", 0]
    before = digest(source)

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return main.run(main.convert_app, "convert", [*map(str, args), "--output", "out"])

    code, told = forked(child, tmp_path)
    assert code == 2, told
    assert told.splitlines()[-1].startswith("rehead: no space left for"), told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    assert digest(source) == before


def forked(child, folder):
    """Exit code and stderr of a function run in a process of its own, in that folder."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 99
        try:
            os.chdir(folder)
            os.dup2(writer, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            code = child()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said
