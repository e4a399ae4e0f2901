"""What was asked (Recipe) and what was decided (Plan): frozen values with JSON both ways."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from svdcli.errors import UsageError
from svdcli.plan.layout import stored_tensors
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo
from svdcli.plan.words import (
    ALLOCATIONS,
    LAYOUTS,
    METRICS,
    NONFINITE,
    SOLVERS,
    TARGETS,
    WEIGHTED,
    Allocation,
    Layout,
    Metric,
    OnNonfinite,
    Solver,
    Target,
)

FORMAT = 1


@dataclass(frozen=True)
class Recipe:
    """What the person asked for. Everything here changes what the output is; device and threads, which change
    the last bits at most, and verbosity do not belong.

    target is one of words.TARGETS; value is its number (a rank, a share in (0, 1], bytes). calibration is the digest of a file
    of moments, metric how much of them counts: the inputs alone, or the loss gradients besides.
    Raises UsageError where the values cannot be met together.
    """

    target: Target
    value: float
    allocate: Allocation = "uniform"
    floor: float = 0.6
    multiple_of: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[str, ...] | None = None
    layout: Layout = "factored"
    dtype: str | None = None
    solver: Solver = "auto"
    seed: int = 0
    nonfinite: OnNonfinite = "error"
    max_shard_size: int | None = None
    self_contained: bool = False
    calibration: str | None = None
    metric: Metric = "auto"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("target", self.target, TARGETS),
            ("--allocate", self.allocate, ALLOCATIONS),
            ("--layout", self.layout, LAYOUTS),
            ("--solver", self.solver, SOLVERS),
            ("--nonfinite", self.nonfinite, NONFINITE),
            ("--metric", self.metric, METRICS),
        ):
            if value not in known:
                raise UsageError(f"{name} {value!r} is unknown", f"use one of {', '.join(known)}")
        if self.dtype is not None and self.dtype not in FACTORED_DTYPES:
            raise UsageError(f"--dtype {self.dtype!r} cannot hold factors", f"use one of {', '.join(FACTORED_DTYPES)}")
        if self.self_contained and self.layout == "dense":
            raise UsageError("--self-contained has nothing to add to the dense layout", "any loader opens it as it is")
        self._check_numbers()
        if self.target in ("rank", "size"):
            object.__setattr__(self, "value", int(self.value))

    def _check_numbers(self) -> None:
        whole = math.isfinite(self.value) and self.value >= 1 and self.value == int(self.value)
        if self.target in ("rank", "size") and not whole:
            raise UsageError(f"--{self.target} {self.value:g} is not a whole number above 0", "give at least 1")
        if self.target in ("keep", "energy") and not 0 < self.value <= 1:
            raise UsageError(f"--{self.target} {self.value:g} is outside (0, 1]", "give a share such as 0.6")
        if self.target == "error" and not 0 < self.value < 1:
            raise UsageError(f"--error {self.value:g} is outside (0, 1)", "give a relative error such as 0.1")
        if self.allocate == "global" and self.target in ("energy", "error"):
            raise UsageError(
                f"--allocate global needs a budget, and --{self.target} is a bound for each layer",
                "use --keep, --size or --rank",
            )
        if self.solver == "randomized" and self.target in ("energy", "error"):
            raise UsageError(f"--solver randomized may miss what --{self.target} asks for", "use --solver auto")
        if self.target == "rank" and self.value < self.multiple_of:
            raise UsageError(f"--rank {self.value:g} is below --multiple-of {self.multiple_of}", "no rank is both")
        if self.target == "size" and self.layout == "dense":
            raise UsageError("--size cannot be met in the dense layout, which saves no bytes", "use --layout factored or pivoted")
        if not 0 <= self.floor <= 1:
            raise UsageError(f"--floor {self.floor:g} is outside [0, 1]", "give a share of the uniform rank such as 0.6")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed} is outside [0, 2^63)", "give a smaller one")
        if self.multiple_of < 1:
            raise UsageError(f"--multiple-of {self.multiple_of} is not a whole number above 0", "give at least 1")
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(f"--max-shard-size {self.max_shard_size} is not a size", "give bytes such as 5GB")

    @property
    def shown_target(self) -> str:
        return f"{self.target} {self.value:g}" if self.target != "size" else f"size {int(self.value)} bytes"


def best_defaults(target: Target, *, calibrated: bool) -> dict[str, Any]:
    """What --allocate, --floor and --layout are where a person does not say. With a calibration, losses of different layers
    compare, and the best is what was measured to be best: ranks where they are worth most, without a floor, stored pivoted."""
    if not calibrated:
        return {"allocate": "uniform", "floor": 0.6, "layout": "factored"}
    return {"allocate": "uniform" if target in ("energy", "error") else "global", "floor": 0.0, "layout": "pivoted"}


@dataclass(frozen=True)
class LayerPlan:
    """One selected layer: its rank, or None with the reason why it stays dense.

    loss is what the rank gives up, where the spectrum was measured: the share of the weight's energy (of the outputs' with
    metric "inputs"), or, with metric "diagonal" or "full", the predicted rise of the model's own loss. bias names the bias that
    is refitted to the inputs' mean.
    """

    tensor: TensorInfo
    rank: int | None
    layout: str
    stored_dtype: str
    solver: str
    reason: str = ""
    loss: float | None = None
    metric: str = ""
    bias: TensorInfo | None = None

    def stored(self) -> tuple[TensorInfo, ...]:
        if self.rank is None:
            return (self.tensor,)
        return stored_tensors(self.tensor, self.rank, self.layout, self.stored_dtype)

    def left_dense(self, reason: str) -> LayerPlan:
        return replace(self, rank=None, reason=reason, loss=None, bias=None)


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not selected, and why."""

    tensor: TensorInfo
    reason: str


@dataclass(frozen=True)
class TextRead:
    """What a calibration has read: samples windows of seq_len tokens, or sentences of at most as many; tokens in all."""

    text: str
    text_sha256: str
    samples: int
    seq_len: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> TextRead:
        numbers = (int(data[name]) for name in ("samples", "seq_len", "tokens"))
        return TextRead(str(data["text"]), str(data["text_sha256"]), *numbers)


@dataclass(frozen=True)
class Healing:
    """How the factors were refined after they were solved: on which text, and what came of each block.

    blocks maps a block to its relative squared error before and after, and the steps between; "whole model" to its divergence,
    mixed with its excess loss on the text by the share hard_labels.
    """

    text: str
    text_sha256: str
    samples: int
    seq_len: int
    blocks: dict[str, tuple[float, float, int]]
    hard_labels: float = 0.0

    def to_json(self) -> dict[str, Any]:
        blocks = {
            name: {"before": before, "after": after, "steps": steps} for name, (before, after, steps) in self.blocks.items()
        }
        return asdict(self) | {"blocks": blocks}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Healing:
        blocks = {
            str(name): (float(item["before"]), float(item["after"]), int(item["steps"])) for name, item in data["blocks"].items()
        }
        hard = float(data.get("hard_labels", 0.0))
        return Healing(str(data["text"]), str(data["text_sha256"]), int(data["samples"]), int(data["seq_len"]), blocks, hard)


@dataclass(frozen=True)
class Plan:
    """What was decided for every tensor of one checkpoint.

    loss_unit is that of the layers' losses: "nats" or "1 - cosine" of the model, "" for shares of a layer's own energy.
    calibration tells the text that they were measured on.
    """

    recipe: Recipe
    fingerprint: str
    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = field(default=())
    loss_unit: str = ""
    healing: Healing | None = None
    calibration: TextRead | None = None

    @property
    def factored(self) -> tuple[LayerPlan, ...]:
        return tuple(layer for layer in self.layers if layer.rank is not None)

    def with_dense(self, reasons: dict[str, str]) -> Plan:
        """The same plan with the named layers left dense."""
        layers = tuple(
            layer.left_dense(reasons[layer.tensor.name]) if layer.tensor.name in reasons else layer for layer in self.layers
        )
        return replace(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON; `layers`, `dense` and `skipped` map tensor names to what was decided."""
        more: dict[str, Any] = {"loss_unit": self.loss_unit} if self.loss_unit else {}
        if self.healing is not None:
            more["healing"] = self.healing.to_json()
        if self.calibration is not None:
            more["calibration"] = self.calibration.to_json()
        return {
            "format": FORMAT,
            "recipe": recipe_to_json(self.recipe),
            "fingerprint": self.fingerprint,
            "layers": {layer.tensor.name: _layer_to_json(layer) for layer in self.factored},
            "dense": {
                layer.tensor.name: _layer_to_json(layer) | {"reason": layer.reason} for layer in self.layers if layer.rank is None
            },
            "skipped": {s.tensor.name: _tensor_to_json(s.tensor) | {"reason": s.reason} for s in self.skipped},
            "notes": list(self.notes),
        } | more

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Read a plan back; also accepts the larger record that an output carries. Raises UsageError where it is not one."""
        try:
            if data["format"] > FORMAT:
                raise UsageError(f"the plan has format {data['format']}, this svdcli knows {FORMAT}", "upgrade svdcli")
            chosen = {**data["layers"], **data["dense"]}
            return Plan(
                recipe=recipe_from_json(data["recipe"]),
                fingerprint=str(data["fingerprint"]),
                layers=tuple(layer_from_json(name, item) for name, item in chosen.items()),
                skipped=tuple(Skipped(_tensor_from_json(n, item), str(item["reason"])) for n, item in data["skipped"].items()),
                notes=tuple(str(note) for note in data["notes"]),
                loss_unit=str(data.get("loss_unit", "")),
                healing=None if data.get("healing") is None else Healing.from_json(data["healing"]),
                calibration=None if data.get("calibration") is None else TextRead.from_json(data["calibration"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"not a plan of svdcli ({error})", "write one with --save-plan") from error


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    known = dict(data)
    for name in ("include", "exclude", "layers"):
        if known.get(name) is not None:
            known[name] = tuple(known[name])
    return Recipe(**known)


def _tensor_to_json(tensor: TensorInfo) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": tensor.dtype}


def _tensor_from_json(name: str, data: dict[str, Any]) -> TensorInfo:
    return TensorInfo(name, str(data["dtype"]), tuple(int(size) for size in data["shape"]))


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    item = _tensor_to_json(layer.tensor) | {
        "rank": layer.rank,
        "layout": layer.layout,
        "stored_dtype": layer.stored_dtype,
        "solver": layer.solver,
    }
    if layer.loss is not None:
        item["loss"] = layer.loss
    if layer.metric:
        item["metric"] = layer.metric
    if layer.bias is not None:
        item["bias"] = {"name": layer.bias.name} | _tensor_to_json(layer.bias)
    return item


def layer_from_json(name: str, data: dict[str, Any]) -> LayerPlan:
    tensor = _tensor_from_json(name, data)
    if len(tensor.shape) != 2:
        raise ValueError(f"{name} is not a matrix")
    rank = data["rank"] if data["rank"] is None else int(data["rank"])
    if rank is not None and not 1 <= rank <= min(tensor.shape):
        raise ValueError(f"{name}: rank {rank} does not fit its shape {tensor.shape}")
    for key in ("dtype", "stored_dtype"):
        if data[key] not in FACTORED_DTYPES:
            raise ValueError(f"{name}: {key} {data[key]!r} cannot be factored")
    if str(data["solver"]).split(" ")[0] not in (*SOLVERS[1:], WEIGHTED):
        raise ValueError(f"{name}: solver {data['solver']!r} is unknown")
    if data.get("metric", "") not in ("", *METRICS[1:]):
        raise ValueError(f"{name}: metric {data['metric']!r} is unknown")
    bias = data.get("bias")
    if data["layout"] not in LAYOUTS:
        raise ValueError(f"{name}: layout {data['layout']!r} is unknown")
    return LayerPlan(
        tensor=tensor,
        rank=rank,
        layout=str(data["layout"]),
        stored_dtype=str(data["stored_dtype"]),
        solver=str(data["solver"]).split(" ")[0],
        reason=str(data.get("reason", "")),
        loss=data.get("loss"),
        metric=str(data.get("metric", "")),
        bias=None if bias is None else _tensor_from_json(str(bias["name"]), bias),
    )
