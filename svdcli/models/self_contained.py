"""The one Python file of `compress --self-contained`, put together from the plugin's own source. No
torch here."""

from __future__ import annotations

import ast
from pathlib import Path

from svdcli.files.checkpoint import STANDALONE
from svdcli.version import __version__

# In this order, since each uses names of those before it.
_SOURCES = (
    "plan/parts.py",
    *(f"models/{name}.py" for name in ("kernels", "modules", "experts", "hf", "auto_classes")),
)
_PACKAGE = Path(__file__).parent.parent


def standalone_source() -> bytes:
    """Put modules, plugin and openers into one file that imports torch, safetensors and
    transformers only."""
    parts = [
        f"# Written by svdcli {__version__}: opens the model beside it. Apache-2.0.\n"
        f"from __future__ import annotations\n"
    ]
    for name in _SOURCES:
        text = (_PACKAGE / name).read_text(encoding="utf-8")
        parts.append(_without_own_imports(text) + "\n")
    return "\n".join(parts).encode()


def _without_own_imports(text: str) -> str:
    """Return the lines of a module but for imports of svdcli's own, which the one file has in
    itself, and of __future__, which stands at its top."""
    dropped: set[int] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package = node.module.partition(".")[0]
            if package in ("svdcli", "__future__"):
                dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), start=1)
    return "\n".join(line for number, line in lines if number not in dropped)


def auto_map() -> dict[str, str]:
    """Return what config.json says about that file: every stock class by its own name."""
    module = STANDALONE.removesuffix(".py")
    tree = ast.parse((_PACKAGE / "models" / "auto_classes.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "AUTO_CLASSES":
            return {name: f"{module}.{name}" for name in ast.literal_eval(node.value)}
    raise AssertionError("auto_classes.py names no classes")
