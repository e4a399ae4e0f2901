"""Small checkpoints, hostile files, and two ways to drive the command line. Plain functions;
fixtures are in conftest.py."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import deserialize
from safetensors.torch import load_file, save_file

INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")
EIGHT_BIT_FLOATS = (
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)


# Checkpoints --------------------------------------------------------------------------------------


def changed(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a model with other weights."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def weight(
    rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A matrix with a decaying spectrum, as trained layers have."""
    generator = torch.Generator().manual_seed(seed)
    short = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, short, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, short, generator=generator)).Q
    return ((left * 2.0 * 0.9 ** torch.arange(short)) @ right.T).to(dtype).contiguous()


def decaying(m: int, n: int, power: float, seed: int = 0) -> torch.Tensor:
    """A float64 (m, n) matrix with singular values 1, 2**-power, 3**-power, ..."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return (left * torch.arange(1, k + 1, dtype=torch.float64) ** -power) @ right.T


def best_error(w: torch.Tensor, rank: int) -> float:
    """What Eckart and Young say is lost at that rank: the energy of the tail."""
    return float(torch.linalg.svdvals(w.double())[rank:].square().sum())


UP, DOWN = "layers.0.up.weight", "layers.0.down.weight"


def small_tensors() -> dict[str, torch.Tensor]:
    """Two linear layers worth factoring, and a tensor of every dtype that torch and safetensors
    share."""
    tensors = {
        UP: weight(48, 40, 1),
        DOWN: weight(40, 48, 2, torch.bfloat16),
        "layers.0.up.bias": torch.linspace(-1, 1, 48),
        "embed_tokens.weight": weight(64, 40, 3, torch.float16),
        "norm.weight": torch.ones(40),
        "odd.scalar": torch.tensor(3, dtype=torch.int32),
        "odd.empty": torch.empty(0, 7),
        "odd.double": torch.arange(5, dtype=torch.float64),
        "odd.complex": torch.tensor([1 + 2j, -3j], dtype=torch.complex64),
        "odd.bool": torch.tensor([True, False, True]),
    }
    for name in INTEGERS:
        tensors[f"odd.{name}"] = torch.tensor([0, 1, 5], dtype=getattr(torch, name))
    for name in filter(lambda name: hasattr(torch, name), EIGHT_BIT_FLOATS):
        tensors[f"odd.{name}"] = torch.tensor([1.0, 2.0, 4.0]).to(getattr(torch, name))
    return tensors


def write_small(path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """A small valid safetensors file with several dtypes, two layers of which are worth
    factoring."""
    save_file(small_tensors(), path, metadata=dict(metadata) if metadata else None)
    return path


RANKED = {
    "layers.0.up.weight": (96, 64),
    "layers.0.down.weight": (64, 96),
    "layers.1.up.weight": (96, 64),
}
LLAMA = {"model_type": "llama", "hidden_size": 64}


def ranked_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Three layers worth factoring, an embedding, a norm."""
    tensors = {
        name: weight(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(RANKED.items())
    }
    return tensors | {
        "embed_tokens.weight": weight(80, 64, 9, dtype),
        "norm.weight": torch.ones(64, dtype=dtype),
    }


def write_model(
    folder: Path,
    config: Mapping[str, Any] | None = LLAMA,
    *,
    tensors: Mapping[str, torch.Tensor] | None = None,
    shards: int = 1,
) -> Path:
    """A Hugging Face directory of these tensors (those of `ranked_tensors`), with a tokenizer and a
    subfolder; config None leaves config.json out."""
    tensors = ranked_tensors() if tensors is None else dict(tensors)
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling": 1}')
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    return write_sharded(
        folder, {name: dict(list(tensors.items())[i::shards]) for i, name in enumerate(names)}
    )


def write_sharded(
    folder: Path,
    shards: Mapping[str, Mapping[str, torch.Tensor]],
    index: str = "model.safetensors.index.json",
) -> Path:
    """A directory of shards with the index that lists them."""
    for name, tensors in shards.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def size_of(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def rebuilt(tensors: dict[str, torch.Tensor], name: str, layout: str) -> torch.Tensor:
    """The weight that the stored tensors of a layout stand for, by the formulas of the format."""
    module = name.removesuffix(".weight")
    if layout == "dense":
        return tensors[name].double()
    up, down = (
        tensors[f"{module}.svd_up.weight"].double(),
        tensors[f"{module}.svd_down.weight"].double(),
    )
    if layout == "factored":
        return up @ down
    return torch.cat([down, up @ down])[tensors[f"{module}.svd_rows"].long()]


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the reference reader finds in one file: dtype, shape and bytes of every tensor."""
    found = deserialize(path.read_bytes())
    return {
        name: (item["dtype"], tuple(item["shape"]), bytes(item["data"])) for name, item in found
    }


# Hostile headers ----------------------------------------------------------------------------------


def framed(
    header: bytes | str | Mapping[str, Any], data: bytes = b"", *, length: int | None = None
) -> bytes:
    """The bytes of a safetensors file with this header, however wrong; length is what its first 8
    bytes claim."""
    raw = json.dumps(header) if isinstance(header, Mapping) else header
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """What a header says about one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Solvers that fail --------------------------------------------------------------------------------


def diverges(*_: Any, **__: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


# The command line ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """How one command ended."""

    code: int
    out: bytes
    err: str


def run(
    *args: str | Path,
    input: bytes | None = None,  # noqa: A002
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> Finished:
    """`svdcli ARGS` in a process of its own; prefix goes before the interpreter."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "svdcli", *map(str, args)],
        input=b"" if input is None else input,
        env={**os.environ, **(env or {})},
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr.decode())


def cli(
    *args: str | Path,
    input: bytes | None = None,  # noqa: A002
    env: Mapping[str, str] | None = None,
) -> Finished:
    """`svdcli ARGS` in this process: the same as `run`, without the seconds that importing torch
    takes."""
    from svdcli.cli.commands import main

    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(
        io.BytesIO(), encoding="utf-8", errors="backslashreplace", write_through=True
    )
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["svdcli", *map(str, args)]),
        mock.patch.object(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(input or b""), encoding="utf-8")
        ),
        mock.patch.dict(os.environ, {"COLUMNS": "160", **(env or {})}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Finished(int(code or 0), out.buffer.getvalue(), err.buffer.getvalue().decode())


_ENVIRONMENT = dict(os.environ)
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(
    ["torch", "transformers.modeling_utils", "peft", "torchao.quantization"]
)


def run_code(code: str, *arguments: str | Path, folder: Path) -> Finished:
    """The same as `python -c CODE ARGUMENTS` with `folder` as the current one, but for the seconds
    that importing torch and transformers takes: its process is forked from one that has these, and
    neither svdcli nor anything that a test has done."""
    return Forked(code, map(str, arguments), folder, {}).end(120)


class Forked:
    """Such a process under way."""

    def __init__(
        self, code: str, arguments: Iterable[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self._place = tempfile.TemporaryDirectory()
        self._streams = [Path(self._place.name) / name for name in ("out", "err")]
        for stream in self._streams:
            stream.touch()
        how = (code, list(arguments), folder, dict(environment), self._streams)
        self._process = _FORKED.Process(target=_run_forked, args=how)
        # the first one starts the process that all are forked from: not in what a test has set
        with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
            self._process.start()
        self._done: Finished | None = None

    @property
    def running(self) -> bool:
        return self._done is None and self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def end(self, seconds: float) -> Finished:
        """Wait for its end, for so long at most, then end it."""
        if self._done is None:
            self._process.join(seconds)
            self._process.kill()
            self._process.join()
            out, err = (stream.read_bytes() for stream in self._streams)
            self._done = Finished(self._process.exitcode or 0, out, err.decode())
            self._process.close()
            self._place.cleanup()
        return self._done


def _run_forked(
    code: str, arguments: list[str], folder: Path, environment: dict[str, str], streams: list[Path]
) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY), number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def complaint(done: Finished, code: int = 1) -> str:
    """The one line of a refusal. Fails where the command succeeded, said more or less, or met what
    it did not foresee."""
    assert done.code == code, done
    assert done.out == b""
    assert done.err.startswith("svdcli: error: "), done.err
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    assert "SVDCLI_DEBUG" not in done.err, f"not foreseen: {done.err}"
    return done.err


OUT = "out.safetensors"


def refused(*args: str | Path, code: int = 1, **how: Any) -> str:
    """Run a command that must fail and must leave the current folder as it was. Returns its one
    line."""
    before = tree(Path())
    line = complaint(cli(*args, **how), code)
    assert tree(Path()) == before
    return line


def compress_refused(*args: str | Path, code: int = 2, model: str | Path = "m.safetensors") -> str:
    return refused("compress", model, *args, code=code)


def works(*args: str | Path, **how: Any) -> None:
    """Run a command that must succeed."""
    done = cli(*args, **how)
    assert done.code == 0, done.err


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder with a digest of what is there: equal before and after where
    nothing was touched."""
    return {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*"))}


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {os.readlink(path)}"
    return (
        hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        if path.is_dir()
        else "special"
    )
