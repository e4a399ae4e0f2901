"""Values for programs: JSON, CSV, plain lines."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from svdcli.errors import printable


def print_json(data: Mapping[str, Any], stream: TextIO) -> None:
    stream.write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def print_csv(rows: Sequence[Mapping[str, Any]], stream: TextIO) -> None:
    """One line a row, titles first; lists are joined by spaces, shapes by x."""
    text = io.StringIO()
    if rows:
        import csv

        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _flat(key, value) for key, value in row.items()})
    stream.write(text.getvalue())


def _flat(key: str, value: object) -> object:
    if isinstance(value, (tuple, list)):
        separator = "x" if key == "shape" else " "
        return separator.join(map(str, value))
    return "" if value is None else value


def print_lines(lines: Sequence[str], stream: TextIO) -> None:
    """Lines as they are; to a terminal without the characters that would steer it."""
    shown = map(printable, lines) if stream.isatty() else lines
    stream.writelines(line + "\n" for line in shown)
