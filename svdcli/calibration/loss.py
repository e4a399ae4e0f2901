"""The loss whose curvature counts: the model's own, with labels drawn from its predictions (the
Fisher information).

An encoder without a head is judged by its normalised sentence embedding e: gradients of e . z with
z ~ N(0, I). Half the squared error in their metric is the expected 1 - cosine where errors of a
sentence's tokens are independent; where they go together it is too low, by up to the number of
tokens, and not evenly over the layers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.rows import MomentSums, padding_mask, without_padding
from svdcli.calibration.stream import Stream
from svdcli.calibration.text_side import pooled, rows_of
from svdcli.errors import NotFiniteError
from svdcli.text.tokens import Batch


def drawing(seed: int, index: int) -> torch.Generator:
    """Return what draws the labels of one batch of a text, on the CPU. It depends on the seed and
    on the batch's index in the whole text alone, not on what was drawn before it: a batch has the
    same labels in whichever part or round it is read."""
    digest = hashlib.sha256(f"{seed} {index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class ModelLoss:
    """The loss that a backward pass through `Stream` starts from, with labels of this seed. events
    counts predictions or embeddings; nats says that it was predictions."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.events = 0
        self.nats = True

    def note_kind(self, batch: int, output: Any) -> None:
        """Note what the model answers with: one without logits is judged by its embeddings."""
        self.nats = getattr(output, "logits", None) is not None

    def cotangents(
        self, batches: Sequence[Batch], indices: Sequence[int]
    ) -> Callable[[int, Any], tuple[Tensor, Tensor]]:
        """Return a function of the place of one of these batches, and of the model's output: its
        `cotangent`. indices are those of the batches in the whole text."""
        return lambda place, output: self.cotangent(indices[place], batches[place], output)

    def cotangent(self, index: int, batch: Batch, output: Any) -> tuple[Tensor, Tensor]:
        """Return the tensor to differentiate for the batch with this index in the whole text, and
        its gradient."""
        self.note_kind(0, output)
        mask = batch.get("attention_mask")
        generator = drawing(self.seed, index)
        if self.nats:
            return output.logits, self._gradient_at(output.logits, mask, generator)

        # The gradient of e . z at the encoder's rows, with z drawn on the CPU on every device
        rows = rows_of(output)
        leaf = rows.detach().requires_grad_()
        with torch.enable_grad():
            embedding = embedding_of(leaf, mask)
            z = torch.randn(embedding.shape, generator=generator).to(embedding)
            (embedding * z).sum().backward()
        self.events += leaf.shape[0]
        assert leaf.grad is not None
        return rows, leaf.grad

    def _gradient_at(
        self, logits: Tensor, mask: Tensor | None, generator: torch.Generator
    ) -> Tensor:
        """Return the gradient of the summed loss at logits (..., classes) for labels drawn from the
        predictions themselves. Raises NotFiniteError where these are not finite."""
        # The gradient of a cross entropy at its logits: the predictions, less 1 at the label
        gradient = logits.detach().float().softmax(-1)
        if not bool(torch.isfinite(gradient.sum())):
            raise NotFiniteError("the model answers with NaN or infinity")
        flat = gradient.view(-1, gradient.shape[-1])
        labels = torch.multinomial(flat.cpu(), 1, generator=generator).to(flat.device)
        flat.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=flat.dtype))

        # Padding predicts nothing
        if mask is not None and mask.shape == logits.shape[:-1]:
            gradient = gradient * mask.to(gradient)[..., None]
            self.events += int(mask.sum())
        else:
            self.events += flat.shape[0]
        return gradient.to(logits.dtype)


def embedding_of(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Return normalised sentence embeddings (batch, width) from the rows of an encoder."""
    return nn.functional.normalize(pooled(rows, mask), dim=-1)


def answer_of(output: Any, batch: Batch) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """Return the rows to compare, and the summed distance between two sets of them: log
    probabilities of predictions and their KL divergence, or sentence embeddings and 1 - cosine."""
    mask = batch.get("attention_mask")
    logits = getattr(output, "logits", None)
    if logits is None:
        return embedding_of(rows_of(output), mask), _cosine_distance
    rows = logits.float().log_softmax(-1)
    return without_padding(rows, padding_mask(batch)), _divergence


def divergence_terms(original: Tensor, compressed: Tensor) -> Tensor:
    """Return KL(original || compressed) before it is summed over the last axis, of log
    probabilities."""
    return original.exp() * (original - compressed)


def _divergence(original: Tensor, compressed: Tensor) -> Tensor:
    return divergence_terms(original, compressed).sum(dtype=torch.float64)


def _cosine_distance(original: Tensor, compressed: Tensor) -> Tensor:
    """Return the sum of 1 - cosine, for normalised embeddings."""
    cosines = (original.double() * compressed.double()).sum(-1)
    return (1 - cosines).sum()


def excess_of(original: Tensor, compressed: Tensor, ids: Tensor) -> Tensor:
    """Return by how much more, in nats a token, the compressed decoder loses on the tokens ids
    (batch, length) than its original. original and compressed (batch * length, vocabulary) are
    their log probabilities."""
    difference = _log_likelihoods(original, ids) - _log_likelihoods(compressed, ids)
    return difference.mean()


def _log_likelihoods(rows: Tensor, ids: Tensor) -> Tensor:
    """Return the log likelihoods (batch, length - 1, 1) of every token but the first of each row,
    which nothing predicts."""
    predictions = rows.view(*ids.shape, -1)[:, :-1]
    return predictions.gather(-1, ids[:, 1:, None])


def block_moments(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Collection[str],
    at_a_time: int,
    device: torch.device,
    call: Callable[..., Any] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the second moments (width, width) of the loss gradient at the output of every block,
    averaged over predictions; a block that no gradient reaches has none. All else is as for
    `block_sums`."""
    return averaged(*block_sums(model, batches, blocks, at_a_time, device, call, seed))


def averaged(sums: Mapping[str, Tensor], events: int) -> dict[str, Tensor]:
    """Return sums over predictions as averages."""
    return {unit: total / max(1, events) for unit, total in sums.items()}


def block_sums(
    model: nn.Module,
    batches: Sequence[Batch],
    blocks: Collection[str],
    at_a_time: int,
    device: torch.device,
    call: Callable[..., Any] | None = None,
    seed: int = 0,
    first: int = 0,
    states_on: torch.device | None = None,
) -> tuple[dict[str, Tensor], int]:
    """Return (what `block_moments` averages, summed over predictions; how many these were).

    at_a_time bounds how many batches are under way together; call is what is called with each, if
    not the whole model; seed draws the labels, of batches that are numbered from `first` on; hidden
    states wait on states_on, None for the device.
    """
    loss = ModelLoss(seed)
    sums = MomentSums()

    def add(unit: str, batch: int, gradient: Tensor) -> None:
        if unit in blocks:
            sums.add(unit, without_padding(gradient, None).float())

    stream = Stream(model, device, torch.float32, call=call, gradients=add, states_on=states_on)
    for start in range(0, len(batches), at_a_time):
        group = batches[start : start + at_a_time]
        indices = range(first + start, first + start + len(group))
        stream.run(group, loss.cotangents(group, indices))
    return sums.take(), loss.events
