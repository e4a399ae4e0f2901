"""Fixtures of the model tests: quiet transformers, and each tiny family written and compressed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers
import zoo

import svdcli

Compressed = Callable[..., Path]


@pytest.fixture(autouse=True, scope="session")
def _no_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family's tiny model, written when it is first asked for."""
    made: dict[str, Path] = {}

    def write(family: str) -> Path:
        if family not in made:
            made[family] = zoo.save(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return write


@pytest.fixture(scope="session")
def compressed(written: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """The same, compressed: (family, layout, keep) -> directory."""
    made: dict[tuple[str, str, float], Path] = {}

    def make(family: str, layout: str = "factored", keep: float = 0.6) -> Path:
        key = (family, layout, keep)
        if key not in made:
            out = tmp_path_factory.mktemp(f"{family}-{layout}") / "out"
            svdcli.compress(written(family), out, svdcli.Recipe("keep", keep, layout=layout))
            made[key] = out
        return made[key]

    return make
