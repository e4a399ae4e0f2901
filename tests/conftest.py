"""Fixtures that several rooms of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import write_small


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Tiny matrices gain nothing from threads, and results stay the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(folder: Path) -> Path:
    """A small valid file, `m.safetensors`, in `folder`."""
    return write_small(folder / "m.safetensors")


@pytest.fixture(scope="session")
def compressed_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample network at rank 64."""
    import svdcli

    out = tmp_path_factory.mktemp("mlp") / "mlp.svd.safetensors"
    svdcli.compress(Path(__file__).parent.parent / "sample_models" / "mlp.safetensors", out, svdcli.Recipe("rank", 64))
    return out
