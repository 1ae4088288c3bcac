"""The command line, through its console scripts and in the process."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import folders
import pytest
import typer
from transformers import AutoModelForCausalLM

from rehead.cli import main
from rehead.cli.convert import default_output
from rehead.converters import FORMS, ROPES, Conversion, InputError, LayerReport, Recipe
from rehead.evaluation import kv_bytes_per_token

SCRIPTS = Path(sys.executable).parent
TEXT = "The quick brown fox jumps over the lazy dog. " * 40

# Scripts depend on these; a name may be added and never lost.
CONVERT_OPTIONS = {
    "--to",
    "--output",
    "--kv-budget",
    "--kv-bits",
    "--exact-tokens",
    "--kv-lora-rank",
    "--qk-rope-head-dim",
    "--q-lora-rank",
    "--num-key-value-heads",
    "--pooling",
    "--head-dim",
    "--share-q-dim",
    "--rope",
    "--uniform-rank",
    "--native",
    "--preset",
    "--calibration",
    "--samples",
    "--heal",
    "--seed",
    "--dtype",
    "--device",
    "--dry-run",
    "--resume",
    "--force",
    "--report",
    "--eval-text",
    "--quiet",
    "--verbose",
    "--json",
}
EVALUATE_OPTIONS = {"--text", "--window", "--windows", "--compare", "--dtype", "--device", "--json"}
EVALUATE_OPTIONS |= {"--quiet", "--verbose"}
EXPORT_OPTIONS = {"--to", "--output", "--calibration", "--samples", "--norm-rows"}
EXPORT_OPTIONS |= {"--push-to-hub", "--private", "--force", "--json", "--quiet", "--verbose"}
COMPLETION = {"--install-completion", "--show-completion"}


def script(name, *args, **options):
    command = [SCRIPTS / name, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def run(capsys, *args, command="rehead"):
    """Exit code, stdout and stderr of a command run in this process."""
    app = main.app if command == "rehead" else main.convert_app
    code = main.run(app, command, [str(arg) for arg in args])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model's folder and a text."""
    path = tmp_path_factory.mktemp("inputs")
    folders.save(path / "tiny")
    (path / "text.txt").write_text(TEXT)
    return path / "tiny", path / "text.txt"


def options_of(help_text):
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", help_text))


def test_the_options_are_those_that_scripts_depend_on():
    wide = os.environ | {"COLUMNS": "200"}
    shown = script("convert", "--help", env=wide)
    assert shown.returncode == 0
    assert options_of(shown.stdout) == CONVERT_OPTIONS | {"--help"} | COMPLETION
    same = script("rehead", "convert", "--help", env=wide)
    assert options_of(same.stdout) == CONVERT_OPTIONS | {"--help"}
    shown = script("rehead", "evaluate", "--help", env=wide)
    assert options_of(shown.stdout) == EVALUATE_OPTIONS | {"--help"}
    shown = script("rehead", "export", "--help", env=wide)
    # Its help names an option of the conversion it needs.
    assert options_of(shown.stdout) - {"--preset"} == EXPORT_OPTIONS | {"--help"}
    shown = script("rehead", "--version")
    assert re.fullmatch(r"rehead \d+\.\d+\.\d+\S*\n", shown.stdout)


def test_help_does_not_wait_for_torch():
    code = "import sys; from rehead.cli import main; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_evaluate_reports_one_json_object(inputs):
    model, text = inputs
    done = script(
        *("rehead", "evaluate", model, "--text", text),
        *("--window", 64, "--windows", 5, "--compare", model, "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["tokens"] == 5 * 63
    assert (result["window"], result["windows"], result["dtype"]) == (64, 5, "float32")
    assert result["kv_bytes_per_token"] == 2 * (2 * 2 * 8) * 4
    assert result["perplexity"] == result["compare"]["perplexity"] > 1


def test_evaluate_shows_a_table(inputs, capsys):
    model, text = inputs
    code, out, _ = run(capsys, "evaluate", model, "--text", text, "--window", 64, "--windows", 2)
    assert code == 0
    assert "perplexity" in out
    assert "256 B" in out


def test_a_model_writes_texts_that_a_conversion_is_calibrated_on(inputs, tmp_path, capsys):
    place = tmp_path / "own.jsonl"
    args = ("sample", inputs[0], "--output", place, "--tokens", 300, "--length", 40, "--batch", 4)
    code, out, _ = run(capsys, *args, "--json")
    assert code == 0
    found = json.loads(out)
    lines = [json.loads(line) for line in place.read_text().splitlines()]
    assert (len(lines), found["output"]) == (found["texts"], str(place))
    assert 300 <= found["tokens"] < 340
    before = place.read_bytes()
    code, _, err = run(capsys, *args)
    assert code == 2
    assert "Give another --output, or --force" in err
    assert run(capsys, *args, "--force", "--seed", 1)[0] == 0
    assert place.read_bytes() != before
    assert run(capsys, *args, "--force")[0] == 0
    assert place.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]
    texts = ("--calibration", "default", "--calibration", place, "--samples", 4, "--heal", 0)
    args = ("convert", inputs[0], "--to", "mla", *texts, "--output", tmp_path / "out", "--json")
    code, out, _ = run(capsys, *args)
    assert code == 0
    assert json.loads(out)["recipe"]["calibration"] == f"default + {place}"


def test_sampling_that_breaks_off_leaves_nothing(inputs, tmp_path, monkeypatch, capsys):
    from rehead import evaluation

    def texts(*args, **options):
        yield "a", 1
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "own_texts", texts)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "sample", inputs[0])[0] == main.INTERRUPTED
    assert not list(tmp_path.iterdir())


MISTAKES = {
    "no place to write": (["sample", "{model}", "--output", "no/a.jsonl"], "no is no folder"),
    "unknown command": (["evalute"], "Did you mean 'evaluate'"),
    "unknown option": (["evaluate", "{model}", "--txt", "x"], "--text"),
    "no text": (["evaluate", "{model}"], "Missing option '--text'"),
    "no model": (["evaluate", "--text", "{text}"], "Missing argument 'DIR'"),
    "window of one": (["evaluate", "{model}", "--text", "{text}", "--window", "1"], "--window"),
    "window too long": (["evaluate", "{model}", "--text", "{text}", "--window", "9999"], "1800"),
    "no such text": (["evaluate", "{model}", "--text", "no.txt"], "no.txt: no such file"),
    "no such model": (["evaluate", "./no", "--text", "{text}"], "no such file or folder"),
    "near text": (["evaluate", "{model}", "--text", "{text}t"], "Did you mean"),
    "near model": (["evaluate", "{model}y", "--text", "{text}"], "Did you mean {model}?"),
    "near model to inspect": (["inspect", "{model}y"], "Did you mean {model}?"),
    "quiet and verbose": (["convert", "{model}", "--to", "mla", "-q", "-v"], "opposites"),
    "no such device": (
        ["evaluate", "{model}", "--text", "{text}", "--device", "cuda:9"],
        "cuda:9 cannot be used",
    ),
    "no such dtype": (["evaluate", "{model}", "--text", "{text}", "--dtype", "fp3"], "fp3"),
    "no form": (["convert", "{model}"], "Missing option '--to'"),
    "near form": (["convert", "{model}", "--to", "mlaa"], "Did you mean mla?"),
    "near pooling": (["convert", "{model}", "--to", "gqa", "--pooling", "men"], "mean mean?"),
    "near preset": (["convert", "{model}", "--to", "mla", "--preset", "engin"], "mean engine?"),
    "near rope": (["convert", "{model}", "--to", "mla", "--rope", "decopled"], "mean decoupled?"),
    "near format": (["export", "{model}", "--to", "transformer"], "Did you mean transformers?"),
    "nothing to export": (["export", "{model}", "--to", "transformers"], "stock class"),
    "bad steps": (["convert", "{model}", "--to", "mla", "--heal", "-1"], "--heal"),
    "no number": (["convert", "{model}", "--to", "mla", "--samples", "few"], "--samples"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case, inputs, capsys):
    args, message = MISTAKES[case]
    places = {"model": str(inputs[0]), "text": str(inputs[1])}
    code, out, err = run(capsys, *(arg.format(**places) for arg in args))
    last = err.strip().splitlines()[-1]
    assert code == 2
    assert out == ""
    assert last.startswith("rehead: ")
    assert message.format(**places) in last
    assert "Traceback" not in err


def test_a_mistake_reaches_the_shell_as_exit_code_2(inputs):
    done = script("rehead", "evaluate", inputs[0], "--text", "no.txt", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rehead: no.txt: no such file.\n"


def test_a_mistyped_family_is_told_the_near_one(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    code, _, err = run(capsys, "convert", folder, "--to", "mla")
    assert code == 2
    assert "Did you mean 'llama'?" in err.splitlines()[-1]


def test_no_arguments_show_the_help(capsys):
    code, out, err = run(capsys)
    assert code == 2
    assert "evaluate" in out + err
    assert "rehead: \n" not in err


def done(output: Path | None) -> Conversion:
    """What a conversion returns."""
    recipe = Recipe("m", "mla", "decoupled", 0.5, calibration="default", samples=8, heal=0, seed=0)
    dims = [
        dict(zip(("kv_lora_rank", "qk_rope_head_dim"), d, strict=True)) for d in ((8, 4), (7, 0))
    ]
    layers = [LayerReport(0, dims[0], error=0.01), LayerReport(1, dims[1], error=float("nan"))]
    return Conversion(
        output=output,
        form="mla",
        kv_budget=0.5,
        kv_bytes_per_token={"source": 1000, "converted": 500},
        seconds=61.0,
        peak_rss_bytes=3 << 30,
        recipe=recipe,
        parts={"read": 1.2, "fit": 59.0},
        layers=layers,
    )


@pytest.fixture
def conversion(monkeypatch):
    """Stands in for the conversion: records its arguments, and does what `act` says."""
    import rehead.converters

    calls = []

    class Recorder:
        act = None

        def __call__(self, model, **options):
            calls.append((model, options))
            if self.act:
                self.act(options)
            return done(None if options["dry_run"] else options["output"])

    recorder = Recorder()
    recorder.calls = calls
    monkeypatch.setattr(rehead.converters, "convert", recorder)
    return recorder


def test_options_reach_the_conversion(conversion, capsys):
    code, _, _ = run(capsys, "convert", "a/llama-7b", "--to", "mla")
    assert code == 0
    model, defaults = conversion.calls.pop()
    assert model == "a/llama-7b"
    defaults.pop("progress")
    assert defaults == {
        **dict.fromkeys(("calibration", "samples", "heal", "dtype")),
        **dict.fromkeys(("kv_lora_rank", "qk_rope_head_dim", "q_lora_rank", "kv_budget")),
        **dict.fromkeys(("num_key_value_heads", "pooling", "head_dim", "share_q_dim", "preset")),
        **dict.fromkeys(("uniform_rank", "native", "dry_run", "resume", "force"), False),
        **{"to": "mla", "output": Path("llama-7b-mla")},
        **{"rope": "decoupled", "seed": 0, "device": "cpu", "kv_bits": None, "exact_tokens": None},
    }
    given = {
        **{"output": Path("x"), "kv_budget": "33%", "calibration": "c.txt", "samples": 8},
        **{"heal": 0, "rope": "on-read", "seed": 7, "dtype": "bfloat16", "device": "cuda"},
        **{"kv_lora_rank": 96, "qk_rope_head_dim": 0, "q_lora_rank": 64},
        **{"num_key_value_heads": 2, "pooling": "mean", "head_dim": 48, "share_q_dim": 99},
        **{"preset": "engine", "kv_bits": "auto", "exact_tokens": 2},
    }
    flags = ("uniform_rank", "native", "dry_run", "resume", "force")
    args = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    args += [f"--{flag.replace('_', '-')}" for flag in flags]
    code, out, _ = run(capsys, "m", "--to", "mla", *args, command="convert")
    assert code == 0
    assert "layer 1: kv_lora_rank 7, qk_rope_head_dim 0" in out
    assert "nothing was written" in out
    _, options = conversion.calls.pop()
    options.pop("progress")
    given["calibration"] = ["c.txt"]  # there may be several
    assert options == {"to": "mla", **given, **dict.fromkeys(flags, True)}


def test_json_is_all_that_stands_on_stdout(conversion, capsys):
    def act(options):
        print("a library's chatter")
        for done in (0, 1, 2):
            options["progress"]("layers", done, 2, {"error": 0.5})

    conversion.act = act
    code, out, err = run(capsys, "m", "--to", "mla", "--json", command="convert")
    assert code == 0
    result = json.loads(out, parse_constant=pytest.fail)
    assert result["output"] == "m-mla"
    assert result["layers"][1]["error"] is None  # JSON has no NaN
    assert "a library's chatter" in err
    assert "layers" in err
    code, out, _ = run(capsys, "m", "--to", "mla", command="convert")
    assert "1000 B -> 500 B (50.0%)" in out
    assert "1 min 1 s, 3.00 GiB" in out


def test_quiet_and_verbose(conversion, capsys):
    def act(options):
        for done in (0, 1, 2):
            options["progress"]("layers", done, 2, {"error": 0.5})

    conversion.act = act
    for flag, told in (("--quiet", ""), ("--verbose", r"[\d:]{8} layers 0/2 error 0.5\n(.+\n){2}")):
        code, out, err = run(capsys, "m", "--to", "mla", flag, command="convert")
        assert code == 0
        assert re.fullmatch(told, err)
        assert "Written to m-mla" in out
        assert ("Of that: read 1 s, fit 59 s" in out) == (flag == "--verbose")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (InputError("kv_budget=3 is too much.\nUse 1."), 2, "kv_budget=3 is too much. Use 1."),
        (InputError("a tensor \x1b[2J\x07 of a stranger"), 2, r"a tensor \[2J of a stranger$"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (typer.Abort(), 130, "interrupted"),
        (ValueError("a\nfault"), 1, "internal error: ValueError: a fault.*REHEAD_DEBUG=1"),
    ],
)
def test_errors_become_exit_codes(error, code, told, conversion, capsys, monkeypatch):
    monkeypatch.delenv("REHEAD_DEBUG", raising=False)

    def act(options):
        raise error

    conversion.act = act
    found, _, err = run(capsys, "convert", "m", "--to", "mla")
    assert found == code
    assert re.search(f"^rehead: {told}", err, re.MULTILINE)
    assert "Traceback" not in err


def test_a_fault_shows_its_traceback_when_asked(conversion, capsys, monkeypatch):
    def act(options):
        raise ValueError("a fault")

    conversion.act = act
    monkeypatch.setenv("REHEAD_DEBUG", "1")
    with pytest.raises(ValueError, match="a fault"):
        run(capsys, "convert", "m", "--to", "mla")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("llama-7b", "llama-7b-mla"),
        ("meta/llama-7b", "llama-7b-mla"),
        ("/models/llama-7b/", "llama-7b-mla"),
        ("../x.Q4_1.gguf", "x.Q4_1-mla"),
    ],
)
def test_the_output_is_named_after_the_model(model, expected, tmp_path, monkeypatch):
    assert default_output(model, "mla") == Path(expected)
    monkeypatch.chdir(tmp_path)
    assert default_output(".", "mla") == Path(f"{tmp_path.name}-mla")


def heed_interrupts():
    """A shell starts what runs in the background with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_terminated_process_leaves_nothing_half_written(tmp_path):
    """The console script's own signal handling around a writer that is at work."""
    code = (
        "import sys, time, torch\n"
        "import rehead.converters\n"
        "from rehead.cli import main\n"
        "from rehead.converters.checkpoint import Writer\n"
        "def convert(model, **options):\n"
        "    with Writer(sys.argv[1]) as writer:\n"
        "        writer.add('w', torch.ones(4))\n"
        "        print('at work', file=sys.stderr, flush=True)\n"
        "        time.sleep(60)\n"
        "rehead.converters.convert = convert\n"
        "sys.argv[1:] = [sys.argv[1], '--to', 'mla']\n"
        "main.convert_main()\n"
    )
    for number, expected in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        command = [sys.executable, "-c", code, tmp_path / "model"]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts
        ) as process:
            assert any("at work" in line for line in process.stderr)
            assert list(tmp_path.iterdir())
            process.send_signal(number)
            assert process.wait(20) == expected
        assert not list(tmp_path.iterdir())


def test_convert_writes_a_folder_that_evaluate_measures(inputs, tmp_path):
    """Both console scripts on a real folder; the numbers reported are those of the model."""
    model, _ = inputs
    (tmp_path / "text.txt").write_text(TEXT * 20)
    args = ["--to", "mla", "--heal", 0, "--samples", 4, "--calibration", "text.txt", "--json"]
    done = script("convert", model, *args, "--kv-budget", "50%", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["output"], report["form"]) == ("tiny-mla", "mla")
    assert 0.4 < report["kv_budget"] <= 0.5
    assert report["kv_bytes_per_token"]["source"] == 2 * (2 * 2 * 8) * 4
    assert report["kv_bytes_per_token"]["converted"] <= report["kv_bytes_per_token"]["source"] / 2
    assert report["seconds"] > 0
    assert report["peak_rss_bytes"] > 1 << 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "tiny-mla"]

    measured = script(
        *("rehead", "evaluate", "tiny-mla", "--text", "text.txt"),
        *("--window", 64, "--windows", 2, "--json"),
        cwd=tmp_path,
    )
    assert measured.returncode == 0, measured.stderr
    found = json.loads(measured.stdout)
    assert found["kv_bytes_per_token"] == report["kv_bytes_per_token"]["converted"]
    assert found["perplexity"] > 1

    again = script("rehead", "convert", model, *args, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert "--force" in again.stderr.splitlines()[-1]


def test_export_writes_a_folder_that_evaluate_measures(inputs, tmp_path, capsys, monkeypatch):
    model, text = inputs
    monkeypatch.chdir(tmp_path)
    args = ["--to", "mla", "--native", "--heal", 0, "--samples", 4, "--calibration", text]
    assert run(capsys, model, *args, command="convert")[0] == 0
    code, out, _ = run(capsys, "export", "tiny-mla", "--to", "transformers", "--json")
    assert code == 0
    done = json.loads(out)
    assert (done["output"], done["to"]) == ("tiny-mla-transformers", "transformers")
    assert done["architecture"] == "YoutuForCausalLM"
    args = ["--text", text, "--window", 64, "--windows", 2, "--json"]
    found = [
        json.loads(run(capsys, "evaluate", at, *args)[1]) for at in ("tiny-mla", done["output"])
    ]
    assert found[1]["perplexity"] == pytest.approx(found[0]["perplexity"], rel=1e-5)
    cache = [result["kv_bytes_per_token"] for result in found]
    assert cache == [done["kv_bytes_per_token"][key] for key in ("converted", "exported")]
    code, out, err = run(capsys, "export", "tiny-mla", "--to", "transformers")
    assert (code, out) == (2, "")
    assert "--force" in err
    code, out, _ = run(capsys, "export", "tiny-mla", "--to", "transformers", "--force")
    assert code == 0
    assert "Loads as YoutuForCausalLM" in out


def test_inspect_reads_the_config_alone(inputs, tmp_path, capsys):
    """What it says is cached is what the model caches, and what is offered can be had."""
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(inputs[0] / "config.json", folder)
    code, out, _ = run(capsys, "inspect", folder, "--json")
    assert code == 0
    found = json.loads(out)
    model = AutoModelForCausalLM.from_pretrained(inputs[0])
    assert found["kv_bytes_per_token"] == kv_bytes_per_token(model)
    assert (found["form"], found["conversion"], found["refused"]) == ("gqa", None, None)
    offers = [offer for offer in found["forms"] if not offer["refused"]]
    assert {offer["form"] for offer in offers} == set(FORMS)
    assert {offer["rope"] for offer in offers if offer["form"] == "mla"} == set(ROPES)
    for offer in offers:
        share = offer["kv_budget"] * found["kv_bytes_per_token"]
        if offer["kv_bits"] != "16":  # of the cache at 16 bits, and this one has 32
            share /= 2
        assert offer["kv_bytes_per_token"] == share, offer["form"]
        assert offer["capacity"]["ter"] == 4 * offer["capacity"]["frh"]
    assert found["parameters"] == model.num_parameters()
    assert found["capacity"] == {"frh": 8, "slsd": 16, "ter": 32}
    fits = {(each["memory_gb"], each["batch"]): each["tokens"] for each in found["contexts"]}
    room = 24e9 - sum(p.nbytes for p in model.parameters())
    assert fits[24, 32] == room // (32 * found["kv_bytes_per_token"])
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 0
    assert "When to take which" in out
    assert "--kv-bits auto --kv-budget 33%" in out.splitlines()[-1]


def test_inspect_says_more_where_there_is_room(inputs, capsys, monkeypatch):
    for columns, dims in ((80, False), (200, True)):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, out, _ = run(capsys, "inspect", inputs[0])
        assert code == 0
        assert ("num_key_value_heads 1" in out) == dims
        assert ("in 80 GB" in out) == dims


def test_inspect_knows_a_conversion(inputs, tmp_path, capsys):
    output = tmp_path / "out"
    args = ["--to", "mfa-kr", "--heal", 0, "--samples", 4, "--output", output, "--json"]
    code, out, _ = run(capsys, inputs[0], *args, "--calibration", inputs[1], command="convert")
    assert code == 0
    done = json.loads(out)
    code, out, _ = run(capsys, "inspect", output, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["form"] == "mfa-kr"
    assert found["kv_bytes_per_token"] == done["kv_bytes_per_token"]["converted"]
    assert found["conversion"]["samples"] == 4
    assert "converted already" in found["refused"]
    code, out, _ = run(capsys, "inspect", output)
    assert code == 0
    assert "Not convertible" in out


def test_inspect_refuses_what_is_no_model(tmp_path, capsys):
    for place, message in ((tmp_path, "no config.json"), (tmp_path / "none", "no file or folder")):
        code, out, err = run(capsys, "inspect", place)
        assert (code, out) == (2, "")
        assert message in err
