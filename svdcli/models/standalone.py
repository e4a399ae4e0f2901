"""The one Python file of `compress --self-contained`, put together from the plugin's own source. No torch here."""

from __future__ import annotations

import ast
from pathlib import Path

from svdcli import __version__

FILE = "svdcli_model.py"
_PARTS = ("modules.py", "hf.py", "opener.py")


def standalone_source() -> bytes:
    """Modules, plugin and openers in one file that imports torch, safetensors and transformers only."""
    parts = [f"# Written by svdcli {__version__}: opens the model beside it. Apache-2.0.\nfrom __future__ import annotations\n"]
    for name in _PARTS:
        text = Path(__file__).with_name(name).read_text(encoding="utf-8")
        parts.append("\n".join(line for line in text.splitlines() if not _drops(line)) + "\n")
    return "\n".join(parts).encode()


def auto_map() -> dict[str, str]:
    """What config.json says about that file: every stock class by its own name."""
    tree = ast.parse(Path(__file__).with_name("opener.py").read_text(encoding="utf-8"))
    names = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "AUTO_CLASSES")  # type: ignore[attr-defined]
    return {name: f"{FILE.removesuffix('.py')}.{name}" for name in ast.literal_eval(names)}


def _drops(line: str) -> bool:
    return line.startswith(("from svdcli", "from __future__"))
