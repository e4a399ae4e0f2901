"""What work on tensors asks of a checkpoint, the difference of two can answer as well."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from helpers import ranked_tensors, write_model
from torch import Tensor

from svdcli.engine.run import Run
from svdcli.engine.spectra import measure_spectra
from svdcli.files.checkpoint import Checkpoint, TensorRef, open_checkpoint
from svdcli.files.dtypes import bytes_of
from svdcli.files.source import Source
from svdcli.plan.layers import choose_layers
from svdcli.plan.tensors import TensorInfo
from svdcli.progress import silent


class Difference:
    """tuned - base, of two checkpoints with the same names."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        self.base, self.tuned = base, tuned

    @property
    def shown(self) -> str:
        return f"{self.tuned.shown} - {self.base.shown}"

    @property
    def infos(self) -> list[TensorInfo]:
        return self.base.infos

    @property
    def tensors(self) -> Mapping[str, TensorRef]:
        return self.base.tensors

    @property
    def opener(self) -> Callable[[], Source]:
        return lambda: self

    def read_tensor(self, name: str) -> Tensor:
        return self.tuned.read_tensor(name) - self.base.read_tensor(name)

    def chunks(self, name: str) -> Iterator[bytes | memoryview]:
        yield bytes_of(self.read_tensor(name))

    def fingerprint(self) -> str:
        return self.base.fingerprint() + self.tuned.fingerprint()


def test_the_spectra_of_a_difference(tmp_path: Path) -> None:
    base, change = ranked_tensors(), {}
    for name, tensor in base.items():
        left = torch.randn(tensor.shape[0], 3, generator=torch.Generator().manual_seed(1))
        change[name] = left @ left.new_ones(3, tensor.shape[-1]) if tensor.ndim == 2 else 0 * tensor
    tuned = {name: tensor + change[name] for name, tensor in base.items()}
    one = open_checkpoint(write_model(tmp_path / "base"))
    other = open_checkpoint(write_model(tmp_path / "tuned", tensors=tuned))
    source: Source = Difference(one, other)
    layers, _ = choose_layers(source.infos)
    found = measure_spectra(Run(source, torch.device("cpu"), silent), layers, spectra=True)
    assert found.keys() == {layer.name for layer in layers}
    for name, measured in found.items():
        expected = torch.linalg.svdvals(source.read_tensor(name).double()).square()
        assert measured.energies == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)
