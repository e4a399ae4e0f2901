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
from svdcli.errors import NotFiniteError, SvdcliError, UsageError
from svdcli.files.finite import weights_told
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
    device = (compute or Compute()).start()
    model = load_quietly(output, device, dtype, trust_remote_code=trust_remote_code)
    original = None
    if against is not None:
        original = load_quietly(against, device, dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(output, trust_remote_code=trust_remote_code)
    side = text_side(model, str(output), len(tokenizer), "eval judges what reads text")
    models = _Models(model, original, side, tokenizer, device)

    # What holds without a text
    computed_in = str(next(model.parameters()).dtype).removeprefix("torch.")
    against_shown = None if against is None else str(against)
    continuations = _continuations(models, prompts, new_tokens)
    evaluation = Evaluation(
        path=str(output),
        against=against_shown,
        model_kind=side.kind,
        computed_in=computed_in,
        continuations=continuations,
        side=side.shown,
    )
    if texts is None:
        return evaluation
    evaluation = replace(evaluation, text=texts.name, text_sha256=texts.digest)

    # Decoders by their losses, encoders by their sentence embeddings
    judged = [path for path in (against, output) if path is not None]
    if side.kind == "decoder":
        length = window_length(side.longest, seq_len)
        windows = windows_of(tokenizer, texts, length, Amount(samples).samples)
        with weights_told(*judged):
            return _judge_decoder(evaluation, models, windows, progress)
    if original is None:
        raise SvdcliError(
            f"{output} is an encoder, which is judged by its distance from the original",
            "give --against MODEL",
        )
    read = read_batches(replace(side, decodes=False), tokenizer, texts, Amount(samples), seq_len)
    with weights_told(*judged):
        return _judge_encoder(evaluation, models, read, progress)


@dataclass(frozen=True)
class _Models:
    """The model, its original where there is one, and what reads text of both."""

    model: Any
    original: Any | None
    side: TextSide
    tokenizer: Any
    device: torch.device


def _judge_decoder(
    evaluation: Evaluation, models: _Models, windows: Windows, progress: Progress
) -> Evaluation:
    """The evaluation with losses, and with the drift from the original where there is one."""
    side = models.side
    windows = replace(windows, ids=windows.ids.to(models.device))
    original_call = None
    if models.original is not None:
        original_call = side.of(models.original)
    scores, original_scores, drift = compare(
        side.of(models.model),
        original_call,
        windows,
        evaluation.path,
        str(evaluation.against),
        progress,
    )
    # The first token of a window is not predicted
    count, length = windows.ids.shape
    return replace(
        evaluation,
        text_tokens=windows.total,
        tokens=count * (length - 1),
        compressed=scores,
        original=original_scores,
        drift=drift,
    )


def _judge_encoder(
    evaluation: Evaluation, models: _Models, read: Read, progress: Progress
) -> Evaluation:
    """The evaluation with the similarity of sentence embeddings."""
    similarity = _similarity(_cosines(models, read, progress))
    return replace(evaluation, text_tokens=read.tokens, tokens=read.tokens, similarity=similarity)


def _continuations(
    models: _Models, prompts: Sequence[str], new_tokens: int
) -> tuple[Continuation, ...]:
    """What a decoder and its original make of each prompt. Raises UsageError for prompts to a model
    that generates no text."""
    if not prompts:
        return ()
    side = models.side
    networks = (models.model, models.original)
    parts = [side.module(network) for network in networks if network is not None]
    if side.kind != "decoder" or not hasattr(parts[0], "generate"):
        raise UsageError(f"{type(parts[0]).__name__} continues no text", "leave out --prompt")
    return tuple(_continue(prompt, parts, models.tokenizer, new_tokens) for prompt in prompts)


# Decoders -----------------------------------------------------------------------------------------


def compare(
    model: Any,
    original: Any | None,
    windows: Windows,
    path: str = "",
    against: str = "",
    progress: Progress = silent,
    chunk: int = _CHUNK,
) -> tuple[Scores, Scores | None, Drift | None]:
    """Losses of a decoder on windows (count, length) of tokens, on its device, and, with an
    original, the drift from it.

    Both are functions of input_ids whose answers have logits, as models are. chunk is how many
    logits are turned to float32 at a time.
    """
    rows: list[list[float]] = []
    for done, ids in enumerate(windows.ids, 1):
        rows.append(_window_means(model, original, ids, chunk))
        progress("eval", f"window {done}", done, len(windows.ids))
    losses, *compared = (list(column) for column in zip(*rows, strict=True))
    bits = 1 / (math.log(2) * windows.bytes_per_token)
    scores = _scores(path, losses, bits)
    if original is None:
        return scores, None, None

    # Paired by window: what is hard to predict is hard for both, and the difference is sharper
    original_losses, divergences, agreements = compared
    excess = [ours - theirs for ours, theirs in zip(losses, original_losses, strict=True)]
    drift = Drift(mean_of(excess), mean_of(divergences), mean_of(agreements))
    return scores, _scores(against, original_losses, bits), drift


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and its standard error."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Mean(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Mean(mean, math.sqrt(variance / len(values)))


def _scores(path: str, losses: Sequence[float], bits: float) -> Scores:
    """Scores from the mean loss of every window; bits turns nats a token into bits a byte."""
    loss = mean_of(losses)
    perplexity = math.exp(min(loss.value, 700.0))  # exp(710) is no float64
    # An error of the loss becomes one of its exponential by the slope, which is that again
    error = None
    if loss.error is not None:
        error = perplexity * loss.error
    return Scores(path, loss, Mean(perplexity, error), loss.value * bits)


@torch.inference_mode()
def _window_means(model: Any, original: Any | None, ids: Tensor, chunk: int) -> list[float]:
    """[loss] or [loss, loss of the original, KL, agreement], each a mean over the tokens of one
    window."""
    logits = _logits(model, ids)
    original_logits = None
    if original is not None:
        original_logits = _logits(original, ids)

    # In float32 chunk by chunk: all logits of a long window and a large vocabulary take gigabytes
    count = 1 if original is None else 4
    sums = torch.zeros(count, dtype=torch.float64)
    step = max(1, chunk // logits.shape[-1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        theirs = None
        if original_logits is not None:
            theirs = original_logits[rows]
        sums += _sums(logits[rows], theirs, ids[1:][rows])
    means: list[float] = (sums / logits.shape[0]).tolist()
    _check_finite(means)
    return means


def _check_finite(values: Sequence[float]) -> None:
    if not all(map(math.isfinite, values)):
        raise NotFiniteError("the model answers with NaN or infinity")


def _logits(model: Any, ids: Tensor) -> Tensor:
    """(length - 1, vocabulary): for every token but the last, what the next one may be."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return logits


def _sums(logits: Tensor, original_logits: Tensor | None, targets: Tensor) -> Tensor:
    """float64 sums over tokens, in the order of `_window_means`."""
    ours = logits.float().log_softmax(-1)
    loss = -ours.gather(-1, targets[:, None]).double().sum()
    if original_logits is None:
        return loss.cpu()[None]
    theirs = original_logits.float().log_softmax(-1)
    original_loss = -theirs.gather(-1, targets[:, None]).double().sum()
    kl = divergence_terms(theirs, ours).sum(-1).double().sum()
    same = (ours.argmax(-1) == theirs.argmax(-1)).double().sum()
    return torch.stack((loss, original_loss, kl, same)).cpu()


@torch.inference_mode()
def _continue(prompt: str, parts: Sequence[Any], tokenizer: Any, new_tokens: int) -> Continuation:
    """What the model and, where there are two, its original make of a prompt. Raises UsageError
    for one without tokens."""
    device = next(parts[0].parameters()).device
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    prompt_length = inputs["input_ids"].shape[1]
    if not prompt_length:
        raise UsageError(f"--prompt {prompt!r} has no tokens", "give some text")
    texts = []
    for part in parts:
        ids = part.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        )
        texts.append(tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True))
    original = texts[1] if len(texts) > 1 else None
    return Continuation(prompt, texts[0], original)


# Encoders -----------------------------------------------------------------------------------------


@torch.inference_mode()
def _cosines(models: _Models, read: Read, progress: Progress) -> list[float]:
    """Cosine similarity of every sentence's two embeddings."""
    cosines: list[float] = []
    for batch in read.batches:
        inputs = {key: value.to(models.device) for key, value in batch.items()}
        ours = models.side.embed(models.model, inputs).double()
        theirs = models.side.embed(models.original, inputs).double()
        cosines += torch.cosine_similarity(ours, theirs, dim=-1).tolist()
        progress("eval", f"sentence {len(cosines)}", len(cosines), read.samples)
    return cosines


def _similarity(cosines: Sequence[float]) -> Similarity:
    _check_finite(cosines)
    ordered = sorted(cosines)
    return Similarity(
        mean=math.fsum(ordered) / len(ordered),
        percentile_5=ordered[int(0.05 * (len(ordered) - 1))],
        minimum=ordered[0],
        sentences=len(ordered),
    )
