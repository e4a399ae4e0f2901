"""The way of a checkpoint through svdcli: decide, write, publish."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from svdcli.engine.planning import (
    Request,
    check_smaller,
    check_source,
    design_of,
    make_plan,
    not_smaller,
    noting_a_miss,
    predicted_report,
    refusing,
    request_of,
)
from svdcli.engine.publish import destination, disk_errors, finish, identity, out_path, write
from svdcli.errors import SvdcliError, UsageError
from svdcli.files.checkpoint import STANDARD, Checkpoint, open_checkpoint
from svdcli.files.record import record_of
from svdcli.files.report import SOLVERS_FAILED, read_report
from svdcli.files.workspace import MOMENTS, Workspace
from svdcli.plan.budget import missed_target
from svdcli.plan.plan import Plan
from svdcli.plan.recipe import WANTED, Recipe, Wanted, recipe_for, recipe_to_json
from svdcli.progress import Progress, silent
from svdcli.verbs.outcome import Outcome

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from svdcli.engine.compute import Compute
    from svdcli.text.texts import Texts
    from svdcli.verbs.calibrate import Forecast
    from svdcli.verbs.evaluate import Evaluation


@dataclass(frozen=True)
class Reading:
    """Text to calibrate on while compressing, and how much of it (as for `calibrate`); held_out is
    to measure on what the result is worth. trust_remote_code runs Python that the model's folder
    brings along."""

    texts: Texts
    held_out: Texts | None = None
    samples: int | None = None
    seq_len: int | None = None
    trust_remote_code: bool = False
    announce: Callable[[Forecast], None] = lambda forecast: None


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
    **wanted: Unpack[Wanted],
) -> Outcome:
    """Replace the selected layers of `model` by the factors of their truncated SVD and write the
    result to `out`.

    model is a file, a directory or "-"; out defaults to `<stem>.svd.safetensors` or `<name>-svd`
    beside it and may be "-" for standard output. What happens is decided by keyword arguments, such
    as keep=0.5 and layout="pivoted": exactly one of rank, keep, size, energy and error, and any
    other of `Wanted`, with the defaults of the command; or by a recipe or a plan, and then by
    nothing beside it. calibration is a file of `svdcli calibrate`: errors then count by what they
    do to the layers' outputs, or to the model's loss; reading does that calibration here and now.
    state_dict is the key of a PyTorch file under which the tensors lie, where there are several;
    carry are globs of files of a directory that go along although they are no part of the model.
    The output appears whole or not at all; a run that was cut short continues where it stopped when
    it is called again. One that would not be smaller than its source is an error, unless
    allow_larger. Raises SvdcliError or a child of it, and OSError where the file system refuses.
    """
    from svdcli.engine.compute import Compute
    from svdcli.engine.executor import threads_each

    if calibration is not None and reading is not None:
        raise UsageError("give a calibration or a text, not both", "leave out one of them")
    calibrated = calibration is not None or reading is not None
    recipe = _the_recipe(recipe, plan, wanted, calibrated)
    with open_checkpoint(model, state_dict=state_dict, carry=carry) as checkpoint:
        check_source(checkpoint, recipe)
        compute = compute or Compute()
        device = compute.start()
        source = _Source(calibration, reading, compute)
        if dry_run:
            return _predict(checkpoint, out, recipe, plan, source, device, progress, allow_larger)
        choice = None if reading is not None else request_of(checkpoint, recipe, plan, calibration)
        with destination(checkpoint, out, ".svd", "-svd", force) as target:
            workspace = Workspace(target, is_file=not checkpoint.is_directory)
            with disk_errors(target), workspace.locked():
                if choice is None:
                    with workspace.beginning():
                        file = source.file(checkpoint, workspace.folder, recipe, progress)
                        choice = request_of(checkpoint, recipe, plan, file)
                asked = (recipe_to_json(choice.recipe), plan and plan.to_json())
                same = identity(checkpoint, "compress", *asked, threads_each(device))
                if workspace.resume(same, force=force):
                    _compress_into(workspace, checkpoint, choice, device, progress, allow_larger)
            report = read_report(target)
            evaluation, why = (
                (None, "")
                if reading is None
                else _evaluate_output(checkpoint, target, reading, compute, progress)
            )
            return Outcome(
                replace(report, path=str(out)) if out is not None else report,
                Plan.from_json(record_of(open_checkpoint(target))),
                None if out == STANDARD else target,
                workspace.started_over,
                evaluation,
                why,
            )


def _the_recipe(
    recipe: Recipe | None, plan: Plan | None, wanted: Wanted, calibrated: bool
) -> Recipe:
    """The one that decides: given by itself, with a plan, or in keyword arguments. Raises
    UsageError for none of them, or several."""
    unknown = sorted(wanted.keys() - WANTED)
    if unknown:
        raise TypeError(f"compress() got an unexpected keyword argument {unknown[0]!r}")
    if [recipe is not None, plan is not None, bool(wanted)].count(True) > 1:
        raise UsageError(
            "give exactly one of a recipe, a plan and keyword arguments", "leave out the others"
        )
    if recipe is not None:
        return recipe
    if plan is not None:
        return plan.recipe
    return recipe_for(wanted, calibrated=calibrated)


def _evaluate_output(
    checkpoint: Checkpoint, target: Path, reading: Reading, compute: Compute, progress: Progress
) -> tuple[Evaluation | None, str]:
    """(how far the output is from the original on the held-out text, why that could not be
    evaluated)."""
    from svdcli.calibration.memory import free_memory
    from svdcli.verbs.evaluate import evaluate

    both = 2 * (
        checkpoint.nbytes + sum(path.stat().st_size for path in target.glob("*.safetensors"))
    )
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
            compute=compute,
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
        choice = request_of(
            checkpoint,
            recipe,
            plan,
            source.file(checkpoint, Path(folder), recipe, progress),
        )
        name = None if checkpoint.is_directory else out_path(checkpoint, out, ".svd", "-svd").name
        decided = make_plan(checkpoint, choice, name, device, None, progress)
        refused = "" if allow_larger else not_smaller(design_of(checkpoint, decided, name))
        return Outcome(predicted_report(checkpoint, decided, name), decided, None, refused=refused)


# Deciding -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the calibration comes from: a file, a text that is read now, or nowhere."""

    path: str | Path | None
    reading: Reading | None
    compute: Compute

    def file(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        recipe: Recipe,
        progress: Progress,
    ) -> str | Path | None:
        """The file of moments; one of the same text that an earlier run left in `folder` is used
        again."""
        if self.reading is None:
            return self.path
        from svdcli.verbs.calibrate import calibrate

        reading, gradients = self.reading, _GRADIENTS.get(recipe.metric, True)
        how = (reading.samples, reading.seq_len, reading.trust_remote_code, gradients)
        asked = (checkpoint.fingerprint(), reading.texts.digest, *how)
        found = folder / f"{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.{MOMENTS}"
        if not found.exists():
            calibrate(
                checkpoint.path,
                found,
                reading.texts,
                samples=reading.samples,
                seq_len=reading.seq_len,
                gradients=gradients,
                compute=self.compute,
                trust_remote_code=reading.trust_remote_code,
                announce=reading.announce,
                progress=progress,
            )
        return found


# Whether a metric needs the moments of gradients; None leaves that to the memory there is.
_GRADIENTS = {"inputs": False, "auto": None}


# Writing ------------------------------------------------------------------------------------------


def _compress_into(
    workspace: Workspace,
    checkpoint: Checkpoint,
    choice: Request,
    device: torch.device,
    progress: Progress,
    allow_larger: bool,
) -> None:
    name = workspace.out.name if workspace.is_file else None
    with refusing(workspace):
        plan = make_plan(checkpoint, choice, name, device, workspace, progress)
        design = design_of(checkpoint, plan, name)
        check_smaller(design, allow_larger)
    seed, calibration = choice.recipe.seed, choice.calibration
    written, results, failed = write(
        design, plan.factored, workspace, device, seed, progress, calibration
    )
    if failed:
        plan = plan.with_dense({layer: f"{SOLVERS_FAILED}: {why}" for layer, why in failed.items()})
        plan = noting_a_miss(
            plan, missed_target(plan, design_of(checkpoint, plan, name).blueprint().total)
        )
        workspace.set_aside()
        design = design_of(checkpoint, plan, name)
        written, results, _ = write(
            design, plan.factored, workspace, device, seed, progress, calibration
        )
    else:
        with refusing(workspace):
            check_smaller(written, allow_larger)  # again, since fall-backs may have taken more room
    finish(written, results, workspace, progress)
