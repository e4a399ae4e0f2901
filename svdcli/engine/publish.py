"""How results become an output: written into a workspace beside it, and put in its place at the
end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from svdcli.engine.run import Run
from svdcli.errors import SvdcliError, UsageError, printable
from svdcli.files.blueprint import Design
from svdcli.files.checkpoint import CHUNK, RECORD, STANDARD, Checkpoint, sha256_of
from svdcli.files.folder import in_hub_cache
from svdcli.files.formats import without_ending
from svdcli.files.modes import modes_of
from svdcli.files.record import Result
from svdcli.files.workspace import Workspace
from svdcli.plan.plan import LayerPlan
from svdcli.version import __version__

if TYPE_CHECKING:
    from svdcli.engine.solve import Ready


AnyDesign = TypeVar("AnyDesign", bound=Design)


def write(
    run: Run, design: AnyDesign, layers: Sequence[LayerPlan], ready: Ready | None = None
) -> tuple[AnyDesign, dict[str, Result], dict[str, str]]:
    """Lay the files out and do every unit: (the design that was written, results, layers on which
    every solver failed).

    Where solvers gave way to others on more layers than the record has room for, all is laid out
    once more, with more room.
    """
    run.kept.drop_other()
    results, failed = _write_once(run, design, layers, ready)
    if failed or design.fits(results):
        return design, results, failed
    design = design.with_room()
    run.kept.set_aside()
    results, failed = _write_once(run, design, layers, ready)
    return design, results, failed


def _write_once(
    run: Run, design: Design, layers: Sequence[LayerPlan], ready: Ready | None
) -> tuple[dict[str, Result], dict[str, str]]:
    """Lay the files out and do every unit: (results, layers on which every solver failed)."""
    from svdcli.engine.job import run_units
    from svdcli.files.writer import WeightWriter

    blueprint = design.blueprint()
    _check_free(run.kept, blueprint.total)
    writer = WeightWriter(run.kept.data, blueprint.files)
    by_name = {layer.tensor.name: layer for layer in layers}
    return run_units(run, design.units, by_name, writer, ready)


def _check_free(workspace: Workspace, total: int) -> None:
    """Raises OSError (ENOSPC) where the disk has no room for what is not written yet."""
    written = sum(path.stat().st_size for path in workspace.data.rglob("*") if path.is_file())
    missing, free = total - written, shutil.disk_usage(workspace.out.parent).free
    if missing > free:
        raise OSError(errno.ENOSPC, f"{missing} bytes are needed, {free} are free")


def finish(run: Run, design: Design, results: Mapping[str, Result]) -> None:
    """Headers, the files beside the weights, the record; read everything back with the reference
    reader; publish. Raises BadCheckpointError where the source was written to meanwhile."""
    from svdcli.files.writer import WeightWriter, write_file

    # a weight file is none until it has its header
    blueprint, workspace = design.blueprint(), run.kept
    writer = WeightWriter(workspace.data, blueprint.files)
    for file in blueprint.files:
        writer.finish(file.name, design.metadata(file, results))
        _open_with_safetensors(workspace.data / file.name)

    # what is rewritten, and what goes along as it is
    for name, text in blueprint.texts.items():
        write_file(workspace.data / name, [text])
    for name in blueprint.carried:
        with (design.checkpoint.path / name).open("rb") as source:
            write_file(workspace.data / name, iter(lambda: source.read(CHUNK), b""))

    # the record names the digest of every other file, so it comes last
    if blueprint.record_bytes:
        others = {name: size for name, size in blueprint.sizes().items() if name != RECORD}
        digests = _digests(run, others)
        files = {name: (size, digests[name]) for name, size in others.items()}
        write_file(workspace.data / RECORD, [design.record(results, files, blueprint.record_bytes)])

    _check_sizes(workspace.data, blueprint.sizes())
    design.checkpoint.check_unchanged()
    workspace.publish(modes_of(design.checkpoint, blueprint))


def _digests(run: Run, sizes: Mapping[str, int]) -> dict[str, str]:
    """SHA-256 of every file, by name; sizes are their bytes."""
    digests: dict[str, str] = {}
    hashed, total = 0, sum(sizes.values())
    for name, value in run.crew.map_unordered(partial(_digest, run.kept.data), sizes):
        digests[name] = value
        hashed += sizes[name]
        run.progress("check", name, hashed / 1e9, total / 1e9)
    return digests


def _digest(folder: Path, name: str) -> tuple[str, str]:
    return name, sha256_of(folder / name)


def _open_with_safetensors(path: Path) -> None:
    """Every weight file is opened by the reference reader before anybody sees it."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        file.keys()


def _check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        written = (folder / name).stat().st_size
        if written != size:
            raise SvdcliError(
                f"{name} has {written} bytes where {size} were laid out",
                "the source changed while it was read",
            )


# Where the output goes ----------------------------------------------------------------------------


def identity(checkpoint: Checkpoint, *parts: object) -> str:
    """The same for the same command on the same source: what a journal must match to be
    continued."""
    values = [__version__, checkpoint.fingerprint(), checkpoint.state(), checkpoint.name, *parts]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def out_path(
    checkpoint: Checkpoint, out: str | Path | None, file_suffix: str, folder_suffix: str
) -> Path:
    """Where an output goes: `out`, or a name beside the source. Raises UsageError where the source
    has no name, or lies where no output belongs."""
    if out is not None and str(out) != STANDARD:
        return Path(out)

    # what came through a pipe has no place of its own
    if checkpoint.temporary is not None:
        if out is None:
            raise UsageError(
                "standard input has no name to derive the output's from",
                "give -o FILE, or -o - for a pipe",
            )
        return Path("model.safetensors")
    if in_hub_cache(checkpoint.path) is not None:
        raise UsageError(
            f"{checkpoint.shown} lies in the hub's cache, where no output belongs", "give -o PATH"
        )

    # beside the source; `.` and `..` have a name only when they are resolved
    if checkpoint.is_directory:
        folder = checkpoint.path
        if folder.name in ("", ".."):
            folder = folder.resolve()
        return folder.with_name(f"{folder.name}{folder_suffix}")
    stem = without_ending(checkpoint.path.name)
    return checkpoint.path.with_name(f"{stem.removesuffix('.svd')}{file_suffix}.safetensors")


@contextmanager
def destination(
    checkpoint: Checkpoint,
    out: str | Path | None,
    file_suffix: str,
    folder_suffix: str,
    force: bool,
) -> Iterator[Path]:
    """The path to write to. Standard output gets its bytes from a temporary file once that is
    whole."""
    if out is None or str(out) != STANDARD:
        target = out_path(checkpoint, out, file_suffix, folder_suffix)
        _check_target(checkpoint, target, force)
        yield target
        return

    # standard output takes one file, and no person's screen
    if checkpoint.is_directory:
        raise UsageError("a directory does not fit through standard output", "give -o FOLDER")
    if sys.__stdout__ is None:
        raise UsageError("standard output is closed", "pipe it on, or give -o FILE")
    if sys.stdout.isatty():
        raise UsageError("standard output is a terminal", "pipe it on, or give -o FILE")

    # not a byte of it before all is well
    folder = Path(tempfile.mkdtemp(prefix="svdcli-"))
    try:
        target = folder / "model.safetensors"
        yield target
        with target.open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer, CHUNK)
        sys.stdout.buffer.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_target(checkpoint: Checkpoint, target: Path, force: bool) -> None:
    """`check_place` for an output of the same kind as its source; a run that was cut short may go
    on."""
    if checkpoint.is_directory and target.suffix == ".safetensors":
        raise UsageError(
            f"the output {target} would be a directory, as {checkpoint.shown} is",
            "give it another name",
        )
    ending = None if checkpoint.is_directory else ".safetensors"
    begun = False
    if target.name:
        begun = Workspace(target, is_file=not checkpoint.is_directory).folder.exists()
    check_place(target, ending, source=checkpoint.path, force=force or begun)
    if force and target.is_dir() and not _looks_like_a_model(target):
        raise SvdcliError(
            f"{target} does not look like a model", "remove it yourself, or choose another -o"
        )


def check_place(
    target: Path, ending: str | None, *, source: Path, force: bool, option: str = "-o"
) -> None:
    """May `target` be written: a file with this ending, or a directory where that is None.

    Raises SvdcliError where that would lose something or cannot work; force allows to replace what
    is there, but never the source. option is what a person would change.
    """
    # What the name alone says
    try:
        os.fsencode(target).decode()
    except UnicodeDecodeError:
        shown = printable(str(target))
        raise UsageError(f"the path {shown} is not UTF-8", f"choose another {option}") from None
    parent = target.absolute().parent
    if not parent.is_dir():
        raise SvdcliError(f"the folder {parent} does not exist", "create it first")
    if ending is not None and target.suffix != ending:
        raise UsageError(f"the output {target} does not end in {ending}", "that is what it will be")
    origin, goal = source.resolve(), target.resolve()
    if origin == goal or origin in goal.parents or goal in origin.parents:
        raise SvdcliError(
            f"the output {target} is the source, or inside or around it", f"choose another {option}"
        )

    # What is there already
    if not target.exists():
        return
    if target.is_dir() != (ending is None):
        raise SvdcliError(
            f"{target} is a {'directory' if target.is_dir() else 'file'}",
            f"choose another {option}",
        )
    if source.exists() and target.samefile(source):
        raise SvdcliError(
            f"the output {target} is the source under another name", f"choose another {option}"
        )
    if not force:
        raise SvdcliError(
            f"{target} exists", f"use --force to replace it, or choose another {option}"
        )


def _looks_like_a_model(folder: Path) -> bool:
    inside = list(folder.iterdir())
    return not inside or any(
        path.name == RECORD or path.suffix in (".safetensors", ".bin") for path in inside
    )


@contextmanager
def disk_errors(target: Path, *, resumes: bool = True) -> Iterator[None]:
    """A full disk, in words that say what to do; resumes where a second run goes on."""
    hint = "free space and run the same command again"
    if resumes:
        hint += ", it continues where it was"
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise SvdcliError(f"cannot write {target}: {error.strerror}", hint) from error
