"""Parts of a model that can be opened alone: which layers warn loaders without the plugin, and
which configs ask for it.

Standard library only: `compress --self-contained` ships this file beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Where transformers looks for the config of a part in files that do not say its model_type.
_PART_NAMES = frozenset(
    {
        "text_config",
        "vision_config",
        "audio_config",
        "speech_config",
        "image_config",
        "encoder",
        "decoder",
    }
)


def tripwires(modules: Iterable[str]) -> tuple[str, ...]:
    """The factored modules under whose old weight's name a zero-size tensor is stored, in the order
    given.

    A loader without the plugin then fails on any part of the model that it opens: these are every
    module outside of numbered stacks, and the first one of each stack. A stack is what comes before
    the first number, `encoder.block` of `encoder.block.0.layer.1.DenseReluDense.wi`; first is what
    has the fewest numbers (experts are numbered again within their layer, and may be kept in one
    tensor), then the lowest.
    """
    names = tuple(modules)
    first: dict[str, str] = {}
    for name in sorted(names, key=_place):
        first.setdefault(_stack(name), name)
    return tuple(name for name in names if first[_stack(name)] == name)


def _stack(name: str) -> str:
    """The path before the first number; of a module outside of numbered stacks the whole name."""
    words = name.split(".")
    return ".".join(
        words[: next((at for at, word in enumerate(words) if word.isdigit()), len(words))]
    )


def _place(name: str) -> tuple[int, list[int], str]:
    numbers = [int(word) for word in name.split(".") if word.isdigit()]
    return len(numbers), numbers, name


def part_configs(
    config: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """(path, sub-config) of every part within a config.json that transformers may open alone, at
    any depth."""
    for key, value in config.items():
        if isinstance(value, dict) and (value.get("model_type") or key in _PART_NAMES):
            yield (*path, key), value
            yield from part_configs(value, (*path, key))
