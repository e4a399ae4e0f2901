"""The house stays as it is: who may import whom, what stays out of the quick commands, what README must tell."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "svdcli"
FLOORS = {
    "errors": 0,
    "progress": 0,
    "plan": 0.5,
    "linalg": 1,
    "files": 2,
    "models": 3,
    "engine": 4,
    "pipeline": 5,
    "healing": 6,
    "survey": 6,
    "render": 7,
    "cli": 8,
    "__main__": 9,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Every module that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "svdcli" or len(parts) == 1:
            continue
        assert parts[1] == room or FLOORS[parts[1]] < FLOORS[room], f"{room} imports {name}"


@pytest.mark.parametrize(("library", "home"), [("typer", "cli.py"), ("rich", "render.py")])
def test_one_home_for_each_library_of_the_surface(library: str, home: str) -> None:
    users = {path.name for path in MODULES if any(name.split(".")[0] == library for name in imports(path))}
    assert users == {home}


def test_the_plan_needs_only_the_standard_library() -> None:
    for path in (*PACKAGE.glob("plan/*.py"), PACKAGE / "errors.py", PACKAGE / "files" / "header.py"):
        foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"svdcli"}
        assert not foreign, path


def test_no_test_imports_another_test() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imports(path) if name.split(".")[0].startswith("test_")], path


def test_functions_fit_on_a_screen() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and path.name != "cli.py":
                assert (node.end_lineno or 0) - node.lineno < 62, f"{path.name}: {node.name}"


def test_public_names_have_docstrings() -> None:
    for path in MODULES:
        tree = ast.parse(path.read_text())
        if path.name != "__main__.py" and tree.body:
            assert ast.get_docstring(tree), path
    import svdcli

    for name in svdcli.__all__:
        assert getattr(svdcli, name).__doc__ or name == "__version__"


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
    ],
    ids=" ".join,
)
def test_quick_commands_import_no_torch(arguments: list[str], compressed_mlp: Path) -> None:
    arguments = [str(compressed_mlp) if argument == "OUT" else argument for argument in arguments]
    imports_no_torch(arguments, {})


def test_completion_imports_no_torch() -> None:
    line = {"COMP_WORDS": "svdcli compress m --layout ", "COMP_CWORD": "4", "_SVDCLI_COMPLETE": "complete_bash"}
    assert imports_no_torch([], line).split() == ["factored", "pivoted", "dense"]


def imports_no_torch(arguments: list[str], environment: dict[str, str]) -> str:
    """Standard output of a command that must end well without any of the libraries that take long to import."""
    code = (
        "import sys; from svdcli.cli import main\n"
        f"sys.argv = ['svdcli', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_documents_every_command_and_option() -> None:
    readme = (ROOT / "README.md").read_text()
    source = (PACKAGE / "cli.py").read_text()
    for command in re.findall(r"@app\.command\(.*\)\ndef (\w+)", source):
        assert f"svdcli {command.rstrip('_')}" in readme, command
    for option in sorted(set(re.findall(r'"(--[a-z-]+)"', source))):
        assert option in readme, option


def test_every_command_shows_an_example() -> None:
    source = (PACKAGE / "cli.py").read_text()
    assert source.count("@app.command(") == source.count('@app.command(epilog="Example: svdcli ')


def test_the_top_level_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    assert visible <= {"LICENSE", "README.md", "pyproject.toml", "svdcli", "tests", "sample_models"}
