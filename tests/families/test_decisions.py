"""What is decided for every model family of transformers: the recorded table against today's rules
and against live models.

`python tests/families/record.py` writes the table; it names the transformers that it was made with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from record import entry_of
from table import Entry, Row, Table, decide, read, write

# Smaller in the file, whole in memory: linear layers with a forward of their own, multiplied out
# while loading (with a warning).
WHOLE_IN_MEMORY = re.compile(r"IBert|DeepseekV4")


@pytest.fixture(scope="module")
def table() -> Table:
    return read()


def rows(table: Table) -> Iterator[tuple[Entry, Row]]:
    for entry in table.entries:
        for row in entry.rows:
            yield entry, row


def test_the_recorded_decisions_are_today_s(table: Table) -> None:
    stale = [
        f"{entry.family} {entry.model}"
        for entry in table.entries
        if decide([(row.name, row.shape) for row in entry.rows], entry.facts)
        != [row.reason for row in entry.rows]
    ]
    assert not stale, "python tests/families/record.py --again, and read what has changed"


def test_the_table_holds_nearly_every_family(table: Table) -> None:
    assert len({entry.family for entry in table.entries}) > 600
    assert len(table.not_built) < 100
    assert all(table.not_built.values())


@pytest.mark.parametrize("letter", ["i", "o", "l", "c"])
def test_no_embedding_no_head_and_nothing_that_chooses_is_selected(
    table: Table, letter: str
) -> None:
    told = [(entry, row) for entry, row in rows(table) if letter in row.what]
    assert len({entry.family for entry, _ in told}) > 50
    assert not [f"{entry.model}: {row.name}" for entry, row in told if not row.reason]


def test_what_chooses_is_known_without_a_config_too(table: Table) -> None:
    wrong = []
    for entry in table.entries:
        reasons = decide([(row.name, row.shape) for row in entry.rows], None)
        wrong += [
            f"{entry.model}: {row.name}"
            for row, reason in zip(entry.rows, reasons, strict=True)
            if "c" in row.what and "l" not in row.what and not reason
        ]
    assert not wrong


def test_no_layer_of_a_class_is_said_to_be_left_out_by_it(table: Table) -> None:
    assert not [
        f"{entry.model}: {row.name}"
        for entry, row in rows(table)
        if row.reason.startswith(("beyond", "multi-token"))
    ]


def test_the_model_can_hold_the_factors_of_all_that_is_selected(table: Table) -> None:
    whole = {entry.model for entry, row in rows(table) if "x" in row.what and not row.reason}
    assert whole
    assert not [model for model in whole if not WHOLE_IN_MEMORY.match(model)]


def test_a_table_comes_back_as_it_was_written(table: Table, tmp_path: Path) -> None:
    write(table, tmp_path / "decisions.json")
    assert read(tmp_path / "decisions.json") == table


BUILT_ANEW = [
    ("bert", "BertForMaskedLM"),
    ("clip", "CLIPModel"),
    ("deepseek_v32", "DeepseekV32ForCausalLM"),
    ("gpt2", "GPT2LMHeadModel"),
    ("granitemoe", "GraniteMoeForCausalLM"),
    ("mixtral", "MixtralForCausalLM"),
    ("qwen3_next", "Qwen3NextForCausalLM"),
    ("rt_detr", "RTDetrForObjectDetection"),
    ("switch_transformers", "SwitchTransformersForConditionalGeneration"),
    ("t5", "T5ForConditionalGeneration"),
]


@pytest.mark.parametrize(("family", "model"), BUILT_ANEW)
@pytest.mark.filterwarnings("ignore")
def test_a_model_built_anew_is_decided_as_recorded(table: Table, family: str, model: str) -> None:
    if transformers.__version__ != table.transformers:
        pytest.skip(f"recorded with transformers {table.transformers}")
    assert entry_of(family, model) in table.entries
