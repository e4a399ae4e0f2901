"""The file of `svdcli calibrate`: second moments of layers' inputs and of the loss gradients at
their outputs.

A safetensors file. `mean.K` (n,) and `input.K` (n, n) are of the input that a group of layers
shares, K being the name of the first of them; `output.L` is (m, m) or, diagonal only, (m,);
`sensitivity.L` (2,) is what the model loses when L alone is cut, and the share of L's energy that
the cut gave up. All float32; the metadata key `svdcli_moments` says which layer has which, and
where they come from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.checkpoint import Checkpoint, open_output
from svdcli.files.dtypes import bytes_of
from svdcli.files.writer import Unit, WeightWriter, lay_out
from svdcli.linalg.damping import Moment, each
from svdcli.linalg.whitening import Metric
from svdcli.plan.tensors import TensorInfo

METADATA = "svdcli_moments"
METADATA_OF_PART = "svdcli_moments_part"  # of what `parts` writes
# Moments are sums in float32. Where inputs hardly vary, the rounding of these, as a part of their
# norm, is a noticeable part of a covariance, and may make it indefinite.
_ROUNDING = 1e-7
_NOTICEABLE = 2.5e-3
FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """The model that was measured, and the text that it read. unit is that of the predicted loss:
    nats, or 1 - cosine; precision the dtype in which the model ran."""

    fingerprint: str
    text: str
    text_sha256: str
    tokens: int
    samples: int
    seq_len: int
    seed: int
    gradients: bool
    sensitivity: bool
    unit: str
    precision: str = "float32"

    @staticmethod
    def of(data: Mapping[str, Any]) -> Provenance:
        """Return what a file's metadata says; what older files do not have is as it was then.
        Raises KeyError for anything else that is missing."""
        known = {}
        for item in fields(Provenance):
            if item.name in data or item.default is MISSING:
                known[item.name] = data[item.name]
        return Provenance(**known)


@dataclass(frozen=True)
class LayerMoments:
    """The moments of one layer: inputs G (n, n), their mean (n,), outputs H (m, m) or (m,) or None;
    of a group of layers one below the other, a tuple of these. Float32, on the CPU.

    transposed says that the weight is stored as (in, out).
    """

    inputs: Tensor
    mean: Tensor
    outputs: Moment | None
    transposed: bool


def metric_of(moments: LayerMoments, device: torch.device, *, centred: bool) -> Metric:
    """Return the metric that a layer's error is counted by, in float64. A bias that follows the
    mean leaves only what varies around it."""
    inputs = moments.inputs.to(device, torch.float64)
    if centred:
        mean = moments.mean.to(device, torch.float64)
        rounding = _ROUNDING * torch.linalg.matrix_norm(inputs)
        inputs = inputs - torch.outer(mean, mean)
        if inputs.diagonal().mean() * _NOTICEABLE < rounding:
            inputs.diagonal().add_(rounding)
    outputs = moments.outputs
    if outputs is not None:
        outputs = each(outputs, lambda block: block.to(device))
    return Metric(inputs, outputs)


class Spool:
    """Sums that are kept on disk between rounds, one file each. shapes has the shape of each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}

    def add(self, key: str, value: Tensor) -> None:
        """Add to the sum under this key, which starts from zero."""
        if key in self.shapes:
            value = self.get(key) + value
        self.put(key, value)

    def put(self, key: str, value: Tensor) -> None:
        """Have this be the sum under this key. Raises OSError where the disk is full, which torch
        does not say."""
        self.shapes[key] = tuple(value.shape)
        path = self._path(key)
        try:
            torch.save(value.to("cpu", torch.float32).contiguous(), path)
        except RuntimeError as error:
            if shutil.disk_usage(self.folder).free > 4 * value.numel():
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error

    def find(self, key: str) -> Tensor | None:
        """Return the sum so far, None where there is none."""
        return self.get(key) if key in self.shapes else None

    def get(self, key: str) -> Tensor:
        """Return the sum so far, float32, on the CPU."""
        value: Tensor = torch.load(self._path(key), weights_only=True)
        return value

    def _path(self, key: str) -> Path:
        # By digest: names of layers may hold anything, and be longer than a file's name
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.pt"


def write_moments(
    path: Path,
    spool: Spool,
    scales: Mapping[str, float],
    layers: Mapping[str, Mapping[str, Any]],
    provenance: Provenance,
) -> None:
    """Write every spooled sum times its scale into one file that appears whole or not at all.

    layers maps a weight's name to the keys of its moments: {"input": K, "output": key or None,
    "transposed": bool}.
    """
    metadata = {METADATA: json.dumps({"format": FORMAT} | asdict(provenance) | {"layers": layers})}
    write_sums(path, spool, metadata, lambda key, value: value * scales[key])


def write_sums(
    path: Path,
    spool: Spool,
    metadata: Mapping[str, str],
    change: Callable[[str, Tensor], Tensor] = lambda key, value: value,
) -> None:
    """Write every spooled sum, as `change` makes it, into one file that appears whole or not at
    all; one sum at a time is in memory."""
    infos = tuple(TensorInfo(key, "F32", shape) for key, shape in spool.shapes.items())

    # Written beside the path and moved there when it is complete
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as folder:
        file = lay_out(path.name, [Unit("moments", "copy", (), infos, path.name)], metadata)
        writer = WeightWriter(Path(folder), [file])
        for info in infos:
            writer.write(info.name, [bytes_of(change(info.name, spool.get(info.name)))])
        writer.finish(path.name, metadata)
        os.replace(Path(folder) / path.name, path)


class Moments:
    """An open file of moments. Tensors are read when they are asked for."""

    def __init__(self, checkpoint: Checkpoint, data: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self.provenance = Provenance.of(data)
        self.layers: Mapping[str, Mapping[str, Any]] = data["layers"]

    @property
    def path(self) -> Path:
        """The file itself."""
        return self._checkpoint.path

    def of(self, name: str) -> LayerMoments | None:
        """Return the moments of the weight `name`, None where it was not calibrated. Raises
        BadCheckpointError where they are not finite."""
        keys = self.layers.get(name)
        if keys is None:
            return None
        input_key, mean_key, output_key = _keys_of(keys)
        inputs, mean = self._read(name, input_key), self._read(name, mean_key)
        outputs = None if output_key is None else self._read(name, output_key)
        return LayerMoments(inputs, mean, outputs, bool(keys["transposed"]))

    def _read(self, name: str, key: str) -> Tensor:
        tensor: Tensor = self._checkpoint.read_tensor(key)
        if not bool(tensor.isfinite().all()):
            raise BadCheckpointError(
                f"{self._checkpoint.shown}: the moments of {name} hold NaN or infinity",
                "calibrate again",
            )
        return tensor

    def loss_scale(self, name: str) -> float | None:
        """Return the loss of the model for the whole of a layer's energy, from its measured
        sensitivity; None where there is none."""
        if f"sensitivity.{name}" not in self._checkpoint.tensors:
            return None
        loss, share = self._checkpoint.read_tensor(f"sensitivity.{name}").tolist()
        # Where the cut gave nothing up the layer is of a lower rank, and costs nothing
        return float(loss / share) if share > 0 else 0.0

    def metric_name(self, name: str) -> str:
        """Return what was measured of the layer: "" nothing, "inputs", "diagonal" or "full" moments
        of the gradients besides."""
        keys = self.layers.get(name)
        if keys is None:
            return ""
        output = keys["output"]
        if output is None:
            return "inputs"
        shape = self._checkpoint.tensors[output].info.shape
        return "full" if len(shape) == 2 else "diagonal"

    @property
    def digest(self) -> str:
        """Tells files of moments apart: the checkpoint fingerprint of this one."""
        return self._checkpoint.fingerprint()


def open_moments(path: str | Path) -> Moments:
    """Open a file of `svdcli calibrate`. Raises BadCheckpointError where it is none, or damaged."""
    # The metadata of the one file that it is
    checkpoint = open_output(path)
    metadata: Mapping[str, str] = next(iter(checkpoint.metadata.values()), {})
    text = metadata.get(METADATA)
    if text is None and METADATA_OF_PART in metadata:
        raise BadCheckpointError(
            f"{path} is a part of a calibration", "run `svdcli merge-moments` on all parts first"
        )
    if text is None:
        raise BadCheckpointError(
            f"{path} was not written by svdcli calibrate", "run `svdcli calibrate` first"
        )

    # What it says must be what the tensors are; whatever may be wrong in it is one error
    try:
        data = json.loads(text)
        if data["format"] > FORMAT:
            raise BadCheckpointError(
                f"{path} has format {data['format']}, this svdcli knows {FORMAT}", "upgrade svdcli"
            )
        moments = Moments(checkpoint, data)
        for name, keys in moments.layers.items():
            if not _fits(checkpoint, keys):
                raise KeyError(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpointError(
            f"{path}: its moments are damaged ({error})", "calibrate again"
        ) from error
    return moments


def _fits(checkpoint: Checkpoint, keys: Mapping[str, Any]) -> bool:
    """Tell whether a layer's moments have the shapes of moments. Raises KeyError where one is
    missing."""
    input_key, mean_key, output_key = _keys_of(keys)
    inputs = checkpoint.tensors[input_key].info.shape
    mean = checkpoint.tensors[mean_key].info.shape
    if len(mean) != 1 or inputs != mean * 2:
        return False

    # Full (m, m) or a diagonal (m,)
    if output_key is not None:
        output = checkpoint.tensors[output_key].info.shape
        if len(output) not in (1, 2) or len({*output}) != 1:
            return False
    return isinstance(keys["transposed"], bool)


def _keys_of(keys: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """Return the names of the tensors with a layer's inputs, their mean and, where they were
    measured, the outputs."""
    return f"input.{keys['input']}", f"mean.{keys['input']}", keys["output"]


def check_provenance(moments: Moments, fingerprint: str, shown: str) -> None:
    """Raise SvdcliError where the moments were measured on another model."""
    if moments.provenance.fingerprint != fingerprint:
        raise SvdcliError(
            f"the calibration was made with another model than {shown}",
            "run `svdcli calibrate` on this one",
        )
