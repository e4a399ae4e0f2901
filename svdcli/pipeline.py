"""The verbs that write: compress and expand. They take paths and values, return a value, and print nothing."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdcli import __version__
from svdcli.errors import BadCheckpointError, NothingSelectedError, SvdcliError, UsageError
from svdcli.files.blueprint import Beside, CompressDesign, Design, ExpandDesign
from svdcli.files.checkpoint import CHUNK, RECORD, STANDALONE, STANDARD, Checkpoint, open_checkpoint, sha256_of
from svdcli.files.folder import in_hub_cache
from svdcli.files.formats import without_ending
from svdcli.files.modes import modes_of
from svdcli.files.record import Result, check_listed, make_record, record_of, source_json, stored_layers
from svdcli.files.report import MISSED, SOLVERS_FAILED, Report, read_report, report_of
from svdcli.files.workspace import MOMENTS, Workspace
from svdcli.models import standalone
from svdcli.plan.adapters import adapter_kind
from svdcli.plan.budget import missed_target, staying_dense
from svdcli.plan.decide import UNSOUND, Measured, decide, needs_spectra, rerun
from svdcli.plan.layers import choose_layers, nothing_selected
from svdcli.plan.parts import part_configs
from svdcli.plan.recipe import LayerPlan, Plan, Recipe, Skipped, TextRead, recipe_to_json
from svdcli.plan.roles import Roles
from svdcli.plan.tensors import TensorInfo
from svdcli.progress import Progress, silent

if TYPE_CHECKING:
    import torch

    from svdcli.engine import Calibration, Compute, Ready
    from svdcli.files.texts import Texts
    from svdcli.models.calibrate import Forecast
    from svdcli.models.evaluate import Evaluation


@dataclass(frozen=True)
class Reading:
    """Text to calibrate on while compressing, and how much of it (as for `calibrate`); held_out is to measure on what the result
    is worth. trust_remote_code runs Python that the model's folder brings along."""

    texts: Texts
    held_out: Texts | None = None
    samples: int | None = None
    seq_len: int | None = None
    trust_remote_code: bool = False
    announce: Callable[[Forecast], None] = lambda forecast: None


@dataclass(frozen=True)
class Outcome:
    """What compress did or would do: the report, the plan behind it, and where the output is (None for a dry run).

    measured is how far the output is from the original on text that calibration did not read, where there was such text;
    not_measured says why it is missing. refused says why a run would stop where this dry run did not.
    """

    report: Report
    plan: Plan
    path: Path | None
    started_over: bool = False
    measured: Evaluation | None = None
    not_measured: str = ""
    refused: str = ""


def compress(
    model: str | Path,
    out: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    plan: Plan | None = None,
    calibration: str | Path | None = None,
    reading: Reading | None = None,
    state_dict: str | None = None,
    carry: Sequence[str] = (),
    compute: Compute | None = None,
    force: bool = False,
    allow_larger: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Replace the selected layers of `model` by the factors of their truncated SVD and write the result to `out`.

    model is a file, a directory or "-"; out defaults to `<stem>.svd.safetensors` or `<name>-svd` beside it and may be "-"
    for standard output. Exactly one of recipe and plan decides what happens. calibration is a file of `svdcli calibrate`: errors
    then count by what they do to the layers' outputs, or to the model's loss; reading does that calibration here and now.
    state_dict is the key of a PyTorch file under which the tensors lie, where there are several; carry are globs of files of a
    directory that go along although they are no part of the model. The output appears whole or not at all; a run that was cut
    short continues where it stopped when it is called again. One that would not be smaller than its source is an error, unless
    allow_larger.
    Raises SvdcliError or a child of it, and OSError where the file system refuses.
    """
    from svdcli.engine import Compute, threads_each

    recipe = _the_recipe(recipe, plan)
    if calibration is not None and reading is not None:
        raise UsageError("give a calibration or a text, not both", "leave out one of them")
    with open_checkpoint(model, state_dict=state_dict, carry=carry) as checkpoint:
        _check_source(checkpoint, recipe)
        device = (compute or Compute()).start()
        source = _Source(calibration, reading)
        if dry_run:
            return _predict(checkpoint, out, recipe, plan, source, device, progress, allow_larger)
        choice = None if reading is not None else _choose(checkpoint, recipe, plan, calibration)
        with destination(checkpoint, out, ".svd", "-svd", force) as target:
            workspace = Workspace(target, is_file=not checkpoint.is_directory)
            with disk_errors(target), workspace.locked():
                if choice is None:
                    with workspace.beginning():
                        file = source.file(checkpoint, workspace.folder, recipe, device, progress)
                        choice = _choose(checkpoint, recipe, plan, file)
                asked = (recipe_to_json(choice.recipe), plan and plan.to_json())
                same = identity(checkpoint, "compress", *asked, threads_each(device))
                if workspace.resume(same, force=force):
                    _compress_into(workspace, checkpoint, choice, device, progress, allow_larger)
            report = read_report(target)
            measured, why = (None, "") if reading is None else _measure(checkpoint, target, reading, device, progress)
            return Outcome(
                replace(report, path=str(out)) if out is not None else report,
                Plan.from_json(record_of(open_checkpoint(target))),
                None if out == STANDARD else target,
                workspace.started_over,
                measured,
                why,
            )


def _the_recipe(recipe: Recipe | None, plan: Plan | None) -> Recipe:
    """The one that decides: given by itself, or with a plan. Raises UsageError for both or neither."""
    if recipe is not None and plan is None:
        return recipe
    if plan is not None and recipe is None:
        return plan.recipe
    raise UsageError("give exactly one of a recipe and a plan")


def _measure(
    checkpoint: Checkpoint, target: Path, reading: Reading, device: torch.device, progress: Progress
) -> tuple[Evaluation | None, str]:
    """(how far the output is from the original on the held-out text, why that could not be measured)."""
    from svdcli.models.calibrate import free_memory
    from svdcli.models.evaluate import evaluate

    both = 2 * (checkpoint.nbytes + sum(path.stat().st_size for path in target.glob("*.safetensors")))
    if both > _SHARE_TO_MEASURE * free_memory():
        return None, f"both models at once may need {both / 1e9:.1f} GB"
    if reading.held_out is None:
        return None, "no text was held out"
    try:
        return evaluate(
            target,
            reading.held_out,
            against=checkpoint.path,
            seq_len=reading.seq_len,
            samples=_WINDOWS_TO_MEASURE,
            device=device,
            trust_remote_code=reading.trust_remote_code,
            progress=progress,
        ), ""
    except SvdcliError as error:
        return None, str(error)


_SHARE_TO_MEASURE = 0.8
_WINDOWS_TO_MEASURE = 32


def _predict(
    checkpoint: Checkpoint,
    out: str | Path | None,
    recipe: Recipe,
    plan: Plan | None,
    source: _Source,
    device: torch.device,
    progress: Progress,
    allow_larger: bool,
) -> Outcome:
    """What a dry run tells."""
    with tempfile.TemporaryDirectory(prefix="svdcli-") as folder:
        choice = _choose(checkpoint, recipe, plan, source.file(checkpoint, Path(folder), recipe, device, progress))
        name = None if checkpoint.is_directory else _out_path(checkpoint, out, ".svd", "-svd").name
        decided = _decide(checkpoint, choice, name, device, None, progress)
        refused = "" if allow_larger else not_smaller(_design(checkpoint, decided, name))
        return Outcome(_predicted(checkpoint, decided, name), decided, None, refused=refused)


def expand(model: str | Path, out: str | Path | None = None, *, force: bool = False, progress: Progress = silent) -> Path | None:
    """Write an output of compress as an ordinary checkpoint again: original names, shapes and dtypes, low-rank weights.

    out defaults to `<stem>.dense.safetensors` or `<name>-dense` beside the model. Returns where it is (None for standard
    output). Raises like `compress`.
    """
    import torch

    with open_checkpoint(model) as checkpoint:
        record = record_of(checkpoint)
        if record is None:
            hint = "factors that transformers saved: svdcli.load(PATH).dequantize().save_pretrained(DENSE), from Python"
            raise SvdcliError(f"{checkpoint.shown} was not written by svdcli compress", hint)
        layers = stored_layers(checkpoint, record)
        check_listed(checkpoint, record)
        _check_undamaged(checkpoint, record, layers)
        with destination(checkpoint, out, ".dense", "-dense", force) as target:
            workspace = Workspace(target, is_file=not checkpoint.is_directory)
            with disk_errors(target), workspace.locked():
                if workspace.resume(identity(checkpoint, "expand"), force=force):
                    design = ExpandDesign(checkpoint, record, layers, target.name if workspace.is_file else None)
                    written, results, _ = write(design, layers, workspace, torch.device("cpu"), 0, progress)
                    finish(written, results, workspace, progress)
            return None if out == STANDARD else target


def _check_undamaged(checkpoint: Checkpoint, record: Mapping[str, Any], layers: Sequence[LayerPlan]) -> None:
    """Raises BadCheckpointError where a weight file of a directory is not what was written, config.json is gone, or an order of
    rows is none."""
    from svdcli.engine import has_row_order

    files = record.get("files") or {}
    if "config.json" in files and checkpoint.config is None:
        raise BadCheckpointError(f"{checkpoint.path} has lost its config.json", "put it back, or write the output again")
    for name, item in files.items():
        if name in checkpoint.files and sha256_of(checkpoint.path / name) != item.get("sha256"):
            raise BadCheckpointError(f"{checkpoint.path / name} was changed after svdcli wrote it", "see `svdcli verify`")
    damaged = next((layer.tensor.name for layer in layers if not has_row_order(checkpoint, layer)), None)
    if damaged is not None:
        raise BadCheckpointError(f"the svd_rows of {damaged} are no order of its rows", "write the output again")


# Deciding ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the calibration comes from: a file, a text that is read now, or nowhere."""

    path: str | Path | None
    reading: Reading | None

    def file(
        self, checkpoint: Checkpoint, folder: Path, recipe: Recipe, device: torch.device, progress: Progress
    ) -> str | Path | None:
        """The file of moments; one of the same text that an earlier run left in `folder` is used again."""
        if self.reading is None:
            return self.path
        from svdcli.models.calibrate import calibrate

        reading, gradients = self.reading, _GRADIENTS.get(recipe.metric, True)
        how = (reading.samples, reading.seq_len, reading.trust_remote_code, gradients)
        asked = (checkpoint.fingerprint(), reading.texts.digest, *how)
        found = folder / f"{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.{MOMENTS}"
        if not found.exists():
            calibrate(
                checkpoint.path,
                reading.texts,
                found,
                samples=reading.samples,
                seq_len=reading.seq_len,
                gradients=gradients,
                device=device,
                trust_remote_code=reading.trust_remote_code,
                announce=reading.announce,
                progress=progress,
            )
        return found


# Whether a metric needs the moments of gradients; None leaves that to the memory there is.
_GRADIENTS = {"inputs": False, "auto": None}


@dataclass(frozen=True)
class _Choice:
    """What is to be decided about: the recipe, the plan it came from if any, and the layers."""

    recipe: Recipe
    plan: Plan | None
    selected: tuple[TensorInfo, ...]
    skipped: tuple[Skipped, ...]
    fingerprint: str
    calibration: Calibration | None = None


def _check_source(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises SvdcliError for an input that svdcli wrote, or that another tool has quantised; UsageError for odd options."""
    if record_of(checkpoint) is not None:
        raise SvdcliError(f"{checkpoint.shown} was written by svdcli already", "start from the original, or expand it first")
    adapter = adapter_kind(checkpoint.infos, checkpoint.carried)
    if adapter:
        raise SvdcliError(
            f"{checkpoint.shown} is {adapter}, whose matrices are small factors already",
            "merge it into its base model (PEFT: merge_and_unload), and compress that",
        )
    config = checkpoint.config or {}
    parts = [config, *(part for _, part in part_configs(config))]
    quantised = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if quantised and recipe.layout != "dense":
        method = quantised.get("quant_method", "another tool") if isinstance(quantised, dict) else "another tool"
        raise SvdcliError(f"{checkpoint.shown} is quantised by {method}", "start from the unquantised model")
    if recipe.self_contained:
        if not (checkpoint.is_directory and checkpoint.transformers_opens_it):
            raise UsageError("--self-contained is for directories with a config.json of transformers", "leave it out")
        if config.get("auto_map"):
            raise UsageError(f"{checkpoint.shown} brings its own code (auto_map)", "leave out --self-contained")
    if recipe.max_shard_size is not None and not checkpoint.is_directory:
        raise UsageError("--max-shard-size is for directories", "leave it out for a single file")


def _choose(checkpoint: Checkpoint, recipe: Recipe, plan: Plan | None, calibration: str | Path | None) -> _Choice:
    fingerprint = checkpoint.fingerprint()
    recipe, found = _calibrated(recipe, calibration, fingerprint, checkpoint.shown)
    if plan is not None:
        plan = rerun(plan, {info.name: info for info in checkpoint.infos}, fingerprint)
        selected, skipped = tuple(layer.tensor for layer in plan.layers), plan.skipped
    else:
        selected, skipped = choose_layers(
            checkpoint.infos,
            include=recipe.include,
            exclude=recipe.exclude,
            layers=recipe.layers,
            tied=checkpoint.tied,
            facts=checkpoint.facts,
        )
    if not selected:
        raise nothing_selected(checkpoint.shown, skipped)
    return _Choice(recipe, plan, selected, skipped, fingerprint, found)


def _calibrated(
    recipe: Recipe, calibration: str | Path | None, fingerprint: str, shown: str
) -> tuple[Recipe, Calibration | None]:
    """The recipe with the digest of its calibration, and the calibration, checked to be of this model."""
    if calibration is None:
        if recipe.calibration is not None:
            raise UsageError("the plan was made with a calibration", "give the same one with --calibration")
        if recipe.metric != "auto":
            raise UsageError(f"--metric {recipe.metric} says how a calibration counts", "give --calibration too")
        return recipe, None
    from svdcli.engine import Calibration, check_metric
    from svdcli.files.moments import check_provenance, open_moments

    moments = open_moments(calibration)
    check_provenance(moments, fingerprint, shown)
    if recipe.calibration not in (None, moments.digest):
        raise UsageError(f"{calibration} is not the calibration that the plan was made with", "give the same one")
    check_metric(recipe, moments)
    return replace(recipe, calibration=moments.digest), Calibration(moments, recipe.metric)


def _decide(
    checkpoint: Checkpoint,
    choice: _Choice,
    name: str | None,
    device: torch.device,
    workspace: Workspace | None,
    progress: Progress,
) -> Plan:
    """Look at the weights, then fix every rank. Nothing is written but the journal's notes of what was measured."""
    from svdcli.engine import check_finite, measure

    recipe = choice.recipe
    spectra = choice.plan is None and needs_spectra(recipe)
    measured = measure(
        checkpoint,
        choice.selected,
        spectra=spectra,
        device=device,
        workspace=workspace,
        progress=progress,
        calibration=choice.calibration,
    )
    bad = [tensor.name for tensor in choice.selected if not measured[tensor.name].finite]
    if recipe.nonfinite == "error":
        check_finite(bad)
    if choice.plan is not None:
        plan = _rerun(checkpoint, _with_its_text(choice.plan, choice), name, bad)
        plan = replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *checkpoint.notes))))
    else:
        plan = _decide_ranks(checkpoint, choice, name, measured)
    if not plan.factored:
        reason = plan.layers[0].reason or "nothing to do"
        raise NothingSelectedError(f"no layer of {checkpoint.shown} would shrink ({plan.layers[0].tensor.name}: {reason})")
    return plan


def _decide_ranks(checkpoint: Checkpoint, choice: _Choice, name: str | None, measured: Mapping[str, Measured]) -> Plan:
    notes = (*checkpoint.notes, *_little_read(choice), *_no_longer_tied(checkpoint, choice))

    def complete(plan: Plan) -> Plan:
        return _with_its_text(replace(plan, notes=(*plan.notes, *notes)), choice)

    def predict(plan: Plan) -> int:
        return _design(checkpoint, complete(plan), name).blueprint().total

    unit = "" if choice.calibration is None else choice.calibration.unit
    return complete(decide(choice.recipe, choice.fingerprint, choice.selected, choice.skipped, measured, predict, unit))


def _with_its_text(plan: Plan, choice: _Choice) -> Plan:
    """The plan with what the calibration behind it has read."""
    if choice.calibration is None:
        return plan
    read = choice.calibration.moments.provenance
    return replace(plan, calibration=TextRead(read.text, read.text_sha256, read.samples, read.seq_len, read.tokens))


def _rerun(checkpoint: Checkpoint, saved: Plan, name: str | None, bad: Sequence[str]) -> Plan:
    """A saved plan, with the layers dense that cannot be factored here.

    A note tells where it misses the budget it was made for. Raises UsageError where those layers are the reason.
    """
    plan = saved.with_dense(dict.fromkeys(bad, f"holds {UNSOUND}"))
    missed = missed_target(plan, _design(checkpoint, plan, name).blueprint().total)
    if not missed:
        return plan
    if bad and not missed_target(saved, _design(checkpoint, saved, name).blueprint().total):
        dense = {layer.tensor.name: layer.reason for layer in plan.layers if layer.rank is None}
        why = staying_dense(dense, len(plan.layers))
        hint = f"make a new plan of this model: --{plan.recipe.target} without --plan"
        raise UsageError(f"the plan does not meet its target here: {missed}, since {why}", hint)
    return noting_a_miss(plan, missed)


def _little_read(choice: _Choice) -> tuple[str, ...]:
    """A note where the calibration cannot have seen every direction of some layer's input."""
    if choice.calibration is None:
        return ()
    moments = choice.calibration.moments
    widths = [t.shape[0 if moments.layers[t.name]["transposed"] else 1] for t in choice.selected if t.name in moments.layers]
    tokens, widest = moments.provenance.tokens, max(widths, default=0)
    if tokens >= widest:
        return ()
    return (f"the calibration read {tokens} tokens, fewer than the {widest} inputs of a layer: expect more loss than predicted",)


def _no_longer_tied(checkpoint: Checkpoint, choice: _Choice) -> tuple[str, ...]:
    """A note for each head or embedding that is factored while its equal copy in the file is not."""
    facts, selected = checkpoint.facts, {tensor.name for tensor in choice.selected}
    if facts is None or facts.tied is False:
        return ()
    apart = [pair for pair in Roles(checkpoint.infos, facts).copies() if len({t.name for t in pair} & selected) == 1]
    return tuple(
        f"{head.module} and {table.module} hold the same numbers: tied before, they are two weights now; name both to keep one"
        for head, table in apart
        if checkpoint.look_equal(head.name, table.name)
    )


def _design(checkpoint: Checkpoint, plan: Plan, name: str | None) -> CompressDesign:
    return CompressDesign(checkpoint, plan, name, beside() if plan.recipe.self_contained else None)


def beside() -> Beside:
    """The Python file of `--self-contained`, and what config.json says about it."""
    return Beside(STANDALONE, standalone.standalone_source(), standalone.auto_map())


def _predicted(checkpoint: Checkpoint, plan: Plan, name: str | None) -> Report:
    sizes = _design(checkpoint, plan, name).blueprint().sizes()
    planned = {layer.tensor.name: Result(0.0, layer.solver) for layer in plan.factored}
    source = source_json(checkpoint, plan.fingerprint)
    record = make_record(plan, source, checkpoint.left_out, checkpoint.left_out_bytes, planned)
    return report_of(record, sizes, checkpoint.shown, predicted=True)


# Writing -------------------------------------------------------------------------------------------------------------


def _compress_into(
    workspace: Workspace,
    checkpoint: Checkpoint,
    choice: _Choice,
    device: torch.device,
    progress: Progress,
    allow_larger: bool,
) -> None:
    name = workspace.out.name if workspace.is_file else None
    with _refusing(workspace):
        plan = _decide(checkpoint, choice, name, device, workspace, progress)
        design = _design(checkpoint, plan, name)
        _check_smaller(design, allow_larger)
    seed, calibration = choice.recipe.seed, choice.calibration
    written, results, failed = write(design, plan.factored, workspace, device, seed, progress, calibration)
    if failed:
        plan = plan.with_dense({layer: f"{SOLVERS_FAILED}: {why}" for layer, why in failed.items()})
        plan = noting_a_miss(plan, missed_target(plan, _design(checkpoint, plan, name).blueprint().total))
        workspace.set_aside()
        design = _design(checkpoint, plan, name)
        written, results, _ = write(design, plan.factored, workspace, device, seed, progress, calibration)
    else:
        with _refusing(workspace):
            _check_smaller(written, allow_larger)  # again, since fall-backs may have taken more room
    finish(written, results, workspace, progress)


@contextmanager
def _refusing(workspace: Workspace) -> Iterator[None]:
    """A refusal leaves nothing behind but a calibration that was made on the way, and says where that is."""
    try:
        yield
    except SvdcliError as error:
        if workspace.give_up():
            where = f"the calibration waits in {workspace.folder} for the next try"
            error.hint = f"{error.hint}; {where}" if error.hint else where
        raise


def _check_smaller(design: Design, allow_larger: bool) -> None:
    larger = not_smaller(design)
    if larger and not allow_larger:
        raise SvdcliError(larger, "cut more, --exclude what hardly shrinks, or write it all the same with --allow-larger")


def not_smaller(design: Design) -> str:
    """What is wrong with an output that is no smaller than its source; empty where it is, or in a layout that never is."""
    if isinstance(design, ExpandDesign) or design.plan.recipe.layout == "dense":
        return ""
    size, source = design.blueprint().total, design.source_bytes
    if size < source:
        return ""
    saved = sum(layer.tensor.nbytes - sum(part.nbytes for part in layer.stored()) for layer in design.plan.factored)
    return (
        f"the output would have {size} bytes, no fewer than the {source} of its source: "
        f"factors save {saved}, headers and the record take more"
    )


def noting_a_miss(plan: Plan, missed: str) -> Plan:
    """The plan with a note of the target that it misses, where it misses one."""
    note = f"{MISSED} {missed}"
    return plan if not missed or note in plan.notes else replace(plan, notes=(*plan.notes, note))


def write(
    design: Design,
    layers: Sequence[LayerPlan],
    workspace: Workspace,
    device: torch.device,
    seed: int,
    progress: Progress,
    calibration: Calibration | None = None,
    ready: Ready | None = None,
) -> tuple[Design, dict[str, Result], dict[str, str]]:
    """Lay the files out and do every unit: (the design that was written, results, layers on which every solver failed).

    Where solvers gave way to others on more layers than the record has room for, all is laid out once more, with more room.
    """
    results, failed = _write_once(design, layers, workspace, device, seed, progress, calibration, ready)
    if failed or isinstance(design, ExpandDesign) or design.fits(results):
        return design, results, failed
    design = design.with_room()
    workspace.set_aside()
    results, failed = _write_once(design, layers, workspace, device, seed, progress, calibration, ready)
    return design, results, failed


def _write_once(
    design: Design,
    layers: Sequence[LayerPlan],
    workspace: Workspace,
    device: torch.device,
    seed: int,
    progress: Progress,
    calibration: Calibration | None,
    ready: Ready | None,
) -> tuple[dict[str, Result], dict[str, str]]:
    """Lay the files out and do every unit: (results, layers on which every solver failed)."""
    from svdcli.engine import run_units
    from svdcli.files.writer import WeightWriter

    blueprint = design.blueprint()
    claimed = sum(path.stat().st_size for path in workspace.data.rglob("*") if path.is_file())
    free = shutil.disk_usage(workspace.out.parent).free
    if blueprint.total - claimed > free:
        raise OSError(errno.ENOSPC, f"{blueprint.total - claimed} bytes are needed, {free} are free")
    writer = WeightWriter(workspace.data, blueprint.files)
    by_name = {layer.tensor.name: layer for layer in layers}
    return run_units(
        design.checkpoint,
        design.units,
        by_name,
        writer,
        workspace,
        seed=seed,
        device=device,
        progress=progress,
        calibration=calibration,
        ready=ready,
    )


def finish(design: Design, results: Mapping[str, Result], workspace: Workspace, progress: Progress) -> None:
    """Headers, the files beside the weights, the record; read everything back with the reference reader; publish."""
    import torch

    from svdcli.engine import spread
    from svdcli.files.writer import WeightWriter, write_file

    blueprint = design.blueprint()
    writer = WeightWriter(workspace.data, blueprint.files)
    for file in blueprint.files:
        writer.finish(file.name, design.metadata(file, results))
        _open_with_safetensors(workspace.data / file.name)
    for name, text in blueprint.texts.items():
        write_file(workspace.data / name, [text])
    for name in blueprint.carried:
        with (design.checkpoint.path / name).open("rb") as source:
            write_file(workspace.data / name, iter(lambda: source.read(CHUNK), b""))
    if blueprint.record_bytes and isinstance(design, CompressDesign):
        others = {name: size for name, size in blueprint.sizes().items() if name != RECORD}
        digests: dict[str, str] = {}
        hashed = 0
        for name, digest in spread(lambda name: (name, sha256_of(workspace.data / name)), others, torch.device("cpu")):
            digests[name] = digest
            hashed += others[name]
            progress("check", name, hashed / 1e9, sum(others.values()) / 1e9)
        files = {name: (size, digests[name]) for name, size in others.items()}
        write_file(workspace.data / RECORD, [design.record(results, files, blueprint.record_bytes)])
    _check_sizes(workspace.data, blueprint.sizes())
    workspace.publish(modes_of(design.checkpoint, blueprint))


def _open_with_safetensors(path: Path) -> None:
    """Every weight file is opened by the reference reader before anybody sees it."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        file.keys()


def _check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        found = (folder / name).stat().st_size
        if found != size:
            raise SvdcliError(f"{name} has {found} bytes where {size} were laid out", "the source changed while it was read")


# Where the output goes -----------------------------------------------------------------------------------------------


def identity(checkpoint: Checkpoint, *parts: object) -> str:
    """The same for the same command on the same source: what a journal must match to be continued."""
    values = [__version__, checkpoint.fingerprint(), checkpoint.state(), checkpoint.name, *parts]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _out_path(checkpoint: Checkpoint, out: str | Path | None, file_suffix: str, folder_suffix: str) -> Path:
    if out is not None and str(out) != STANDARD:
        return Path(out)
    if checkpoint.temporary is not None:
        if out is None:
            raise UsageError("standard input has no name to derive the output's from", "give -o FILE, or -o - for a pipe")
        return Path("model.safetensors")
    entry = in_hub_cache(checkpoint.path)
    if entry is not None:
        raise UsageError(f"{checkpoint.shown} lies in the hub's cache, where no output belongs", "give -o PATH")
    if checkpoint.is_directory:
        folder = checkpoint.path if checkpoint.path.name not in ("", "..") else checkpoint.path.resolve()
        return folder.with_name(f"{folder.name}{folder_suffix}")
    stem = without_ending(checkpoint.path.name)
    return checkpoint.path.with_name(f"{stem.removesuffix('.svd')}{file_suffix}.safetensors")


@contextmanager
def destination(
    checkpoint: Checkpoint, out: str | Path | None, file_suffix: str, folder_suffix: str, force: bool
) -> Iterator[Path]:
    """The path to write to. Standard output gets its bytes from a temporary file once that is whole."""
    if out is None or str(out) != STANDARD:
        target = _out_path(checkpoint, out, file_suffix, folder_suffix)
        _check_target(checkpoint, target, force)
        yield target
        return
    if checkpoint.is_directory:
        raise UsageError("a directory does not fit through standard output", "give -o FOLDER")
    if sys.__stdout__ is None:
        raise UsageError("standard output is closed", "pipe it on, or give -o FILE")
    if sys.stdout.isatty():
        raise UsageError("standard output is a terminal", "pipe it on, or give -o FILE")
    folder = Path(tempfile.mkdtemp(prefix="svdcli-"))
    try:
        target = folder / "model.safetensors"
        yield target
        with target.open("rb") as stream:
            shutil.copyfileobj(stream, sys.stdout.buffer, CHUNK)
        sys.stdout.buffer.flush()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_target(checkpoint: Checkpoint, target: Path, force: bool) -> None:
    """Raises SvdcliError where writing to `target` would lose something or cannot work."""
    parent = target.absolute().parent
    if not parent.is_dir():
        raise SvdcliError(f"the folder {parent} does not exist", "create it first")
    if not checkpoint.is_directory and target.suffix != ".safetensors":
        raise UsageError(f"the output {target} does not end in .safetensors", "that is what it will be")
    if checkpoint.is_directory and target.suffix == ".safetensors":
        raise UsageError(f"the output {target} would be a directory, as {checkpoint.shown} is", "give it another name")
    source, goal = checkpoint.path.resolve(), target.resolve()
    if source == goal or source in goal.parents or goal in source.parents:
        raise SvdcliError(f"the output {target} is the source, or inside or around it", "choose another -o")
    if not target.exists():
        return
    if target.is_dir() != checkpoint.is_directory:
        raise SvdcliError(f"{target} is a {'directory' if target.is_dir() else 'file'}", "choose another -o")
    if target.samefile(checkpoint.path):
        raise SvdcliError(f"the output {target} is the source under another name", "choose another -o")
    if force and target.is_dir() and not _looks_like_a_model(target):
        raise SvdcliError(f"{target} does not look like a model", "remove it yourself, or choose another -o")
    if not force and not Workspace(target, is_file=not checkpoint.is_directory).folder.exists():
        raise SvdcliError(f"{target} exists", "use --force to replace it, or choose another -o")


def _looks_like_a_model(folder: Path) -> bool:
    inside = list(folder.iterdir())
    return not inside or any(path.name == RECORD or path.suffix in (".safetensors", ".bin") for path in inside)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """A full disk, in words that say what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise SvdcliError(
            f"cannot write {target}: {error.strerror}", "free space and run the same command again, it continues where it was"
        ) from error
