"""Conversions that several processes share, started as Hugging Face users start them."""

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import folders
import pytest
import tiny
import torch

from rehead.converters import InputError
from rehead.converters.processes import Processes

WORDS = ["the", "a", "of", "tree", "river", "house", "runs", "sees", "blue", "small", "and"]
# What `accelerate launch` runs on GPUs; on a CPU it starts one process, whatever it is asked for.
LAUNCH = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    *("-m", "rehead.converters"),
]
ALONE = [sys.executable, "-m", "rehead.converters"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    place = tmp_path_factory.mktemp("inputs")
    folders.save(place / "source", tiny.source(num_hidden_layers=3, **folders.MODEL_FIELDS))
    words = " ".join(random.Random(0).choices(WORDS, k=800))
    (place / "text.txt").write_text(words)
    return place


def run(command, inputs, output, *options):
    command = [
        *command, inputs / "source", "--calibration", inputs / "text.txt", "--samples", "4",
        "--output", output, *options,
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "options",
    [("--to", "mla", "--heal", "3"), ("--to", "mla", "--native", "--heal", "0")],
    ids=["healed", "native"],
)
def test_two_processes_write_what_one_writes(inputs, tmp_path, options):
    done = run(LAUNCH, inputs, tmp_path / "out", "--json", *options)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one process speaks
    assert [layer["layer"] for layer in told["layers"]] == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no work folder is left
    both = bytes_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "both")
    alone = run(ALONE, inputs, tmp_path / "out", "--json", *options)
    assert alone.returncode == 0, alone.stderr
    assert bytes_of(tmp_path / "out") == both
    assert json.loads(alone.stdout)["layers"] == told["layers"]


def test_each_process_takes_layers_of_its_own(inputs, tmp_path):
    """Said by the lines of progress: the first one's bring errors of its layers alone."""
    done = run(LAUNCH, inputs, tmp_path / "out", "--verbose", "--to", "mla", "--heal", "2")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if " heal " in line]
    assert ["error" in line for line in lines] == [True, False, True]


def test_a_dry_run_is_shared_too(inputs, tmp_path):
    options = ("--to", "gqa", "--heal", "0", "--dry-run", "--json")
    both, alone = (run(way, inputs, tmp_path / "out", *options) for way in (LAUNCH, ALONE))
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout)["layers"] == json.loads(alone.stdout)["layers"]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options",
    [("--to", "mla"), ("--to", "mlaa"), ("--to", "mla", "--kv-budget", "none")],
    ids=["output in the way", "no form", "no budget"],
)
def test_a_refusal_is_told_once_and_all_end(inputs, tmp_path, options):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    done = run(LAUNCH, inputs, tmp_path / "out", *options)
    assert done.returncode != 0 and done.stdout == ""
    assert len([line for line in done.stderr.splitlines() if line.startswith("rehead: ")]) == 1
    assert bytes_of(tmp_path / "out") == {"mine": b"x"}


@pytest.mark.parametrize("native", [(), ("--native",)], ids=["", "native"])
def test_an_interrupted_run_goes_on_with_any_number_of_processes(inputs, tmp_path, native):
    """What two have begun one ends, in the bytes that it writes by itself."""
    options = ("--to", "mla", "--heal", "2", *native)
    code = "\n".join(
        [
            "import os, signal, sys",
            "from rehead.converters import job",
            "kept = job.save",
            "def save(file, item):",
            "    kept(file, item)",
            "    if file.name == 'fitted-0001.pt':",  # the second one's, while the first one waits
            "        os.kill(os.getpid(), signal.SIGKILL)",
            "job.save = save",
            "from rehead.cli.main import convert_main",
            "convert_main()",
        ]
    )
    (tmp_path / "killed.py").write_text(code)
    killed = run([*LAUNCH[:-2], tmp_path / "killed.py"], inputs, tmp_path / "out", *options)
    assert killed.returncode != 0 and not (tmp_path / "out").exists()
    work = tmp_path / ".out.work"
    assert len(list(work.glob("fitted-*.pt"))) >= 1, killed.stderr
    assert len(list(work.glob("moments-*.pt"))) == 3
    assert run(ALONE, inputs, tmp_path / "out", *options, "--resume").returncode == 0
    resumed = bytes_of(tmp_path / "out")
    assert run(ALONE, inputs, tmp_path / "out", *options, "--force").returncode == 0
    assert bytes_of(tmp_path / "out") == resumed


def test_devices_are_one_for_each_process():
    processes = Processes()
    assert (processes.count, processes.first) == (1, True)
    assert [processes.takes(layer) for layer in range(3)] == [True, True, True]
    assert processes.own(torch.device("cuda:1")) == torch.device("cuda:1")
    processes.count, processes.index = 2, 1
    assert [processes.takes(layer) for layer in range(3)] == [False, True, False]
    assert processes.own(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InputError, match="--device cuda: each takes its own"):
        processes.own(torch.device("cuda:1"))


@pytest.mark.parametrize("mine", [0, 1, 2])
def test_a_process_without_a_device_is_refused(mine, monkeypatch):
    processes = Processes()
    processes.count, processes.index = 3, mine
    processes._state = SimpleNamespace(local_process_index=mine)
    two = SimpleNamespace(device_count=lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: two)
    if mine < 2:
        assert processes.own(torch.device("cuda")) == torch.device("cuda", mine)
    else:
        with pytest.raises(InputError, match="3 processes were launched, and 2 cuda devices"):
            processes.own(torch.device("cuda"))
