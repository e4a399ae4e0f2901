"""From text to what a model reads: windows of tokens, or sentences; and how much of the text that
is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from svdcli.errors import SvdcliError, UsageError
from svdcli.models import own_code
from svdcli.text.texts import Texts

Batch = dict[str, Tensor]
Item = TypeVar("Item")

# How much text calibration reads: so many tokens, or so many for every input of the widest layer,
# where that is more.
TOKENS = 131_072
TOKENS_AN_INPUT = 16

TOKENS_IN_A_BATCH = 2048
_LONGEST = 2048  # tokens of a window, where nothing else is asked for
_FIRST_LOOK = 256  # sentences whose tokens are counted before it is known how many will do


# How much -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """The amount of text that is read: so many windows or sentences, or as many as hold so many
    tokens; with neither, all of it.

    Raises UsageError for less than one window.
    """

    samples: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples < 1:
            raise UsageError(f"--samples {self.samples} leaves no text to read", "give at least 1")

    @staticmethod
    def to_calibrate(samples: int | None, widest: int) -> Amount:
        """Return as many samples as asked for; else 131,072 tokens, or 16 for every input of the
        widest layer where that is more."""
        if samples is not None:
            return Amount(samples)
        return Amount(tokens=max(TOKENS, TOKENS_AN_INPUT * widest))

    def times(self, factor: int) -> Amount:
        """Return so many times as much."""
        samples = None if self.samples is None else factor * self.samples
        tokens = None if self.tokens is None else factor * self.tokens
        return Amount(samples, tokens)

    def batches(self, samples: int, tokens: int, count: int) -> int:
        """Return how many of `count` batches, which hold so many samples and tokens together, are
        this much: at least one."""
        if self.samples is not None:
            share = self.samples / samples
        else:
            share = (self.tokens or tokens) / tokens
        return max(1, round(min(1.0, share) * count))

    def windows(self, length: int) -> int | None:
        """Return the number of windows of `length` tokens; None for all."""
        if self.samples is not None or self.tokens is None:
            return self.samples
        return math.ceil(self.tokens / length)


def rows_at_a_time(length: int) -> int:
    """Return how many rows of this length are read at a time."""
    return max(1, TOKENS_IN_A_BATCH // length)


def evenly(items: Sequence[Item], count: int | None) -> list[Item]:
    """Return at most `count` of the items, the first and the last among them, evenly spread; None
    for all."""
    if count is None or count >= len(items):
        return list(items)
    # A single one is the first
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


# Tokens -------------------------------------------------------------------------------------------


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer beside a model. Raises SvdcliError where there is none, and where it is
    code that may not run."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if not trust_remote_code and own_code.tokenizer_sources(Path(path)):
            raise own_code.refusal(str(path), "a tokenizer of its own") from error
        reason = " ".join(str(error).split())[:160]
        raise SvdcliError(
            f"{path} has no tokenizer that opens ({reason})",
            "copy tokenizer.json and its config there",
        ) from error


def padding_token(tokenizer: Any) -> None:
    """Give a tokenizer that has no token for padding its first one: it does not matter which, since
    padding is left out of everything."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)


def window_length(longest: int | None, asked: int | None) -> int:
    """Return the length as asked, by default 2048 tokens; at most `longest`, what the model takes,
    or 2048 where it does not say. Raises SvdcliError for less than 2."""
    wanted = _LONGEST if asked is None else asked
    length = min(wanted, longest or _LONGEST)
    if length < 2:
        raise UsageError(f"--seq-len {length} leaves nothing to predict", "give at least 2")
    return length


# Windows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Windows:
    """ids (count, length) of whole windows, without padding. bytes_per_token is that of the text
    they were cut from.

    total is how many tokens the text has; the windows are spread evenly over it.
    """

    ids: Tensor
    bytes_per_token: float
    total: int


def windows_of(tokenizer: Any, texts: Texts, length: int, count: int | None = None) -> Windows:
    """Cut the tokens of all documents, one after the other, into windows of `length` that share one
    token with the next.

    A beginning-of-text token that the tokenizer adds starts every window. With `count`, that many
    windows, evenly spread. Raises SvdcliError where the text is too short for one window.
    """
    ids, first = _encode(tokenizer, texts.documents)
    length = min(length, len(ids) + len(first))

    # Behind a beginning-of-text token every token is predicted; without one the first of a window
    # is not, and is the last of the window before
    take = length - len(first)
    step = take if first else take - 1
    if step < 1:
        raise SvdcliError(f"{texts.name} has only {len(ids)} tokens", "give more text")

    # Windows that are full, and of these as many as are wanted
    starts = evenly(range(0, len(ids) - take + 1, step), count)
    flat = torch.tensor(ids, dtype=torch.long)
    begin = torch.tensor(first, dtype=torch.long)
    rows = [torch.cat((begin, flat[start : start + take])) for start in starts]
    return Windows(torch.stack(rows), texts.nbytes / max(1, len(ids)), len(ids))


def _encode(tokenizer: Any, documents: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return (all tokens without special ones, the token that the tokenizer puts before a text, if
    any)."""
    # Whether it puts one there is seen only by trying
    first: list[int] = []
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("a")["input_ids"][:1] == [bos]:
        first = [bos]

    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, first


# Sentences ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentence:
    """A line of text, and how many tokens of it an encoder reads: special ones count, what lies
    beyond the window does not."""

    text: str
    tokens: int


def sentences_of(tokenizer: Any, texts: Texts, length: int, amount: Amount) -> list[Sentence]:
    """Return lines of three words or more, evenly spread: as many as asked for, or as many as hold
    the tokens asked for.

    Raises SvdcliError where there are none.
    """
    lines: list[str] = []
    for document in texts.documents:
        for line in document.splitlines():
            if len(line.split()) > 2:
                lines.append(line.strip())
    if not lines:
        raise SvdcliError(f"{texts.name} has no lines of three words or more", "give more text")

    # How many lines hold the tokens is guessed from those that were counted, until they do
    take = amount.samples if amount.tokens is None else _FIRST_LOOK
    while True:
        sentences = _counted(tokenizer, evenly(lines, take), length)
        tokens = sum(sentence.tokens for sentence in sentences)
        if amount.tokens is None or take is None or tokens >= amount.tokens or take >= len(lines):
            break
        take = 1 + math.ceil(take * amount.tokens / max(1, tokens))

    # A tokenizer of other text may answer with nothing at all
    if not sentences:
        raise SvdcliError(
            f"{texts.name} has only 0 tokens",
            "give more text, or the tokenizer that the model was trained with",
        )
    return sentences


def _counted(tokenizer: Any, lines: Sequence[str], length: int) -> list[Sentence]:
    """Return lines with their numbers of tokens, without those that have none."""
    ids = tokenizer(list(lines), truncation=True, max_length=length)["input_ids"]
    return [Sentence(line, len(row)) for line, row in zip(lines, ids, strict=True) if len(row) > 0]


def grouped(sentences: Sequence[Sentence], *, padded: bool) -> list[list[Sentence]]:
    """Return sentences to be read together, short ones first: 2048 tokens, padding included, and at
    least one sentence.

    Where they cannot be padded those of the same number of tokens come together.
    """
    groups: list[list[Sentence]] = []
    for sentence in sorted(sentences, key=lambda sentence: sentence.tokens):
        last = groups[-1] if groups else []
        fits = bool(last) and (padded or last[-1].tokens == sentence.tokens)
        # The longest of a group, to which the others are padded, is the one that comes last
        if fits and len(last) < rows_at_a_time(sentence.tokens):
            last.append(sentence)
        else:
            groups.append([sentence])
    return groups


def batch_of(tokenizer: Any, lines: Sequence[str], length: int) -> Batch:
    """Return tokenised lines with their attention mask, padded to the longest of them."""
    batch = tokenizer(
        list(lines),
        padding=True,
        truncation=True,
        max_length=length,
        return_attention_mask=True,
        return_tensors="pt",
    )
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}
