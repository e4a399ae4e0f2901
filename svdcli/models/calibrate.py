"""Second moments of every layer's inputs, and of the loss gradients at its outputs, from text that the model reads.

The loss is the model's own (`fisher`), so that half the two-sided error of a weight change is the expected rise of the loss: the
Fisher information in the Kronecker-factored form of Martens and Grosse (K-FAC, 2015).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdcli.errors import SvdcliError
from svdcli.files.checkpoint import Checkpoint, open_checkpoint
from svdcli.files.moments import LayerMoments, Provenance, Spool, write_moments
from svdcli.files.report import JSON_VERSION
from svdcli.files.texts import Texts
from svdcli.linalg.products import fill_gram, mirror
from svdcli.models.fisher import ModelLoss
from svdcli.models.load import load_stored
from svdcli.models.modules import is_linear
from svdcli.models.reading import ALONE, Read, read_batches
from svdcli.models.sensitivity import sensitivities
from svdcli.models.stream import Stream
from svdcli.models.text_side import text_side
from svdcli.models.tokens import Amount, Batch, load_tokenizer
from svdcli.plan.layers import choose_layers
from svdcli.progress import Progress, silent

# Outputs wider than this get the diagonal of H only: m * m numbers, and a factorisation of them, would dwarf the rest.
FULL_OUTPUTS = 4096
SHARE_OF_MEMORY = 0.25
_SPEED_IN_PRACTICE = 0.4
# Sensitivities compare whole distributions, which says much with little text.
_SENSITIVITY_BATCHES = 4


@dataclass(frozen=True)
class Forecast:
    """What calibration will take, told before it starts. state_bytes are hidden states kept between blocks; seconds is a guess.

    samples are windows of seq_len tokens, or sentences of at most as many. Where gradients were left to choose and are not
    measured, reason says why. side names the part of the model that reads the text, where it is not the whole.
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

    samples are the windows of seq_len tokens that were read, or the sentences of at most as many. side names the part of the
    model that read them, where it is not the whole.
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

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "calibration"} | asdict(self)


def calibrate(
    model: str | Path,
    texts: Texts,
    out: str | Path,
    *,
    samples: int | None = None,
    seq_len: int | None = None,
    gradients: bool | None = None,
    sensitivity: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    device: torch.device | None = None,
    memory: int | None = None,
    trust_remote_code: bool = False,
    announce: Callable[[Forecast], None] = lambda forecast: None,
    progress: Progress = silent,
) -> Calibrated:
    """Read text with the model and write the moments of the selected layers to `out`.

    samples is how many windows of seq_len tokens are read, or sentences by an encoder; by default as many as hold 131,072 tokens,
    or 16 for every input of the widest layer where that is more. gradients adds the moments of the loss gradients; None leaves
    that to the memory there is. sensitivity adds what the model's output loses when each layer alone is cut, from forward passes
    over a few of the windows. memory bounds the hidden states that are kept between blocks (bytes; by default a quarter of what
    is free): where the text needs more, it is read in rounds. trust_remote_code runs Python that the model's folder brings along.

    Of a model that reads more than text only the part is run that reads text alone (`text_side`). Raises SvdcliError for a model
    without one, and for one that answers with NaN, with the name of the first layer that does.
    """
    out = Path(out)
    with open_checkpoint(model) as checkpoint:
        network = load_stored(model, trust_remote_code=trust_remote_code)
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        side = text_side(network, str(model), len(tokenizer), ALONE)
        layers = _modules_of(network, checkpoint, include, exclude)
        amount = Amount.to_calibrate(samples, widest(network, layers.values()))
        read = read_batches(side, tokenizer, texts, amount, seq_len)
        room = memory if memory is not None else int(SHARE_OF_MEMORY * free_memory())
        forecast = _forecast(network, read, gradients, room)
        announce(forecast)
        size = -(-len(read.batches) // forecast.rounds)
        rounds = [read.batches[start : start + size] for start in range(0, len(read.batches), size)]
        torch.manual_seed(seed)
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.spool-") as folder:
            gather = _Gather(network, width_of(side.config(network)), layers, Spool(Path(folder)), progress, len(rounds))
            where = device or torch.device("cpu")
            stream = Stream(network, where, torch.float32, gather.visit, side.of(network))
            for number, batch in enumerate(rounds):
                gather.begin(number, batch, backwards=forecast.gradients, units=len(stream.units))
                stream.run(batch, gather.loss.seed if forecast.gradients else None, set(layers.values()), gather.loss.look)
            if sensitivity:
                gather.add_sensitivities(stream, read.batches, room)
            unit = "nats" if gather.loss.nats else "1 - cosine"
            what = (texts.name, texts.digest, read.tokens, read.samples, read.seq_len)
            provenance = Provenance(checkpoint.fingerprint(), *what, seed, forecast.gradients, sensitivity, unit)
            keys = gather.keys()
            write_moments(out, gather.spool, gather.scales(), keys, provenance)
        return _calibrated(out, layers, keys, forecast, sensitivity)


def _calibrated(
    out: Path, layers: Mapping[str, str], keys: Mapping[str, Mapping[str, Any]], forecast: Forecast, sensitivity: bool
) -> Calibrated:
    return Calibrated(
        path=str(out),
        layers=len(keys),
        inputs=len({item["input"] for item in keys.values()}),
        tokens=forecast.tokens,
        gradients=forecast.gradients,
        sensitivity=sensitivity,
        rounds=forecast.rounds,
        bytes=out.stat().st_size,
        uncalibrated=tuple(name for name in layers if name not in keys),
        samples=forecast.samples,
        seq_len=forecast.seq_len,
        side=forecast.side,
    )


def widest(model: nn.Module, names: Iterable[str]) -> int:
    """The number of inputs of the widest linear layer among these modules."""
    modules = dict(model.named_modules())
    return max((_inputs_of(modules[name]) for name in names if is_linear(modules.get(name))), default=0)


def _inputs_of(module: Any) -> int:
    """Of a linear layer, or of a Conv1D, which stores its weight as (in, out)."""
    return int(module.in_features if isinstance(module, nn.Linear) else module.weight.shape[0])


def _modules_of(model: Any, checkpoint: Checkpoint, include: Sequence[str], exclude: Sequence[str]) -> dict[str, str]:
    """{name of a selected weight in the checkpoint: name of its module}, for weights that a module of their own holds."""
    from svdcli.models.hf import module_names

    selected, _ = choose_layers(checkpoint.infos, include=include, exclude=exclude, tied=checkpoint.tied, facts=checkpoint.facts)
    found = module_names(model, [info.module for info in selected])
    modules = dict(model.named_modules())
    return {
        info.name: target
        for info in selected
        if (target := found.get(info.module)) is not None and is_linear(modules.get(target))
    }


def _forecast(model: Any, read: Read, gradients: bool | None, room: int) -> Forecast:
    """In how many rounds the text is read, and whether with gradients: hidden states of a round must fit into `room`."""
    with_gradients, reason, batches = gradients is not False, "", read.batches
    width, part = width_of(read.side.config(model)), read.side.module(model)
    each = state_bytes(part, width, batches, gradients=with_gradients)
    if gradients is None and each > room:
        with_gradients, reason = False, f"hidden states of {each / 1e9:.1f} GB a batch do not fit into {room / 1e9:.1f} GB"
        each = state_bytes(part, width, batches, gradients=False)
    rounds = -(-len(batches) // max(1, room // each))
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


def state_bytes(model: Any, width: int, batches: Sequence[Batch], *, gradients: bool) -> int:
    """Hidden states of the largest batch: what goes into a block, and, with gradients, into every block at once."""
    depth = sum((isinstance(module, nn.ModuleList) and len(module)) or 0 for module in model.modules())
    largest = max(batch["input_ids"].numel() for batch in batches)
    return largest * width * 4 * ((2 * depth + 4) if gradients else 4)


def whole_bytes(teacher: Any, student: Any, vocabulary: int, batches: Sequence[Batch]) -> int:
    """What it takes, at most, to train the student on the teacher's answers in one piece and in float32: the weights of both,
    gradients and AdamW's two moments, what one batch leaves behind in every layer, and a few copies of its logits."""
    weights: list[int] = [sum(parameter.numel() for parameter in model.parameters()) for model in (teacher, student)]
    tokens: int = max(batch["input_ids"].numel() for batch in batches)
    widths: int = sum(sum(module.weight.shape) for module in teacher.modules() if isinstance(module, nn.Linear))
    return 4 * (weights[0] + 4 * weights[1] + tokens * (3 * widths + 8 * vocabulary))


def width_of(config: Any) -> int:
    """Width of the hidden states between blocks."""
    return next((value for n in ("hidden_size", "d_model", "n_embd") if isinstance(value := getattr(config, n, None), int)), 1024)


def _guess(model: Any, tokens: int, gradients: bool) -> float:
    """Seconds from a count of operations and the speed of one product: forwards 2 a weight and token, with gradients 6 more;
    2 for every number of a moment's lower triangle."""
    shapes = [module.weight.shape for module in model.modules() if isinstance(module, nn.Linear)]
    weights = sum(shape.numel() for shape in shapes)
    moments = sum(shape[1] ** 2 + (shape[0] ** 2 if gradients and shape[0] <= FULL_OUTPUTS else 0) for shape in shapes)
    return tokens * (weights * (8 if gradients else 2) + moments) / (_SPEED_IN_PRACTICE * _operations_a_second())


def _operations_a_second() -> float:
    """Of one float32 product of this process, on the CPU."""
    a = torch.ones(512, 512)
    torch.mm(a, a)
    begin = time.perf_counter()
    for _ in range(4):
        torch.mm(a, a)
    return 4 * 2 * 512**3 / (time.perf_counter() - begin)


def free_memory() -> int:
    """Bytes of memory that can be had without swapping, where the system tells; else 4 GB."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * 10**9


@dataclass
class _Gather:
    """Hooks on the selected layers, and the sums of the unit whose turn it is."""

    model: Any
    width: int
    layers: dict[str, str]
    spool: Spool
    progress: Progress
    rounds: int
    phase: str = ""
    mask: Tensor | None = None
    loss: ModelLoss = field(default_factory=ModelLoss)
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    leaders: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[Tensor, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, target in self.layers.items():
            module = self.model.get_submodule(target)
            module.register_forward_pre_hook(self._input_hook(name))
            module.register_forward_hook(self._output_hook(name))

    def begin(self, number: int, batches: Sequence[Batch], *, backwards: bool, units: int) -> None:
        self.number, self.batches, self.backwards, self.units, self.steps = number, batches, backwards, units, 0
        self.loss.batches = batches

    def visit(self, phase: str, unit: str, batch: int, total: int) -> None:
        self.phase, self.seen = phase, []
        if phase.endswith("done"):
            for key, value in self.sums.items():
                self.spool.add(key, mirror(value) if value.ndim == 2 else value)
            self.sums = {}
            self._tell(unit)
        else:
            mask = self.batches[batch].get("attention_mask")
            self.mask = None if mask is None or bool(mask.all()) else mask.bool()

    def _tell(self, unit: str) -> None:
        """A step forwards counts as one, a step backwards as three: the block is computed again and differentiated twice."""
        self.steps += 1 if self.phase == "forward done" else 3
        whole = self.units * (4 if self.backwards else 1)
        done = self.number + min(1.0, self.steps / whole)
        self.progress("calibrate", unit, done, self.rounds)

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if self.phase == "forward":
                x = inputs[0]
                leader = next((n for tensor, n in self.seen if tensor is x or _same_memory(tensor, x)), name)
                if self.leaders.setdefault(name, leader) != leader:
                    raise SvdcliError(f"{name} shares its input only sometimes", "calibrate it alone with --include")
                if leader == name:
                    self.seen.append((x, name))
                    self._add_inputs(name, self._rows(x, name))

        return hook

    def _add_inputs(self, name: str, rows: Tensor) -> None:
        self.rows[name] = self.rows.get(name, 0) + rows.shape[0]
        width = rows.shape[1]
        for key, shape in ((f"input.{name}", (width, width)), (f"mean.{name}", (width,))):
            if key not in self.sums:
                self.sums[key] = torch.zeros(shape, dtype=torch.float32, device=rows.device)
        fill_gram(rows.T, self.sums[f"input.{name}"], add=True)
        self.sums[f"mean.{name}"] += rows.sum(0)

    def _output_hook(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if self.phase == "backward" and output.requires_grad:
                output.register_hook(lambda gradient: self._add_outputs(name, self._rows(gradient.detach(), name)))

        return hook

    def _add_outputs(self, name: str, rows: Tensor) -> None:
        key, width = f"output.{name}", rows.shape[1]
        full = width <= FULL_OUTPUTS
        if key not in self.sums:
            self.sums[key] = torch.zeros((width, width) if full else (width,), dtype=torch.float32, device=rows.device)
        if full:
            fill_gram(rows.T, self.sums[key], add=True)
        else:
            self.sums[key] += rows.square().sum(0)

    def _rows(self, values: Tensor, name: str) -> Tensor:
        """(tokens, width) in float32, without padding. Raises SvdcliError where a value is not finite."""
        values = values.float()
        if self.mask is not None and values.shape[:-1] == self.mask.shape:
            values = values[self.mask.to(values.device)]
        values = values.reshape(-1, values.shape[-1])
        if not bool(torch.isfinite(values.sum())):
            raise SvdcliError(
                f"{name} meets NaN or infinity", "the model itself answers so on this text; check it with `svdcli eval`"
            )
        return values

    # What is written

    def add_sensitivities(self, stream: Stream, batches: Sequence[Batch], room: int) -> None:
        """Measure them on batches spread over the text, and put them beside the moments."""
        self.phase = ""
        few = [batches[len(batches) * i // _SENSITIVITY_BATCHES] for i in range(min(_SENSITIVITY_BATCHES, len(batches)))]
        each = sum(state_bytes(self.model, self.width, [batch], gradients=False) for batch in few)
        known = {name: self.layers[name] for name in self.leaders}
        found = sensitivities(stream, few, known, self._moments_of, max(1, room // each), self.progress)
        for name, values in found.items():
            self.spool.add(f"sensitivity.{name}", torch.tensor(values))

    def _moments_of(self, name: str) -> LayerMoments:
        keys, scales = self.keys()[name], self.scales()

        def get(key: str) -> Tensor:
            return self.spool.get(key) * scales[key]

        outputs = None if keys["output"] is None else get(keys["output"])
        return LayerMoments(get(f"input.{keys['input']}"), get(f"mean.{keys['input']}"), outputs, keys["transposed"])

    def keys(self) -> dict[str, dict[str, Any]]:
        outputs = self.spool.shapes
        return {
            name: {
                "input": leader,
                "output": f"output.{name}" if f"output.{name}" in outputs else None,
                "transposed": not isinstance(self.model.get_submodule(self.layers[name]), nn.Linear),
            }
            for name, leader in self.leaders.items()
        }

    def scales(self) -> dict[str, float]:
        """Inputs are averaged over rows, gradients summed over the losses: an error counts for every row that a loss reads."""

        def scale(kind: str, name: str) -> float:
            return 1 / max(1, {"output": self.loss.events, "sensitivity": 1}.get(kind) or self.rows[name])

        return {key: scale(*key.split(".", 1)) for key in self.spool.shapes}


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
