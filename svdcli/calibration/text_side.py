"""Which part of a model reads text by itself, found by trying.

A language model reads it whole, and so does one that takes images besides (it then sees none). A
model of two towers has a function for its text; else the largest module will do that reads text
alone and is not fed by anything else meanwhile. The trial is one forward pass over two short rows,
a block in memory at a time, as calibration does it later.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.stream import Stream
from svdcli.errors import SvdcliError
from svdcli.text.tokens import Batch

FORWARD, FEATURES = "forward", "get_text_features"
# of the trial; the second row differs from the first in the last tokens
_ROWS = 2
_LENGTH = 11
_CHANGED = 4
# how much what comes later may change what comes before it, as a share of the largest answer
_CAUSAL = 1e-4
_LIMITS = ("max_position_embeddings", "n_positions", "seq_length")


@dataclass(frozen=True)
class Features:
    """One embedding for every text (batch, width), as the model itself makes it."""

    embeddings: Tensor


def rows_of(output: Any) -> Tensor:
    """What an encoder makes of text: an embedding for each (batch, width), or hidden states (batch,
    length, width)."""
    rows: Tensor = output.embeddings if isinstance(output, Features) else output.last_hidden_state
    return rows


def pooled(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Sentence embeddings (batch, width): rows that are such, or the mean of hidden states over the
    tokens where mask is set."""
    if rows.ndim == 2:
        return rows
    if mask is None:
        mask = torch.ones(rows.shape[:2])
    weights = mask.to(rows)[..., None]
    return (rows * weights).sum(1) / weights.sum(1).clamp(min=1)


@dataclass(frozen=True)
class TextSide:
    """How a model reads text alone.

    kind is "decoder" (predicts the next token, and sees none that come later) or "encoder". name is
    that of the module that is called, "" for the whole model, and method its function; decodes says
    that its decoder wants tokens too. padded is False where padding would be read as text. longest
    is how many tokens it takes in a row, if it says so; words how many it tells apart, if that can
    be seen.
    """

    kind: str
    name: str
    method: str
    decodes: bool = False
    padded: bool = True
    longest: int | None = None
    words: int = 0

    @property
    def shown(self) -> str:
        """What runs, where that is not the whole model."""
        return ".".join(
            part for part in (self.name, "" if self.method == FORWARD else self.method) if part
        )

    @property
    def in_windows(self) -> bool:
        """Is text cut into windows; else it is read by sentences."""
        return self.kind == "decoder" or self.decodes

    def module(self, model: Any) -> Any:
        """The part of `model` that is called."""
        return model.get_submodule(self.name)

    def config(self, model: Any) -> Any:
        """The configuration of that part."""
        return text_config(self.module(model).config)

    def ask(self, model: Any, **inputs: Any) -> Any:
        """What the model answers; arguments that it does not take are left out."""
        module = self.module(model)
        if self.method == FORWARD:
            return module(**_taken(module, FORWARD, inputs))
        found = getattr(module, self.method)(**_taken(module, self.method, inputs))
        return Features(found if isinstance(found, Tensor) else found.pooler_output)

    def of(self, model: Any) -> Callable[..., Any]:
        """A model of this structure as a function of its inputs."""
        return partial(self.ask, model)

    def embed(self, model: Any, inputs: Batch) -> Tensor:
        """Sentence embeddings (count, width): the model's own, else the mean of the last hidden
        states over the tokens that are no padding. Raises SvdcliError for a model that shows
        none."""
        if self.method == FEATURES:
            return rows_of(self.ask(model, **inputs))
        module = self.module(model)
        module = module.get_encoder() if self.decodes else getattr(module, "base_model", module)
        output = module(**_taken(module, FORWARD, inputs))
        if getattr(output, "last_hidden_state", None) is None:
            raise SvdcliError(
                f"{type(module).__name__} shows no hidden states to compare",
                "compare its outputs by yourself",
            )
        return pooled(rows_of(output), inputs["attention_mask"])


def text_side(model: Any, shown: str, vocabulary: int, hint: str) -> TextSide:
    """How `model` reads text; vocabulary is how many tokens its tokenizer knows.

    Raises SvdcliError, with this hint, for a model no part of which reads text alone.
    """
    reasons: list[str] = []
    for side in _candidates(model, vocabulary):
        found = _Trial(model, side).run()
        if isinstance(found, TextSide):
            return found
        reasons.append(found)
    why = next(iter(reasons), f"takes {' and '.join(_needed(model.forward))}")
    raise SvdcliError(f"{shown} does not read text alone ({type(model).__name__} {why})", hint)


def text_config(config: Any) -> Any:
    """The part of a configuration that is about text, where there is one such part."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # none of transformers', or several such parts
        return config


def arguments_of(call: Callable[..., Any]) -> frozenset[str]:
    """The names of a function's arguments."""
    return frozenset(inspect.signature(call).parameters)


def _taken(module: Any, method: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs that the function of a module's class takes, and that it need not keep anything
    for later."""
    names = arguments_of(getattr(type(module), method))
    return {name: value for name, value in ({"use_cache": False} | inputs).items() if name in names}


# Candidates ---------------------------------------------------------------------------------------


def _candidates(model: Any, vocabulary: int) -> Iterator[TextSide]:
    """What may read text alone: the whole, its function for text, then its parts: first those whose
    table of words fits the tokenizer best, and of those the large ones."""
    yield from _calls(model, "", model)
    parts = [
        (name, module)
        for name, module in model.named_modules()
        if name and hasattr(module, "config")
    ]
    parts = [(name, module) for name, module in parts if _words(module) >= vocabulary]
    for name, module in sorted(parts, key=lambda part: (_words(part[1]), -_weights(part[1]))):
        yield from _calls(model, name, module)


def _calls(model: Any, name: str, module: Any) -> Iterator[TextSide]:
    """The ways to call one module that take tokens and can do without anything else."""
    for method in (FORWARD, FEATURES):
        call = getattr(module, method, None)
        if (
            call is not None
            and "input_ids" in arguments_of(call)
            and set(_required(call)) <= {"input_ids"}
        ):
            yield _side(model, name, method)


def _required(call: Callable[..., Any]) -> list[str]:
    """The arguments that have no default."""
    parameters = inspect.signature(call).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, one in parameters.items()
        if one.default is one.empty and one.kind not in kinds
    ]


def _needed(call: Callable[..., Any]) -> list[str]:
    """What to call the input of something that does not take tokens, or not only."""
    return _required(call) or list(inspect.signature(call).parameters)[:1] or ["something else"]


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _side(model: Any, name: str, method: str) -> TextSide:
    module = model.get_submodule(name)
    pair = method == FORWARD and bool(getattr(module.config, "is_encoder_decoder", False))
    return TextSide(
        "encoder",
        name,
        method,
        decodes=pair and "decoder_input_ids" in arguments_of(module.forward),
    )


def _words(module: Any) -> int:
    """Rows of the table that a module looks its tokens up in; 0 where it has none."""
    try:
        return int(module.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        return max((table.num_embeddings for table in tables), default=0)


# The trial ----------------------------------------------------------------------------------------

_FED = "reads text only beside what its other side sends there"


@dataclass
class _Trial:
    """One forward pass of a candidate, and what could be seen meanwhile."""

    model: Any
    side: TextSide
    ran: set[int] = field(default_factory=set)
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def run(self) -> TextSide | str:
        """The side, completed with what the trial told; or why it is none."""
        module = self.side.module(self.model)
        rows = _Rows.for_(self.model.config, _words(module))
        try:
            output = self._pass(rows.batch(decodes=self.side.decodes))
        except (
            Exception
        ) as error:  # whatever a model of anybody's may raise where something is missing
            return (
                f"fails on tokens alone: "
                f"{' '.join(str(error).split())[:160] or type(error).__name__}"
            )
        if self.side.name and self._is_fed():
            return _FED
        kind = self._kind(output, rows)
        if kind is None:
            return "answers with neither logits nor hidden states for each token"
        takes_mask = "attention_mask" in arguments_of(getattr(module, self.side.method))
        other_way = (_LENGTH, _ROWS) in {shape[:2] for shape in self.shapes}
        longest = longest_of(module)
        return replace(
            self.side,
            kind=kind,
            padded=takes_mask and not other_way,
            longest=longest,
            words=rows.words,
        )

    def _pass(self, batch: Batch) -> Any:
        answers: list[Any] = []
        device = next(self.model.parameters()).device
        stream = Stream(self.model, device, torch.float32, call=self.side.of(self.model))
        with watched(self.side.module(self.model), self._see):
            stream.run([batch], read=lambda index, output: answers.append(output))
        return answers[0]

    def _see(self, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.ran.add(id(part))
        self.shapes |= {
            tuple(value.shape) for value in inputs if isinstance(value, Tensor) and value.ndim == 3
        }

    def _is_fed(self) -> bool:
        """Did a block leave out a part that is for what something else sends: attention to another
        sequence."""
        lists = [
            part
            for part in self.side.module(self.model).modules()
            if isinstance(part, nn.ModuleList)
        ]
        for block in itertools.chain.from_iterable(lists):
            others = [
                word for word in arguments_of(block.forward) if "encoder" in word or "cross" in word
            ]
            parts = {
                id(part)
                for part in block.modules()
                if next(part.parameters(recurse=False), None) is not None
            }
            if id(block) in self.ran and others and not parts <= self.ran:
                return True
        return False

    def _kind(self, output: Any, rows: _Rows) -> str | None:
        """ "decoder" or "encoder" by what came out; None for something else."""
        if isinstance(output, Features):
            return (
                "encoder"
                if isinstance(output.embeddings, Tensor) and output.embeddings.ndim == 2
                else None
            )
        logits, hidden = (getattr(output, name, None) for name in ("logits", "last_hidden_state"))
        if isinstance(logits, Tensor) and logits.ndim == 3 and logits.shape[:2] == (_ROWS, _LENGTH):
            other_words = 2 * logits.shape[-1] < rows.words
            if self.side.decodes or other_words:
                return None if other_words and self.side.name else "encoder"
            before = logits[:, : _LENGTH - _CHANGED].float()
            looks_ahead = (before[0] - before[1]).abs().max() > _CAUSAL * before.abs().max()
            return "encoder" if bool(looks_ahead) else "decoder"
        labels = getattr(self.side.module(self.model).config, "num_labels", None)
        if isinstance(logits, Tensor) and logits.ndim == 2 and logits.shape == (_ROWS, labels):
            return "encoder"
        states = (
            isinstance(hidden, Tensor) and hidden.ndim == 3 and hidden.shape[:2] == (_ROWS, _LENGTH)
        )
        return "encoder" if logits is None and states else None


@dataclass(frozen=True)
class _Rows:
    """Tokens of the trial (2, 11): ordinary ones, none that stands for a picture or an end."""

    ids: Tensor
    words: int

    @staticmethod
    def for_(config: Any, words: int) -> _Rows:
        special = _special_ids(config)
        plain = [number for number in range(words) if number not in special] or [0]
        first = [plain[(3 * place + 1) % len(plain)] for place in range(_LENGTH)]
        second = [plain[(3 * place + 2) % len(plain)] for place in range(_LENGTH)]
        return _Rows(torch.tensor([first, first[:-_CHANGED] + second[-_CHANGED:]]), words)

    def batch(self, *, decodes: bool) -> Batch:
        """The arguments of a forward pass."""
        batch = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        return batch | {"decoder_input_ids": self.ids} if decodes else batch


def _special_ids(config: Any) -> set[int]:
    """Whatever a configuration, or one inside it, calls the id of a token."""
    left, found = [config.to_dict() if hasattr(config, "to_dict") else {}], set[int]()
    while left:
        for name, value in left.pop().items():
            if isinstance(value, dict):
                left.append(value)
            elif "token_id" in str(name) or "token_index" in str(name):
                found |= {
                    number
                    for number in (value if isinstance(value, list) else [value])
                    if isinstance(number, int)
                }
    return found


def longest_of(module: Any) -> int | None:
    """How many tokens a model takes: what its configuration says, less what a table of positions
    keeps for padding."""
    config = text_config(module.config)
    limits: list[int] = []
    for name in _LIMITS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            limits.append(value)
    for name, table in module.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(table, nn.Embedding)
            and table.padding_idx is not None
        ):
            limits.append(table.num_embeddings - table.padding_idx - 1)
    return min(limits, default=None)


@contextmanager
def watched(module: nn.Module, see: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    """Tell of every part that runs, with its positional arguments."""
    handles = [part.register_forward_pre_hook(see) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
