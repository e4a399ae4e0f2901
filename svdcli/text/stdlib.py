"""Text that every Python has: the source of its standard library, split once and for all into
training and held-out modules."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_ONE_IN = 16
# Folders of tests, generated tables and installed packages.
_SKIPPED_PARTS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "__pycache__",
    }
)


def is_held_out(relative: str) -> bool:
    """Tell whether the sample model's training never read a module.

    The rule looks at the module's path only (SHA-256 modulo 16), so it gives the same split on
    every Python version.
    """
    return int(hashlib.sha256(relative.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def stdlib_modules(*, held_out: bool) -> list[tuple[str, str]]:
    """Return (relative path, source text) of the standard library's modules in one half of the
    split, sorted by path.

    Tests, generated tables and installed packages are left out. Files that are not UTF-8 are passed
    over.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules: list[tuple[str, str]] = []
    for path in sorted(_sources(root)):
        name = path.relative_to(root).as_posix()
        if is_held_out(name) != held_out:
            continue
        try:
            modules.append((name, path.read_text(encoding="utf-8")))
        except (UnicodeDecodeError, OSError):
            continue
    return modules


def _sources(root: Path) -> Iterator[Path]:
    """Yield every module below root, without ever walking into what is left out: site-packages may
    be larger than all the rest."""
    for folder, below, files in os.walk(root):
        # In place: what is taken out of this list is not walked into. config-* holds build files
        kept = [part for part in below if not part.startswith("config-")]
        below[:] = [part for part in kept if part not in _SKIPPED_PARTS]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))
