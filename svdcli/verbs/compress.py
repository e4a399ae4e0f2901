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
    goes_by_weights,
    make_plan,
    measures_spectra,
    not_smaller,
    noting_a_miss,
    predicted_report,
    refusing,
    request_of,
)
from svdcli.engine.publish import destination, disk_errors, finish, identity, out_path, write
from svdcli.errors import SvdcliError, UsageError
from svdcli.files.blueprint import in_one_dtype
from svdcli.files.checkpoint import STANDARD, Checkpoint, open_checkpoint
from svdcli.files.record import record_of
from svdcli.files.report import SOLVERS_FAILED, read_report
from svdcli.files.workspace import MOMENTS, Workspace
from svdcli.memory import free_memory
from svdcli.plan.budget import missed_target
from svdcli.plan.plan import Plan
from svdcli.plan.recipe import WANTED, Recipe, Wanted, recipe_for, recipe_to_json
from svdcli.plan.words import PRECISION, MetricName, Precision
from svdcli.progress import Progress, silent
from svdcli.ranks import PATIENCE, place_here
from svdcli.verbs.outcome import Outcome

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from svdcli.calibration.work import Forecast
    from svdcli.engine.compute import Compute
    from svdcli.engine.executor import Workers
    from svdcli.ranks import Team
    from svdcli.text.texts import Texts
    from svdcli.verbs import calibrate
    from svdcli.verbs.evaluate import Evaluation


@dataclass(frozen=True)
class Reading:
    """Text to calibrate on while compressing, how much of it, and in which precision (as for
    `calibrate`); held_out is to measure on what the result is worth. trust_remote_code runs Python
    that the model's folder brings along."""

    texts: Texts
    held_out: Texts | None = None
    samples: int | None = None
    seq_len: int | None = None
    trust_remote_code: bool = False
    precision: Precision = PRECISION
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
    from svdcli.engine.crew import Follower, crew_of

    if calibration is not None and reading is not None:
        raise UsageError("give a calibration or a text, not both", "leave out one of them")
    calibrated = calibration is not None or reading is not None
    recipe = _the_recipe(recipe, plan, wanted, calibrated)
    compute = compute or Compute()
    source = _Source(calibration, reading, recipe.metric, compute)
    asked = _Asked(recipe, plan, source, out, force, allow_larger, dry_run, progress)
    given = (*map(str, (model, out, calibration)), reading and reading.precision, dry_run)
    work = ("compress", given, recipe_to_json(recipe), plan and plan.to_json())
    with crew_of(compute, repr(work)) as crew:
        # Of several ranks one leads; the others do jobs, and give back what it does
        if isinstance(crew, Follower):
            followed: Outcome = crew.follow(source.read_with)
            return followed
        with open_checkpoint(model, state_dict=state_dict, carry=carry) as checkpoint:
            outcome = _compress(checkpoint, asked, crew)
        crew.end(outcome)
        return outcome


@dataclass(frozen=True)
class _Asked:
    """What was asked of `compress`."""

    recipe: Recipe
    plan: Plan | None
    source: _Source
    out: str | Path | None
    force: bool
    allow_larger: bool
    dry_run: bool
    progress: Progress


def _compress(checkpoint: Checkpoint, asked: _Asked, crew: Workers) -> Outcome:
    """Compress an open checkpoint with these workers."""
    from svdcli.linalg.lapack import library
    from svdcli.models.kinds import take_apart_stacks

    recipe, plan, source = asked.recipe, asked.plan, asked.source
    check_source(checkpoint, recipe)
    take_apart_stacks(checkpoint)
    if asked.dry_run:
        return _predict(checkpoint, asked, crew)

    # Where no text is to be read, most refusals come before a workspace is made
    request = None
    if source.reading is None:
        request = request_of(checkpoint, recipe, plan, source.path)
    with destination(checkpoint, asked.out, ".svd", "-svd", asked.force) as target:
        workspace = Workspace(target, is_file=not checkpoint.is_directory)
        # A rank that led before may still be ending
        patience = PATIENCE if place_here() is not None else 0.0
        with disk_errors(target), workspace.locked(patience):
            if crew.ranks > 1:
                with workspace.beginning():
                    crew.check_shared(workspace.folder, checkpoint)

            # Reading takes long: its moments are kept in the workspace, for the next try too
            if request is None:
                with workspace.beginning():
                    moments = source.file(checkpoint, workspace.folder, crew, asked.progress)
                    request = request_of(checkpoint, recipe, plan, moments)

            # A journal counts for the same work only, and for what rounds it alike
            work = (recipe_to_json(request.recipe), plan and plan.to_json())
            rounded_by = (crew.threads, library(crew.threads))
            command = identity(checkpoint, "compress", *work, *rounded_by)
            if workspace.resume(command, force=asked.force):
                workspace.started_by(crew.ranks)
                _compress_into(workspace, checkpoint, request, asked, crew)

        outcome = _outcome(target, asked.out, workspace, crew)
        if source.reading is None:
            return outcome
        with crew.all_threads():
            evaluation, why_not = _evaluate_output(checkpoint, target, source, asked.progress)
        return replace(outcome, evaluation=evaluation, not_evaluated=why_not)


def _outcome(target: Path, out: str | Path | None, workspace: Workspace, crew: Workers) -> Outcome:
    """What the record of the written output says, under the path that was asked for, and what
    happened on the way."""
    report = read_report(target)
    happened = (*workspace.restarts(), *dict.fromkeys(crew.told))
    report = replace(report, notes=(*report.notes, *happened))
    if out is not None:
        report = replace(report, path=str(out))
    plan = Plan.from_json(record_of(open_checkpoint(target)))
    path = None if out == STANDARD else target
    return Outcome(report, plan, path, workspace.started_over)


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
    checkpoint: Checkpoint, target: Path, source: _Source, progress: Progress
) -> tuple[Evaluation | None, str]:
    """(how far the output is from the original on the held-out text, why that could not be
    evaluated)."""
    from svdcli.verbs.evaluate import evaluate

    # Both models are loaded at once, and in float32 a 16-bit one takes twice its bytes
    stored = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    both = 2 * (checkpoint.nbytes + stored)
    if both > _SHARE_TO_EVALUATE * free_memory():
        return None, f"both models at once may need {both / 1e9:.1f} GB"
    reading = source.reading
    if reading is None or reading.held_out is None:
        return None, "no text was held out"

    # The output is written by now: what fails here is told, and is no failure of compress
    try:
        evaluation = evaluate(
            target,
            reading.held_out,
            against=checkpoint.path,
            seq_len=reading.seq_len,
            samples=_WINDOWS_TO_EVALUATE,
            compute=source.compute,
            trust_remote_code=reading.trust_remote_code,
            progress=progress,
        )
    except SvdcliError as error:
        return None, str(error)
    return evaluation, ""


_SHARE_TO_EVALUATE = 0.8  # of free memory
_WINDOWS_TO_EVALUATE = 32  # of the held-out text; `eval` reads 128


def _predict(checkpoint: Checkpoint, asked: _Asked, crew: Workers) -> Outcome:
    """Decide as a run would, and predict its report and its time, without writing an output."""
    from svdcli.engine.costs import costs_of, speeds_here

    with tempfile.TemporaryDirectory(prefix="svdcli-") as folder:
        crew.check_shared(Path(folder) if asked.source.reading else None, checkpoint)
        moments = asked.source.file(checkpoint, Path(folder), crew, asked.progress)
        request = request_of(checkpoint, asked.recipe, asked.plan, moments)

        # A file is planned under the name that it will have, a directory under none
        name = None
        if not checkpoint.is_directory:
            name = out_path(checkpoint, asked.out, ".svd", "-svd").name
        run = request.run(checkpoint, crew.device, asked.progress, workers=crew)
        decided = make_plan(run, checkpoint, request, name)
        design = design_of(checkpoint, decided, name)
        return Outcome(
            predicted_report(design),
            decided,
            None,
            refused="" if asked.allow_larger else not_smaller(design),
            costs=costs_of(
                design,
                request.selected if goes_by_weights(request) else (),
                speeds_here(crew),
                spectra=measures_spectra(request),
                calibrated=request.calibration is not None,
            ),
            unchecked="" if goes_by_weights(request) else _UNCHECKED,
        )


_UNCHECKED = "that all weights are finite: none was read, and a run stops at one that is not"


# Deciding -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the calibration comes from: a file, a text that is read now, or nowhere."""

    path: str | Path | None
    reading: Reading | None
    metric: MetricName
    compute: Compute

    def file(
        self, checkpoint: Checkpoint, folder: Path, crew: Workers, progress: Progress
    ) -> str | Path | None:
        """The file of moments; one of the same text that an earlier run left in `folder` is used
        again. All ranks of a launch share the reading."""
        if self.reading is None:
            return self.path
        from svdcli.verbs import calibrate

        # The name of the file tells what was read: model, text, amount, and whether backwards too
        reading = self.reading
        amount = (reading.samples, reading.seq_len, reading.trust_remote_code, self._gradients)
        asked = (checkpoint.fingerprint(), reading.texts.digest, *amount, reading.precision)
        digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:16]
        moments = folder / f"{digest}.{MOMENTS}"
        if moments.exists():
            return moments

        # With the ranks of a launch, or in this process
        request = self._request(checkpoint.path, moments, progress)
        team = crew.meet((checkpoint.path, moments))
        if team is not None:
            calibrate.read_together(request, team)
        else:
            with crew.all_threads():
                calibrate.read_alone(request)
        return moments

    def read_with(self, team: Team, about: tuple[Path, Path]) -> None:
        """Share the reading with the rank that leads: about is which model it reads, and the file
        of moments that it will write."""
        from svdcli.verbs import calibrate

        calibrate.read_together(self._request(*about, silent), team)

    @property
    def _gradients(self) -> bool | None:
        """Are moments of gradients needed; None leaves that to the memory there is."""
        return {"inputs": False, "auto": None}.get(self.metric, True)

    def _request(self, model: Path, moments: Path, progress: Progress) -> calibrate.Request:
        from svdcli.calibration.work import Settings
        from svdcli.verbs.calibrate import Request

        assert self.reading is not None
        settings = Settings(
            texts=self.reading.texts,
            samples=self.reading.samples,
            seq_len=self.reading.seq_len,
            gradients=self._gradients,
            trust_remote_code=self.reading.trust_remote_code,
            progress=progress,
        )
        return Request(
            model=model,
            out=moments,
            settings=settings,
            precision=self.reading.precision,
            compute=self.compute,
            announce=self.reading.announce,
        )


# Writing ------------------------------------------------------------------------------------------


def _compress_into(
    workspace: Workspace,
    checkpoint: Checkpoint,
    request: Request,
    asked: _Asked,
    crew: Workers,
) -> None:
    """Decide, then write all layers; once more with those dense on which every solver failed."""
    from svdcli.engine.solve import UnsoundError

    name = workspace.out.name if workspace.is_file else None
    run = request.run(checkpoint, crew.device, asked.progress, workspace, crew)

    # Everything is decided, and a refusal leaves nothing behind
    with refusing(workspace):
        plan = make_plan(run, checkpoint, request, name)
        design = design_of(checkpoint, plan, name)
        check_smaller(design, asked.allow_larger)
    with refusing(workspace, UnsoundError):
        written, results, failed = write(run, design, plan.factored)

    if failed:
        # A layer that stays dense moves all that lies behind it: the files are laid out anew
        reasons = {layer: f"{SOLVERS_FAILED}: {why}" for layer, why in failed.items()}
        plan = in_one_dtype(checkpoint, plan.with_dense(reasons))
        size = design_of(checkpoint, plan, name).blueprint().total
        plan = noting_a_miss(plan, missed_target(plan, size))
        workspace.set_aside()
        written, results, _ = write(run, design_of(checkpoint, plan, name), plan.factored)
    else:
        # Checked again, since a longer record of fall-backs may have taken more room
        with refusing(workspace):
            check_smaller(written, asked.allow_larger)
    finish(run, written, results)
