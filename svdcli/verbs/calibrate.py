"""Second moments of every layer's inputs, and of the loss gradients at its outputs, from text that
the model reads.

The loss is the model's own (`loss`), so that half the two-sided error of a weight change is the
expected rise of the loss: the Fisher information in the Kronecker-factored form of Martens and
Grosse (K-FAC, 2015).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.gather import FULL_OUTPUTS, Gather
from svdcli.calibration.memory import SHARE_OF_MEMORY, free_memory, state_bytes, widest, width_of
from svdcli.calibration.moments import Provenance, Spool, write_moments
from svdcli.calibration.reading import ALONE, Read, read_batches
from svdcli.calibration.stream import Stream
from svdcli.calibration.text_side import text_side
from svdcli.engine.compute import Compute
from svdcli.engine.publish import check_place
from svdcli.files.checkpoint import Checkpoint, open_checkpoint
from svdcli.files.record import check_not_compressed
from svdcli.files.report import JSON_VERSION
from svdcli.models.kinds import take_apart_stacks
from svdcli.models.load import load_stored
from svdcli.models.modules import is_linear
from svdcli.plan.layers import choose_layers
from svdcli.progress import Progress, silent
from svdcli.text.texts import Texts
from svdcli.text.tokens import Amount, load_tokenizer

# Share of the speed of one large product at which a whole model is taken to be read.
_SPEED_IN_PRACTICE = 0.4


@dataclass(frozen=True)
class Forecast:
    """What calibration will take, told before it starts. state_bytes are hidden states kept between
    blocks; seconds is a guess.

    samples are windows of seq_len tokens, or sentences of at most as many. Where gradients were
    left to choose and are not measured, reason says why. side names the part of the model that
    reads the text, where it is not the whole.
    """

    tokens: int
    seq_len: int
    rounds: int
    gradients: bool
    state_bytes: int
    seconds: float
    reason: str = ""
    samples: int = 0
    side: str = ""


@dataclass(frozen=True)
class Calibrated:
    """What was measured, and what it took. uncalibrated lists selected weights that saw no input.

    samples are the windows of seq_len tokens that were read, or the sentences of at most as many.
    side names the part of the model that read them, where it is not the whole. saw_few lists
    weights of experts that read fewer tokens than they have inputs, and lean on the average of
    their layer.
    """

    path: str
    layers: int
    inputs: int
    tokens: int
    gradients: bool
    sensitivity: bool
    rounds: int
    bytes: int
    uncalibrated: tuple[str, ...]
    samples: int = 0
    seq_len: int = 0
    side: str = ""
    saw_few: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "calibration"} | asdict(self)


def calibrate(
    model: str | Path,
    out: str | Path,
    texts: Texts,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    gradients: bool | None = None,
    sensitivity: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    memory: int | None = None,
    compute: Compute | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    announce: Callable[[Forecast], None] = lambda forecast: None,
    progress: Progress = silent,
) -> Calibrated:
    """Read text with the model and write the moments of the selected layers to `out`, a file that
    must not be there yet unless force.

    samples is how many windows of seq_len tokens are read, or sentences by an encoder; by default
    as many as hold 131,072 tokens, or 16 for every input of the widest layer where that is more.
    gradients adds the moments of the loss gradients; None leaves that to the memory there is.
    sensitivity adds what the model's output loses when each layer alone is cut, from forward passes
    over a few of the windows. memory bounds the hidden states that are kept between blocks (bytes;
    by default a quarter of what is free): where the text needs more, it is read in rounds.
    trust_remote_code runs Python that the model's folder brings along.

    Of a model that reads more than text only the part is run that reads text alone (`text_side`).
    Raises SvdcliError for a model without one, and for one that answers with NaN, with the name of
    the first layer that does.
    """
    out = Path(out)
    device = (compute or Compute()).start()
    with open_checkpoint(model) as checkpoint:
        check_not_compressed(checkpoint, "calibrate the original, which compress takes")
        take_apart_stacks(checkpoint)
        check_place(out, ".safetensors", source=checkpoint.path, force=force)

        # The model, the layers to measure, and the text as it reads it
        network = load_stored(model, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        side = text_side(network, str(model), len(tokenizer), ALONE)
        layers = _modules_of(network, checkpoint, include, exclude)
        amount = Amount.to_calibrate(samples, widest(network, layers.values()))
        read = read_batches(side, tokenizer, texts, amount, seq_len)

        # Hidden states of a round have to fit into memory
        if memory is None:
            memory = int(SHARE_OF_MEMORY * free_memory())
        forecast = _forecast(network, read, gradients, memory)
        announce(forecast)
        size = -(-len(read.batches) // forecast.rounds)
        rounds = [read.batches[start : start + size] for start in range(0, len(read.batches), size)]
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory(
            dir=out.absolute().parent, prefix=f".{out.name}.spool-"
        ) as folder:
            # Moments, round by round
            width = width_of(side.config(network))
            gather = Gather(network, width, layers, Spool(Path(folder)), progress, len(rounds))
            stream = Stream(network, device, torch.float32, call=side.of(network))
            for number, batches in enumerate(rounds):
                _gather_round(gather, stream, number, batches, layers, forecast.gradients)
            few = gather.share_among_experts()
            if sensitivity:
                gather.add_sensitivities(stream, read.batches, memory)

            # All of them into the file, with where they come from
            provenance = Provenance(
                fingerprint=checkpoint.fingerprint(),
                seed=seed,
                gradients=forecast.gradients,
                sensitivity=sensitivity,
                unit="nats" if gather.loss.nats else "1 - cosine",
                **_text_read(texts, read),
            )
            keys = gather.keys()
            write_moments(out, gather.spool, gather.scales(), keys, provenance)
        return _calibrated(out, layers, keys, forecast, sensitivity, few)


def _text_read(texts: Texts, read: Read) -> dict[str, Any]:
    """The fields of Provenance about the text."""
    return {
        "text": texts.name,
        "text_sha256": texts.digest,
        "tokens": read.tokens,
        "samples": read.samples,
        "seq_len": read.seq_len,
    }


def _gather_round(
    gather: Gather,
    stream: Stream,
    number: int,
    batches: Sequence[dict[str, Tensor]],
    layers: Mapping[str, str],
    gradients: bool,
) -> None:
    """Run these batches through the model, backwards too with gradients, while moments are added
    up."""
    cotangent = None
    if gradients:
        cotangent = gather.loss.cotangents(batches)
    units = len(stream.units)
    with gather.round(number, batches, backwards=gradients, units=units) as visit:
        stream.run(batches, cotangent, set(layers.values()), gather.loss.note_kind, visit)


def _calibrated(
    out: Path,
    layers: Mapping[str, str],
    keys: Mapping[str, Mapping[str, Any]],
    forecast: Forecast,
    sensitivity: bool,
    few: Sequence[str],
) -> Calibrated:
    return Calibrated(
        path=str(out),
        layers=len(keys),
        inputs=len({key["input"] for key in keys.values()}),
        tokens=forecast.tokens,
        gradients=forecast.gradients,
        sensitivity=sensitivity,
        rounds=forecast.rounds,
        bytes=out.stat().st_size,
        uncalibrated=tuple(name for name in layers if name not in keys),
        samples=forecast.samples,
        seq_len=forecast.seq_len,
        side=forecast.side,
        saw_few=tuple(few),
    )


def _modules_of(
    model: Any, checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]
) -> dict[str, str]:
    """{name of a selected weight in the checkpoint: name of its module}, for weights that a module
    of their own holds."""
    from svdcli.models.hf import module_names

    selected, _ = choose_layers(
        checkpoint.infos,
        include=include,
        exclude=exclude,
        tied=checkpoint.tied,
        facts=checkpoint.facts,
    )
    # transformers may hold a weight under another name than the file, or as a part of a larger one
    targets = module_names(model, [info.module for info in selected])
    modules = dict(model.named_modules())
    measured = {}
    for info in selected:
        target = targets.get(info.module)
        if target is not None and is_linear(modules.get(target)):
            measured[info.name] = target
    return measured


def _forecast(model: Any, read: Read, gradients: bool | None, memory: int) -> Forecast:
    """In how many rounds the text is read, and whether with gradients: hidden states of a round
    must fit into `memory`."""
    batches = read.batches
    width = width_of(read.side.config(model))
    part = read.side.module(model)

    # Gradients, unless they were declined, or were left to choose and do not fit
    with_gradients = gradients is not False
    reason = ""
    each = state_bytes(part, width, batches, gradients=with_gradients)
    if gradients is None and each > memory:
        with_gradients = False
        room = f"{memory / 1e9:.1f} GB"
        reason = f"hidden states of {each / 1e9:.1f} GB a batch do not fit into {room}"
        each = state_bytes(part, width, batches, gradients=False)

    rounds = -(-len(batches) // max(1, memory // each))
    return Forecast(
        tokens=read.tokens,
        seq_len=read.seq_len,
        rounds=rounds,
        gradients=with_gradients,
        state_bytes=each * -(-len(batches) // rounds),
        seconds=_guess(part, read.tokens, with_gradients),
        reason=reason,
        samples=read.samples,
        side=read.side.shown,
    )


def _guess(model: Any, tokens: int, gradients: bool) -> float:
    """Seconds from a count of operations and the speed of one product: forwards 2 a weight and
    token, with gradients 6 more; 2 for every number of a moment's lower triangle."""
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(shape.numel() for shape in shapes)
    moments = 0
    for outputs, inputs in shapes:
        moments += inputs**2
        if gradients and outputs <= FULL_OUTPUTS:
            moments += outputs**2
    passes = 8 if gradients else 2
    speed = _SPEED_IN_PRACTICE * _operations_a_second()
    return tokens * (weights * passes + moments) / speed


def _operations_a_second() -> float:
    """Of one float32 product of this process, on the CPU."""
    size, times = 512, 4
    matrix = torch.ones(size, size)
    torch.mm(matrix, matrix)  # to warm up
    begin = time.perf_counter()
    for _ in range(times):
        torch.mm(matrix, matrix)
    return times * 2 * size**3 / (time.perf_counter() - begin)
