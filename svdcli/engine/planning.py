"""From a checkpoint and a recipe to a plan: what is selected, measured and decided before any
work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from svdcli.engine.copies import copies_in, stored_once
from svdcli.engine.run import Run
from svdcli.errors import NothingSelectedError, SvdcliError, UsageError
from svdcli.files.blueprint import CompanionFile, CompressDesign, in_one_dtype
from svdcli.files.checkpoint import STANDALONE, Checkpoint
from svdcli.files.record import Result, make_record, record_of, source_json
from svdcli.files.report import MISSED, Report, report_of
from svdcli.files.workspace import Workspace
from svdcli.models import self_contained as standalone
from svdcli.plan.adapters import adapter_kind
from svdcli.plan.budget import missed_target, staying_dense
from svdcli.plan.decide import (
    UNSOUND,
    LayerSpectrum,
    decide,
    needs_spectra,
    rerun,
)
from svdcli.plan.groups import Group, groups_of
from svdcli.plan.layers import choose_layers, nothing_selected
from svdcli.plan.packing import Packing
from svdcli.plan.parts import part_configs
from svdcli.plan.plan import Plan, Skipped, TextRead
from svdcli.plan.recipe import Recipe
from svdcli.plan.roles import Roles
from svdcli.plan.spending import chooses_packings
from svdcli.plan.tables import tables_of, with_tables
from svdcli.plan.tensors import TensorInfo
from svdcli.plan.words import option_of
from svdcli.progress import Progress
from svdcli.ranks import LostRankError

if TYPE_CHECKING:
    import torch

    from svdcli.engine.calibrated import Calibration
    from svdcli.engine.executor import Workers
    from svdcli.models.kinds import Kinds


@dataclass(frozen=True)
class Request:
    """What is to be decided about: the recipe, the plan it came from if any, and the layers."""

    recipe: Recipe
    plan: Plan | None
    selected: tuple[TensorInfo, ...]
    skipped: tuple[Skipped, ...]
    fingerprint: str
    calibration: Calibration | None = None

    def run(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        progress: Progress,
        workspace: Workspace | None = None,
        workers: Workers | None = None,
    ) -> Run:
        """The run that decides about it, and writes it where there is a workspace."""
        seed = self.recipe.seed
        return Run(checkpoint, device, progress, workspace, self.calibration, seed, workers)


def check_source(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises SvdcliError for an input that is no original: written by svdcli, an adapter, or
    quantised; UsageError for options that do not fit it."""
    _check_original(checkpoint)
    if recipe.saves_bytes:
        _check_not_quantised(checkpoint)
    if recipe.group_size != 64 and recipe.bits in ("8", "16"):
        raise UsageError(
            f"--group-size changes nothing at {recipe.bits} bits, which have no groups",
            "leave it out",
        )
    if recipe.self_contained:
        _check_takes_code(checkpoint)
    if recipe.max_shard_size is not None and not checkpoint.is_directory:
        raise UsageError("--max-shard-size is for directories", "leave it out for a single file")


def _check_original(checkpoint: Checkpoint) -> None:
    """Raises SvdcliError where the matrices are low-rank factors already."""
    if record_of(checkpoint) is not None:
        raise SvdcliError(
            f"{checkpoint.shown} was written by svdcli already",
            "start from the original, or expand it first",
        )
    adapter = adapter_kind(checkpoint.infos, checkpoint.carried)
    if adapter:
        raise SvdcliError(
            f"{checkpoint.shown} is {adapter}, whose matrices are small factors already",
            "merge it into its base model (PEFT: merge_and_unload), and compress that",
        )


def _check_not_quantised(checkpoint: Checkpoint) -> None:
    """Raises SvdcliError where config.json, or that of a part, tells of quantised weights."""
    config = checkpoint.config or {}
    for part in (config, *(part for _, part in part_configs(config))):
        quantisation = part.get("quantization_config")
        if not quantisation:
            continue
        method = "another tool"
        if isinstance(quantisation, dict):
            method = quantisation.get("quant_method", method)
        raise SvdcliError(
            f"{checkpoint.shown} is quantised by {method}", "start from the unquantised model"
        )


def _check_takes_code(checkpoint: Checkpoint) -> None:
    """Raises UsageError where no Python file can be put beside the weights for transformers."""
    if not (checkpoint.is_directory and checkpoint.transformers_opens_it):
        raise UsageError(
            "--self-contained is for directories with a config.json of transformers",
            "leave it out",
        )
    if (checkpoint.config or {}).get("auto_map"):
        raise UsageError(
            f"{checkpoint.shown} brings its own code (auto_map)", "leave out --self-contained"
        )


def request_of(
    checkpoint: Checkpoint, recipe: Recipe, plan: Plan | None, calibration: str | Path | None
) -> Request:
    """The layers that a plan names, or else that the recipe selects, and the calibration that they
    are decided with. Raises SvdcliError where there are none, or the calibration does not fit."""
    fingerprint = checkpoint.fingerprint()
    recipe, opened = _calibrated(recipe, calibration, fingerprint, checkpoint.shown)
    if plan is not None:
        plan = rerun(plan, {info.name: info for info in checkpoint.infos}, fingerprint)
        selected, skipped = plan.originals, plan.skipped
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
    return Request(recipe, plan, selected, skipped, fingerprint, opened)


def _calibrated(
    recipe: Recipe, calibration: str | Path | None, fingerprint: str, shown: str
) -> tuple[Recipe, Calibration | None]:
    """The recipe with the digest of its calibration, and the calibration, checked to be of this
    model."""
    if calibration is None:
        _check_needs_none(recipe)
        return recipe, None
    from svdcli.calibration.moments import check_provenance, open_moments
    from svdcli.engine.calibrated import Calibration, check_metric

    moments = open_moments(calibration)
    check_provenance(moments, fingerprint, shown)
    if recipe.calibration not in (None, moments.digest):
        raise UsageError(
            f"{calibration} is not the calibration that the plan was made with", "give the same one"
        )
    check_metric(recipe, moments)
    return replace(recipe, calibration=moments.digest), Calibration(moments, recipe.metric)


def _check_needs_none(recipe: Recipe) -> None:
    """Raises UsageError for a recipe that means nothing without a calibration."""
    if recipe.calibration is not None:
        raise UsageError(
            "the plan was made with a calibration", "give the same one with --calibration"
        )
    if recipe.metric != "auto":
        raise UsageError(
            f"--metric {recipe.metric} says how a calibration counts", "give --calibration too"
        )
    if recipe.share == "always":
        raise UsageError(
            "--share always goes by what layers read, which a calibration knows",
            "give --text or --calibration too",
        )


def make_plan(run: Run, checkpoint: Checkpoint, request: Request, name: str | None) -> Plan:
    """Measure the weights, then fix every rank. Nothing is written but lines of the journal.

    No weights are read where the plan does not go by them: whether they are finite is then found
    by the jobs. Raises UnsoundError for weights that are found not to be, unless such layers are to
    stay dense, and NothingSelectedError where no layer would shrink.
    """
    from svdcli.engine.solve import check_finite
    from svdcli.engine.spectra import measure_spectra

    # A plan has its ranks: of the weights it only needs to know that they are finite.
    recipe = request.recipe
    spectra = measures_spectra(request)
    packed_for = None
    if request.plan is None and chooses_packings(recipe):
        packed_for = recipe
    groups = _groups(checkpoint, request) if spectra else ()
    if not goes_by_weights(request):
        measured = {tensor.name: LayerSpectrum(finite=True) for tensor in request.selected}
    else:
        measured = measure_spectra(
            run, request.selected, spectra=spectra, recipe=packed_for, groups=groups
        )
    kinds = _kinds_of(checkpoint, request)
    for name in measured.keys() & kinds.misfits.keys():
        measured[name] = replace(measured[name], misfit=kinds.misfits[name])
    bad = [tensor.name for tensor in request.selected if not measured[tensor.name].finite]
    if recipe.nonfinite == "error":
        check_finite(bad, checkpoint.shown)

    # every rank, or the saved ones
    selected = {tensor.name for tensor in request.selected}
    equal = copies_in(checkpoint, selected, factors=recipe.keeps_factors)
    if request.plan is not None:
        saved = stored_once(checkpoint, _with_its_text(request.plan, request), equal)
        plan = _rerun(checkpoint, saved, name, bad)
        plan = replace(plan, notes=tuple(dict.fromkeys((*plan.notes, *checkpoint.notes))))
    else:
        plan = _decide_ranks(checkpoint, request, name, measured, kinds, groups, equal)
    if not plan.factored:
        raise _nothing_shrinks(checkpoint, plan)
    return plan


def measures_spectra(request: Request) -> bool:
    """Do the ranks go by singular values that are still to be measured."""
    return request.plan is None and needs_spectra(request.recipe)


def goes_by_weights(request: Request) -> bool:
    """Does the plan depend on the numbers in the weights, and not on shapes alone."""
    calibrated = request.calibration is not None
    return measures_spectra(request) or calibrated or request.recipe.nonfinite == "skip"


def _groups(checkpoint: Checkpoint, request: Request) -> tuple[Group, ...]:
    """The groups of layers that read the same input in the calibration, and that are compared by
    what they cost the model: for that gradients must count."""
    recipe, calibration = request.recipe, request.calibration
    if calibration is None or recipe.share == "never" or recipe.allocate != "global":
        return ()
    by_gradients = calibration.moments.provenance.gradients and recipe.metric != "inputs"
    if not by_gradients or not recipe.keeps_factors:
        return ()
    apart = checkpoint.in_stacks | checkpoint.tied.keys()
    single = [tensor for tensor in request.selected if tensor.name not in apart]
    return groups_of(single, calibration.inputs())


def _nothing_shrinks(checkpoint: Checkpoint, plan: Plan) -> NothingSelectedError:
    """The error of a plan that leaves every layer as it is."""
    reason = plan.layers[0].reason or "nothing to do"
    hint = ""
    if plan.recipe.target in ("size", "keep_bytes"):
        hint = "a smaller budget, or another layout, may change that"
    if plan.recipe.packs_whole:
        hint = "leave out --layout dense: svdcli's own layouts take more kinds of layers"
    return NothingSelectedError(
        f"no layer of {checkpoint.shown} would shrink ({plan.layers[0].tensor.name}: {reason})",
        hint,
    )


def _decide_ranks(
    checkpoint: Checkpoint,
    request: Request,
    name: str | None,
    measured: Mapping[str, LayerSpectrum],
    kinds: Kinds,
    groups: Sequence[Group],
    equal: Mapping[str, str],
) -> Plan:
    notes = (*checkpoint.notes, *_little_read(request), *_no_longer_tied(checkpoint, request))
    if kinds.unknown:
        notes = (*notes, f"layers were not compared with the model's class: {kinds.unknown}")

    tables: set[str] = set()
    if request.recipe.embedding_bits != "16":
        roles = Roles(checkpoint.infos, checkpoint.facts)
        tables = tables_of(checkpoint.infos, request.skipped, roles)
        if not tables:
            raise UsageError(
                f"{checkpoint.shown} has no embedding table to pack", "leave out --embedding-bits"
            )

    def complete(plan: Plan) -> Plan:
        plan = stored_once(checkpoint, with_tables(in_one_dtype(checkpoint, plan), tables), equal)
        plan = replace(plan, notes=(*plan.notes, *notes, *_mixed(plan)))
        return _with_its_text(replace(plan, ignored=_ignored(plan, kinds)), request)

    def predict(plan: Plan) -> int:
        return design_of(checkpoint, complete(plan), name).blueprint().total

    unit = "" if request.calibration is None else request.calibration.unit
    plan = complete(
        decide(
            request.recipe,
            request.fingerprint,
            request.selected,
            request.skipped,
            measured,
            predict,
            unit,
            groups,
        )
    )
    _check_experts(plan, kinds)
    return plan


def _check_experts(plan: Plan, kinds: Kinds) -> None:
    """Raises SvdcliError where transformers would stack experts that are packed in different ways,
    or not all packed."""
    packings = {layer.tensor.name: layer.packing for layer in plan.factored}
    apart = [name for name in kinds.stacked if packings.get(name) != packings.get(kinds.stacked[0])]
    dense = [name for name in kinds.stacked if name not in packings]
    if dense or apart:
        reasons = {layer.tensor.name: layer.reason for layer in plan.layers if layer.reason}
        first = (dense or apart)[0]
        why = reasons.get(first, "not selected" if dense else "other bits than the first")
        what = _packing_for_all(plan, kinds.stacked) or "select all of them with the same bits"
        raise SvdcliError(
            f"transformers stacks the experts, and opens them packed alike alone: {first} is not "
            f"({why})",
            f"{what}, or leave out --layout dense",
        )


def _packing_for_all(plan: Plan, names: Sequence[str]) -> str:
    """The option that packs all of these layers, where their columns are why some are not packed;
    empty where there is none."""
    columns = {tensor.shape[1] for tensor in plan.originals if tensor.name in names}
    if not any(packing.misfit(n) for packing in plan.recipe.packings for n in columns):
        return ""
    for other in (Packing(4, 64), Packing(4, 32), Packing(8)):
        if not any(other.misfit(n) for n in columns):
            option = "--bits 8" if other.bits == 8 else f"--group-size {other.group}"
            return f"give {option}, which fits all of them"
    return ""


def _kinds_of(checkpoint: Checkpoint, request: Request) -> Kinds:
    """What the modules of the model's class are, where other loaders are to find packed weights in
    them."""
    from svdcli.models.kinds import Kinds, kinds_of

    opens = checkpoint.is_directory and checkpoint.transformers_opens_it
    if not (request.recipe.packs_whole and opens):
        return Kinds()
    matrices = [info.name for info in checkpoint.infos if len(info.shape) == 2]
    return kinds_of(checkpoint, matrices, [tensor.name for tensor in request.selected])


def _mixed(plan: Plan) -> tuple[str, ...]:
    """A note where the layers of another loader's checkpoint have different bits."""
    if not plan.recipe.packs_whole or len({layer.packing for layer in plan.factored}) < 2:
        return ()
    return (
        "layers have 8 or 4 bits: vLLM opens that only where the layers that it fuses (query, key "
        "and value, gate and up) are alike",
    )


def _ignored(plan: Plan, kinds: Kinds) -> tuple[str, ...]:
    """Linear modules of the class that are not packed and that no layer of the plan is called
    after. The usual name of a tied head, where the class is not known."""
    packed = {layer.tensor.module for layer in plan.factored}
    if kinds.unknown:
        return ("lm_head",)
    return tuple(path for path, layer in kinds.linear.items() if layer not in (path, *packed))


def _with_its_text(plan: Plan, request: Request) -> Plan:
    """The plan with what the calibration behind it has read."""
    if request.calibration is None:
        return plan
    read = request.calibration.moments.provenance
    return replace(
        plan,
        calibration=TextRead(read.text, read.text_sha256, read.samples, read.seq_len, read.tokens),
    )


def _rerun(checkpoint: Checkpoint, saved: Plan, name: str | None, bad: Sequence[str]) -> Plan:
    """A saved plan, with the layers dense that cannot be factored here.

    A note tells where it misses the budget it was made for. Raises UsageError where those layers
    are the reason.
    """
    plan = in_one_dtype(checkpoint, saved.with_dense(dict.fromkeys(bad, f"holds {UNSOUND}")))
    missed = missed_target(plan, design_of(checkpoint, plan, name).blueprint().total)
    if not missed:
        return plan
    if bad and not missed_target(saved, design_of(checkpoint, saved, name).blueprint().total):
        dense = {layer.tensor.name: layer.reason for layer in plan.layers if layer.rank is None}
        why = staying_dense(dense, len(plan.layers))
        hint = f"make a new plan of this model: {option_of(plan.recipe.target)} without --plan"
        raise UsageError(f"the plan does not meet its target here: {missed}, since {why}", hint)
    return noting_a_miss(plan, missed)


def _little_read(request: Request) -> tuple[str, ...]:
    """A note where the calibration cannot have seen every direction of some layer's input."""
    if request.calibration is None:
        return ()
    moments = request.calibration.moments
    widths = [
        t.shape[0 if moments.layers[t.name]["transposed"] else 1]
        for t in request.selected
        if t.name in moments.layers
    ]
    tokens, widest = moments.provenance.tokens, max(widths, default=0)
    if tokens >= widest:
        return ()
    return (
        f"the calibration read {tokens} tokens, fewer than the {widest} inputs of a layer: "
        f"expect more loss than predicted",
    )


def _no_longer_tied(checkpoint: Checkpoint, request: Request) -> tuple[str, ...]:
    """A note for each head or embedding that is factored while its equal copy in the file is
    not."""
    facts, selected = checkpoint.facts, {tensor.name for tensor in request.selected}
    if facts is None or facts.tied is False:
        return ()
    apart = [
        pair
        for pair in Roles(checkpoint.infos, facts).copies()
        if len({t.name for t in pair} & selected) == 1
    ]
    return tuple(
        f"{head.module} and {table.module} hold the same numbers: tied before, they are two "
        f"weights now; name both to keep one"
        for head, table in apart
        if checkpoint.look_equal(head.name, table.name)
    )


def design_of(checkpoint: Checkpoint, plan: Plan, name: str | None) -> CompressDesign:
    """The output of a plan; name is that of a single file, None for a directory."""
    code = model_code() if plan.recipe.self_contained else None
    return CompressDesign(checkpoint, plan, name, code)


def model_code() -> CompanionFile:
    """The Python file of `--self-contained`, and what config.json says about it."""
    return CompanionFile(STANDALONE, standalone.standalone_source(), standalone.auto_map())


def predicted_report(design: CompressDesign) -> Report:
    """The report of an output that was not written, without measured errors."""
    checkpoint, plan = design.checkpoint, design.plan
    sizes = design.blueprint().sizes()
    planned = {layer.tensor.name: Result(0.0, layer.solver) for layer in plan.factored}
    source = source_json(checkpoint, plan.fingerprint)
    record = make_record(plan, source, checkpoint.left_out, checkpoint.left_out_bytes, planned)
    return report_of(record, sizes, checkpoint.shown, predicted=True)


@contextmanager
def refusing(workspace: Workspace, kind: type[SvdcliError] = SvdcliError) -> Iterator[None]:
    """A refusal, of this kind, leaves nothing behind but a calibration that was made on the way,
    and says where that is. A rank that is lost refuses nothing."""
    try:
        yield
    except LostRankError:
        raise
    except kind as error:
        if workspace.give_up():
            kept = f"the calibration waits in {workspace.folder} for the next try"
            error.hint = "; ".join(filter(None, (error.hint, kept)))
        raise


def check_smaller(design: CompressDesign, allow_larger: bool) -> None:
    """Raises SvdcliError where the output would be no smaller than its source."""
    larger = not_smaller(design)
    if larger and not allow_larger:
        how = "--exclude what hardly shrinks"
        if design.checkpoint.quantised:  # of which what stays as it is takes more than before
            how = "take fewer --bits"
        raise SvdcliError(larger, f"cut more, {how}, or write it all the same with --allow-larger")


def not_smaller(design: CompressDesign) -> str:
    """What is wrong with an output that is no smaller than its source; empty where it is, or in a
    layout that never is."""
    if not design.plan.recipe.saves_bytes:
        return ""
    size, source = design.blueprint().total, design.source_bytes
    if size < source:
        return ""
    too_many = f"the output would have {size} bytes, no fewer than the {source} of its source"
    if design.checkpoint.quantised:
        return f"{too_many}, which is stored in 8 or 4 bits and read as numbers of more"
    saved = sum(
        layer.tensor.nbytes - sum(part.nbytes for part in layer.stored())
        for layer in design.plan.factored
    )
    return f"{too_many}: layers save {saved}, headers and the record take more"


def noting_a_miss(plan: Plan, missed: str) -> Plan:
    """The plan with a note of the target that it misses, where it misses one."""
    note = f"{MISSED} {missed}"
    return plan if not missed or note in plan.notes else replace(plan, notes=(*plan.notes, note))
