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
    """Return {auto class: "module.Class", or "repository--module.Class"}, without what `compress
    --self-contained` put there: svdcli opens its own outputs by itself."""
    entries = (config or {}).get("auto_map")
    if not isinstance(entries, dict):
        return {}
    openers = standalone.auto_map()
    references: dict[str, str] = {}
    for name, value in entries.items():
        if isinstance(value, str) and openers.get(name) != value:
            references[name] = value
    return references


def auto_class(config: Mapping[str, Any] | None) -> str | None:
    """Return the auto class through which the folder's own code opens as its config means it: the
    one of the class that `architectures` names, else one with a language model's head, else any
    with a head, else none but the bare model."""
    references = auto_map_of(config)
    names = [name for name in references if name.startswith("AutoModel")]
    named = ((config or {}).get("architectures") or [""])[0]

    # False comes before True: the first of these that is so decides
    def order(name: str) -> tuple[bool, bool, bool]:
        return (
            references[name].rpartition(".")[2] != named,
            name != "AutoModelForCausalLM",
            name == "AutoModel",
        )

    return min(names, key=order, default=None)


def sources(path: str | Path) -> list[str]:
    """List what runs when the model and its tokenizer are opened with `--trust-remote-code`: Python
    files of the folder, the ones they import among them, and files of repositories that its
    auto_map names. Empty where the folder has no code of its own."""
    folder = Path(path)
    return list(dict.fromkeys([*model_sources(folder), *tokenizer_sources(folder)]))


def model_sources(folder: Path) -> list[str]:
    """Return the files behind the classes of config and model."""
    config = _json(folder / "config.json")
    references = auto_map_of(config)
    names = ("AutoConfig", auto_class(config))
    return _files(folder, [references[name] for name in names if name in references])


def tokenizer_sources(folder: Path) -> list[str]:
    """Return the files behind the class of the tokenizer."""
    entry = _json(folder / _TOKENIZER_CONFIG).get("auto_map")
    if isinstance(entry, dict):
        entry = entry.get("AutoTokenizer")

    # One class, or a slow and a fast one: the fast one, where there is one
    listed = entry if isinstance(entry, list) else [entry]
    classes = [name for name in listed if isinstance(name, str)]
    return _files(folder, classes[-1:])


def refusal(shown: str, code: str) -> SvdcliError:
    """Return the error for a folder whose code may not run."""
    return SvdcliError(
        f"{shown} brings {code}, as Python code that runs only where you trust it",
        f"read it, then give {OPTION} (from Python trust_remote_code=True)",
    )


def _json(path: Path) -> dict[str, Any]:
    """Return a JSON file; empty where there is none that can be read."""
    try:
        return read_json(path)
    except (OSError, BadCheckpointError):
        return {}


def _files(folder: Path, classes: Iterable[str]) -> list[str]:
    """Return the files behind references of an auto_map, and what these import from the same
    folder."""
    files: list[str] = []
    for reference in classes:
        repository, _, local = reference.rpartition("--")
        name = f"{local.partition('.')[0]}.py"
        if repository:
            files.append(f"{name} of the repository {repository}")
            continue
        files.append(str(folder / name))
        with suppress(OSError, ImportError):  # opening the model names what is missing
            from transformers.dynamic_module_utils import get_relative_import_files

            files += get_relative_import_files(folder / name)
    return list(dict.fromkeys(files))
