"""The recorded decisions of all families: rows, and their compact form in decisions.json. Standard
library only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from svdcli.plan.facts import ModelFacts
from svdcli.plan.layers import choose_layers
from svdcli.plan.tensors import TensorInfo

FILE = Path(__file__).with_name("decisions.json")


@dataclass(frozen=True)
class Row:
    """The first weight of each pattern of names and shape in a class: its name in the file, and why
    it stays dense ("" where it is selected). what is what the live model says of it, in letters: i
    looks ids up for the whole model (get_input_embeddings), o gives the outputs
    (get_output_embeddings), l has as many rows as there are labels (or one more, for none of them),
    c feeds a choice, x has no module that could hold its factors."""

    name: str
    shape: tuple[int, ...]
    reason: str
    what: str = ""


@dataclass(frozen=True)
class Entry:
    """One class of a family."""

    family: str
    model: str
    facts: ModelFacts
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """What was recorded: by which transformers, for which classes, and why the others could not be
    built."""

    transformers: str
    entries: tuple[Entry, ...]
    not_built: Mapping[str, str]


def decide(shapes: Iterable[tuple[str, tuple[int, ...]]], facts: ModelFacts | None) -> list[str]:
    """The reason of each tensor of a checkpoint, in order; "" for those that are selected."""
    infos = [TensorInfo(name, "BF16", shape) for name, shape in shapes]
    _, skipped = choose_layers(infos, facts=facts)
    reasons = {item.tensor: item.reason for item in skipped}
    return [reasons.get(info, "") for info in infos]


def write(table: Table, path: Path = FILE) -> None:
    """Compact: names are told from the one before, and what rows have in common is written once."""
    rows = [row for entry in table.entries for row in entry.rows]
    names, shapes = sorted({row.name for row in rows}), sorted({row.shape for row in rows})
    notes, facts = (
        sorted({(row.reason, row.what) for row in rows}),
        sorted({_facts_text(e.facts) for e in table.entries}),
    )
    places = [
        {item: place for place, item in enumerate(items)} for items in (names, shapes, notes, facts)
    ]
    families: dict[str, dict[str, Any]] = {}
    for entry in table.entries:
        family = families.setdefault(entry.family, {"rows": {}, "classes": {}})
        own = [
            (places[0][row.name], places[1][row.shape], places[2][row.reason, row.what])
            for row in entry.rows
        ]
        numbers = [family["rows"].setdefault(key, len(family["rows"])) for key in own]
        family["classes"][entry.model] = [places[3][_facts_text(entry.facts)], _ranges(numbers)]
    lines = {
        "transformers": table.transformers,
        "not_built": dict(table.not_built),
        "names": _told_from_before(names),
        "shapes": shapes,
        "notes": notes,
        "facts": [json.loads(text) for text in facts],
    }
    text = [f"{json.dumps(key)}:{_packed(value)}" for key, value in lines.items()]
    for kind, family in families.items():
        flat = [number for key in family["rows"] for number in key]
        text.append(f"{json.dumps(f'family {kind}')}:{_packed([flat, family['classes']])}")
    path.write_text("{" + ",\n".join(text) + "}\n")


def read(path: Path = FILE) -> Table:
    """The table in decisions.json."""
    stored = json.loads(path.read_text())
    names = _from_before(stored["names"])
    facts = [_facts(item) for item in stored["facts"]]
    entries = []
    for key, (flat, classes) in (
        (key, value) for key, value in stored.items() if key.startswith("family ")
    ):
        rows = []
        for name, shape, note in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            rows.append(Row(names[name], tuple(stored["shapes"][shape]), *stored["notes"][note]))
        for model, (place, ranges) in classes.items():
            own = tuple(rows[number] for number in _numbers(ranges))
            entries.append(Entry(key.removeprefix("family "), model, facts[place], own))
    return Table(stored["transformers"], tuple(entries), stored["not_built"])


def _packed(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _facts_text(facts: ModelFacts) -> str:
    listed = {
        key: sorted(value) if isinstance(value, frozenset) else value
        for key, value in asdict(facts).items()
    }
    return _packed({key: value for key, value in listed.items() if value not in ([], None)})


def _facts(stored: Mapping[str, Any]) -> ModelFacts:
    return ModelFacts(
        **{
            key: frozenset(value) if isinstance(value, list) else value
            for key, value in stored.items()
        }
    )


def _told_from_before(names: Sequence[str]) -> list[str]:
    """["ab.c", "ab.d"] as ["0 ab.c", "3 d"]: how many characters are those of the name before."""
    told, before = [], ""
    for name in names:
        pairs = zip(before, name, strict=False)
        shared = next(
            (place for place, (one, other) in enumerate(pairs) if one != other),
            min(len(before), len(name)),
        )
        told.append(f"{shared} {name[shared:]}")
        before = name
    return told


def _from_before(told: Sequence[str]) -> list[str]:
    names, before = [], ""
    for text in told:
        shared, _, rest = text.partition(" ")
        before = before[: int(shared)] + rest
        names.append(before)
    return names


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5", in the order of the numbers."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)


def _numbers(ranges: str) -> list[int]:
    numbers: list[int] = []
    for span in ranges.split(",") if ranges else ():
        first, _, last = span.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
