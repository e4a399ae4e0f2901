"""From text to the token windows that a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdcli.errors import SvdcliError, UsageError
from svdcli.files.texts import Texts

_LONGEST = 2048


@dataclass(frozen=True)
class Windows:
    """ids (count, length) of whole windows, without padding. bytes_per_token is that of the text they were cut from.

    total is how many tokens the text has; the windows are spread evenly over it.
    """

    ids: Tensor
    bytes_per_token: float
    total: int


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer beside a model. Raises SvdcliError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:160]
        raise SvdcliError(f"{path} has no tokenizer that opens ({reason})", "copy tokenizer.json and its config there") from error


def window_length(model: Any, asked: int | None) -> int:
    """As asked, at most what the model takes. Raises SvdcliError for less than 2."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length")]
    limit = min([int(value) for value in limits if isinstance(value, int) and value > 1] or [_LONGEST])
    length = min(limit, _LONGEST if asked is None else asked)
    if length < 2:
        raise SvdcliError(f"--seq-len {length} leaves nothing to predict", "give at least 2")
    return length


def windows_of(tokenizer: Any, texts: Texts, length: int, count: int | None = None) -> Windows:
    """Cut the tokens of all documents, one after the other, into windows of `length` that share one token with the next.

    A beginning-of-text token that the tokenizer adds starts every window. With `count`, that many windows, evenly spread.
    Raises SvdcliError where the text is too short for one window, UsageError for a count below 1.
    """
    _check_count(count)
    ids, first = _encode(tokenizer, texts.documents)
    length = min(length, len(ids) + len(first))
    step = length - len(first) - (0 if first else 1)
    if step < 1:
        raise SvdcliError(f"{texts.name} has only {len(ids)} tokens", "give more text")
    take = length - len(first)
    starts = range(0, len(ids) - take + 1, step)
    chosen = list(starts)
    if count is not None and count < len(chosen):
        chosen = [chosen[round(i * (len(chosen) - 1) / max(1, count - 1))] for i in range(count)]
    flat = torch.tensor(ids, dtype=torch.long)
    begin = torch.tensor(first, dtype=torch.long)
    rows = [torch.cat((begin, flat[start : start + take])) for start in chosen]
    return Windows(torch.stack(rows), texts.nbytes / max(1, len(ids)), len(ids))


def _encode(tokenizer: Any, documents: Sequence[str]) -> tuple[list[int], list[int]]:
    """(all tokens without special ones, the token that the tokenizer puts before a text, if any)."""
    bos = tokenizer.bos_token_id
    first = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    return ids, first


def sentences_of(texts: Texts, count: int) -> list[str]:
    """Lines of three words or more, at most `count`, evenly spread. Raises UsageError for a count below 1."""
    _check_count(count)
    lines = [line.strip() for document in texts.documents for line in document.splitlines() if len(line.split()) > 2]
    if not lines:
        raise SvdcliError(f"{texts.name} has no lines of three words or more", "give more text")
    if count >= len(lines):
        return lines
    return [lines[round(i * (len(lines) - 1) / max(1, count - 1))] for i in range(count)]


def _check_count(count: int | None) -> None:
    if count is not None and count < 1:
        raise UsageError(f"--samples {count} leaves no text to read", "give at least 1")


def kind_of(model: Any) -> str:
    """ "decoder" (predicts the next token), "encoder" (embeds text) or "other" (does not read text)."""
    config = model.config
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or not hasattr(model, "get_input_embeddings"):
        return "other"
    if getattr(config, "is_encoder_decoder", False):
        return "encoder"
    causal = model.can_generate() if hasattr(model, "can_generate") else False
    return "decoder" if causal and model.get_output_embeddings() is not None else "encoder"
