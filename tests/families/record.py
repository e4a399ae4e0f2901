"""Write down what svdcli decides for every model family of transformers: `python
tests/families/record.py` (minutes).

    python tests/families/record.py  all families, into decisions.json
    python tests/families/record.py --again
        what is recorded, decided anew after a change of rules: seconds
    python tests/families/record.py t5 mixtral
        print these as they are decided now; nothing is written

Builds each class of the auto mappings on the meta device. Needs no network.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import transformers
from building import build, config_json, families, pattern_of, stored_weights, what_they_do
from table import Entry, Row, Table, decide, read, write

from svdcli.plan.facts import ModelFacts

SECONDS_A_CLASS = 120


def entry_of(family: str, model_class: str) -> Entry:
    """One class, decided by today's rules; the family's most telling class is run too, to see what
    feeds a choice.

    Raises what transformers does where it cannot be built.
    """
    model = build(family, model_class)
    weights, facts = stored_weights(model), ModelFacts.of(config_json(model))
    follow = model_class == min(families()[family], key=_how_little_it_tells)
    what = what_they_do(model, weights, follow=follow)
    reasons = decide([(name, weight.shape) for name, weight in weights.items()], facts)
    firsts: dict[tuple[object, ...], Row] = {}
    for (name, weight), reason in zip(weights.items(), reasons, strict=True):
        row = Row(name, weight.shape, reason, what[name])
        firsts.setdefault((pattern_of(name), row.shape, row.reason, row.what), row)
    rows = tuple(row for row in firsts.values() if _says_something(row, facts))
    alone = decide([(row.name, row.shape) for row in rows], facts)
    odd = next((row for row, reason in zip(rows, alone, strict=True) if reason != row.reason), None)
    if odd is not None:
        raise AssertionError(
            f"{odd.name} is decided otherwise beside the first layer of each kind alone"
        )
    return Entry(family, model_class, facts, rows)


def _how_little_it_tells(model_class: str) -> tuple[bool, str]:
    """For the order of a family's classes: those with the whole model and its heads first."""
    return re.search(
        r"ForConditionalGeneration|ForCausalLM|LMHead|ForPreTraining|Detection", model_class
    ) is None, model_class


def _says_something(row: Row, facts: ModelFacts) -> bool:
    """Is a row more than a vector, a convolution or something tiny of no consequence. Stacks of
    experts tell who routes."""
    if len(row.shape) > 2:
        return "expert" in row.name or (len(row.shape) == 3 and row.shape[0] in facts.experts)
    return (
        not row.reason.startswith(("too small", "not the weight"))
        or bool(set(row.what) - {"x"})
        or "expert" in row.name
    )


def entries_of(family: str) -> tuple[list[Entry], dict[str, str]]:
    """(the classes of a family that say something of their own, why others could not be built)."""
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    warnings.simplefilter("ignore")
    entries, failed = [], {}
    for name in families()[family]:
        try:
            with _time_limit(SECONDS_A_CLASS):
                entries.append(entry_of(family, name))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            failed[name] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
    return [entry for entry in entries if not _repeats(entry, entries)], failed


def _repeats(entry: Entry, others: Sequence[Entry]) -> bool:
    """Is a class the base model of another one, with the same names but for that one's prefix, and
    decided alike."""
    own = set(entry.rows)
    for other in others:
        for prefix in {row.name.split(".")[0] for row in other.rows}:
            start = f"{prefix}."
            inner = (row for row in other.rows if row.name.startswith(start))
            if other is not entry and own <= {
                Row(r.name.removeprefix(start), r.shape, r.reason, r.what) for r in inner
            }:
                return True
    return False


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"takes more than {seconds} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def show(names: Sequence[str]) -> None:
    """Print what is decided for these families."""
    for family in names:
        entries, failed = entries_of(family)
        for entry in entries:
            print(f"{family} {entry.model}")
            for row in entry.rows:
                print(f"    {row.name:80} {row.shape!s:18} {row.what:3} {row.reason or 'selected'}")
        for name, why in failed.items():
            print(f"{family} {name}: not built: {why}")


def again() -> None:
    """Put today's decisions into decisions.json."""
    recorded, entries = read(), []
    for entry in recorded.entries:
        reasons = decide([(row.name, row.shape) for row in entry.rows], entry.facts)
        rows = tuple(
            replace(row, reason=reason) for row, reason in zip(entry.rows, reasons, strict=True)
        )
        entries.append(replace(entry, rows=rows))
    write(replace(recorded, entries=tuple(entries)))


def main() -> None:
    if sys.argv[1:] == ["--again"]:
        again()
        return
    if sys.argv[1:]:
        show(sys.argv[1:])
        return
    entries: list[Entry] = []
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for number, (found, errors) in enumerate(pool.map(entries_of, families()), 1):
            entries += found
            failed |= {name: re.sub(r"0x[0-9a-f]+", "", why) for name, why in errors.items()}
            print(f"\r{number} families", end="", file=sys.stderr, flush=True)
    write(Table(transformers.__version__, tuple(entries), failed))


if __name__ == "__main__":
    main()
