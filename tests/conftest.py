"""Fixtures that several files share."""

import os
import shutil

# Before Triton reads it: its kernels run in its interpreter, on any machine.
os.environ.setdefault("TRITON_INTERPRET", "1")

import folders
import pytest
import torch


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def left_padding(ids) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    return mask


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A tiny Llama's folder with one weight file, which no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    folders.save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def export_tiny(tmp_path):
    """(to, output, options) -> an export of the tiny model at `in`, calibrated on random bytes."""
    from rehead.export import export

    draw = torch.randint(33, 127, (128 * 40,), generator=torch.Generator().manual_seed(1))
    (tmp_path / "text.txt").write_text("".join(map(chr, draw)))

    def run(to, output, **options):
        options = dict(calibration=str(tmp_path / "text.txt"), samples=5, norm_rows=4) | options
        return export(tmp_path / "in", to=to, output=tmp_path / output, **options)

    return run


@pytest.fixture
def steadied(monkeypatch):
    """Every direction of the input read, and nothing else: the norm is constant, as |x| is."""
    from rehead.export import steady

    monkeypatch.setattr(steady, "LEAST_SHARE", 1e-9)
    return dict(norm_rows=32)
