"""What may import what, followed through every import, and that only the command line prints."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
FILES = {
    f"{package}.{path.stem}".removesuffix(".__init__"): path
    for package, folder in FOLDERS.items()
    for path in (ROOT / folder).glob("*.py")
}
# Mathematics on tensors, for any library's models.
PURE = [
    f"rehead.converters.{name}"
    for name in (
        *("activations", "calibration", "gqa", "grouping", "latent", "lowrank", "maps", "mfa"),
        *("mfa_kr", "mla", "moments", "on_read", "plan", "refit", "rope_split", "shared_key"),
        *("shared_norm", "whole_keys"),
    )
]


def imports(tree: ast.AST, package: str) -> set[str]:
    """Absolute names of what is imported anywhere, functions included; `a.b` for `from a import b`.

    Args:
        package: of the module, for relative imports.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            found |= {stem} | {f"{stem}.{alias.name}" for alias in node.names}
    return found


def imported_by(module: str) -> set[str]:
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return imports(ast.parse(path.read_text()), package)


def reached_from(module: str) -> set[str]:
    """Everything imported by the module and by those of ours it imports, and so on.

    A package's own `__init__` is not counted: Python runs it, but the module does not need it.
    """
    reached, todo = set(), [module]
    while todo:
        new = imported_by(todo.pop()) - reached
        reached |= new
        todo += [name for name in new if name in FILES]
    return reached


def prints(tree: ast.AST) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(tree))


def ours(names: set[str], package: str = "rehead") -> list[str]:
    return sorted(n for n in names if n == package or n.startswith(f"{package}."))


@pytest.mark.parametrize("module", PURE)
def test_the_mathematics_need_no_transformers(module):
    names = reached_from(module)
    assert not ours(names, "transformers")
    assert set(ours(names)) <= {n for n in names if n.startswith("rehead.converters.")}


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("rehead.modeling")])
def test_models_import_nothing_of_ours(module):
    """A checkpoint carries these files alone: siblings only, and only by one dot."""
    assert set(ours(imported_by(module))) == set(ours(imported_by(module), "rehead.modeling"))
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            assert not (node.module or "").startswith("rehead")


@pytest.mark.parametrize("module", FILES)
def test_only_the_command_line_prints_and_nothing_imports_it(module):
    if module.startswith("rehead.cli"):
        return
    assert not prints(ast.parse(FILES[module].read_text()))
    assert not ours(imported_by(module), "rehead.cli")


def test_the_mathematics_run_without_transformers():
    """As Python sees it, without the package's own `__init__`."""
    names = [module.rpartition(".")[2] for module in PURE]
    code = f"""
import importlib, sys, types
sys.modules["transformers"] = None  # importing it raises
package = types.ModuleType("rehead.converters")
package.__path__ = [{str(ROOT / "converters")!r}]
sys.modules["rehead.converters"] = package
for name in {names!r}:
    importlib.import_module("rehead.converters." + name)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


def test_a_broken_layer_would_be_seen():
    tree = ast.parse(
        "import torch\nfrom ..cli import console\nfrom .maps import rotate\nfrom . import plan\n"
        "def f():\n    import transformers\n    print(1)\n"
    )
    found = imports(tree, "rehead.converters")
    assert ours(found, "rehead.cli") == ["rehead.cli", "rehead.cli.console"]
    assert ours(found, "transformers") == ["transformers"]
    assert {"rehead.converters.maps", "rehead.converters.plan", "torch"} <= found
    assert prints(tree)
    assert ours(reached_from("rehead.converters.convert"), "transformers")
    assert re.search("rehead.modeling", " ".join(reached_from("rehead.converters.convert")))
