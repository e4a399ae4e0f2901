"""One model that is measured, and the text that it reads for that: what it will take, and the sums
over some of the text's batches."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from svdcli.calibration.gather import FULL_OUTPUTS, Gather
from svdcli.calibration.loss import ModelLoss
from svdcli.calibration.memory import room_for_states, state_bytes, widest, width_of
from svdcli.calibration.moments import Provenance, Spool
from svdcli.calibration.parts import Whole
from svdcli.calibration.precision import Passes, chosen, operations_a_second
from svdcli.calibration.reading import ALONE, Read, read_batches
from svdcli.calibration.sensitivity import add_sensitivities
from svdcli.calibration.stream import Stream
from svdcli.calibration.sums import Sums
from svdcli.calibration.text_side import text_side
from svdcli.errors import SvdcliError
from svdcli.files.checkpoint import Checkpoint
from svdcli.models.load import load_stored
from svdcli.models.modules import is_linear
from svdcli.plan.layers import choose_layers
from svdcli.plan.words import Precision
from svdcli.progress import Progress, silent
from svdcli.text.texts import Texts
from svdcli.text.tokens import Amount, Batch, load_tokenizer
from svdcli.version import __version__

# Share of the speed of one large product at which a whole model is taken to be read.
_SPEED_IN_PRACTICE = 0.4


@dataclass(frozen=True)
class Forecast:
    """What calibration will take, told before it starts. state_bytes are hidden states kept between
    blocks; seconds is a guess.

    samples are windows of seq_len tokens, or sentences of at most as many. Where gradients were
    left to choose and are not measured, reason says why. side names the part of the model that
    reads the text, where it is not the whole. precision is the dtype in which the model runs;
    no_bfloat16 says why not in this, which the machine has faster and was left to choose. on_host
    says that hidden states wait on the host, since they do not fit where the blocks are. part
    says, as "2/8", that a part of the text alone is meant; ranks is how many processes share the
    text, and rounds, state_bytes and seconds are then of each.
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
    precision: str = "float32"
    part: str = ""
    ranks: int = 1
    no_bfloat16: str = ""
    on_host: bool = False


@dataclass(frozen=True)
class Settings:
    """What is measured, of which text, and with which labels; as for `calibrate`. sharers is how
    many processes of this machine have its memory together."""

    texts: Texts
    samples: int | None = None
    seq_len: int | None = None
    gradients: bool | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    seed: int = 0
    memory: int | None = None
    trust_remote_code: bool = False
    progress: Progress = silent
    sharers: int = 1


@dataclass(frozen=True)
class Work:
    """A model, the layers to measure as {name of the weight: name of its module}, and the batches
    that it reads."""

    settings: Settings
    checkpoint: Checkpoint
    device: torch.device
    network: Any
    layers: Mapping[str, str]
    read: Read

    @staticmethod
    def begin(settings: Settings, checkpoint: Checkpoint, device: torch.device) -> Work:
        """Load the model, choose the layers, and cut the text as the model reads it. Raises
        SvdcliError for a model that reads no text, and for a text that is too short."""
        trust = settings.trust_remote_code
        network = load_stored(checkpoint.path, trust_remote_code=trust)
        tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust)
        side = text_side(network, checkpoint.shown, len(tokenizer), ALONE)
        layers = _modules_of(network, checkpoint, settings.include, settings.exclude)
        amount = Amount.to_calibrate(settings.samples, widest(network, layers.values()))
        read = read_batches(side, tokenizer, settings.texts, amount, settings.seq_len)
        return Work(settings, checkpoint, device, network, layers, read)

    @property
    def every_batch(self) -> range:
        """The indices of all batches."""
        return range(len(self.read.batches))

    @cached_property
    def transposed(self) -> dict[str, bool]:
        """Whether each weight is stored as (in, out)."""
        return {
            name: not isinstance(self.network.get_submodule(target), nn.Linear)
            for name, target in self.layers.items()
        }

    def stream(self, dtype: torch.dtype, states_on: torch.device | None = None) -> Stream:
        """Return the model as a stream of blocks."""
        call = self.read.side.of(self.network)
        return Stream(self.network, self.device, dtype, call=call, states_on=states_on)

    def room(self, needed: int) -> tuple[torch.device, int]:
        """Return (where hidden states wait, how many bytes they may take there), for so many that
        all batches together need."""
        if self.settings.memory is not None:
            return self.device, self.settings.memory
        return room_for_states(needed, self.device, self.settings.sharers)

    def passes(self, precision: Precision) -> Passes:
        """Return in which dtype the model runs. Raises SvdcliError where it does not run in the one
        that is asked for."""
        name = chosen(precision, self.device)
        why_not = "" if name == "float32" else self._failure(Passes(name))
        if not why_not:
            return Passes(name)
        if precision == "auto":
            return Passes("float32", why_not)
        raise SvdcliError(f"the model does not run in {name}: {why_not}", "use --precision float32")

    def _failure(self, passes: Passes) -> str:
        """Say why one row of the text does not pass the model; "" where it does. A model may raise
        anything where it mixes dtypes."""
        row = {key: value[:1] for key, value in self.read.batches[0].items()}
        try:
            self.stream(passes.dtype).run([row])
        except Exception as error:
            return " ".join(str(error).split())[:160] or type(error).__name__
        return ""

    def forecast(self, passes: Passes, indices: range) -> Forecast:
        """Return in how many rounds these batches are read, and whether with gradients: hidden
        states of a round must fit into the memory."""
        batches = [self.read.batches[index] for index in indices]
        width = width_of(self.read.side.config(self.network))
        part = self.read.side.module(self.network)
        asked, dtype = self.settings.gradients, passes.dtype

        def each(gradients: bool) -> int:
            return state_bytes(part, width, batches, gradients=gradients, itemsize=dtype.itemsize)

        # Gradients, unless they were declined, or were left to choose and do not fit
        with_gradients = asked is not False
        states_on, memory = self.room(each(with_gradients) * len(batches))
        reason = ""
        if asked is None and each(True) > memory:
            with_gradients = False
            room = f"{memory / 1e9:.1f} GB"
            reason = f"hidden states of {each(True) / 1e9:.1f} GB a batch do not fit into {room}"
        size = each(with_gradients)

        rounds = -(-len(batches) // max(1, memory // size))
        tokens = sum(map(_tokens_of, batches))
        return Forecast(
            tokens=tokens,
            seq_len=self.read.seq_len,
            rounds=rounds,
            gradients=with_gradients,
            state_bytes=size * -(-len(batches) // rounds),
            seconds=_guess(part, tokens, with_gradients, dtype, self.device),
            reason=reason,
            samples=sum(len(batch["input_ids"]) for batch in batches),
            side=self.read.side.shown,
            precision=passes.precision,
            no_bfloat16=passes.why_not,
            on_host=states_on != self.device,
        )

    def added_up(self, indices: range, forecast: Forecast, spool: Spool) -> Sums:
        """Return the sums over these batches, round by round, kept in the spool."""
        sums = Sums(spool, self.transposed)
        loss = ModelLoss(self.settings.seed)
        size = -(-len(indices) // forecast.rounds)
        rounds = [indices[start : start + size] for start in range(0, len(indices), size)]
        gather = Gather(self.network, self.layers, sums, loss, self.settings.progress, len(rounds))
        states_on = torch.device("cpu") if forecast.on_host else self.device
        stream = self.stream(Passes(forecast.precision).dtype, states_on)
        for number, group in enumerate(rounds):
            batches = [self.read.batches[index] for index in group]
            cotangent = loss.cotangents(batches, group) if forecast.gradients else None
            with gather.round(
                number, batches, backwards=forecast.gradients, units=len(stream.units)
            ) as visit:
                wanted = set(self.layers.values())
                stream.run(batches, cotangent, wanted, loss.note_kind, visit)
        return sums

    def provenance(self, forecast: Forecast, sums: Sums) -> Provenance:
        """Return where the sums come from: of the whole text, whichever part was read."""
        texts = self.settings.texts
        return Provenance(
            fingerprint=self.checkpoint.fingerprint(),
            text=texts.name,
            text_sha256=texts.digest,
            tokens=self.read.tokens,
            samples=self.read.samples,
            seq_len=self.read.seq_len,
            seed=self.settings.seed,
            gradients=forecast.gradients,
            sensitivity=False,
            unit="nats" if sums.nats else "1 - cosine",
            precision=forecast.precision,
        )

    def whole(self, forecast: Forecast, sums: Sums) -> Whole:
        """Return what all parts of this calibration have in common."""
        where = self.provenance(forecast, sums)
        return Whole(where, self.transposed, self.read.side.shown, len(self.read.batches))

    def digest(self, *more: object) -> str:
        """Return what tells this calibration from others: 64 hexadecimal digits."""
        settings, read = self.settings, self.read
        asked = (
            __version__,
            self.checkpoint.fingerprint(),
            settings.texts.digest,
            (read.tokens, read.samples, read.seq_len, len(read.batches)),
            (settings.gradients, settings.seed, sorted(self.layers)),
            more,
        )
        return hashlib.sha256(repr(asked).encode()).hexdigest()

    def measure_cuts(self, sums: Sums) -> None:
        """Measure what the output loses when each layer alone is cut, and put it beside the sums,
        which are those of the whole text. In float32 always: small losses are differences of large
        numbers."""
        width = width_of(self.read.side.config(self.network))
        # Copies stay with the blocks: as many at a time as there is room for
        _, room = self.room(0)
        add_sensitivities(
            sums,
            self.stream(torch.float32),
            self.layers,
            width,
            self.read.batches,
            room,
            self.settings.progress,
        )


def _tokens_of(batch: Batch) -> int:
    """Return the tokens of a batch without padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


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


def _guess(
    model: Any, tokens: int, gradients: bool, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds from a count of operations and the speed of one product: forwards 2 a weight and
    token, with gradients 6 more; 2 for every number of a moment's lower triangle, in float32."""
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(shape.numel() for shape in shapes)
    moments = 0
    for outputs, inputs in shapes:
        moments += inputs**2
        if gradients and outputs <= FULL_OUTPUTS:
            moments += outputs**2
    passes = 8 if gradients else 2

    # Passes in their own dtype
    speed = operations_a_second(device, torch.float32)
    speed_of_passes = speed
    if dtype != torch.float32:
        speed_of_passes = max(1.0, operations_a_second(device, dtype))
    seconds = weights * passes / speed_of_passes + moments / speed
    return tokens * seconds / _SPEED_IN_PRACTICE
