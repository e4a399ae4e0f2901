"""Second moments of every layer's inputs, and of the loss gradients at its outputs, from text that
the model reads.

The loss is the model's own (`loss`), so that half the two-sided error of a weight change is the
expected rise of the loss: the Fisher information in the Kronecker-factored form of Martens and
Grosse (K-FAC, 2015).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from svdcli.calibration.moments import Provenance, Spool
from svdcli.calibration.parts import Part, PartFile, added, in_order, open_part, write_part
from svdcli.calibration.precision import Passes
from svdcli.calibration.sums import Sums
from svdcli.calibration.together import Together
from svdcli.calibration.work import Forecast, Settings, Work
from svdcli.engine.compute import Compute
from svdcli.engine.publish import check_place, disk_errors
from svdcli.errors import BadCheckpointError, UsageError
from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.finite import weights_told
from svdcli.files.record import check_not_compressed
from svdcli.files.report import JSON_VERSION
from svdcli.models.kinds import take_apart_stacks
from svdcli.plan.words import PRECISION, Precision
from svdcli.progress import Progress, silent
from svdcli.ranks import Place, Team, assembled, place_here
from svdcli.text.texts import Texts


@dataclass(frozen=True)
class Calibrated:
    """What was measured, and what it took. uncalibrated lists selected weights that saw no input.

    samples are the windows of seq_len tokens that were read, or the sentences of at most as many.
    side names the part of the model that read them, where it is not the whole. saw_few lists
    weights of experts that read fewer tokens than they have inputs, and lean on the average of
    their layer. precision is the dtype in which the model ran. Of one part, such as "2/8", these
    are what it read alone; rounds of parts that were added up are all of theirs. widest is the most
    inputs that a layer has.
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
    precision: str = "float32"
    part: str = ""
    widest: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "calibration"} | asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Calibrated:
        """Return what the fields became in JSON as what they were."""
        lists = {name: tuple(values[name]) for name in ("uncalibrated", "saw_few")}
        return Calibrated(**{**values, **lists})


def calibrate(
    model: str | Path,
    out: str | Path,
    texts: Texts,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    gradients: bool | None = None,
    sensitivity: bool = False,
    precision: Precision = PRECISION,
    part: tuple[int, int] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    memory: int | None = None,
    compute: Compute | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    alone: bool = False,
    announce: Callable[[Forecast], None] = lambda forecast: None,
    progress: Progress = silent,
) -> Calibrated:
    """Read text with the model and write the moments of the selected layers to `out`, a file that
    must not be there yet unless force.

    samples is how many windows of seq_len tokens are read, or sentences by an encoder; by default
    as many as hold 131,072 tokens, or 16 for every input of the widest layer where that is more.
    gradients adds the moments of the loss gradients; None leaves that to the memory there is.
    sensitivity adds what the model's output loses when each layer alone is cut, from forward passes
    over a few of the windows. precision is the dtype in which the model runs: auto is bfloat16
    where the device multiplies it at least 1.5 times as fast as float32. memory bounds the hidden
    states that are kept between blocks (bytes; by default a quarter of what is free): where the
    text needs more, it is read in rounds. trust_remote_code runs Python that the model's folder
    brings along.

    part=(2, 8) reads the second of eight parts of the text alone, and writes sums that
    `merge_moments` adds up. Ranks that a launcher such as torchrun started together share the text
    in the same way, all with the same result, unless alone. Parts must not depend on the machine:
    there None means gradients, and auto of a single part float32.

    Of a model that reads more than text only the part is run that reads text alone (`text_side`).
    Raises SvdcliError for a model without one, and for one that answers with NaN, with the name of
    the tensor that holds it, or of the first layer that meets it; on one rank for what ended any of
    them.
    """
    # What is asked for
    settings = Settings(
        texts=texts,
        samples=samples,
        seq_len=seq_len,
        gradients=gradients,
        include=include,
        exclude=exclude,
        seed=seed,
        memory=memory,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    request = Request(
        model=model,
        out=Path(out),
        settings=settings,
        sensitivity=sensitivity,
        precision=precision,
        compute=compute or Compute(),
        force=force,
        announce=announce,
    )

    # Who reads it: this process, for the whole or for a part, or several
    place = None if alone else place_here()
    if place is not None and place.size == 1:
        place = None
    if part is not None:
        if place is not None:
            raise UsageError(
                "a part is for a process by itself, and ranks have a part each already",
                "leave out --part, or start it without a launcher",
            )
        with disk_errors(request.out, resumes=False):
            return _of_one_part(request, Part(*part))
    if place is None:
        with disk_errors(request.out, resumes=False):
            return read_alone(request)
    with assembled(place) as team:
        if team.ended_before():
            followed: Calibrated = team.outcome()
            return followed
        return calibrate_together(request, team)


@dataclass(frozen=True)
class Request:
    """What `calibrate` is asked for: its arguments."""

    model: str | Path
    out: Path
    settings: Settings
    sensitivity: bool = False
    precision: Precision = PRECISION
    compute: Compute = field(default_factory=Compute)
    force: bool = False
    announce: Callable[[Forecast], None] = lambda forecast: None

    def as_on_any_machine(self) -> Request:
        """Return the same with gradients, unless they are declined: what parts measure must not
        depend on the memory of a machine."""
        gradients = self.settings.gradients is not False
        return replace(self, settings=replace(self.settings, gradients=gradients))

    @contextmanager
    def opened(self, place: Place | None = None) -> Iterator[Work]:
        """Open the model, and cut the text as it reads it; see that the output may be written,
        which among ranks is the first one's to see. Each rank takes a GPU of its own."""
        device = self.compute.start()
        if place is not None and device.type == "cuda":
            device = torch.device("cuda", place.local % torch.cuda.device_count())
        with open_checkpoint(self.model) as checkpoint:
            check_not_compressed(checkpoint, "calibrate the original, which compress takes")
            take_apart_stacks(checkpoint)
            if place is None or place.leads:
                check_place(self.out, ".safetensors", source=checkpoint.path, force=self.force)
            with weights_told(checkpoint):
                yield Work.begin(self.settings, checkpoint, device)


@contextmanager
def _spool_beside(path: Path) -> Iterator[Spool]:
    """Keep sums in a temporary folder beside a file to be."""
    try:
        beside = tempfile.TemporaryDirectory(
            dir=path.absolute().parent, prefix=f".{path.name}.spool-"
        )
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    with beside as folder:
        yield Spool(Path(folder))


# The whole text, or one part of it ----------------------------------------------------------------


def read_alone(request: Request) -> Calibrated:
    """Read all of the text in this process."""
    with request.opened() as work, _spool_beside(request.out) as spool:
        forecast = work.forecast(work.passes(request.precision), work.every_batch)
        request.announce(forecast)
        sums = work.added_up(work.every_batch, forecast, spool)
        whole = work.whole(forecast, sums)
        measure = work.measure_cuts if request.sensitivity else None
        return _finished(request.out, sums, whole.provenance, measure, forecast.rounds, whole.side)


def _of_one_part(request: Request, part: Part) -> Calibrated:
    """Read one part of the text, and leave its sums. Raises UsageError for what takes the whole
    text."""
    if request.sensitivity:
        raise UsageError(
            "--sensitivity takes the moments of the whole text, which a part does not have",
            "leave it out, or have torchrun share the text: it is measured at the end then",
        )
    # Nor may the precision depend on the machine
    precision: Precision = "float32" if request.precision == "auto" else request.precision
    request = request.as_on_any_machine()
    with request.opened() as work, _spool_beside(request.out) as spool:
        batches = part.indices(len(work.read.batches))
        forecast = replace(work.forecast(work.passes(precision), batches), part=str(part))
        request.announce(forecast)
        sums = work.added_up(batches, forecast, spool)
        whole = work.whole(forecast, sums)
        write_part(request.out, part, whole, sums, forecast.rounds)
        return replace(
            _calibrated(request.out, sums, whole.provenance, forecast.rounds, whole.side),
            tokens=forecast.tokens,
            samples=forecast.samples,
            part=str(part),
        )


def merged(
    files: Sequence[PartFile], out: Path, measure: Callable[[Sums], None] | None = None
) -> Calibrated:
    """Add up all parts of a calibration, in their order, and write the file of moments. measure is
    called with the sums when they are final.

    Raises UsageError where a part is missing, there twice, or of another calibration.
    """
    files = in_order(files)
    whole, rounds = files[0].whole, sum(file.rounds for file in files)
    with _spool_beside(out) as spool:
        sums = added(files, spool)
        return _finished(out, sums, whole.provenance, measure, rounds, whole.side)


def _finished(
    out: Path,
    sums: Sums,
    provenance: Provenance,
    measure: Callable[[Sums], None] | None,
    rounds: int,
    side: str,
) -> Calibrated:
    """Make moments of the sums over a whole text, and write them."""
    provenance = replace(provenance, sensitivity=measure is not None)
    few = sums.write(out, provenance, measure)
    done = _calibrated(out, sums, provenance, rounds, side)
    return replace(done, saw_few=tuple(few))


def _calibrated(
    out: Path, sums: Sums, provenance: Provenance, rounds: int, side: str
) -> Calibrated:
    """Return what came of these sums, once they are written."""
    keys, shapes = sums.keys(), sums.spool.shapes
    return Calibrated(
        path=str(out),
        layers=len(keys),
        inputs=len({key["input"] for key in keys.values()}),
        tokens=provenance.tokens,
        gradients=provenance.gradients,
        sensitivity=provenance.sensitivity,
        rounds=rounds,
        bytes=out.stat().st_size,
        uncalibrated=tuple(name for name in sums.layers if name not in keys),
        samples=provenance.samples,
        seq_len=provenance.seq_len,
        side=side,
        precision=provenance.precision,
        widest=max(shape[0] for key, shape in shapes.items() if key.startswith("mean.")),
    )


# Parts that ranks share ---------------------------------------------------------------------------


def calibrate_together(request: Request, team: Team) -> Calibrated:
    """Calibrate with all ranks of a launch that were started for it; each returns what came of
    it."""
    with team.sharing_errors(), disk_errors(request.out):
        team.check_same(f"calibrate {request.out} {request.precision} {request.compute}")
        done = read_together(request, team)
        if done is None:
            followed: Calibrated = team.outcome()
            return followed
        team.end(done)
        return done


def read_together(request: Request, team: Team) -> Calibrated | None:
    """Read one part on each rank, and add the parts up on rank 0, which alone returns what came of
    it. Of an interrupted run, the same command takes the parts that are whole."""
    together = Together(team, request.out)
    request = request.as_on_any_machine()
    settings = replace(
        request.settings,
        progress=together.checking(request.settings.progress),
        sharers=max(1, team.place.local_size),
    )
    request = replace(request, settings=settings)
    with together.clean_where_nothing_is_whole(), request.opened(team.place) as work:
        passes, folder = _agreed(request, work, together)
        ranks = min(team.place.size, len(work.read.batches))
        paths = [folder / f"{number}.safetensors" for number in range(1, ranks + 1)]

        # A part each; ranks beyond the last batch have none
        if team.place.rank < ranks:
            part = Part(team.place.rank + 1, ranks)
            announce = request.announce if team.leads else lambda forecast: None
            _leave_part(work, part, passes, paths[team.place.rank], announce)
            together.tell(f"part/{team.place.rank}", "")
        if not team.leads:
            together.hear("added up", 0)
            return None

        # All of them added up
        for rank, path in enumerate(paths):
            together.wait_for(path, f"part/{rank}", rank)
        measure = work.measure_cuts if request.sensitivity else None
        done = merged([open_part(path) for path in paths], request.out, measure)
        together.clean_up()
        together.tell("added up", "")
        return done


def _agreed(request: Request, work: Work, together: Together) -> tuple[Passes, Path]:
    """Return how all ranks run the model, and the folder of their parts. Raises UsageError where
    this rank was asked for something else than rank 0."""
    place = together.team.place
    told = together.agree("passes", lambda: json.dumps(asdict(work.passes(request.precision))))
    passes = Passes(**json.loads(told))
    asked = work.digest(passes.precision, place.size)
    if together.agree("asked", lambda: asked) != asked:
        raise UsageError(
            "this rank was asked for something else than rank 0, or sees another model or text",
            "start all ranks with the same command, on a file system that they share",
        )
    # Threads change the order of sums
    threads = together.agree("threads", lambda: f"{work.device.type}{torch.get_num_threads()}")
    return passes, together.folder(f"{asked[:16]}-{threads}")


def _leave_part(
    work: Work,
    part: Part,
    passes: Passes,
    path: Path,
    announce: Callable[[Forecast], None],
) -> None:
    """Read a part and write its sums to `path`, unless an earlier round has done so."""
    batches = part.indices(len(work.read.batches))
    forecast = work.forecast(passes, batches)
    read = work.read
    announce(replace(forecast, tokens=read.tokens, samples=read.samples, ranks=part.of))
    try:
        open_part(path)  # the name of its folder says of which calibration it is
    except BadCheckpointError:
        with _spool_beside(path) as spool:
            sums = work.added_up(batches, forecast, spool)
            write_part(path, part, work.whole(forecast, sums), sums, forecast.rounds)
