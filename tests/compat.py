"""Run the model tests on the oldest and the newest transformers that pyproject.toml claims (or on
versions named here).

    python tests/compat.py  both ends of the claimed range, each in a fresh environment
    python tests/compat.py 5.12.0 5.16.0  these

Needs the network. Prints one line a version and ends with 1 where one failed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
OLDEST = "5.12.0"
TESTS = ("families", "load", "evaluate", "modules", "strictness", "parts", "packed")
FREE = re.compile(r"(transformers|tokenizers|huggingface.hub)==")


def pinned() -> str:
    """The transformers that tests/constraints.txt names: the newest one that is claimed."""
    found = re.search(
        r"^transformers==(\S+)$", (ROOT / "tests" / "constraints.txt").read_text(), re.MULTILINE
    )
    assert found is not None
    return found[1]


def passes(version: str) -> bool:
    """Install svdcli beside that transformers in a new environment and run the model tests
    there."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
        constraints.write_text("\n".join(line for line in lines if not FREE.match(line)))
        venv.create(Path(folder) / "venv", with_pip=True)
        python = Path(folder) / "venv" / "bin" / "python"
        wanted = [
            str(ROOT),
            f"transformers=={version}",
            "accelerate",
            "tokenizers",
            "pytest",
            "pytest-xdist",
            "hypothesis",
        ]
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "-c", constraints, *wanted], check=True
        )
        tests = [ROOT / "tests" / "models" / f"test_{name}.py" for name in TESTS]
        command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
        return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main() -> None:
    versions = sys.argv[1:] or [OLDEST, pinned()]
    results = {version: passes(version) for version in versions}
    for version, passed in results.items():
        print(f"transformers {version}: {'passed' if passed else 'FAILED'}")
    sys.exit(0 if all(results.values()) else 1)


if __name__ == "__main__":
    main()
