"""The wheel, the versions, and what may import what."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
MODULES = [path for folder in FOLDERS.values() for path in (ROOT / folder).glob("*.py")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the tree, so that nothing is left in it."""
    base = tmp_path_factory.mktemp("wheel")
    tree = base / "tree"
    skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "demo-output")
    shutil.copytree(ROOT, tree, ignore=skipped)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", base, tree]
    subprocess.run([sys.executable, "-m", "pip", *map(str, build)], check=True)
    return next(base.glob("*.whl"))


def test_the_wheel_holds_every_module_and_text_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".gz") or path.name == "README.md"
    }
    code = {name for name in names if ".dist-info/" not in name}
    assert code == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert zipfile.Path(wheel, "rehead/data/calibration.jsonl.gz").exists()
    assert wheel.stat().st_size < 4_000_000


def test_every_folder_of_modules_is_a_package():
    top = {name for name in FOLDERS.values() if "/" not in name}
    for name in top:
        inner = {path.parent for path in (ROOT / name).rglob("*.py")}
        assert {str(path.relative_to(ROOT)) for path in inner} <= set(FOLDERS.values())
    assert set(FOLDERS) == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_installed_wheel_works_without_the_repository(wheel, tmp_path):
    install = ["install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run([sys.executable, "-m", "pip", *map(str, install)], check=True)
    code = (
        "import rehead.cli.main as cli, rehead.converters.text as text;"
        "print(cli.__file__); print(len(text.default_calibration_text()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
    )
    file, length = done.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert int(length) > 4_000_000
    assert (tmp_path / "site" / "bin" / "convert").exists()


def test_every_dependency_is_pinned_for_reproducible_set_up():
    project = PROJECT["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in wanted)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert set(pins) == set(bounds)

    def number(version):
        return [int(part) for part in version.split(".")]

    assert all(number(pins[name]) >= number(bounds[name]) for name in bounds)


def imports(path):
    """The modules that a file imports, relative ones as they are written."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = "." * node.level + (node.module or "")
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names if not node.module)


def prints(path):
    tree = ast.walk(ast.parse(path.read_text()))
    return any(isinstance(node, ast.Name) and node.id == "print" for node in tree)


def crossings(path, folder):
    """The rules of the house that a module breaks."""
    broken = []
    for name in imports(path):
        if folder != "cli" and re.search(r"\bcli\b", name):
            broken.append(f"imports the command line: {name}")
        if name == "rehead" or name.startswith("rehead."):
            broken.append(f"absolute: {name}")
        if folder == "modeling" and name.startswith(".."):
            broken.append(f"modeling imports ours: {name}")
        if path.name in PURE and name.split(".")[0] == "transformers":
            broken.append(f"pure mathematics imports {name}")
    if folder != "cli" and prints(path):
        broken.append("prints")
    return broken


PURE = {f"{name}.py" for name in ("maps", "rope", "lowrank", "gqa", "mla", "mfa")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_keep_to_their_layer(path):
    folder = path.relative_to(ROOT).parts[0]
    # modeling/mla.py is a Hugging Face class, converters/mla.py the mathematics.
    found = crossings(path, folder)
    if folder == "modeling":
        found = [line for line in found if not line.startswith("pure")]
    assert not found


def test_a_broken_layer_would_be_seen(tmp_path):
    path = tmp_path / "mla.py"
    path.write_text("import transformers\nfrom ..cli import console\nimport rehead.x\nprint(1)\n")
    assert len(crossings(path, "converters")) == 5 - 1
    assert any("modeling" in line for line in crossings(path, "modeling"))
