"""The house stays as it is: who may import whom, what stays out of the quick commands, what README
must tell."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "svdcli"
COMMANDS = PACKAGE / "cli" / "commands.py"
OPTIONS = PACKAGE / "cli" / "options.py"
# From the ground up: a room's files import each other and what lies below. The files of the lowest
# import nothing of ours, and `__init__` gives the names of all rooms without importing any.
FLOORS = (
    {"version", "errors", "progress", "startup"},
    {"plan", "linalg", "ranks", "memory"},
    {"files"},
    {"models"},
    {"text"},
    {"calibration"},
    {"engine", "healing"},
    {"verbs"},
    {"render", "__init__"},
    {"cli"},
    {"__main__"},
)
MODULES = sorted(PACKAGE.rglob("*.py"))


@cache
def imports(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, anywhere in it; of `from a import b`, b where that is a
    module, too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            modules = [name for name in inside if is_own_module(name)]
            # Of `from a import b` with b a value, a itself is imported
            if len(modules) < len(inside):
                names.append(node.module)
            names += modules
    return tuple(names)


def is_own_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("svdcli.") and (path.is_dir() or path.with_suffix(".py").is_file())


def name_of(path: Path) -> str:
    """svdcli/plan/tensors.py -> svdcli.plan.tensors."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] == "svdcli"}


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor_of(name: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room_of(name) in rooms)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = name_of(path)
    if room_of(own) == "__init__":
        return
    for name in own_imports(path):
        assert room_of(name) == room_of(own) or floor_of(name) < floor_of(own), (
            f"{own} imports {name}"
        )


def test_the_map_of_the_house_names_every_room() -> None:
    rooms = {
        path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
    }
    text = (PACKAGE / "docs" / "house.md").read_text()
    assert set(re.findall(r"^  (\w+)/", text, re.MULTILINE)) == rooms
    tested = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    assert tested <= rooms | {"benchmarks", "families", "readme"}


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {
        name_of(path): own_imports(path) for path in MODULES if room_of(name_of(path)) != "__init__"
    }
    while graph:
        done = {name for name, below in graph.items() if not below & graph.keys()}
        assert done, f"a circle among {sorted(graph)}"
        graph = {name: below for name, below in graph.items() if name not in done}


@pytest.mark.parametrize(("library", "home"), [("typer", "cli"), ("rich", "render")])
def test_one_room_for_each_library_of_the_surface(library: str, home: str) -> None:
    users = {
        room_of(name_of(path))
        for path in MODULES
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users == {home}


def test_the_plan_needs_only_the_standard_library() -> None:
    for path in (
        *PACKAGE.glob("plan/*.py"),
        PACKAGE / "errors.py",
        PACKAGE / "files" / "header.py",
    ):
        foreign = (
            {name.split(".")[0] for name in imports(path)}
            - set(sys.stdlib_module_names)
            - {"svdcli"}
        )
        assert not foreign, path


def test_no_test_imports_another_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0].startswith("test_")], path


def test_functions_fit_on_a_screen() -> None:
    """What is to be read of them, without their arguments and docstrings."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            body = node.body
            if ast.get_docstring(node) and len(body) > 1:
                body = body[1:]
            lines = (node.end_lineno or 0) - body[0].lineno + 1
            assert lines <= 50, f"{path.name}: {node.name} has {lines} lines"


def test_public_names_have_docstrings() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if path.name != "__main__.py" and tree.body:
            assert ast.get_docstring(tree), path
    import svdcli

    for name in svdcli.__all__:
        assert getattr(svdcli, name).__doc__ or name == "__version__"


def test_verbs_name_their_arguments_alike() -> None:
    """First what is read; `out` for what is written; `compute` for where the mathematics runs."""
    import svdcli

    verbs = [path.stem for path in (PACKAGE / "verbs").glob("*.py")]
    public = [name for name in (*verbs, "export_onnx") if name in svdcli.__all__]
    assert set(verbs) - set(public) == {"__init__", "export", "help", "outcome"}
    for name in public:
        arguments = list(inspect.signature(getattr(svdcli, name)).parameters)
        assert arguments[0] in ("model", "output", "parts"), name
        assert "out" not in arguments or arguments[1] == "out", name
        assert not {"device", "threads"} & set(arguments), name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["compress", "--help"],
        ["inspect", "sample_models/tiny-llama"],
        ["inspect", "sample_models/mlp.safetensors", "--json"],
        ["report", "OUT"],
        ["report", "OUT", "--csv"],
        ["help"],
        ["help", "guide"],
    ],
    ids=" ".join,
)
def test_quick_commands_import_no_torch(arguments: list[str], compressed_mlp: Path) -> None:
    arguments = [str(compressed_mlp) if argument == "OUT" else argument for argument in arguments]
    imports_no_torch(arguments, {})


def test_quantised_sources_are_listed_without_torch(tmp_path: Path) -> None:
    """Packed ones declare their shapes in tensors, which are read all the same."""
    tensors = {
        "a.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        "a.weight_scale": torch.ones(64, 2),
        "a.weight_shape": torch.tensor([64, 64]),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    listed = imports_no_torch(["inspect", str(tmp_path / "m.safetensors")], {})
    assert "64×64" in listed


def test_completion_imports_no_torch() -> None:
    line = {
        "COMP_WORDS": "svdcli compress m --layout ",
        "COMP_CWORD": "4",
        "_SVDCLI_COMPLETE": "complete_bash",
    }
    assert imports_no_torch([], line).split() == ["factored", "pivoted", "dense"]


def imports_no_torch(arguments: list[str], environment: dict[str, str]) -> str:
    """Standard output of a command that must end well without any of the libraries that take long
    to import."""
    code = (
        "import sys; from svdcli.cli.commands import main\n"
        f"sys.argv = ['svdcli', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_documentation_knows_every_command_and_option() -> None:
    pages = [ROOT / "README.md", *PACKAGE.glob("docs/*.md")]
    documentation = "\n".join(page.read_text() for page in pages)
    source = COMMANDS.read_text()
    for command in re.findall(r"@app\.command\(.*?\)\ndef (\w+)", source, re.DOTALL):
        shown = command.rstrip("_").replace("_", "-")
        assert f"svdcli {shown}" in documentation, command
    for option in sorted(set(re.findall(r'"(--[a-z-]+)"', source + OPTIONS.read_text()))):
        assert option in documentation, option


def test_every_option_has_help() -> None:
    from svdcli.cli.commands import app, command_names, keep_commands

    keep_commands([])
    commands = typer.main.get_command(app).commands
    assert list(commands) == command_names()
    for name, command in commands.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name}: {parameter.name}"


def test_every_command_shows_an_example() -> None:
    source = COMMANDS.read_text()
    commands = re.findall(r"@app\.command\((.*?)\)\ndef ", source, re.DOTALL)
    assert len(commands) == source.count("@app.command(")
    assert all('epilog="Example: svdcli ' in command for command in commands)


def test_the_top_level_stays_small() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {"LICENSE", "README.md", "pyproject.toml", "svdcli", "tests", "sample_models"}


def test_nothing_goes_by_a_clock_that_may_jump() -> None:
    for path in MODULES:
        assert "time.time()" not in path.read_text(), path
        assert "datetime.now" not in path.read_text(), path
