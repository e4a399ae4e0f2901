"""Refine the factors of a compressed directory: that and its original in, a compressed directory of
the same size out."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import averaged, block_sums
from svdcli.calibration.memory import (
    batch_bytes,
    memory_for,
    room_for_states,
    state_bytes,
    whole_bytes,
    widest,
    width_of,
)
from svdcli.calibration.reading import read_batches
from svdcli.calibration.text_side import TextSide, text_side, watched
from svdcli.engine.compute import Compute
from svdcli.engine.planning import model_code, noting_a_miss
from svdcli.engine.publish import check_place, destination, disk_errors, finish, identity, write
from svdcli.engine.run import Run
from svdcli.engine.solve import Ready
from svdcli.errors import SvdcliError, UsageError
from svdcli.files.blueprint import CompressDesign
from svdcli.files.checkpoint import Checkpoint, check_names_model, open_checkpoint, open_output
from svdcli.files.finite import weights_told
from svdcli.files.record import Result, record_of, stored_layers, take_apart_again
from svdcli.files.report import read_report
from svdcli.files.workspace import BLOCKS, Workspace
from svdcli.healing.blocks import (
    WHOLE,
    Batches,
    Effort,
    HealedBlock,
    assign,
    blocks_of,
    heal_blocks,
    heal_whole,
)
from svdcli.healing.coordinates import numbers_of_coordinates
from svdcli.healing.replicas import Replicas, replicas_here
from svdcli.healing.shared_memory import SharedPair
from svdcli.healing.sharing import bring, can_share
from svdcli.healing.standins import stack_alike
from svdcli.models.load import load_stored
from svdcli.models.modules import is_packed_conv
from svdcli.plan.budget import missed_target
from svdcli.plan.groups import SHARED
from svdcli.plan.packing import PLAIN, SHAPE
from svdcli.plan.plan import EMBEDDING, Healing, LayerPlan, Plan
from svdcli.progress import Progress, silent
from svdcli.text.texts import Texts
from svdcli.text.tokens import Amount, load_tokenizer
from svdcli.verbs.outcome import Outcome

__all__ = ["HARD_LABELS", "Effort", "heal"]

HARD_LABELS = 0.1
_MOMENT_BATCHES = 12
# The whole model reads this times the text that the blocks read: it keeps no hidden states of it.
_WHOLE_READS = 8
# Of the time, where the whole model is trained after them. What was rounded with feedback gains
# little from a block's closed form.
_BLOCKS_SHARE = 0.2
_PACKED_BLOCKS_SHARE = 0.1
_SHARE_FOR_THE_WHOLE = 0.5  # of free memory
_NOT_WHOLE = (
    "heal refined the blocks one by one and did not train the whole model: "
    "that takes up to {needed}, and {limit} is {memory:.3g} GB"
)
_SHARED = (
    "heal trained the whole model with its weights shared among {ranks} ranks (FSDP2): "
    "that takes up to {needed}, and {limit} is {memory:.3g} GB"
)
_NOT_COMPRESSED = (
    "gradients of weights that the ranks shared were sent as they are: PowerSGD has no part in that"
)


def heal(
    output: str | Path,
    out: str | Path | None = None,
    *,
    teacher: str | Path,
    texts: Texts,
    effort: Effort = Effort(steps=400),  # noqa: B008  frozen
    samples: int | None = None,
    seq_len: int | None = None,
    hard_labels: float | None = None,
    seed: int = 0,
    memory: int | None = None,
    compress_gradients: bool = False,
    compute: Compute | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Refine the factors and the rounding of `output` on text, towards what `teacher` answers:
    block by block, then all together (`healing.blocks`).

    output is a directory that compress wrote from teacher, with factors or packed layers; out
    defaults to `<output>-healed`. Ranks, bits, layout and bytes stay; no block is left worse on
    text that it was not trained on. A run that was cut short continues with the block it had
    reached. samples is how much text the blocks read, as for `calibrate`; the whole model reads
    eight times as much. hard_labels, from 0 to 1, is how much the tokens of the text count against
    the original's answers where the whole of a decoder is trained; by default `HARD_LABELS`. memory
    bounds what training the whole model may take in one process (bytes; by default half of what is
    free): where it takes more, ranks share its weights, or else the blocks alone are refined.
    trust_remote_code runs Python that the folders bring along.

    In the processes that torchrun started together, each reads its own share of the text, a step
    takes a batch of each, and rank 0 alone writes; all give back the same. compress_gradients then
    sends gradients through torch's PowerSGD hook. Raises SvdcliError or a child of it.
    """
    if hard_labels is not None and not 0 <= hard_labels <= 1:
        raise UsageError(f"--hard-labels {hard_labels:g} is not a share", "give 0 to 1")
    request = _Request(
        effort, samples, seq_len, hard_labels, seed, trust_remote_code, compress_gradients
    )
    with open_output(output) as compressed, open_checkpoint(teacher) as original:
        for checkpoint in (compressed, original):
            take_apart_again(checkpoint, record_of(compressed) or {})
        pair = _Pair(compressed, original, _plan_of(compressed, original))
        device = (compute or Compute()).start()

        def asked() -> str:
            """Of several ranks each may read a copy of its own."""
            models = compressed.fingerprint(), original.fingerprint()
            return repr((models, texts.digest, request, out, compute))

        sharing = replicas_here(device, asked, compress=compress_gradients)
        with weights_told(original, compressed), sharing as replicas:
            if replicas.ended_before():
                return replicas.ends_with(None)
            healer = _Heal(pair, texts, request, memory, replicas)
            if not replicas.first:
                healer.follow()
                return replicas.ends_with(None)
            with destination(compressed, out, ".healed", "-healed", force) as target:
                # Both models are sources: neither may be written over
                check_place(target, None, source=original.path, force=force)
                started_over = healer.lead(target, progress, force=force)

                # What the output's own record says
                report = read_report(target)
                if out is not None:
                    report = replace(report, path=str(out))
                plan = Plan.from_json(record_of(open_checkpoint(target)))
                return replicas.ends_with(Outcome(report, plan, target, started_over))


def _plan_of(compressed: Checkpoint, original: Checkpoint) -> Plan:
    """The plan behind a compressed directory. Raises SvdcliError where it cannot be healed with
    this original."""
    # A directory that compress wrote
    check_names_model(compressed, "heal opens Hugging Face directories")
    record = record_of(compressed)
    if record is None:
        raise SvdcliError(
            f"{compressed.shown} was not written by svdcli compress", "compress the model first"
        )
    # With factors, and made from this original
    plan = Plan.from_json(record)
    if not plan.recipe.keeps_factors:
        raise UsageError(
            f"{compressed.shown} has the dense layout, which heal does not take",
            "compress again without --layout dense",
        )
    if plan.fingerprint != original.fingerprint():
        raise SvdcliError(
            f"{original.shown} is not the model that {compressed.shown} was made from",
            "give that as --teacher",
        )
    # Damaged layers are told of now, before the training
    stored_layers(compressed, record)
    return plan


@dataclass(frozen=True)
class _Request:
    """What was asked."""

    effort: Effort
    samples: int | None
    seq_len: int | None
    hard_labels: float | None
    seed: int
    trust_remote_code: bool
    compress_gradients: bool


@dataclass(frozen=True)
class _Pair:
    """Both checkpoints, and the plan that made one of the other."""

    compressed: Checkpoint
    original: Checkpoint
    plan: Plan


@dataclass(frozen=True)
class _Heal:
    """One healing, of this process or of this rank's part in it."""

    pair: _Pair
    texts: Texts
    request: _Request
    memory: int | None
    replicas: Replicas

    def lead(self, target: Path, progress: Progress, *, force: bool) -> bool:
        """Refine and publish, or find it published; True where the unfinished work of another
        command gave way."""
        workspace = Workspace(target, is_file=False)
        run = Run(self.pair.original, self.replicas.device, progress, workspace)
        with disk_errors(target), workspace.locked():
            begins = workspace.resume(_identity(self.pair, self.texts, self.request), force=force)
            if self.replicas.says(begins):
                with _nothing_left_of_a_refusal(workspace):
                    material, refined = self._refined(run)
                _publish(self.pair, _healing(self.texts, material, refined), refined, run)
        return workspace.started_over

    def follow(self) -> None:
        """Take part in what rank 0 leads; it alone writes."""
        if self.replicas.says(None):
            self._refined(Run(self.pair.original, self.replicas.device, silent))

    def _refined(self, run: Run) -> tuple[_Material, _Refined]:
        material = _read(self.pair, self.texts, self.request, self.replicas)
        return material, _refine(self.pair, material, self.request, run, self.memory, self.replicas)


def _identity(pair: _Pair, texts: Texts, request: _Request) -> str:
    """Tells one healing from another, for the journal."""
    asked = (texts.digest, asdict(request))
    return identity(pair.compressed, "heal", pair.original.fingerprint(), repr(asked))


@contextmanager
def _nothing_left_of_a_refusal(workspace: Workspace) -> Iterator[None]:
    """Remove the workspace where healing is refused before its first block is done; the unfinished
    work of another command comes back."""
    try:
        yield
    except SvdcliError:
        if not workspace.healed and not workspace.put_back():
            workspace.remove()
        raise


# What is read -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Material:
    """Both models, and the text as they read it, of several ranks this one's share: for_whole in
    all, for_blocks so many samples of it (of all ranks together), each of at most `window`
    tokens."""

    teacher: Any
    student: Any
    side: TextSide
    for_whole: Batches
    for_blocks: Batches
    samples: int
    window: int
    hard_labels: float
    bytes_for_whole: int
    bytes_for_batch: int


def _read(pair: _Pair, texts: Texts, request: _Request, replicas: Replicas) -> _Material:
    """Load both models, and cut the text into batches for them."""
    # Both models, and the part of them that reads text
    trust = request.trust_remote_code
    teacher = load_stored(pair.original.path, trust_remote_code=trust)
    student = load_stored(pair.compressed.path, trust_remote_code=trust)
    stack_alike(teacher, student)
    tokenizer = load_tokenizer(pair.compressed.path, trust_remote_code=trust)
    hint = "heal refines what reads text"
    side = text_side(teacher, pair.original.shown, len(tokenizer), hint)
    hard_labels = _hard_labels(request.hard_labels, side, pair.original.shown)

    # The text for the whole model, and the part of it that the blocks read
    amount = Amount.to_calibrate(request.samples, widest(teacher, _modules(teacher, pair.plan)))
    read = read_batches(side, tokenizer, texts, amount.times(_WHOLE_READS), request.seq_len)
    batches = Batches.split(read.batches)
    count = amount.batches(read.samples, read.tokens, len(read.batches))
    for_whole = batches.share(replicas)
    for_blocks = batches.fewer(count).share(replicas)
    samples = request.samples
    if samples is None:
        mine = sum(len(batch["input_ids"]) for batch in for_blocks.train)
        samples = int(replicas.total([mine])[0])
    return _Material(
        teacher=teacher,
        student=student,
        side=side,
        for_whole=for_whole,
        for_blocks=for_blocks,
        samples=samples,
        window=read.seq_len,
        hard_labels=hard_labels,
        bytes_for_whole=whole_bytes(
            teacher, student, side.words, read.batches, numbers_of_coordinates(student)
        ),
        bytes_for_batch=batch_bytes(teacher, side.words, read.batches),
    )


def _hard_labels(asked: float | None, side: TextSide, shown: str) -> float:
    """As asked; 0 for what does not predict the next token."""
    if side.kind == "decoder":
        return HARD_LABELS if asked is None else asked
    if asked:
        raise UsageError(f"--hard-labels: {shown} does not predict the next token", "leave it out")
    return 0.0


def _modules(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the modules behind the factored layers, as far as they have one each."""
    places = _places(model, plan.factored)
    return [name for place in places for name in place.values() if name is not None]


def _places(model: nn.Module, layers: Sequence[LayerPlan]) -> list[dict[str, str | None]]:
    """For each layer, where the modules that hold its factors and refitted biases are in the
    model, by what the checkpoint calls them; None for what has no module of its own."""
    from svdcli.models.hf import module_names

    names = [tensor.module for layer in layers for tensor in layer.originals]
    targets = module_names(model, names)
    places = []
    for layer in layers:
        place = {tensor.module: targets[tensor.module] for tensor in layer.originals}
        first = place[layer.tensor.module]
        if layer.members:
            place[layer.home.module] = None if first is None else f"{first}.{SHARED}"
        places.append(place)
    return places


# The training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Refined:
    """What came of the training. stored_names maps every parameter that could have changed to the
    name of its tensor in the checkpoint."""

    blocks: Mapping[str, HealedBlock]
    stored_names: Mapping[str, str]
    notes: tuple[str, ...]


class _Clock:
    """The seconds that are given for all of the training, from now on; None without a limit."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._begin = time.monotonic()

    def left(self) -> float | None:
        """What is left of them, below 0 where it took longer."""
        if self._seconds is None:
            return None
        return self._seconds - (time.monotonic() - self._begin)


def _refine(
    pair: _Pair,
    material: _Material,
    request: _Request,
    run: Run,
    memory: int | None,
    replicas: Replicas,
) -> _Refined:
    """Train block by block, then the whole model; what the journal has is taken from there. memory
    is as for `heal`."""
    student = material.student
    journal = _Journal(run.workspace, replicas)
    clock = _Clock(request.effort.seconds)

    # How errors count, and which tensors the text reaches: others would only drift
    moments, reached = _moments(material, request.seed, run, replicas)
    stored_names = _stored_names(student, pair.plan)
    trained = _stored_names(student, pair.plan, within=reached)

    # Whether the whole model can be trained in memory decides how much time the blocks get
    shared = _shared_pair(material, reached, trained, replicas)
    way = replicas.says(_way_to_the_whole(material, shared, memory, replicas))
    assert way is not None
    seconds = replicas.says(clock.left())
    if seconds is not None and way.trained:
        packed = any(layer.packing != PLAIN for layer in _refined_layers(pair.plan))
        seconds *= _PACKED_BLOCKS_SHARE if packed else _BLOCKS_SHARE
    # The dtypes are noted now: training leaves float32 behind
    dtypes = {name: tensor.dtype for name, tensor in _named_tensors(student).items()}

    # Block by block
    effort = Effort(request.effort.steps, seconds)
    trainable = trained.__contains__
    blocks = _refine_blocks(
        material, effort, trainable, moments, request.seed, run, journal, replicas
    )
    if not blocks:
        raise SvdcliError(
            f"no block of {pair.compressed.shown} that reads text holds factors or packed layers",
            "there is nothing to heal",
        )
    if not way.trained:
        return _Refined(blocks, stored_names, way.notes)

    # The whole model, for the time that is left
    whole = journal.read(WHOLE)
    if whole is not None:
        blocks[WHOLE] = whole
        return _Refined(blocks, stored_names, ())
    with replicas.sharing():
        _bring_into_memory(material, shared if way.shares else None, blocks.values(), replicas)
        effort = Effort(request.effort.steps, replicas.says(clock.left()))
        whole = _refine_whole(material, way, effort, trainable, dtypes, request.seed, run, replicas)
    blocks[WHOLE] = journal.keep(whole)
    plain = way.shares and request.compress_gradients
    return _Refined(blocks, stored_names, (*way.notes, _NOT_COMPRESSED) if plain else way.notes)


def _refine_blocks(
    material: _Material,
    effort: Effort,
    trainable: Callable[[str], bool],
    moments: Mapping[str, Tensor],
    seed: int,
    run: Run,
    journal: _Journal,
    replicas: Replicas,
) -> dict[str, HealedBlock]:
    """Refine every block that holds factors, each noted in the journal as soon as it is done."""
    blocks: dict[str, HealedBlock] = {}
    for block in heal_blocks(
        material.teacher,
        material.student,
        material.for_blocks,
        effort,
        trainable=trainable,
        moments=moments,
        finished=journal.read,
        call=material.side.of,
        seed=seed,
        device=run.device,
        states_on=_where_states_wait(material, run.device, replicas),
        progress=run.progress,
        replicas=replicas,
    ):
        blocks[block.name] = journal.keep(block)
    return blocks


def _where_states_wait(
    material: _Material, device: torch.device, replicas: Replicas
) -> torch.device:
    """Return where what both models' blocks read, and the original's answer, wait between blocks:
    of all batches at once."""
    batches = [*material.for_blocks.train, *material.for_blocks.held_out]
    side = material.side
    width = width_of(side.config(material.teacher))
    of_a_batch = state_bytes(side.module(material.teacher), width, batches, gradients=False)
    return room_for_states(of_a_batch * len(batches), device, replicas.here)[0]


def _refine_whole(
    material: _Material,
    way: _Way,
    effort: Effort,
    trainable: Callable[[str], bool],
    dtypes: Mapping[str, torch.dtype],
    seed: int,
    run: Run,
    replicas: Replicas,
) -> HealedBlock:
    """Train all factors together; both models are in memory."""
    return heal_whole(
        material.teacher,
        material.student,
        material.for_whole,
        effort,
        trainable=trainable,
        dtypes=dtypes,
        hard_labels=material.hard_labels,
        call=material.side.of,
        seed=seed,
        progress=run.progress,
        replicas=replicas,
        in_step=way.shares,
    )


def _moments(
    material: _Material, seed: int, run: Run, replicas: Replicas
) -> tuple[dict[str, Tensor], Collection[str]]:
    """(how much each direction of each block's output matters, names of the modules that ran), from
    batches spread over the text of all ranks."""
    # The same few batches for every seed; the seed draws the labels, by the batch's number
    run.progress("moments", "", 0, 1)
    teacher, side, batches = material.teacher, material.side, material.for_blocks.train
    count = min(len(batches), max(1, _MOMENT_BATCHES // replicas.size))
    few = [batches[len(batches) * i // count] for i in range(count)]

    # As many batches at a time as their hidden states fit into memory
    width = width_of(side.config(teacher))
    of_a_batch = state_bytes(side.module(teacher), width, few, gradients=True)
    states_on, room = room_for_states(of_a_batch, run.device, replicas.here)

    # Modules that do not run here get no gradients from the text, and are not trained
    ran: set[int] = set()
    with watched(teacher, lambda part, inputs: ran.add(id(part))):
        sums, events = block_sums(
            teacher,
            few,
            blocks_of(teacher),
            max(1, room // of_a_batch),
            run.device,
            side.of(teacher),
            seed,
            first=replicas.rank * count,
            states_on=states_on,
        )
    moments = averaged(replicas.summed(sums), int(replicas.total([events])[0]))
    reached = {name for name, part in teacher.named_modules() if id(part) in ran}
    run.progress("moments", "", 1, 1)
    return moments, replicas.union(reached)


def _stored_names(
    student: nn.Module, plan: Plan, within: Collection[str] | None = None
) -> dict[str, str]:
    """{name of a parameter that may change: name of its tensor in the checkpoint}, of all modules
    or of those within."""
    layers = _refined_layers(plan)
    names = {}
    for layer, place in zip(layers, _places(student, layers), strict=True):
        target = place[layer.home.module]
        if target is None or (within is not None and target not in within):
            continue
        if is_packed_conv(student.get_submodule(target)):  # no step of healing takes these
            continue
        for tensor in layer.stored():
            if tensor.name.endswith(SHAPE):  # which stays
                continue
            names[f"{target}{tensor.name.removeprefix(layer.home.module)}"] = tensor.name
        for bias in layer.biases:
            names[f"{place[bias.name.removesuffix('.bias')]}.bias"] = bias.name
    return names


def _refined_layers(plan: Plan) -> list[LayerPlan]:
    """All that may change: packed tables are no layers of a block, and stay."""
    return [layer for layer in plan.factored if layer.role != EMBEDDING]


@dataclass(frozen=True)
class _Way:
    """How the whole model is trained, if at all: shares says that the ranks share
    weights, notes have what is not as usual."""

    trained: bool
    shares: bool = False
    notes: tuple[str, ...] = ()


def _way_to_the_whole(
    material: _Material,
    shared: SharedPair | None,
    allowed: int | None,
    replicas: Replicas,
) -> _Way:
    """Decide by the memory that every rank has; shared tells how ranks would share both models."""
    if allowed is None:
        # Ranks on one machine have its memory in common
        free = memory_for(replicas.device, replicas.here)
        limit, memory = "half of what is free", _SHARE_FOR_THE_WHOLE * replicas.least(free)
        if replicas.size > 1:
            limit = "half of what is free for each rank"
    else:
        limit, memory = "what is allowed", allowed

    # Every rank by itself, or all together
    if material.bytes_for_whole <= memory:
        return _Way(trained=True)
    needed = f"{material.bytes_for_whole / 1e9:.3g} GB of memory"
    fits = False
    if shared is not None:
        together = shared.bytes(replicas.size) + material.bytes_for_batch
        needed += f" in one rank, {together / 1e9:.3g} GB in each where they share weights"
        fits = together <= memory
    note = (_SHARED if fits else _NOT_WHOLE).format(
        needed=needed, limit=limit, memory=memory / 1e9, ranks=replicas.size
    )
    return _Way(fits, fits, (note,))


def _shared_pair(
    material: _Material, ran: Collection[str], trained: Collection[str], replicas: Replicas
) -> SharedPair | None:
    """Both models as these ranks would share them; None where they cannot."""
    if not can_share(replicas):
        return None
    models = material.teacher, material.student
    return SharedPair.of(*models, material.side.name, ran, trained)


def _bring_into_memory(
    material: _Material,
    shared: SharedPair | None,
    blocks: Collection[HealedBlock],
    replicas: Replicas,
) -> None:
    """Both models on the device in float32, of what is shared this rank's part; the student with
    its blocks as they were healed."""
    if shared is None:
        for model in (material.teacher, material.student):
            bring(model, replicas.device)
    else:
        for each in (shared.teacher, shared.student):
            each.bring(replicas, material.side.method)
    tensors = _named_tensors(material.student)
    for block in blocks:
        assign(block, tensors, replicas.device)


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


# The journal --------------------------------------------------------------------------------------


def _file(workspace: Workspace, name: str) -> Path:
    """Where the refined factors of a block are kept."""
    return workspace.folder / BLOCKS / f"{name}.safetensors"


class _Journal:
    """The blocks that are done: rank 0 has the workspace, and tells the others what is in it."""

    def __init__(self, workspace: Workspace | None, replicas: Replicas) -> None:
        self._workspace = workspace
        self._replicas = replicas
        if workspace is not None:
            (workspace.folder / BLOCKS).mkdir(exist_ok=True)

    def read(self, name: str) -> HealedBlock | None:
        """A block that an earlier run finished; None where there is none."""
        found = None if self._workspace is None else _read_block(self._workspace, name)
        facts = self._replicas.says(None if found is None else replace(found, weights={}))
        if facts is None:
            return None
        return replace(facts, weights=self._replicas.same({} if found is None else found.weights))

    def keep(self, block: HealedBlock) -> HealedBlock:
        """The block, noted in the journal if it is not there yet."""
        return block if self._workspace is None else _kept(self._workspace, block)


def _kept(workspace: Workspace, block: HealedBlock) -> HealedBlock:
    """The block, noted in the journal if it is not there yet."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if block.name in workspace.healed:
        return block

    # The factors first, whole by the rename; the line after them says that they are there
    path = _file(workspace, block.name)
    partial_path = path.with_suffix(".partial")
    weights = {name: tensor.contiguous() for name, tensor in block.weights.items()}
    try:
        save_file(weights, partial_path)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    partial_path.rename(path)
    line = {"block": block.name, "before": block.before, "after": block.after, "steps": block.steps}
    workspace.note(line)
    workspace.healed[block.name] = line
    return block


def _read_block(workspace: Workspace, name: str) -> HealedBlock | None:
    """A block that an earlier run finished; None where there is none."""
    from safetensors.torch import load_file

    line, path = workspace.healed.get(name), _file(workspace, name)
    if line is None or not path.is_file():
        return None
    return HealedBlock(name, line["before"], line["after"], line["steps"], load_file(path))


# What is written ----------------------------------------------------------------------------------


def _healing(texts: Texts, material: _Material, refined: _Refined) -> Healing:
    """What the record tells of it."""
    blocks = {
        block.name: (block.before, block.after, block.steps) for block in refined.blocks.values()
    }
    hard_labels = material.hard_labels if WHOLE in blocks else 0.0
    return Healing(texts.name, texts.digest, material.samples, material.window, blocks, hard_labels)


def _publish(pair: _Pair, healing: Healing, refined: _Refined, run: Run) -> None:
    """Write the directory anew: the plan of before, with the refined factors."""
    # The refined tensors by their names in the checkpoint; the whole model's come last, and count
    weights: dict[str, Tensor] = {}
    for block in refined.blocks.values():
        for name, tensor in block.weights.items():
            weights[refined.stored_names[name]] = tensor
    notes = [*pair.plan.notes, *refined.notes]
    left = [name for name in refined.stored_names.values() if name not in weights]
    if left:
        why = "since no block that the text goes through holds them"
        notes.append(f"heal left {len(left)} tensors as they were, {why}: {', '.join(left[:3])}")

    # What was healed makes the record longer: a size that was asked for may be missed by that
    plan = replace(pair.plan, healing=healing, notes=tuple(notes))
    files = model_code() if plan.recipe.self_contained else None
    size = CompressDesign(pair.original, plan, None, files).blueprint().total
    plan = noting_a_miss(plan, missed_target(plan, size))

    design = CompressDesign(pair.original, plan, None, files)
    ready = Ready(partial(_tensors, pair.compressed, weights), _results(pair.compressed))
    written, results, _ = write(run, design, plan.factored, ready)
    finish(run, written, results)


def _tensors(
    compressed: Checkpoint, weights: Mapping[str, Tensor], layer: LayerPlan
) -> tuple[Tensor, ...]:
    """What is stored of a layer: refined, or as it was."""
    names = [tensor.name for tensor in layer.written()]
    return tuple(
        weights[name] if name in weights else compressed.read_tensor(name) for name in names
    )


def _results(compressed: Checkpoint) -> dict[str, Result]:
    """How each layer was solved when it was compressed."""
    layers = (record_of(compressed) or {})["layers"]
    return {
        name: Result(0.0, str(layer["solver"]), tuple(layer.get("fell_back", ())))
        for name, layer in layers.items()
    }
