"""What a model's config.json says about its layers, in numbers: vocabulary, labels, experts, depth,
tied weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# Spellings of transformers and of code on the Hub. Token types are no vocabulary that a head
# answers in.
_VOCABULARY = re.compile(r"(^|_)(vocab_size|n_vocab)(_|$)")
_NO_VOCABULARY = re.compile(r"type_vocab_size")
_LABELS = re.compile(r"^num_(\w+_)?(labels|classes)$")
_EXPERTS = re.compile(r"^(moe_)?(n|num)_(local_|routed_|moe_)?experts$")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# The config of the text stack, where it is one of several in a config.json.
_TEXT = ("text_config", "llm_config", "language_config", "thinker_config")


@dataclass(frozen=True)
class ModelFacts:
    """Numbers by which the role of a layer is known. depth is how many layers the main text stack
    has, tied whether input and output embeddings are one weight; both None where config.json does
    not say. by_class: a class of transformers, or of code for it, opens the model."""

    by_class: bool = False
    vocabularies: frozenset[int] = frozenset()
    codes: frozenset[int] = frozenset()
    labels: frozenset[int] = frozenset()
    experts: frozenset[int] = frozenset()
    depth: int | None = None
    tied: bool | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelFacts:
        """What a config.json says, the configs inside it included. Odd values count as not said."""
        vocabularies: set[int] = set()
        codes: set[int] = set()
        labels: set[int] = set()
        experts: set[int] = set()
        for key, number in _numbers_in(config):
            if _VOCABULARY.search(key) and not _NO_VOCABULARY.search(key):
                vocabularies.add(number)
            if key == "num_embeddings":
                codes.add(number)
            # Two labels are too few to say anything, and one expert is no mixture.
            if _LABELS.search(key) and number > 2:
                labels.add(number)
            if _EXPERTS.search(key) and number > 1:
                experts.add(number)
        return cls(
            by_class="model_type" in config or "architectures" in config,
            vocabularies=frozenset(vocabularies),
            codes=frozenset(codes),
            labels=frozenset(labels),
            experts=frozenset(experts),
            depth=_depth(config),
            tied=_tied(config),
        )


def _numbers_in(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(key, whole number above 0) of a config and of those inside it; a table of labels counts as
    their number."""
    for key, value in config.items():
        if key == "id2label" and isinstance(value, Mapping):
            yield "num_labels", len(value)
        elif isinstance(value, Mapping):
            yield from _numbers_in(value)
        for number in value if isinstance(value, list) else [value]:
            if _is_count(number):
                yield key, number


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _text_configs(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config of the text stack and those around it, innermost first."""
    for key in _TEXT:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            return [*_text_configs(inner), config]
    return [config]


def _depth(config: Mapping[str, Any]) -> int | None:
    text = _text_configs(config)[0]
    for key in _DEPTHS:
        if _is_count(text.get(key)):
            return int(text[key])
    return None


def _tied(config: Mapping[str, Any]) -> bool | None:
    """transformers asks the config of the whole first; files written before its version 5 say it in
    the text stack's."""
    for part in reversed(_text_configs(config)):
        tied = part.get("tie_word_embeddings")
        if isinstance(tied, bool):
            return tied
    return None
