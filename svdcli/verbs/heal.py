"""The verb that refines: heal. A compressed directory and its original in, a compressed directory
of the same size out."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.calibration.loss import block_moments
from svdcli.calibration.memory import (
    SHARE_OF_MEMORY,
    free_memory,
    state_bytes,
    whole_bytes,
    widest,
    width_of,
)
from svdcli.calibration.reading import read_batches
from svdcli.calibration.text_side import TextSide, text_side, watched
from svdcli.engine.compute import Compute
from svdcli.engine.planning import beside, noting_a_miss
from svdcli.engine.publish import destination, disk_errors, finish, identity, write
from svdcli.engine.solve import Ready
from svdcli.errors import SvdcliError, UsageError
from svdcli.files.blueprint import CompressDesign
from svdcli.files.checkpoint import Checkpoint, open_checkpoint
from svdcli.files.record import Result, record_of, stored_layers
from svdcli.files.report import read_report
from svdcli.files.workspace import BLOCKS, Workspace
from svdcli.healing.blocks import (
    WHOLE,
    Effort,
    HealedBlock,
    Reading,
    blocks_of,
    heal_blocks,
    heal_whole,
    put,
)
from svdcli.models.load import load_stored
from svdcli.plan.budget import missed_target
from svdcli.plan.plan import Healing, LayerPlan, Plan
from svdcli.progress import Progress, silent
from svdcli.text.texts import Texts
from svdcli.text.tokens import Amount, Batch, load_tokenizer
from svdcli.verbs.outcome import Outcome

__all__ = ["HARD_LABELS", "Effort", "heal"]

_MOMENT_BATCHES = 12
# times as much text for the whole model, which keeps no hidden states of it, as for the blocks
_WHOLE_READS = 8
_BLOCKS_SHARE = 0.2  # of the time, where the whole model is trained after them
_SHARE_FOR_THE_WHOLE = 0.5  # of free memory
HARD_LABELS = 0.1
_NOT_WHOLE = (
    "heal refined the blocks one by one and did not train the whole model: "
    "that takes up to {needed:.1f} GB of memory, and half of what is free is {room:.1f} GB"
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
    compute: Compute | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Refine the factors of `output` on text, towards what `teacher` answers: block by block, then
    all together (`models.heal`).

    output is a directory that compress wrote from teacher, factored or pivoted; out defaults to
    `<output>-healed`. Ranks, layout and bytes stay; no block is left worse on text that it was not
    trained on. A run that was cut short continues with the block it had reached. samples is how
    much text the blocks read, as for `calibrate`; the whole model reads eight times as much.
    hard_labels, from 0 to 1, is how much the tokens of the text count against the original's
    answers where the whole of a decoder is trained; by default `HARD_LABELS`. trust_remote_code
    runs Python that the folders bring along. Raises SvdcliError or a child of it.
    """
    if hard_labels is not None and not 0 <= hard_labels <= 1:
        raise UsageError(f"--hard-labels {hard_labels:g} is not a share", "give 0 to 1")
    with open_checkpoint(output) as compressed, open_checkpoint(teacher) as original:
        plan, how = (
            _plan_of(compressed, original),
            _How(effort, samples, seq_len, hard_labels, seed, trust_remote_code),
        )
        job = _Job(compressed, original, plan, texts, how)
        device = (compute or Compute()).start()
        with destination(compressed, out, ".healed", "-healed", force) as target:
            workspace = Workspace(target, is_file=False)
            with disk_errors(target), workspace.locked():
                if workspace.resume(job.identity(), force=force):
                    job.refine(workspace, device, progress)
                    job.publish(workspace, device, progress)
            report = read_report(target)
            return Outcome(
                report if out is None else replace(report, path=str(out)),
                Plan.from_json(record_of(open_checkpoint(target))),
                target,
                workspace.started_over,
            )


def _plan_of(compressed: Checkpoint, original: Checkpoint) -> Plan:
    """The plan behind a compressed directory. Raises SvdcliError where it cannot be healed with
    this original."""
    if not (compressed.is_directory and compressed.transformers_opens_it):
        raise SvdcliError(
            f"{compressed.shown} has no config.json that names a model",
            "heal opens Hugging Face directories",
        )
    record = record_of(compressed)
    if record is None:
        raise SvdcliError(
            f"{compressed.shown} was not written by svdcli compress", "compress the model first"
        )
    plan = Plan.from_json(record)
    if not plan.recipe.keeps_factors:
        raise UsageError(
            f"{compressed.shown} has the dense layout, which holds no factors", "compress it again"
        )
    if plan.fingerprint != original.fingerprint():
        raise SvdcliError(
            f"{original.shown} is not the model that {compressed.shown} was made from",
            "give that as --teacher",
        )
    stored_layers(compressed, record)
    return plan


@dataclass(frozen=True)
class _How:
    """What was asked."""

    effort: Effort
    samples: int | None
    seq_len: int | None
    hard_labels: float | None
    seed: int
    trust_remote_code: bool


@dataclass
class _Job:
    """One healing: what goes in, and the blocks that are done."""

    compressed: Checkpoint
    original: Checkpoint
    plan: Plan
    texts: Texts
    how: _How

    def identity(self) -> str:
        asked = (self.texts.digest, asdict(self.how))
        return identity(self.compressed, "heal", self.original.fingerprint(), repr(asked))

    def refine(self, workspace: Workspace, device: torch.device, progress: Progress) -> None:
        """Train what is not in the journal yet; a refusal before that leaves nothing behind."""
        try:
            self._refine(workspace, device, progress)
        except SvdcliError:
            if not workspace.healed:
                workspace.remove()
            raise

    def _refine(self, workspace: Workspace, device: torch.device, progress: Progress) -> None:
        """Fills places, blocks, samples, window, hard and notes."""
        # Both models, and the text as they read it
        trust, asked = self.how.trust_remote_code, self.how.effort
        teacher, student = (
            load_stored(one.path, trust_remote_code=trust)
            for one in (self.original, self.compressed)
        )
        tokenizer = load_tokenizer(self.compressed.path, trust_remote_code=trust)
        side = text_side(
            teacher, self.original.shown, len(tokenizer), "heal refines what reads text"
        )
        self.hard = self._hard_labels(side)
        amount = Amount.to_calibrate(
            self.how.samples, widest(teacher, _modules(teacher, self.plan))
        )
        read = read_batches(
            side, tokenizer, self.texts, amount.times(_WHOLE_READS), self.how.seq_len
        )
        self.window = read.seq_len
        reading = Reading.of(read.batches)
        few = reading.fewer(amount.batches(read.samples, read.tokens, len(read.batches)))
        self.samples = self.how.samples or sum(len(batch["input_ids"]) for batch in few.batches)
        # How errors count, and what there is memory and time for
        (workspace.folder / BLOCKS).mkdir(exist_ok=True)
        begin, seconds, seed = time.monotonic(), asked.seconds, self.how.seed
        moments, reached = _moments(teacher, few.batches, side, seed, device, progress)
        self.places = _places(student, self.plan)
        trained = _places(student, self.plan, reached)
        needed = whole_bytes(teacher, student, side.words, read.batches)
        room = _SHARE_FOR_THE_WHOLE * _free_memory(device)
        fits = needed <= room
        self.notes = () if fits else (_NOT_WHOLE.format(needed=needed / 1e9, room=room / 1e9),)
        for_blocks = (
            None
            if seconds is None
            else (_BLOCKS_SHARE if fits else 1) * (seconds - (time.monotonic() - begin))
        )
        dtypes = {
            name: tensor.dtype
            for name, tensor in (*student.named_parameters(), *student.named_buffers())
        }
        # The blocks, then the whole
        how: dict[str, Any] = {
            "trainable": trained.__contains__,
            "call": side.of,
            "seed": seed,
            "progress": progress,
        }
        known = partial(_read_block, workspace)
        self.blocks: dict[str, HealedBlock] = {}
        effort = Effort(asked.steps, for_blocks)
        for block in heal_blocks(
            teacher, student, few, effort, moments=moments, known=known, device=device, **how
        ):
            self._keep(block, workspace)
        if not self.blocks:
            raise SvdcliError(
                f"no block of {self.compressed.shown} that reads text holds factors",
                "there is nothing to heal",
            )
        if fits:
            done = known(WHOLE)
            if done is None:
                self._in_memory(teacher, student, device)
                left = None if seconds is None else seconds - (time.monotonic() - begin)
                how |= {"dtypes": dtypes, "hard_labels": self.hard}
                done = heal_whole(teacher, student, reading, Effort(asked.steps, left), **how)
            self._keep(done, workspace)

    def _hard_labels(self, side: TextSide) -> float:
        """As asked; 0 for what does not predict the next token."""
        if side.kind == "decoder":
            return HARD_LABELS if self.how.hard_labels is None else self.how.hard_labels
        if self.how.hard_labels:
            raise UsageError(
                f"--hard-labels: {self.original.shown} does not predict the next token",
                "leave it out",
            )
        return 0.0

    def _keep(self, block: HealedBlock, workspace: Workspace) -> None:
        if block.name not in workspace.healed:
            _write_block(workspace, block)
        self.blocks[block.name] = block

    def _in_memory(self, teacher: nn.Module, student: nn.Module, device: torch.device) -> None:
        """Both models on the device in float32, the student with its blocks as they were healed."""
        for model in (teacher, student):
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.to(
                    device, torch.float32 if tensor.is_floating_point() else tensor.dtype
                )
        tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        for block in self.blocks.values():
            put(block, tensors, device)

    def publish(self, workspace: Workspace, device: torch.device, progress: Progress) -> None:
        """Write the directory anew: the plan of before, with the refined factors."""
        weights = {
            self.places[name]: tensor
            for block in self.blocks.values()
            for name, tensor in block.weights.items()
        }
        blocks = {
            block.name: (block.before, block.after, block.steps) for block in self.blocks.values()
        }
        healing = Healing(
            self.texts.name,
            self.texts.digest,
            self.samples,
            self.window,
            blocks,
            self.hard if WHOLE in blocks else 0.0,
        )
        left = [place for place in self.places.values() if place not in weights]
        notes = (*self.plan.notes, *self.notes)
        if left:
            why = "since no block that the text goes through holds them"
            notes = (
                *notes,
                f"heal left {len(left)} tensors as they were, {why}: {', '.join(left[:3])}",
            )
        plan = replace(self.plan, healing=healing, notes=notes)
        files = beside() if plan.recipe.self_contained else None
        size = CompressDesign(self.original, plan, None, files).blueprint().total
        plan = noting_a_miss(
            plan, missed_target(plan, size)
        )  # what was healed makes the record longer
        design = CompressDesign(self.original, plan, None, files)
        ready = Ready(lambda layer: self._tensors(layer, weights), self._results())
        written, results, _ = write(
            design, plan.factored, workspace, device, 0, progress, ready=ready
        )
        finish(written, results, workspace, progress)

    def _tensors(self, layer: LayerPlan, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        names = [tensor.name for tensor in layer.stored()] + (
            [layer.bias.name] if layer.bias is not None else []
        )
        return tuple(
            weights[name] if name in weights else self.compressed.read_tensor(name)
            for name in names
        )

    def _results(self) -> dict[str, Result]:
        layers = (record_of(self.compressed) or {})["layers"]
        return {
            name: Result(0.0, str(item["solver"]), tuple(item.get("fell_back", ())))
            for name, item in layers.items()
        }


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()


def _moments(
    teacher: Any,
    batches: Sequence[Batch],
    side: TextSide,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[dict[str, Tensor], set[str]]:
    """(how much each direction of each block's output matters, names of the modules that ran), from
    batches spread over the text."""
    progress("moments", "", 0, 1)
    torch.manual_seed(seed)
    count = min(len(batches), _MOMENT_BATCHES)
    few = [batches[len(batches) * i // count] for i in range(count)]
    room = int(SHARE_OF_MEMORY * free_memory())
    width = width_of(side.config(teacher))
    at_a_time = max(1, room // state_bytes(side.module(teacher), width, few, gradients=True))
    ran: set[int] = set()
    with watched(teacher, lambda part, inputs: ran.add(id(part))):
        found = block_moments(teacher, few, blocks_of(teacher), at_a_time, device, side.of(teacher))
    progress("moments", "", 1, 1)
    return found, {name for name, part in teacher.named_modules() if id(part) in ran}


def _modules(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the modules behind the factored layers, as far as they have one each."""
    from svdcli.models.hf import module_names

    found = module_names(model, [layer.tensor.module for layer in plan.factored])
    return [name for name in found.values() if name is not None]


def _places(
    student: nn.Module, plan: Plan, within: Collection[str] | None = None
) -> dict[str, str]:
    """{name of a parameter that may change: name of its tensor in the checkpoint}, of all modules
    or of those within."""
    from svdcli.models.hf import module_names

    found = module_names(student, [layer.tensor.module for layer in plan.factored])
    places = {}
    for layer in plan.factored:
        target = found[layer.tensor.module]
        if target is None or (within is not None and target not in within):
            continue
        for tensor in layer.stored():
            places[f"{target}{tensor.name.removeprefix(layer.tensor.module)}"] = tensor.name
        if layer.bias is not None:
            places[f"{target}.bias"] = layer.bias.name
    return places


def _file(workspace: Workspace, name: str) -> Path:
    return workspace.folder / BLOCKS / f"{name}.safetensors"


def _write_block(workspace: Workspace, block: HealedBlock) -> None:
    """The factors first, the line in the journal after them."""
    from safetensors.torch import save_file

    path = _file(workspace, block.name)
    partly = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in block.weights.items()}, partly)
    partly.rename(path)
    line = {"block": block.name, "before": block.before, "after": block.after, "steps": block.steps}
    workspace.note(line)
    workspace.healed[block.name] = line


def _read_block(workspace: Workspace, name: str) -> HealedBlock | None:
    from safetensors.torch import load_file

    line, path = workspace.healed.get(name), _file(workspace, name)
    if line is None or not path.is_file():
        return None
    return HealedBlock(name, line["before"], line["after"], line["steps"], load_file(path))
