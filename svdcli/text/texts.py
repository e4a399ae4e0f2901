"""Text to calibrate and to evaluate on: a file, a folder, standard input, or the standard library's
source."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from svdcli.errors import SvdcliError, UsageError
from svdcli.files.checkpoint import STANDARD
from svdcli.ranks import place_here
from svdcli.text.stdlib import stdlib_modules


@dataclass(frozen=True)
class Texts:
    """Documents with the name that a person gave them. digest is the SHA-256 of all of them, in
    order; passed_over names files that are no text."""

    name: str
    documents: tuple[str, ...]
    passed_over: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(len(document.encode()) for document in self.documents)

    def split(self, share: float) -> tuple[Texts, Texts]:
        """Return the first `share` of all characters, and the rest; a document may be cut in
        two."""
        # Characters that are still to come into the first part
        remaining = int(share * sum(map(len, self.documents)))
        first: list[str] = []
        rest: list[str] = []
        for document in self.documents:
            first.append(document[:remaining])
            rest.append(document[remaining:])
            remaining = max(0, remaining - len(document))

        # Without the empty ends of documents that are all in the other part
        return (
            Texts(f"{self.name}, first {share:.0%}", tuple(filter(None, first))),
            Texts(f"{self.name}, last {1 - share:.0%}", tuple(filter(None, rest))),
        )

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents:
            # With a mark between documents, so that other cuts of the same text differ
            digest.update(document.encode() + b"\0")
        return digest.hexdigest()


def read_texts(path: str | Path | None, *, stdlib: bool = False, held_out: bool = False) -> Texts:
    """Return the text of `--text PATH` (a file, a folder of files, `-`) or of `--stdlib`, its
    held-out half or the other.

    Files of a folder that are not UTF-8 are passed over, and named. Raises UsageError where both or
    neither are given, SvdcliError where there is no text or a file is none.
    """
    if (path is None) != stdlib:
        raise UsageError(
            "give --text FILE or --stdlib, one of them", "--text takes a file, a folder or -"
        )
    texts = _stdlib_texts(held_out=held_out) if path is None else _texts_at(str(path))
    if not any(document.strip() for document in texts.documents):
        raise SvdcliError(f"{texts.name} holds no text", "give another --text")
    return texts


def _stdlib_texts(*, held_out: bool) -> Texts:
    half = "held-out modules" if held_out else "modules that are not held out"
    documents = tuple(text for _, text in stdlib_modules(held_out=held_out))
    return Texts(f"standard library, {half}", documents)


def _texts_at(path: str) -> Texts:
    """Return the text of standard input, a folder or a file."""
    if path == STANDARD:
        place = place_here()
        if place is not None and place.size > 1:
            raise UsageError(
                "several ranks cannot read their text from one standard input",
                "write it to a file that all of them see, and give that as --text",
            )
        return Texts("standard input", (_decoded(sys.stdin.buffer.read(), "standard input"),))
    if Path(path).is_dir():
        return _folder_of_texts(Path(path), path)
    if Path(path).exists():
        return Texts(path, (_decoded(Path(path).read_bytes(), path),))
    raise SvdcliError(f"{path} does not exist", "check the path of --text")


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SvdcliError(
            f"{name} is not UTF-8 text ({error.reason})", "convert it first"
        ) from error


def _folder_of_texts(folder: Path, name: str) -> Texts:
    """Return the files below a folder that are text, in the order of their paths; hidden ones are
    left out."""
    texts: list[str] = []
    passed_over: list[str] = []
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        try:
            texts.append(_decoded(file.read_bytes(), name))
        except SvdcliError:
            passed_over.append(str(inside))
    return Texts(name, tuple(texts), tuple(passed_over))
