"""What one model reads of a text: its part that reads, and the batches for that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from svdcli.calibration.text_side import TextSide
from svdcli.errors import SvdcliError
from svdcli.text.texts import Texts
from svdcli.text.tokens import (
    Amount,
    Batch,
    batch_of,
    grouped,
    padding_token,
    rows_at_a_time,
    sentences_of,
    window_length,
    windows_of,
)

ALONE = "compress it without --text"


@dataclass(frozen=True)
class Read:
    """The batches of a text: samples windows of seq_len tokens, or sentences of at most as many;
    tokens in all."""

    side: TextSide
    batches: list[Batch]
    tokens: int
    samples: int
    seq_len: int


def read_batches(
    side: TextSide, tokenizer: Any, texts: Texts, amount: Amount, seq_len: int | None
) -> Read:
    """Return as much of the text as asked for, cut as the model reads it: into windows of seq_len
    tokens (as many as it takes, at most 2048), or by sentences, those together that are about as
    long.

    Raises SvdcliError where the text is too short, or the tokenizer is another model's.
    """
    length = window_length(side.longest, seq_len)
    # Windows all have one length, and need no padding
    if side.in_windows:
        ids = windows_of(tokenizer, texts, length, amount.windows(length)).ids
        batches = [{"input_ids": part} for part in ids.split(rows_at_a_time(ids.shape[1]))]
        if side.decodes:
            batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
        samples, length = ids.shape
        tokens = ids.numel()

    # Sentences as the tokenizer reads them one by one, special tokens included
    else:
        padding_token(tokenizer)
        sentences = sentences_of(tokenizer, texts, length, amount)
        groups = grouped(sentences, padded=side.padded)
        batches = [
            batch_of(tokenizer, [sentence.text for sentence in group], length) for group in groups
        ]
        samples = len(sentences)
        tokens = sum(sentence.tokens for sentence in sentences)
    check_tokens(side, batches)
    return Read(side, batches, tokens, samples, length)


def check_tokens(side: TextSide, batches: list[Batch]) -> None:
    """Raise SvdcliError for a token that the model has no row for."""
    largest = max(int(batch["input_ids"].max()) for batch in batches)
    if side.words and largest >= side.words:
        hint = "put the tokenizer that the model was trained with beside it"
        raise SvdcliError(
            f"the tokenizer gives token {largest}, and the model knows {side.words}", hint
        )
