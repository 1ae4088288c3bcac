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
