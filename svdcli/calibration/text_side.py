"""Which part of a model reads text by itself, found by trying.

A language model reads it whole, and so does one that takes images besides (it then sees none). A
model of two towers has a function for its text; else the largest module will do that reads text
alone and is not fed by anything else meanwhile. The trial is one forward pass over two short rows,
a block in memory at a time, as calibration does it later.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from svdcli.calibration.stream import Stream
from svdcli.errors import SvdcliError
from svdcli.text.tokens import Batch

FORWARD = "forward"
FEATURES = "get_text_features"
# The batch of the trial: two rows, the second of which differs from the first in its last tokens.
_ROWS = 2
_LENGTH = 11
_CHANGED = 4
# By how much, as a share of the largest answer, tokens may change the answers before them by
# rounding alone.
_CAUSAL = 1e-4
_LIMITS = ("max_position_embeddings", "n_positions", "seq_length")


@dataclass(frozen=True)
class Features:
    """One embedding for every text (batch, width), as the model itself makes it."""

    embeddings: Tensor


def rows_of(output: Any) -> Tensor:
    """Return what an encoder makes of text: an embedding for each (batch, width), or hidden states
    (batch, length, width)."""
    rows: Tensor = output.embeddings if isinstance(output, Features) else output.last_hidden_state
    return rows


def pooled(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return the sentence embeddings (batch, width): rows that are such, or the mean of hidden
    states over the tokens where mask is set."""
    if rows.ndim == 2:
        return rows
    if mask is None:
        mask = torch.ones(rows.shape[:2])
    weights = mask.to(rows)[..., None]
    return (rows * weights).sum(1) / weights.sum(1).clamp(min=1)


@dataclass(frozen=True)
class TextSide:
    """The way in which a model reads text alone.

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
        method = "" if self.method == FORWARD else self.method
        return ".".join(filter(None, (self.name, method)))

    @property
    def in_windows(self) -> bool:
        """Is text cut into windows; else it is read by sentences."""
        return self.kind == "decoder" or self.decodes

    def module(self, model: Any) -> Any:
        """Return the part of `model` that is called."""
        return model.get_submodule(self.name)

    def config(self, model: Any) -> Any:
        """Return the configuration of that part."""
        return text_config(self.module(model).config)

    def ask(self, model: Any, **inputs: Any) -> Any:
        """Call the model; arguments that it does not take are left out."""
        module = self.module(model)
        if self.method == FORWARD:
            return module(**_taken(module, FORWARD, inputs))
        features = getattr(module, self.method)(**_taken(module, self.method, inputs))
        if not isinstance(features, Tensor):  # an output object, by version
            features = features.pooler_output
        return Features(features)

    def of(self, model: Any) -> Callable[..., Any]:
        """Return a model of this structure as a function of its inputs."""
        return partial(self.ask, model)

    def embed(self, model: Any, inputs: Batch) -> Tensor:
        """Return the sentence embeddings (count, width): the model's own, else the mean of the last
        hidden states over the tokens that are no padding. Raises SvdcliError for a model that shows
        none."""
        if self.method == FEATURES:
            return rows_of(self.ask(model, **inputs))

        # Hidden states: of the encoder alone where there are two, and from below any head
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
    """Find how `model` reads text; vocabulary is how many tokens its tokenizer knows.

    Raises SvdcliError, with this hint, for a model no part of which reads text alone.
    """
    reasons: list[str] = []
    for candidate in _candidates(model, vocabulary):
        outcome = _Trial(model, candidate).run()
        if isinstance(outcome, TextSide):
            return outcome
        reasons.append(outcome)

    # The first candidate is the likeliest, and its reason says most
    reason = next(iter(reasons), f"takes {' and '.join(_needed(model.forward))}")
    raise SvdcliError(f"{shown} does not read text alone ({type(model).__name__} {reason})", hint)


def text_config(config: Any) -> Any:
    """Return the part of a configuration that is about text, where there is one such part."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # none of transformers', or several such parts
        return config


def arguments_of(call: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's arguments."""
    return frozenset(inspect.signature(call).parameters)


def _taken(module: Any, method: str, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs that the function of a module's class takes, and that it need not keep
    anything for later."""
    names = arguments_of(getattr(type(module), method))
    offered = {"use_cache": False} | inputs
    return {name: value for name, value in offered.items() if name in names}


# Candidates ---------------------------------------------------------------------------------------


def _candidates(model: Any, vocabulary: int) -> Iterator[TextSide]:
    """Yield what may read text alone: the whole, its function for text, then its parts: first those
    whose table of words fits the tokenizer best, and of those the large ones."""
    yield from _calls(model, "", model)
    parts: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        if name and hasattr(module, "config") and _words(module) >= vocabulary:
            parts.append((name, module))
    parts.sort(key=lambda part: (_words(part[1]), -_weights(part[1])))
    for name, module in parts:
        yield from _calls(model, name, module)


def _calls(model: Any, name: str, module: Any) -> Iterator[TextSide]:
    """Yield the ways to call one module that take tokens and can do without anything else."""
    for method in (FORWARD, FEATURES):
        call = getattr(module, method, None)
        if call is None or "input_ids" not in arguments_of(call):
            continue
        if set(_required(call)) <= {"input_ids"}:
            yield _side(model, name, method)


def _required(call: Callable[..., Any]) -> list[str]:
    """Return the arguments that have no default."""
    collecting = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in inspect.signature(call).parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in collecting
    ]


def _needed(call: Callable[..., Any]) -> list[str]:
    """Name the input of something that does not take tokens, or not only."""
    return _required(call) or list(inspect.signature(call).parameters)[:1] or ["something else"]


def _weights(module: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(weight.numel() for weight in module.parameters())


def _side(model: Any, name: str, method: str) -> TextSide:
    """Return a candidate; the trial decides its kind."""
    module = model.get_submodule(name)
    is_pair = method == FORWARD and bool(getattr(module.config, "is_encoder_decoder", False))
    decodes = is_pair and "decoder_input_ids" in arguments_of(module.forward)
    return TextSide("encoder", name, method, decodes=decodes)


def _words(module: Any) -> int:
    """Return the number of rows of the table that a module looks its tokens up in; 0 where it has
    none."""
    try:
        return int(module.get_input_embeddings().weight.shape[0])
    except (AttributeError, NotImplementedError):
        tables = [part for part in module.modules() if isinstance(part, nn.Embedding)]
        return max((table.num_embeddings for table in tables), default=0)


# The trial ----------------------------------------------------------------------------------------

_FED = "reads text only beside what its other side sends there"


@dataclass
class _Trial:
    """One forward pass of a candidate. ran are the identities of the modules that ran meanwhile,
    shapes those of the hidden states that they read."""

    model: Any
    side: TextSide
    ran: set[int] = field(default_factory=set)
    shapes: set[tuple[int, ...]] = field(default_factory=set)

    def run(self) -> TextSide | str:
        """Return the side, completed with what the trial showed; or why it is none."""
        # The pass itself; a model may raise anything where something is missing
        module = self.side.module(self.model)
        rows = _TrialRows.for_config(self.model.config, _words(module))
        try:
            output = self._pass(rows.batch(decodes=self.side.decodes))
        except Exception as error:
            text = " ".join(str(error).split())[:160]
            return f"fails on tokens alone: {text or type(error).__name__}"

        # What it is, if it reads text by itself
        if self.side.name and self._leaves_out_cross_attention():
            return _FED
        kind = self._kind_by_output(output, rows)
        if kind is None:
            return "answers with neither logits nor hidden states for each token"

        # Hidden states that come as (length, batch) do not fit the mask, which is (batch, length)
        takes_mask = "attention_mask" in arguments_of(getattr(module, self.side.method))
        length_first = (_LENGTH, _ROWS) in {shape[:2] for shape in self.shapes}
        return replace(
            self.side,
            kind=kind,
            padded=takes_mask and not length_first,
            longest=longest_of(module),
            words=rows.words,
        )

    def _pass(self, batch: Batch) -> Any:
        """Return what the candidate answers, in the dtype and on the device where calibration runs
        it."""
        answers: list[Any] = []
        device = next(self.model.parameters()).device
        stream = Stream(self.model, device, torch.float32, call=self.side.of(self.model))
        with watched(self.side.module(self.model), self._note):
            stream.run([batch], read=lambda index, output: answers.append(output))
        return answers[0]

    def _note(self, part: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note that a part runs, and the shapes of the hidden states that it reads."""
        self.ran.add(id(part))
        for value in inputs:
            if isinstance(value, Tensor) and value.ndim == 3:
                self.shapes.add(tuple(value.shape))

    def _leaves_out_cross_attention(self) -> bool:
        """Tell whether a block ran without a part of it that is for what another sequence sends:
        then the module is one side of a pair, and fed by the other."""
        blocks: list[nn.Module] = []
        for part in self.side.module(self.model).modules():
            if isinstance(part, nn.ModuleList):
                blocks += part
        return any(id(block) in self.ran and self._ran_in_part(block) for block in blocks)

    def _ran_in_part(self, block: nn.Module) -> bool:
        """Tell whether a block has an argument for another sequence, and a part with parameters
        that did not run."""
        if not any("encoder" in word or "cross" in word for word in arguments_of(block.forward)):
            return False
        for part in block.modules():
            owns = next(part.parameters(recurse=False), None) is not None
            if owns and id(part) not in self.ran:
                return True
        return False

    def _kind_by_output(self, output: Any, rows: _TrialRows) -> str | None:
        """Return "decoder" or "encoder" by what came out; None for something else."""
        if isinstance(output, Features):
            return "encoder" if _has_dimensions(output.embeddings, 2) else None

        # Logits for every token: a decoder's, unless they look ahead or are of other words
        logits = getattr(output, "logits", None)
        if _for_each_token(logits):
            if 2 * logits.shape[-1] < rows.words:  # too few to predict the next token
                return None if self.side.name else "encoder"
            return "encoder" if self.side.decodes or _looks_ahead(logits) else "decoder"

        # One answer for every row is a classifier's
        labels = getattr(self.side.module(self.model).config, "num_labels", None)
        if _has_dimensions(logits, 2) and logits.shape == (_ROWS, labels):
            return "encoder"

        # Hidden states without a head
        hidden = getattr(output, "last_hidden_state", None)
        return "encoder" if logits is None and _for_each_token(hidden) else None


def _has_dimensions(value: Any, count: int) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.ndim == count


def _for_each_token(value: Any) -> TypeGuard[Tensor]:
    """Tell whether it is a tensor with an entry for each token of the trial."""
    return _has_dimensions(value, 3) and value.shape[:2] == (_ROWS, _LENGTH)


def _looks_ahead(logits: Tensor) -> bool:
    """Tell whether the answers to the tokens that both rows share depend on those that come
    later."""
    shared = logits[:, : _LENGTH - _CHANGED].float()
    return bool((shared[0] - shared[1]).abs().max() > _CAUSAL * shared.abs().max())


@dataclass(frozen=True)
class _TrialRows:
    """Tokens of the trial (2, 11): ordinary ones, none that stands for a picture or an end. words
    is how many the model has."""

    ids: Tensor
    words: int

    @staticmethod
    def for_config(config: Any, words: int) -> _TrialRows:
        """Return rows for a model with this configuration, of which the second differs at its
        end."""
        special = _special_token_ids(config)
        plain = [number for number in range(words) if number not in special] or [0]
        first = [plain[(3 * place + 1) % len(plain)] for place in range(_LENGTH)]
        second = [plain[(3 * place + 2) % len(plain)] for place in range(_LENGTH)]
        return _TrialRows(torch.tensor([first, first[:-_CHANGED] + second[-_CHANGED:]]), words)

    def batch(self, *, decodes: bool) -> Batch:
        """Return the arguments of a forward pass."""
        batch = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids)}
        return batch | {"decoder_input_ids": self.ids} if decodes else batch


def _special_token_ids(config: Any) -> set[int]:
    """Return whatever a configuration, or one inside it, calls the id of a token."""
    configs: list[dict[str, Any]] = [config.to_dict() if hasattr(config, "to_dict") else {}]
    ids: set[int] = set()
    while configs:
        for name, value in configs.pop().items():
            if isinstance(value, dict):
                configs.append(value)
            elif "token_id" in str(name) or "token_index" in str(name):
                listed = value if isinstance(value, list) else [value]
                ids |= {number for number in listed if isinstance(number, int)}
    return ids


def longest_of(module: Any) -> int | None:
    """Return how many tokens a model takes: what its configuration says, less what a table of
    positions keeps for padding."""
    config = text_config(module.config)
    limits: list[int] = []

    # By the configuration
    for name in _LIMITS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 1:
            limits.append(value)

    # By a table whose positions begin behind the one for padding, as in RoBERTa
    for name, table in module.named_modules():
        if not name.endswith("position_embeddings") or not isinstance(table, nn.Embedding):
            continue
        if table.padding_idx is not None:
            limits.append(table.num_embeddings - table.padding_idx - 1)
    return min(limits, default=None)


@contextmanager
def watched(module: nn.Module, see: Callable[[nn.Module, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call `see` for every part that runs, with its positional arguments."""
    handles = [part.register_forward_pre_hook(see) for part in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
