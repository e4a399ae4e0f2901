"""Fixtures that several rooms of tests share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Compressed = Callable[..., Path]

# As the command does, before SciPy is loaded: what runs here computes what the command does.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Fixtures import what they need: the process that only deals out tests to workers needs none of it.


def pytest_configure() -> None:
    """A script that starts tests with `&` has them ignore interrupts, and `nohup` that the terminal
    is gone; what they start must not."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in usual.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One worker more than cores, up to four, since some tests wait for other processes; none where
    files are named, whose tests start at once and can be debugged."""
    named = any(".py" in argument for argument in config.args)
    return 0 if named else min(4, 1 + (os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """What one test compiled does not count against the recompilations of the next."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


@pytest.fixture(autouse=True)
def _few_threads() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and results stay the same on every machine, whatever
    ran before."""
    import torch

    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _float32_if_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor may they depend on what the machine has instructions for."""
    name = "svdcli.calibration.precision.is_faster_in_bfloat16"
    monkeypatch.setattr(name, lambda device: False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is also the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(folder: Path) -> Path:
    """A small valid file, `m.safetensors`, in `folder`."""
    from helpers import write_small

    return write_small(folder / "m.safetensors")


@pytest.fixture(scope="session")
def compressed_mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample network at rank 64."""
    import svdcli

    out = tmp_path_factory.mktemp("mlp") / "mlp.svd.safetensors"
    svdcli.compress(
        Path(__file__).parent.parent / "sample_models" / "mlp.safetensors",
        out,
        svdcli.Recipe("rank", 64),
    )
    return out


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    """transformers draws its own bars where a test has imported it."""
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """The directory of a family's tiny model, written when it is first asked for. Tests share it:
    none may change it, and at the end none has."""
    import zoo
    from helpers import tree

    made: dict[str, Path] = {}
    as_written: dict[str, dict[str, str]] = {}

    def write(family: str) -> Path:
        if family not in made:
            made[family] = zoo.save(family, tmp_path_factory.mktemp(family) / "model")
            as_written[family] = tree(made[family])
        return made[family]

    yield write
    assert {family: tree(path) for family, path in made.items()} == as_written


@pytest.fixture(scope="session")
def readable(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same with a tokenizer: (family, dtype) -> directory."""
    import zoo

    made: dict[tuple[str, Any], Path] = {}

    def write(family: str, dtype: Any = None) -> Path:
        if (family, dtype) not in made:
            folder = zoo.save(family, tmp_path_factory.mktemp(family) / "m", dtype)
            zoo.words_tokenizer(folder)
            made[family, dtype] = folder
        return made[family, dtype]

    return write


@pytest.fixture(scope="session")
def compressed(
    written: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Compressed:
    """The same, compressed: (family, layout, keep) -> directory."""
    import svdcli

    made: dict[tuple[str, str, float], Path] = {}

    def make(family: str, layout: str = "factored", keep: float = 0.6) -> Path:
        key = (family, layout, keep)
        if key not in made:
            out = tmp_path_factory.mktemp(f"{family}-{layout}") / "out"
            svdcli.compress(written(family), out, svdcli.Recipe("keep", keep, layout=layout))
            made[key] = out
        return made[key]

    return make
