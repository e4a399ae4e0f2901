"""Models that bring Python of their own: none of it runs without the option, and with it every
command opens them."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zoo
from helpers import cli, complaint, run_code
from zoo import words_tokenizer

import svdcli
from svdcli.errors import SvdcliError
from svdcli.models import own_code
from svdcli.models.bench_worker import Worker
from svdcli.text.tokens import load_tokenizer

WORDS = " ".join(f"w{(i * i + 3 * i) % 94 + 2}" for i in range(600))
TELL = "import sys\nsys.stderr.write('RUNS ' + __name__ + chr(10))\n"
MODEL = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from .parts import NAME
class MyConfig(LlamaConfig):
    model_type = NAME
class MyModel(LlamaModel):
    config_class = MyConfig
class MyForCausalLM(LlamaForCausalLM):
    config_class = MyConfig
"""
TOKENIZER = (
    "from transformers import PreTrainedTokenizerFast\nclass "
    "MyTokenizer(PreTrainedTokenizerFast):\n    pass\n"
)
CLASSES = {
    "AutoConfig": "my.MyConfig",
    "AutoModel": "my.MyModel",
    "AutoModelForCausalLM": "my.MyForCausalLM",
}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write(folder: Path, *, tokenizer: bool = True) -> Path:
    """A Llama under another name, whose classes and tokenizer are in Python files beside it, which
    tell when they run."""
    path = zoo.save("llama", folder)
    words_tokenizer(path)
    change(
        path / "config.json",
        architectures=["MyForCausalLM"],
        model_type="my_llama",
        auto_map=CLASSES,
    )
    (path / "my.py").write_text(TELL + MODEL)
    (path / "parts.py").write_text(TELL + "NAME = 'my_llama'\n")
    if tokenizer:
        (path / "tok.py").write_text(TELL + TOKENIZER)
        auto = {"AutoTokenizer": [None, "tok.MyTokenizer"]}
        change(path / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=auto)
    return path


@pytest.fixture(autouse=True)
def _own_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """transformers copies such files before it runs them: to a folder of this test."""
    cache = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
    monkeypatch.setenv("HF_MODULES_CACHE", cache)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "t.txt").write_text(WORDS)
    return write(tmp_path / "model")


def commands(model: Path, small: Path) -> dict[str, tuple[str | Path, ...]]:
    folder = model.parent
    text = ("--text", folder / "t.txt", "--samples", "8", "--seq-len", "16")
    return {
        "calibrate": ("calibrate", model, *text, "-o", folder / "c.safetensors"),
        "compress": (
            *("compress", model, "--keep", "0.6", "--allocate", "uniform"),
            *(*text, "-o", folder / "out"),
        ),
        "eval": ("eval", small, "--against", model, *text),
        "heal": ("heal", small, "--teacher", model, *text, "--steps", "1", "-o", folder / "healed"),
        "export": ("export", small, "--onnx", folder / "m.onnx"),
        "bench": (
            "bench",
            small,
            "--against",
            model,
            "--prompt-tokens",
            "4",
            "--new-tokens",
            "1",
            "--rounds",
            "1",
        ),
    }


@pytest.mark.parametrize(
    "command",
    [
        *("calibrate", "compress", "eval", "heal", "export"),
        pytest.param("bench", marks=pytest.mark.slow),  # whose processes are tried below
    ],
)
def test_without_the_option_nothing_runs_and_the_option_is_named(
    command: str, own: Path, tmp_path: Path, capfd: Any
) -> None:
    svdcli.compress(own, tmp_path / "small", svdcli.Recipe("keep", 0.6))
    said = complaint(cli(*commands(own, tmp_path / "small")[command]))
    assert "brings the class MyForCausalLM" in said
    assert "--trust-remote-code" in said
    assert "RUNS" not in said + capfd.readouterr().err
    assert not {path.name for path in tmp_path.iterdir()} - {"model", "small", "t.txt"}


@pytest.mark.parametrize("command", ["calibrate", "compress", "eval", "heal"])
def test_with_it_the_files_are_named_before_they_run(
    command: str, own: Path, tmp_path: Path
) -> None:
    svdcli.compress(own, tmp_path / "small", svdcli.Recipe("keep", 0.6))
    line = commands(own, tmp_path / "small")[command]
    done = cli(*line, "--trust-remote-code", "--json")
    assert done.code == 0, done.err
    told, ran = done.err.index("Python code of others will run"), done.err.index("RUNS")
    assert told < ran
    models = [tmp_path / "small", own] if command in ("eval", "heal") else [own]
    first = next(line for line in done.err.splitlines() if "Python code of others" in line)
    for file in ("my.py", "parts.py", "tok.py"):
        assert all(str(model / file) in first for model in models)
        assert f".{file.removesuffix('.py')}\n" in done.err[ran:]
    assert done.err.count("Python code of others") == 1
    assert json.loads(done.out)["svdcli_json"] == 1


def test_bench_and_export_pass_it_on(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    task = {
        "path": str(own),
        "device": "cpu",
        "threads": None,
        "prompt_tokens": 4,
        "new_tokens": 1,
        "batch": 1,
    }
    with pytest.raises(SvdcliError, match=r"brings the class MyForCausalLM.*--trust-remote-code"):
        Worker(task).load()
    assert "RUNS" not in capfd.readouterr().err
    worker = Worker(task | {"trust_remote_code": True})
    assert "RUNS" in capfd.readouterr().err  # with the imports, which are not measured
    assert worker.load()["model_class"] == "MyForCausalLM"
    found: list[str] = []

    def stop(model: Any) -> None:
        found.append(type(model).__name__)
        raise SvdcliError("stopped")

    monkeypatch.setattr("svdcli.verbs.export._call_for", stop)
    with pytest.raises(SvdcliError, match="stopped"):
        svdcli.export_onnx(own, tmp_path / "m.onnx", trust_remote_code=True)
    assert found == ["MyForCausalLM"]


def test_from_python(own: Path, tmp_path: Path) -> None:
    texts = svdcli.Texts("words", (WORDS,))
    with pytest.raises(SvdcliError, match="trust_remote_code=True"):
        svdcli.calibrate(own, tmp_path / "c.safetensors", texts, samples=8, seq_len=16)
    reading = svdcli.Reading(texts, samples=8, seq_len=16, trust_remote_code=True)
    found = svdcli.compress(own, tmp_path / "out", svdcli.Recipe("keep", 0.6), reading=reading)
    assert found.report.calibration is not None
    assert type(svdcli.load(tmp_path / "out", trust_remote_code=True)).__name__ == "MyForCausalLM"


def test_a_tokenizer_may_be_all_there_is(tmp_path: Path, capfd: Any) -> None:
    path = zoo.save("llama", tmp_path / "model")
    words_tokenizer(path)
    (path / "tok.py").write_text(TELL + TOKENIZER)
    change(
        path / "tokenizer_config.json",
        tokenizer_class="MyTokenizer",
        auto_map={"AutoTokenizer": [None, "tok.MyTokenizer"]},
    )
    change(path / "config.json", model_type="nobody_s")
    with pytest.raises(SvdcliError, match=r"brings a tokenizer of its own.*--trust-remote-code"):
        load_tokenizer(path)
    assert "RUNS" not in capfd.readouterr().err
    assert own_code.sources(path) == [str(path / "tok.py")]
    assert type(load_tokenizer(path, trust_remote_code=True)).__name__ == "MyTokenizer"


def test_code_that_fails_is_told_in_a_line(own: Path) -> None:
    (own / "parts.py").write_text("raise AttributeError('of an older torch')\n")
    line = commands(own, own)["eval"]
    said = cli(*line, "--trust-remote-code")
    assert said.code == 1
    last = said.err.splitlines()[-1]
    assert "the code that" in last
    assert "AttributeError: of an older torch" in last


def test_where_the_class_is_transformers_own_only_the_option_runs_the_folder_s(
    tmp_path: Path, capfd: Any
) -> None:
    path = write(tmp_path / "model", tokenizer=False)
    change(path / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    assert type(svdcli.load(path)).__name__ == "LlamaForCausalLM"
    assert "RUNS" not in capfd.readouterr().err
    assert type(svdcli.load(path, trust_remote_code=True)).__name__ == "MyForCausalLM"


def test_a_self_contained_output_tells_what_was_loaded(
    written: Callable[[str], Path], tmp_path: Path
) -> None:
    svdcli.compress(
        written("llama"), tmp_path / "o", svdcli.Recipe("keep", 0.6, self_contained=True)
    )
    code = (
        "import sys, transformers\n"
        "options = {'trust_remote_code': True, 'output_loading_info': True}\n"
        "opened = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)\n"
        "assert not opened[1]['missing_keys'], opened\n"
        "assert not hasattr(opened[0].config, 'auto_map')\n"
    )
    done = run_code(code, tmp_path / "o", folder=tmp_path)
    assert done.code == 0, done.err


def test_a_self_contained_output_needs_no_trust(tmp_path: Path) -> None:
    """Its Python file is svdcli's own, which svdcli does not need."""
    path = zoo.save("llama", tmp_path / "model")
    words_tokenizer(path)
    (tmp_path / "t.txt").write_text(WORDS)
    svdcli.compress(path, tmp_path / "small", svdcli.Recipe("keep", 0.6, self_contained=True))
    shutil.move(tmp_path / "small" / "svdcli_model.py", tmp_path / "aside.py")
    (tmp_path / "small" / "svdcli_model.py").write_text(TELL)
    assert own_code.sources(tmp_path / "small") == []
    text = ("--text", tmp_path / "t.txt", "--samples", "4", "--seq-len", "16")
    for more in ((), ("--trust-remote-code",)):
        done = cli("calibrate", path, *text, "-o", tmp_path / f"{len(more)}.safetensors", *more)
        assert done.code == 0, done.err
    (tmp_path / "small" / "svdcli_model.py").write_bytes((tmp_path / "aside.py").read_bytes())
    for more in ((), ("--trust-remote-code",)):
        done = cli("eval", tmp_path / "small", "--against", path, *text, *more)
        assert done.code == 0, done.err
        assert "Python code" not in done.err


@pytest.mark.parametrize(
    ("named", "entries", "wanted"),
    [
        ("MyForCausalLM", CLASSES, "AutoModelForCausalLM"),
        ("MyModel", CLASSES, "AutoModel"),
        ("Unheard", CLASSES, "AutoModelForCausalLM"),
        ("Unheard", {"AutoModel": "my.A", "AutoModelForMaskedLM": "my.B"}, "AutoModelForMaskedLM"),
        (
            "Unheard",
            {"AutoConfig": "my.A", "AutoTokenizer": "my.T", "AutoModel": "my.B"},
            "AutoModel",
        ),
        ("Unheard", {"AutoConfig": "my.A", "AutoTokenizer": "my.T"}, None),
        (
            "Both",
            {"AutoModel": "my.Both", "AutoModelForCausalLM": "my.Both"},
            "AutoModelForCausalLM",
        ),
    ],
)
def test_the_auto_class_is_the_one_that_the_config_means(
    named: str, entries: dict[str, str], wanted: str | None
) -> None:
    assert own_code.auto_class({"architectures": [named], "auto_map": entries}) == wanted


def test_code_in_another_repository_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "somebody/theirs--modeling.Model"}})
    )
    assert own_code.sources(tmp_path) == ["modeling.py of the repository somebody/theirs"]
