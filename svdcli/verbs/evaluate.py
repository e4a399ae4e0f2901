"""How far a model is from its original: perplexity, KL divergence, agreement; for encoders, cosine
similarity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdcli.calibration.loss import divergence_terms
from svdcli.calibration.reading import Read, read_batches
from svdcli.calibration.text_side import TextSide, text_side
from svdcli.engine.compute import Compute
from svdcli.errors import SvdcliError, UsageError
from svdcli.files.report import JSON_VERSION
from svdcli.models.load import load_quietly
from svdcli.progress import Progress, silent
from svdcli.text.texts import Texts
from svdcli.text.tokens import Amount, Windows, load_tokenizer, window_length, windows_of

_CHUNK = 2**25  # logits turned to float32 at a time


@dataclass(frozen=True)
class Mean:
    """A mean and its standard error, None where there is one window only; windows of text count as
    independent, tokens inside one do not."""

    value: float
    error: float | None


@dataclass(frozen=True)
class Scores:
    """Of one model on the text: loss in nats a token, perplexity, bits a byte."""

    path: str
    loss: Mean
    perplexity: Mean
    bits_per_byte: float


@dataclass(frozen=True)
class Drift:
    """Of the compressed model from the original. excess_loss is the difference of losses, paired by
    window; kl is KL(original || compressed) in nats a token; top1 the share of tokens where both
    would choose the same next one."""

    excess_loss: Mean
    kl: Mean
    top1: Mean


@dataclass(frozen=True)
class Similarity:
    """Cosine similarity of sentence embeddings (mean of the last hidden states) with the
    original's."""

    mean: float
    percentile_5: float
    minimum: float
    sentences: int


@dataclass(frozen=True)
class Continuation:
    """What both models make of one prompt, greedily."""

    prompt: str
    compressed: str
    original: str | None


@dataclass(frozen=True)
class Evaluation:
    """model_kind is decoder or encoder; tokens were evaluated out of text_tokens. side names the
    part of the model that read them, where it is not the whole."""

    path: str
    against: str | None
    model_kind: str
    computed_in: str
    text: str = ""
    text_sha256: str = ""
    text_tokens: int = 0
    tokens: int = 0
    compressed: Scores | None = None
    original: Scores | None = None
    drift: Drift | None = None
    similarity: Similarity | None = None
    continuations: tuple[Continuation, ...] = ()
    side: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "evaluation"} | asdict(self)


def evaluate(
    output: str | Path,
    texts: Texts | None = None,
    *,
    against: str | Path | None = None,
    seq_len: int | None = None,
    samples: int = 128,
    prompts: Sequence[str] = (),
    new_tokens: int = 48,
    dtype: torch.dtype | None = None,
    compute: Compute | None = None,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Evaluation:
    """Read `samples` windows of text (sentences for an encoder) with a model, compressed or not,
    and with its original beside it. Without texts, only what both make of the prompts.

    Computed in `dtype`, by default in float32 on a CPU for models of up to 4 GB, else as stored.
    trust_remote_code runs Python that the models' folders bring along. Decoders give losses in nats
    a token and, against an original, KL divergence and agreement; encoders need an original. Of a
    model that reads more than text the part is judged that reads text alone. Raises SvdcliError for
    a model without one, or without its tokenizer, and for prompts to one that does not generate.
    """
    # Both models, and the part of them that reads text
    where = (compute or Compute()).start()
    model = load_quietly(output, where, dtype, trust_remote_code=trust_remote_code)
    original = None
    if against is not None:
        original = load_quietly(against, where, dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(output, trust_remote_code=trust_remote_code)
    side = text_side(model, str(output), len(tokenizer), "eval judges what reads text")

    # What holds without a text
    spoken = _speak(side, model, original, tokenizer, prompts, new_tokens)
    computed = str(next(model.parameters()).dtype).removeprefix("torch.")
    found = Evaluation(
        str(output),
        None if against is None else str(against),
        side.kind,
        computed,
        continuations=spoken,
        side=side.shown,
    )
    if texts is None:
        return found

    # Decoders by their losses, window by window
    found = replace(found, text=texts.name, text_sha256=texts.digest)
    calls = side.of(model), None if original is None else side.of(original)
    if side.kind == "decoder":
        windows = windows_of(
            tokenizer, texts, window_length(side.longest, seq_len), Amount(samples).samples
        )
        windows = replace(windows, ids=windows.ids.to(where))
        scores, others, drift = compare(*calls, windows, str(output), str(against), progress)
        tokens = windows.ids.shape[0] * (windows.ids.shape[1] - 1)
        return replace(
            found,
            text_tokens=windows.total,
            tokens=tokens,
            compressed=scores,
            original=others,
            drift=drift,
        )

    # Encoders by the cosine of their sentence embeddings
    if original is None:
        raise SvdcliError(
            f"{output} is an encoder, which is judged by its distance from the original",
            "give --against MODEL",
        )
    read = read_batches(replace(side, decodes=False), tokenizer, texts, Amount(samples), seq_len)
    similarity = _similarity(_cosines(side, model, original, read, where, progress))
    return replace(found, text_tokens=read.tokens, tokens=read.tokens, similarity=similarity)


def _speak(
    side: TextSide,
    model: Any,
    original: Any | None,
    tokenizer: Any,
    prompts: Sequence[str],
    new_tokens: int,
) -> tuple[Continuation, ...]:
    """The continuations of a decoder. Raises UsageError for prompts to a model that continues
    none."""
    if not prompts:
        return ()
    parts = [side.module(one) for one in (model, original) if one is not None]
    if side.kind != "decoder" or not hasattr(parts[0], "generate"):
        raise UsageError(f"{type(parts[0]).__name__} continues no text", "leave out --prompt")
    return tuple(_continue(prompt, parts, tokenizer, new_tokens) for prompt in prompts)


# Decoders -----------------------------------------------------------------------------------------


def compare(
    model: Any,
    original: Any | None,
    windows: Windows,
    path: str = "",
    against: str = "",
    progress: Progress = silent,
) -> tuple[Scores, Scores | None, Drift | None]:
    """Losses of a decoder on windows (count, length) of tokens, on its device, and, with an
    original, the drift from it.

    Both are functions of input_ids whose answers have logits, as models are.
    """
    rows: list[list[float]] = []
    for done, ids in enumerate(windows.ids, 1):
        rows.append(_window(model, original, ids))
        progress("eval", f"window {done}", done, len(windows.ids))
    columns = [list(column) for column in zip(*rows, strict=True)]
    bits = 1 / (math.log(2) * windows.bytes_per_token)
    scores = _scores(path, columns[0], bits)
    if original is None:
        return scores, None, None
    excess = [ours - theirs for ours, theirs in zip(columns[0], columns[1], strict=True)]
    return (
        scores,
        _scores(against, columns[1], bits),
        Drift(mean_of(excess), mean_of(columns[2]), mean_of(columns[3])),
    )


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and its standard error."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(mean, None)
    spread = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Mean(mean, math.sqrt(spread / len(values)))


def _scores(path: str, losses: Sequence[float], bits: float) -> Scores:
    loss = mean_of(losses)
    perplexity = math.exp(min(loss.value, 700.0))
    return Scores(
        path,
        loss,
        Mean(perplexity, None if loss.error is None else perplexity * loss.error),
        loss.value * bits,
    )


@torch.inference_mode()
def _window(model: Any, original: Any | None, ids: Tensor) -> list[float]:
    """[loss] or [loss, loss of the original, KL, agreement], each a mean over the tokens of one
    window."""
    logits = _logits(model, ids)
    others = None if original is None else _logits(original, ids)
    sums = torch.zeros(1 if others is None else 4, dtype=torch.float64)
    step = max(1, _CHUNK // logits.shape[-1])
    for start in range(0, logits.shape[0], step):
        at = slice(start, start + step)
        sums += _sums(logits[at], None if others is None else others[at], ids[1:][at])
    means: list[float] = (sums / logits.shape[0]).tolist()
    if not all(map(math.isfinite, means)):
        raise SvdcliError(
            "the model answers with NaN or infinity", "see `svdcli verify`, or try --device cpu"
        )
    return means


def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return logits


def _sums(logits: Tensor, others: Tensor | None, targets: Tensor) -> Tensor:
    ours = logits.float().log_softmax(-1)
    loss = -ours.gather(-1, targets[:, None]).double().sum()
    if others is None:
        return loss.cpu()[None]
    theirs = others.float().log_softmax(-1)
    other_loss = -theirs.gather(-1, targets[:, None]).double().sum()
    kl = divergence_terms(theirs, ours).sum(-1).double().sum()
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().sum()
    return torch.stack((loss, other_loss, kl, same)).cpu()


@torch.inference_mode()
def _continue(prompt: str, parts: Sequence[Any], tokenizer: Any, new_tokens: int) -> Continuation:
    """What the model and, where there are two, its original make of a prompt."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(
        next(parts[0].parameters()).device
    )
    how = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    }
    texts = []
    for one in parts:
        ids = one.generate(**inputs, **how)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return Continuation(prompt, texts[0], texts[1] if len(texts) > 1 else None)


# Encoders -----------------------------------------------------------------------------------------


@torch.inference_mode()
def _cosines(
    side: TextSide, model: Any, original: Any, read: Read, where: torch.device, progress: Progress
) -> list[float]:
    """Cosine similarity of every sentence's two embeddings."""
    cosines: list[float] = []
    for batch in read.batches:
        inputs = {key: value.to(where) for key, value in batch.items()}
        ours, theirs = (side.embed(one, inputs).double() for one in (model, original))
        cosines += torch.cosine_similarity(ours, theirs, dim=-1).tolist()
        progress("eval", f"sentence {len(cosines)}", len(cosines), read.samples)
    return cosines


def _similarity(cosines: Sequence[float]) -> Similarity:
    if not all(map(math.isfinite, cosines)):
        raise SvdcliError(
            "the model answers with NaN or infinity", "see `svdcli verify`, or try --device cpu"
        )
    ordered = sorted(cosines)
    return Similarity(
        math.fsum(ordered) / len(ordered),
        ordered[int(0.05 * (len(ordered) - 1))],
        ordered[0],
        len(ordered),
    )
