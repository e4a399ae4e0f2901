"""What an output's config.json says, how it is written, and that the way back gives the
source's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import LLAMA, write_model
from hypothesis import given, settings
from hypothesis import strategies as st

import svdcli
from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.config import change, change_back, render_like

QUANTISED = {"quant_method": "svdcli", "format": 1, "layout": "factored"}

# Changes and the way back -------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["a", "b", "c", "d"])
CONFIGS = st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=4)


def paths_of(config: dict[str, Any]) -> st.SearchStrategy[tuple[str, ...]]:
    """Paths to keys of a config and of the dictionaries in it, there or not."""
    inner = [key for key, value in config.items() if isinstance(value, dict)]
    here = st.tuples(KEYS)
    return here | st.tuples(st.sampled_from(inner), KEYS) if inner else here


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_changes_can_be_taken_back_to_the_byte(data: st.DataObject) -> None:
    config = data.draw(CONFIGS)
    changes = data.draw(st.dictionaries(paths_of(config), VALUES, max_size=4))
    outer = {path[:1] for path in changes if len(path) == 1}
    changes = {
        path: value for path, value in changes.items() if len(path) == 1 or path[:1] not in outer
    }
    before = json.dumps(config)
    new, note = change(config, changes)
    assert json.dumps(config) == before
    for path, value in changes.items():
        found: Any = new
        for step in path:
            found = found[step]
        assert found == value
    assert json.dumps(change_back(new, json.loads(json.dumps(note)))) == before


WAYS: list[dict[str, Any]] = [
    {"indent": 2},
    {"indent": 4},
    {"indent": "\t"},
    {"indent": 2, "ensure_ascii": False},
    {},
    {"separators": (",", ":")},
]


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("how", WAYS, ids=str)
def test_a_config_is_written_as_its_source_is(how: dict[str, Any], end: str) -> None:
    data = {"b": 1e-05, "a": {"é": [1, 2.0, None]}, "c": {}, "d": []}
    text = json.dumps(data, **how) + end
    assert render_like(text, data) == text.encode()
    assert render_like(text, data | {"x": 1}) == (json.dumps(data | {"x": 1}, **how) + end).encode()


@pytest.mark.parametrize("text", ['{"a": 1e-5}', '{"a" : 1}', '{\n"a": 1}', '{"a": 1, "a": 2}'])
def test_what_no_plain_way_of_writing_gives_is_written_anew(text: str) -> None:
    assert render_like(text, {"a": 1}) is None


# compress and expand ------------------------------------------------------------------------------


def configs(
    tmp_path: Path, config: dict[str, Any], **recipe: Any
) -> tuple[bytes, dict[str, Any], bytes]:
    """The config.json of a source, of its compressed output, and of what expand makes of that."""
    model = write_model(tmp_path / "m", config)
    svdcli.compress(model, tmp_path / "o", svdcli.Recipe("rank", 9, **recipe), allow_larger=True)
    svdcli.expand(tmp_path / "o", tmp_path / "d")
    files = [tmp_path / folder / "config.json" for folder in "mod"]
    return files[0].read_bytes(), json.loads(files[1].read_text()), files[2].read_bytes()


@pytest.mark.parametrize(
    ("config", "recipe", "expected"),
    [
        ({"model_type": "llama"}, {}, {"model_type": "llama", "quantization_config": QUANTISED}),
        (
            {"model_type": "clip", "text_config": {"a": 1}, "vision_config": {"model_type": "v"}},
            {},
            {
                "model_type": "clip",
                "text_config": {"a": 1, "quantization_config": QUANTISED},
                "vision_config": {"model_type": "v", "quantization_config": QUANTISED},
                "quantization_config": QUANTISED,
            },
        ),
        (
            {"model_type": "llama", "quantization_config": None, "z": 1},
            {},
            {"model_type": "llama", "quantization_config": QUANTISED, "z": 1},
        ),
        (
            {"torch_dtype": "bfloat16", "model_type": "llama"},
            {"dtype": "F32"},
            {"torch_dtype": "float32", "model_type": "llama", "quantization_config": QUANTISED},
        ),
        (
            {
                "dtype": "float32",
                "model_type": "x",
                "encoder": {"dtype": "float16", "model_type": "y"},
            },
            {"dtype": "BF16", "layout": "dense"},
            {
                "dtype": "bfloat16",
                "model_type": "x",
                "encoder": {"dtype": "bfloat16", "model_type": "y"},
            },
        ),
        (
            {"model_type": "llama"},
            {"dtype": "F64", "layout": "dense"},
            {"model_type": "llama", "dtype": "float64"},
        ),
        (
            {"model_type": "llama", "dtype": "float64"},
            {"dtype": "F64", "layout": "dense"},
            {"model_type": "llama", "dtype": "float64"},
        ),
        (
            {"_class_name": "Net", "dtype": "x"},
            {"dtype": "F64", "layout": "dense"},
            {"_class_name": "Net", "dtype": "x"},
        ),
        (
            {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}},
            {"layout": "dense"},
            {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}},
        ),
    ],
    ids=[
        "plain",
        "parts",
        "null",
        "torch_dtype",
        "dtype of parts",
        "no dtype",
        "the same",
        "not of transformers",
        "quantised",
    ],
)
def test_it_says_what_the_output_is_and_expand_takes_that_back(
    config: dict[str, Any], recipe: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    before, found, after = configs(tmp_path, config, **recipe)
    assert found == expected
    assert list(found) == list(expected)
    assert after == before


def test_self_contained_leaves_nothing_behind(tmp_path: Path) -> None:
    before, found, after = configs(tmp_path, {"model_type": "llama"}, self_contained=True)
    assert found["auto_map"]["AutoModel"] == "svdcli_model.AutoModel"
    assert (tmp_path / "o" / "svdcli_model.py").exists()
    assert after == before
    assert not (tmp_path / "d" / "svdcli_model.py").exists()


@pytest.mark.parametrize("quantised", [{}, {"quantization_config": {"quant_method": "fp8"}}])
@pytest.mark.parametrize("self_contained", [False, True])
def test_outputs_without_a_note_of_it_expand_too(
    tmp_path: Path, self_contained: bool, quantised: dict[str, Any]
) -> None:
    """As earlier versions wrote them."""
    if self_contained and quantised:
        pytest.skip("refused")
    config = {"model_type": "llama"} | quantised
    recipe = svdcli.Recipe(
        "rank", 9, layout="dense" if quantised else "factored", self_contained=self_contained
    )
    svdcli.compress(write_model(tmp_path / "m", config), tmp_path / "o", recipe, allow_larger=True)
    record = json.loads((tmp_path / "o" / "svdcli.json").read_text())
    del record["source"]["config_was"]
    (tmp_path / "o" / "svdcli.json").write_text(json.dumps(record))
    svdcli.expand(tmp_path / "o", tmp_path / "d")
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == config


@pytest.mark.parametrize("note", [1, [1], [{}], [{"path": "a"}], [{"path": []}], [{"path": [1]}]])
def test_a_note_that_is_none_is_a_damaged_record(tmp_path: Path, note: Any) -> None:
    svdcli.compress(write_model(tmp_path / "m"), tmp_path / "o", svdcli.Recipe("rank", 9))
    record = json.loads((tmp_path / "o" / "svdcli.json").read_text())
    record["source"]["config_was"] = note
    (tmp_path / "o" / "svdcli.json").write_text(json.dumps(record))
    with pytest.raises(BadCheckpointError, match="record is damaged"):
        svdcli.expand(tmp_path / "o", tmp_path / "d")


def test_an_output_that_lost_its_config_is_not_expanded(tmp_path: Path) -> None:
    svdcli.compress(write_model(tmp_path / "m"), tmp_path / "o", svdcli.Recipe("rank", 9))
    (tmp_path / "o" / "config.json").unlink()
    with pytest.raises(SvdcliError, match=r"has lost its config\.json"):
        svdcli.expand(tmp_path / "o", tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_what_somebody_else_changed_stays(tmp_path: Path) -> None:
    svdcli.compress(write_model(tmp_path / "m"), tmp_path / "o", svdcli.Recipe("rank", 9))
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    (tmp_path / "o" / "config.json").write_text(json.dumps(config | {"architectures": ["Mine"]}))
    svdcli.expand(tmp_path / "o", tmp_path / "d")
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == LLAMA | {
        "architectures": ["Mine"]
    }


def test_a_part_that_another_tool_quantised_is_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "vlm",
        "text_config": {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}},
    }
    with pytest.raises(SvdcliError, match="is quantised by fp8"):
        svdcli.compress(
            write_model(tmp_path / "m", config), tmp_path / "o", svdcli.Recipe("rank", 9)
        )
