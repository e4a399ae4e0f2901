"""Python that a model's folder brings along (`auto_map`): which files it is, which class it offers,
and that it may not run.

Nothing here runs any of it: transformers does, where it is told trust_remote_code=True.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.folder import read_json
from svdcli.models import self_contained as standalone

OPTION = "--trust-remote-code"
_TOKENIZER_CONFIG = "tokenizer_config.json"


def auto_map_of(config: Mapping[str, Any] | None) -> dict[str, str]:
    """{auto class: "module.Class", or "repository--module.Class"}, without what `compress
    --self-contained` put there: svdcli opens its own outputs by itself."""
    entries = (config or {}).get("auto_map")
    if not isinstance(entries, dict):
        return {}
    ours = standalone.auto_map()
    return {
        name: value
        for name, value in entries.items()
        if isinstance(value, str) and ours.get(name) != value
    }


def auto_class(config: Mapping[str, Any] | None) -> str | None:
    """The auto class through which the folder's own code opens as its config means it: the one of
    the class that `architectures` names, else one with a language model's head, else any with a
    head, else none but the bare model."""
    entries = {
        name: value for name, value in auto_map_of(config).items() if name.startswith("AutoModel")
    }
    named = ((config or {}).get("architectures") or [""])[0]

    def order(name: str) -> tuple[bool, bool, bool]:
        return (
            entries[name].rpartition(".")[2] != named,
            name != "AutoModelForCausalLM",
            name == "AutoModel",
        )

    return min(entries, key=order, default=None)


def sources(path: str | Path) -> list[str]:
    """What runs when the model and its tokenizer are opened with `--trust-remote-code`: Python
    files of the folder, the ones they import among them, and files of repositories that its
    auto_map names. Empty where the folder has no code of its own."""
    folder = Path(path)
    return list(dict.fromkeys([*model_sources(folder), *tokenizer_sources(folder)]))


def model_sources(folder: Path) -> list[str]:
    """The files behind the classes of config and model."""
    config = _json(folder / "config.json")
    entries, chosen = auto_map_of(config), auto_class(config)
    return _files(folder, [entries[name] for name in ("AutoConfig", chosen) if name in entries])


def tokenizer_sources(folder: Path) -> list[str]:
    """The files behind the class of the tokenizer."""
    entries = _json(folder / _TOKENIZER_CONFIG).get("auto_map")
    entries = entries.get("AutoTokenizer") if isinstance(entries, dict) else entries
    classes = [
        name
        for name in (entries if isinstance(entries, list) else [entries])
        if isinstance(name, str)
    ]
    return _files(folder, classes[-1:])  # slow and fast: the fast one, where there is one


def refusal(shown: str, what: str) -> SvdcliError:
    """One line for a folder whose code may not run."""
    return SvdcliError(
        f"{shown} brings {what}, as Python code that runs only where you trust it",
        f"read it, then give {OPTION} (from Python trust_remote_code=True)",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, BadCheckpointError):
        return {}


def _files(folder: Path, classes: Iterable[str]) -> list[str]:
    found: list[str] = []
    for reference in classes:
        repository, _, local = reference.rpartition("--")
        name = f"{local.partition('.')[0]}.py"
        if repository:
            found.append(f"{name} of the repository {repository}")
            continue
        found.append(str(folder / name))
        with suppress(OSError, ImportError):  # who opens the model complains about what is missing
            from transformers.dynamic_module_utils import get_relative_import_files

            found += get_relative_import_files(folder / name)
    return list(dict.fromkeys(found))
