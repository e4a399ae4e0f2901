"""argv -> one call -> one rendering."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

import svdcli
from svdcli import startup
from svdcli.cli.options import (
    AgainstToBench,
    AgainstToEval,
    AgainstToVerify,
    Allocate,
    AllowLarger,
    Bits,
    CalibrationFile,
    Carry,
    Csv,
    CsvOfMeasures,
    Device,
    DryRun,
    DtypeOfFactors,
    DtypeOfOnnx,
    DtypeToEval,
    EmbeddingBits,
    Energy,
    Error,
    EveryLayer,
    Exclude,
    Floor,
    Force,
    Group,
    GroupSize,
    Include,
    Jobs,
    Json,
    JsonBesidePipe,
    Keep,
    KeepBytes,
    LayersFrom,
    Layout,
    MaxShardSize,
    Metric,
    Model,
    MultipleOf,
    NewTokensToBench,
    NewTokensToEval,
    Nonfinite,
    Out,
    OutOfCalibrate,
    OutOfHeal,
    Output,
    OutputOrModel,
    OutputOrNewest,
    OutputOrPipe,
    OutputWithFactors,
    Parts,
    PlanFile,
    Precision,
    Quiet,
    Rank,
    Samples,
    SamplesToEval,
    SamplesToHeal,
    SavePlan,
    SeedOfLabels,
    SeedOfOrder,
    SeedOfSolver,
    SelfContained,
    SeqLen,
    SeqLenToRead,
    Share,
    Size,
    Solver,
    StateDict,
    Stdlib,
    StdlibToRead,
    Text,
    TextToRead,
    Threads,
    TrustCode,
    at_least_one,
    check_plan_path,
    check_samples,
    compute_from,
    read_layers,
    read_part,
    read_plan,
    read_wanted,
    write_plan,
)
from svdcli.cli.panels import PanelledCommand
from svdcli.cli.process import (
    interruptible,
    one_line_errors,
    one_rank_writes,
    open_closed_streams,
    outlive_readers,
    print_note,
)
from svdcli.errors import INTERRUPTED, OK, SvdcliError, UsageError, printable
from svdcli.plan import words
from svdcli.ranks import leads_here
from svdcli.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from svdcli.calibration.work import Forecast
    from svdcli.files.report import Report
    from svdcli.plan.recipe import Wanted
    from svdcli.progress import Progress
    from svdcli.text.texts import Texts
    from svdcli.verbs.calibrate import Calibrated
    from svdcli.verbs.compress import Reading
    from svdcli.verbs.outcome import Outcome


# What takes long to import, as rich and torch do, is imported where it is used: `--help` and
# completion need neither.
app = typer.Typer(
    name="svdcli",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="Make neural-network checkpoints smaller by low rank.\n\n"
    "Each chosen linear layer is replaced by the factors of its truncated SVD; what comes out is "
    "a checkpoint again.",
    epilog="svdcli help lists the pages of the documentation. Exit codes: 0 done, 1 failed, "
    "2 usage, 3 nothing selected, 130 interrupted (the same command continues).",
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"svdcli {__version__}")
        raise typer.Exit
    # A bare `svdcli` is no command: it shows the help, and ends as a usage error does
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command(
    epilog="Example: svdcli compress my-llm/ --keep 0.6 --allocate global --json | jq "
    ".total.saved_bytes"
)
def compress(
    context: typer.Context,
    model: Model,
    output: Out = None,
    rank: Rank = None,
    keep: Keep = None,
    keep_bytes: KeepBytes = None,
    size: Size = None,
    energy: Energy = None,
    error: Error = None,
    text: Text = None,
    stdlib: Stdlib = False,
    calibration: CalibrationFile = None,
    metric: Metric = "auto",
    samples: Samples = None,
    seq_len: SeqLen = None,
    precision: Precision = words.PRECISION,
    trust_remote_code: TrustCode = False,
    allocate: Allocate = None,
    floor: Floor = None,
    multiple_of: MultipleOf = 1,
    include: Include = None,
    exclude: Exclude = None,
    layers: LayersFrom = None,
    state_dict: StateDict = None,
    carry: Carry = None,
    layout: Layout = None,
    bits: Bits = None,
    group_size: GroupSize = 64,
    embedding_bits: EmbeddingBits = "16",
    share: Share = "auto",
    dtype: DtypeOfFactors = None,
    solver: Solver = "auto",
    device: Device = "auto",
    seed: SeedOfSolver = 0,
    threads: Threads = None,
    jobs: Jobs = None,
    max_shard_size: MaxShardSize = None,
    self_contained: SelfContained = False,
    nonfinite: Nonfinite = "error",
    plan_file: PlanFile = None,
    save_plan: SavePlan = None,
    dry_run: DryRun = False,
    force: Force = False,
    allow_larger: AllowLarger = False,
    every_layer: EveryLayer = False,
    json_: JsonBesidePipe = False,
    csv_: Csv = False,
    quiet: Quiet = False,
) -> None:
    """Factor the layers of MODEL and write a smaller checkpoint.

    Give exactly one target (or --plan). The output is MODEL's stem with .svd.safetensors, or its
    name with -svd.
    """
    # What was asked
    _check_standard_input({"the model": model, "the list of layers": layers, "the text": text})
    _check_one_format(json_, csv_)
    if save_plan is not None:
        check_plan_path(Path(save_plan), model, output)
    reading = None
    if text or stdlib:
        _tell_code(trust_remote_code, model)
        reading = _reading(text, stdlib, samples, seq_len, precision, trust_remote_code, quiet)
    plan = None
    wanted: Wanted = {}
    if plan_file is None:
        # Options have the names that `Wanted` has, and are passed on by them
        wanted = read_wanted(context.params)
    else:
        _check_nothing_beside_a_plan(context)
        plan = read_plan(plan_file)

    # The work
    with _working(quiet) as progress:
        outcome = svdcli.compress(
            model,
            output,
            plan=plan,
            calibration=calibration,
            reading=reading,
            state_dict=state_dict,
            carry=carry or (),
            compute=compute_from(device, threads, jobs),
            force=force,
            allow_larger=allow_larger,
            dry_run=dry_run,
            progress=progress,
            **wanted,
        )

    # What came of it
    if save_plan is not None:
        write_plan(save_plan, outcome.plan)
    _tell_outcome(outcome, quiet)
    if outcome.refused:
        print_note(f"a run would stop: {outcome.refused}; --allow-larger lets it go on")
    _show_outcome(outcome, _data_stream(output), json_, csv_, quiet, grouped=not every_layer)
    _check_solvers(outcome.report)


def _check_standard_input(inputs: dict[str, str | None]) -> None:
    """Raises UsageError where several inputs, by what they are called, would share it."""
    piped = [name for name, path in inputs.items() if path == "-"]
    if len(piped) > 1:
        raise UsageError(
            f"standard input cannot be both {piped[0]} and {piped[1]}",
            "write one of them to a file",
        )


def _check_one_format(json_: bool, csv_: bool) -> None:
    if json_ and csv_:
        raise UsageError("--json and --csv exclude each other", "choose one")


def _check_solvers(report: Report) -> None:
    """An output with layers on which every solver failed is written, and is an error."""
    if not report.failed:
        return
    from svdcli.files.report import MISSED

    # The target may be missed for the same reason
    first, *others = report.failed
    and_others = f" and {len(others)} more" if others else ""
    missed = "".join(f", and {note}" for note in report.notes if note.startswith(MISSED))
    raise SvdcliError(
        f"every solver failed on {first}{and_others}; what failed stayed dense{missed}",
        "see the report",
    )


def _check_nothing_beside_a_plan(context: typer.Context) -> None:
    """Raises UsageError for an option that says what a plan has decided already."""
    from svdcli.plan.recipe import WANTED

    # Given at all, even with the value that it has by default
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.name in WANTED and source is not None and source.name != "DEFAULT":
            raise UsageError(
                f"--plan decides by itself, and {parameter.opts[0]} would change nothing",
                "leave one of them out",
            )


def _reading(
    text: str | None,
    stdlib: bool,
    samples: int | None,
    seq_len: int | None,
    precision: words.Precision,
    trust_remote_code: bool,
    quiet: bool,
) -> Reading:
    """The text to calibrate on, with what it will cost told before it starts."""
    from svdcli.verbs.compress import Reading

    check_samples(samples)
    texts = _read_text(text, stdlib=stdlib, held_out=False)

    # The standard library has modules set apart; of other text the last tenth is held out
    if stdlib:
        held_out = _read_text(None, stdlib=True, held_out=True)
    else:
        texts, held_out = texts.split(0.9)
    return Reading(
        texts, held_out, samples, seq_len, trust_remote_code, precision, _announce(quiet)
    )


def _read_text(path: str | None, *, stdlib: bool, held_out: bool) -> Texts:
    """The text of --text or --stdlib; files of a folder that are none are told."""
    from svdcli.text.texts import read_texts

    texts = read_texts(path, stdlib=stdlib, held_out=held_out)
    if texts.passed_over:
        count, first = len(texts.passed_over), printable(texts.passed_over[0])
        print_note(
            f"{printable(texts.name)}: files that are not UTF-8 are passed over: {count}, such "
            f"as {first}"
        )
    return texts


def _tell_outcome(outcome: Outcome, quiet: bool) -> None:
    """Tell on standard error where the output is."""
    if quiet:
        return
    if outcome.started_over:
        print_note(
            "an earlier run with other settings had left a partial output; this one started over"
        )
    if outcome.path is not None:
        print_note(f"wrote {outcome.path}")


@app.command(
    epilog="Example: svdcli report my-llm-svd --json | jq '.layers[] | {name, rank, "
    "relative_error}'"
)
def report(
    output: OutputOrNewest = None,
    group: Group = None,
    json_: Json = False,
    csv_: Csv = False,
) -> None:
    """Show what an output saved and cost, by layer and in all.

    Without OUT the newest output in the current folder; - reads one from standard input.
    """
    from svdcli.render import tables

    savings = svdcli.report(output)
    rows = [asdict(row) for row in savings.layers]
    wants_table = _print_for_programs(savings.to_json(), rows, json_, csv_, sys.stdout)
    if wants_table:
        grouped = len(rows) > tables.MANY if group is None else group
        tables.print_report(savings, sys.stdout, grouped=grouped)


@app.command(
    epilog="Example: svdcli inspect my-llm --names | grep mlp | svdcli compress my-llm "
    "--layers-from - --keep 0.5"
)
def inspect(
    model: Model,
    include: Include = None,
    exclude: Exclude = None,
    state_dict: StateDict = None,
    names: Annotated[
        bool, typer.Option("--names", help="Only the names of the selected layers, one a line.")
    ] = False,
    json_: Json = False,
    csv_: Csv = False,
) -> None:
    """List what is in MODEL and what compress would select.

    Each layer with the rank up to which it gains.
    """
    from svdcli.render import machine, tables

    inspection = svdcli.inspect(
        model, include=include or (), exclude=exclude or (), state_dict=state_dict
    )
    if names:
        machine.print_lines([row.name for row in inspection.selected], sys.stdout)
        return
    rows = [asdict(row) for row in inspection.tensors]
    wants_table = _print_for_programs(inspection.to_json(), rows, json_, csv_, sys.stdout)
    if wants_table:
        tables.print_inspection(inspection, sys.stdout)


@app.command(epilog="Example: svdcli spectrum my-llm --include '*.mlp.*' --csv > spectrum.csv")
def spectrum(
    model: Model,
    include: Include = None,
    exclude: Exclude = None,
    layers_from: LayersFrom = None,
    state_dict: StateDict = None,
    device: Device = "auto",
    threads: Threads = None,
    json_: Json = False,
    csv_: Csv = False,
    quiet: Quiet = False,
) -> None:
    """Measure the singular values of each selected layer.

    Effective rank, rank for 90, 95 and 99 % of the energy, decay.
    """
    from svdcli.render import tables

    with _working(quiet) as progress:
        spectra = svdcli.spectrum(
            model,
            include=include or (),
            exclude=exclude or (),
            layers=read_layers(layers_from),
            state_dict=state_dict,
            compute=compute_from(device, threads),
            progress=progress,
        )
    rows = [asdict(row) for row in spectra.layers]
    wants_table = _print_for_programs(spectra.to_json(), rows, json_, csv_, sys.stdout)
    if wants_table:
        tables.print_spectrum(spectra, sys.stdout)


@app.command(epilog="Example: svdcli expand my-llm-svd -o my-llm-dense")
def expand(
    output: OutputOrPipe,
    dense: Out = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Turn an output of compress back into a dense checkpoint.

    It has the original names, shapes and dtypes, and any loader opens it.
    """

    with _working(quiet) as progress:
        path = svdcli.expand(output, dense, force=force, progress=progress)
    # None where it went to standard output
    if path is not None and not quiet:
        print_note(f"wrote {path}")


@app.command(epilog="Example: svdcli verify my-llm-svd --against my-llm")
def verify(
    output: Output,
    against: AgainstToVerify = None,
    json_: Json = False,
    csv_: Csv = False,
    quiet: Quiet = False,
) -> None:
    """Check that an output still holds what its record says.

    SHA-256, headers and plan; against the original also the errors, the copies
    and the sizes in config.json.
    """
    from svdcli.render import tables

    with _working(quiet) as progress:
        verification = svdcli.verify(output, against, progress=progress)
    rows = [asdict(check) for check in verification.checks]
    wants_table = _print_for_programs(verification.to_json(), rows, json_, csv_, sys.stdout)
    if wants_table and not quiet:
        tables.print_verification(verification, sys.stdout)

    # A failed check is an error, and what to do depends on which one it is
    if not verification.ok:
        bad = next(check for check in verification.checks if not check.ok)
        hint = "write the output again"
        if bad.check == "source":
            hint = "give the model that it was made from"
        elif bad.detail.startswith("came"):
            hint = "move it elsewhere"
        raise SvdcliError(
            f"{output} does not verify: {bad.check}, {bad.subject} ({bad.detail})", hint
        )


@app.command(
    epilog="Example: svdcli eval my-llm-svd --against my-llm --text held-out.txt --prompt 'def '",
    name="eval",
)
def eval_(
    output: OutputOrModel,
    against: AgainstToEval = None,
    text: TextToRead = None,
    stdlib: StdlibToRead = False,
    samples: SamplesToEval = 128,
    seq_len: SeqLenToRead = None,
    trust_remote_code: TrustCode = False,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt", help="Print both continuations of this, side by side. Repeatable."
        ),
    ] = None,
    new_tokens: NewTokensToEval = 48,
    dtype: DtypeToEval = None,
    device: Device = "auto",
    threads: Threads = None,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure on text how good a model is, beside its original.

    Perplexity with its error, and the distance from the original. Encoders are compared by the
    cosine similarity of their sentence embeddings.
    """
    from svdcli.render import machine, tables

    # What was asked: prompts alone need no text
    texts = None
    if text or stdlib or not prompt:
        texts = _read_text(text, stdlib=stdlib, held_out=True)
    at_least_one("--samples", samples)
    at_least_one("--new-tokens", new_tokens)
    _tell_code(trust_remote_code, output, against)
    compute = compute_from(device, threads)
    torch_dtype = None
    if dtype is not None:
        from svdcli.files.dtypes import TORCH_DTYPES

        torch_dtype = TORCH_DTYPES[words.STORED_AS[dtype]]

    with _working(quiet) as progress:
        evaluation = svdcli.evaluate(
            output,
            texts,
            against=against,
            seq_len=seq_len,
            samples=samples,
            prompts=prompt or (),
            new_tokens=new_tokens,
            compute=compute,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if json_:
        machine.print_json(evaluation.to_json(), sys.stdout)
    elif not quiet:
        tables.print_evaluation(evaluation, sys.stdout)


@app.command(epilog="Example: svdcli calibrate my-llm --text corpus/ -o stats.safetensors")
def calibrate(
    model: Model,
    output: OutOfCalibrate,
    text: Text = None,
    stdlib: Stdlib = False,
    samples: Samples = None,
    seq_len: SeqLen = None,
    trust_remote_code: TrustCode = False,
    gradients: Annotated[
        bool | None,
        typer.Option(
            "--gradients/--no-gradients",
            help="Moments of the loss gradients too; by default where memory allows.",
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity", help="Also measure what the output loses when each layer alone is cut."
        ),
    ] = False,
    precision: Precision = words.PRECISION,
    part: Annotated[
        str | None,
        typer.Option(
            "--part",
            help="Read one part of the text alone, such as 2/8; merge-moments adds the parts up.",
            metavar="K/N",
        ),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    seed: SeedOfLabels = 0,
    device: Device = "auto",
    threads: Threads = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read text with MODEL and write what its layers see.

    And how much their outputs matter: what compress --calibration takes. The model is in memory a
    block at a time. Under torchrun each rank reads its share of the text.
    """
    # What was asked
    check_samples(samples)
    numbers = None if part is None else read_part(part)
    texts = _read_text(text, stdlib=stdlib, held_out=False)
    _tell_code(trust_remote_code, model)
    with _working(quiet) as progress:
        calibrated = svdcli.calibrate(
            model,
            output,
            texts,
            samples=samples,
            seq_len=seq_len,
            gradients=gradients,
            sensitivity=sensitivity,
            precision=precision,
            part=numbers,
            include=include or (),
            exclude=exclude or (),
            seed=seed,
            compute=compute_from(device, threads),
            force=force,
            trust_remote_code=trust_remote_code,
            announce=_announce(quiet),
            progress=progress,
        )
    _tell_calibrated(calibrated, json_, quiet)


@app.command(
    name="merge-moments",
    epilog="Example: svdcli merge-moments part-*.safetensors -o stats.safetensors",
)
def merge_moments(
    parts: Parts,
    output: OutOfCalibrate,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add up parts of a calibration to the file of moments.

    Parts are what calibrate --part wrote on several machines; every part of the text is needed,
    once, in whichever order.
    """
    with _working(quiet):
        calibrated = svdcli.merge_moments(parts, output, force=force)
    _tell_calibrated(calibrated, json_, quiet)


def _tell_calibrated(calibrated: Calibrated, json_: bool, quiet: bool) -> None:
    """Tell what was measured, and which layers saw nothing."""
    from svdcli.render import machine, words

    if not quiet:
        print_note(
            f"wrote {calibrated.path}: {calibrated.layers} layers, {calibrated.inputs} distinct "
            f"inputs, {words.human(calibrated.bytes, 'B')}"
        )
        if calibrated.tokens < calibrated.widest and not calibrated.part:
            print_note(
                f"{calibrated.tokens} tokens are fewer than the {calibrated.widest} inputs of a "
                "layer: what compresses with this loses more than predicted"
            )
        for name in calibrated.uncalibrated[:3]:
            print_note(
                f"{printable(name)} saw no input, and stays dense when compress uses this "
                f"({len(calibrated.uncalibrated)} such)"
            )
        if calibrated.saw_few:
            print_note(
                f"{printable(calibrated.saw_few[0])} read fewer tokens than it has inputs, and "
                f"leans on the average of its layer's experts ({len(calibrated.saw_few)} such)"
            )
    if json_:
        machine.print_json(calibrated.to_json(), sys.stdout)


@app.command(epilog="Example: svdcli heal my-llm-svd --teacher my-llm --text corpus/ --minutes 30")
def heal(
    output: OutputWithFactors,
    teacher: Annotated[str, typer.Option("--teacher", help="The original.", metavar="MODEL")],
    text: TextToRead = None,
    stdlib: StdlibToRead = False,
    healed: OutOfHeal = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", help="Time for refining, once both models are loaded."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            help="Steps for each block and the whole model (400, where --minutes is not given).",
        ),
    ] = None,
    samples: SamplesToHeal = None,
    seq_len: SeqLenToRead = None,
    trust_remote_code: TrustCode = False,
    hard_labels: Annotated[
        float | None,
        typer.Option(
            "--hard-labels",
            help="How much the text itself counts (0.1), the rest being what the original answers.",
            metavar="SHARE",
        ),
    ] = None,
    compress_gradients: Annotated[
        bool,
        typer.Option(
            "--compress-gradients",
            help="Send fewer bytes between ranks that torchrun started (PowerSGD).",
        ),
    ] = False,
    seed: SeedOfOrder = 0,
    device: Device = "auto",
    threads: Threads = None,
    force: Force = False,
    every_layer: EveryLayer = False,
    json_: Json = False,
    csv_: Csv = False,
    quiet: Quiet = False,
) -> None:
    """Refine factors and rounding to answer as the original.

    Block by block, and then all together. A run that was cut short continues with the block it had
    reached. OUT is not touched.
    """
    # What was asked: without a limit of time there is one of steps
    check_samples(samples)
    if steps is not None:
        at_least_one("--steps", steps)
    if minutes is not None and not 0 < minutes < 1e6:
        raise UsageError(f"--minutes {minutes:g} is not a time", "give minutes above 0")
    _check_one_format(json_, csv_)
    seconds = None
    if minutes is not None:
        seconds = 60 * minutes
    elif steps is None:
        steps = 400
    effort = svdcli.Effort(steps, seconds)
    texts = _read_text(text, stdlib=stdlib, held_out=False)
    _tell_code(trust_remote_code, output, teacher)
    with _working(quiet) as progress:
        outcome = svdcli.heal(
            output,
            healed,
            teacher=teacher,
            texts=texts,
            effort=effort,
            samples=samples,
            seq_len=seq_len,
            hard_labels=hard_labels,
            seed=seed,
            compress_gradients=compress_gradients,
            compute=compute_from(device, threads),
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )

    # What came of it
    _tell_outcome(outcome, quiet)
    _show_outcome(outcome, sys.stdout, json_, csv_, quiet, grouped=not every_layer)


@app.command(epilog="Example: svdcli export my-llm-svd --onnx my-llm.onnx")
def export(
    output: OutputOrModel,
    onnx: Annotated[
        str,
        typer.Option("--onnx", help="The ONNX file to write; needs svdcli[onnx].", metavar="FILE"),
    ],
    dtype: DtypeOfOnnx = "float32",
    trust_remote_code: TrustCode = False,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a model as ONNX and check it against onnxruntime.

    Factors become two matrix products. For text encoders, decoders (without a cache) and vision
    models; batch and sequence lengths are free.
    """
    from svdcli.render import machine

    _tell_code(trust_remote_code, output)
    with _working(quiet) as progress:
        exported = svdcli.export_onnx(
            output,
            onnx,
            dtype=dtype,
            force=force,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )

    # Where it is, and whether it was checked
    if not quiet:
        print_note(f"wrote {exported.path}")
        if exported.checked is None:
            print_note(
                "onnxruntime is not installed, so this was not checked; pip install 'svdcli[onnx]'"
            )
        else:
            print_note(
                f"onnxruntime gives torch's outputs, up to {exported.checked:.0e} of the largest"
            )
    if json_:
        machine.print_json(exported.to_json(), sys.stdout)


@app.command(
    epilog="Example: svdcli bench my-llm-svd --against my-llm --json | jq .ratios.decode.median"
)
def bench(
    output: OutputOrModel,
    against: AgainstToBench,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", help="Length of the prompt.")
    ] = 128,
    new_tokens: NewTokensToBench = 32,
    batch: Annotated[int, typer.Option("--batch", help="Prompts at a time.")] = 1,
    rounds: Annotated[
        int,
        typer.Option("--rounds", help="How often both are measured, after one round to warm up."),
    ] = 5,
    compile_: Annotated[
        bool,
        typer.Option(
            "--compile", help="Decode through torch.compile as well, which takes minutes."
        ),
    ] = False,
    trust_remote_code: TrustCode = False,
    device: Device = "auto",
    threads: Threads = None,
    json_: Json = False,
    csv_: CsvOfMeasures = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed and memory of a model beside its original.

    Tokens a second, time to load, peak memory, file size. Each is in a process of its own, and they
    take turns.
    """
    from svdcli.render import tables

    _tell_code(trust_remote_code, output, against)
    with _working(quiet) as progress:
        measured = svdcli.bench(
            output,
            against,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch=batch,
            rounds=rounds,
            compile=compile_,
            compute=compute_from(device, threads),
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    rows = [asdict(comparison) for comparison in measured.comparisons]
    wants_table = _print_for_programs(measured.to_json(), rows, json_, csv_, sys.stdout)
    if wants_table and not quiet:
        tables.print_bench(measured, sys.stdout)


def _topics() -> list[str]:
    """What `svdcli help` completes."""
    from svdcli.verbs.help import topics

    return list(topics())


@app.command(name="help", epilog="Example: svdcli help guide")
def help_(
    topic: Annotated[
        str | None,
        typer.Argument(
            help="A page or a command; without it, the list of pages.",
            metavar="[TOPIC]",
            autocompletion=_topics,
        ),
    ] = None,
) -> None:
    """Show a page of the documentation, or list the pages."""
    from svdcli.render import pages
    from svdcli.verbs.help import page, topics

    if topic is None:
        pages.print_topics(topics(), sys.stdout)
    else:
        pages.print_page(page(topic), sys.stdout)


def _data_stream(output: str | None) -> TextIO:
    """Standard output is data; where it carries the checkpoint, tables go to standard error."""
    return sys.stderr if output == "-" and leads_here() else sys.stdout


def _show_outcome(
    outcome: Outcome, stream: TextIO, json_: bool, csv_: bool, quiet: bool, *, grouped: bool
) -> None:
    """The report of what was written, and what was measured of it."""
    from svdcli.render import tables

    report, evaluation = outcome.report, outcome.evaluation
    measured = None if evaluation is None else evaluation.to_json()
    data = report.to_json() | {"measured": measured}
    estimate = None if outcome.costs is None else outcome.costs.estimate()
    if estimate is not None:
        data |= {"estimate": estimate.to_json(), "unchecked": outcome.unchecked}
    rows = [asdict(row) for row in report.layers]
    wants_table = _print_for_programs(data, rows, json_, csv_, stream)
    if wants_table and not quiet:
        tables.print_report(report, stream, grouped=grouped)
        if evaluation is not None:
            tables.print_measured(evaluation, stream)
        if estimate is not None:
            tables.print_estimate(estimate, outcome.unchecked, stream)
    # The output is whole without it
    if outcome.not_evaluated and not quiet:
        print_note(f"the loss was not measured: {outcome.not_evaluated}; see `svdcli eval`")


def _print_for_programs(
    data: dict[str, Any], rows: Sequence[dict[str, Any]], json_: bool, csv_: bool, stream: TextIO
) -> bool:
    """Print JSON or CSV where asked; True where a person's table is wanted instead."""
    from svdcli.render import machine

    # Checked again: not every command checks before its work
    _check_one_format(json_, csv_)
    if json_:
        machine.print_json(data, stream)
    elif csv_:
        machine.print_csv(rows, stream)
    return not (json_ or csv_)


def _announce(quiet: bool) -> Callable[[Forecast], None]:
    """Tell on standard error what a calibration will take."""
    from svdcli.render import words

    def tell(forecast: Forecast) -> None:
        # What is read and measured, then what it costs
        rounds = "" if forecast.rounds == 1 else f" in {forecast.rounds} rounds"
        if forecast.on_host:
            rounds += ", hidden states on the host"
        measured = "inputs and loss gradients" if forecast.gradients else "inputs"
        portions = words.portions(forecast.samples, forecast.tokens, forecast.seq_len)
        part = f", part {forecast.part} of the text" if forecast.part else ""
        ranks = f", on {forecast.ranks} ranks" if forecast.ranks > 1 else ""
        print_note(
            f"calibrating on {forecast.tokens:,} tokens, {portions}{part}{ranks}{rounds}: moments "
            f"of {measured}, model in {forecast.precision}"
        )
        if forecast.side:
            print_note(f"only {forecast.side} of the model reads text alone, and is run")
        state = words.human(forecast.state_bytes, "B")
        print_note(
            f"about {words.duration(forecast.seconds)}, and {state} for hidden states "
            f"between blocks"
        )
        if forecast.reason:
            print_note(f"no gradients: {forecast.reason}")
        if forecast.no_bfloat16:
            reason = printable(forecast.no_bfloat16)
            print_note(f"bfloat16 is faster here, but the model does not run in it: {reason}")

    return (lambda forecast: None) if quiet else tell


def _tell_code(trusted: bool, *models: str | None) -> None:
    """Name the Python files that a command is about to run, since somebody trusts them."""
    if not trusted:
        return
    from svdcli.models import own_code

    files: dict[str, None] = {}  # a set in order: two models may bring the same file
    for model in models:
        if model is not None:
            files |= dict.fromkeys(own_code.sources(model))
    if files:
        print_note(
            f"{own_code.OPTION}: Python code of others will run: {printable(', '.join(files))}"
        )


@contextmanager
def _working(quiet: bool) -> Iterator[Progress]:
    """Around everything that may take long: progress on a terminal, and the garbage collector that
    start-up did without."""
    import logging

    from svdcli.render import bars

    startup.long_work_begins()
    for library in (
        "torchao",
        "torch.utils._pytree",
    ):  # what they say when transformers imports them is nobody's business here
        logging.getLogger(library).setLevel(logging.ERROR)
    quiet = quiet or not leads_here()
    with bars.progress_on(sys.stderr, quiet=quiet) as progress:
        yield progress


def main() -> None:
    """The `svdcli` command."""
    open_closed_streams()
    outlive_readers()
    one_rank_writes()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    # torch works without NumPy, and says at every start that it does
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    keep_commands(sys.argv[1:])
    # What ranks do not share, the one that leads does alone
    if not leads_here() and not _TOGETHER.intersection(sys.argv[1:2]):
        sys.exit(OK)
    with one_line_errors(), interruptible():
        code = app(prog_name="svdcli", standalone_mode=False) or 0
        if code == INTERRUPTED:  # which is all that typer makes of the interrupt
            raise KeyboardInterrupt
        sys.stdout.flush()
        sys.exit(code)


_TOGETHER = {"compress", "calibrate", "heal"}

_COMMANDS = {
    command.name or getattr(command.callback, "__name__", ""): command
    for command in app.registered_commands
}
for _command in _COMMANDS.values():
    _command.cls = PanelledCommand


def command_names() -> list[str]:
    """Every command, in the order of `svdcli --help`."""
    return list(_COMMANDS)


def keep_commands(arguments: Sequence[str]) -> None:
    """Typer reads the signatures of all commands at every start; where the first word names one,
    that one will do."""
    asked = [_COMMANDS[word] for word in arguments[:1] if word in _COMMANDS]
    app.registered_commands = asked or list(_COMMANDS.values())
