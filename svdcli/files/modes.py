"""Permissions: an output gets those of its source, as `cp -r` would give them, so that what is
private stays so."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from svdcli.files.checkpoint import RECORD, Checkpoint

if TYPE_CHECKING:
    from svdcli.files.blueprint import Blueprint

_NEW_FILE = 0o666  # less what the umask takes
_OWNER_WORKS = 0o700  # what the owner of a folder needs to move it and what is in it


def modes_of(checkpoint: Checkpoint, blueprint: Blueprint) -> dict[str, int]:
    """The permissions of every file and folder of an output by its name in it; "" is the output
    itself.

    A file that the source has keeps its own; weight files, the index and the record take those of
    the weight files, the strictest where they differ. What came from standard input gets a new
    file's.
    """
    if checkpoint.temporary is not None:
        return {"": _NEW_FILE & ~_umask()}
    if not checkpoint.is_directory:
        return {"": _mode(checkpoint.path)}

    # Weight files may be split anew, so they have the permissions that all of the source's have.
    of_weights = 0o777
    for name in checkpoint.files:
        of_weights &= _mode(checkpoint.path / name)

    modes = {"": _mode(checkpoint.path)}
    for name in blueprint.sizes():
        source = checkpoint.path / name
        is_carried = source.is_file() and name not in checkpoint.files and name != RECORD
        modes[name] = _mode(source) if is_carried else of_weights
        for folder in PurePosixPath(name).parents:
            if folder.name:
                modes[str(folder)] = _mode_of_folder(checkpoint.path / folder)
    return modes


def set_modes(target: Path, modes: Mapping[str, int]) -> None:
    """Give a finished output its permissions, folders after what lies in them.

    A folder stays open to its owner here: it has yet to be moved, and gets its last bits after
    that.
    """
    for name in sorted(modes, key=lambda name: name.count("/"), reverse=True):
        path = target / name if name else target
        mode = modes[name]
        if path.is_dir():
            mode |= _OWNER_WORKS
        path.chmod(mode)


def _mode(path: Path) -> int:
    """The permissions of a file or folder, less what the umask takes, as `cp -r` would have it."""
    return stat.S_IMODE(path.stat().st_mode) & 0o777 & ~_umask()


def _mode_of_folder(path: Path) -> int:
    return _mode(path) if path.is_dir() else 0o777 & ~_umask()


def _umask() -> int:
    """The process's own. The system returns it only when another one is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
