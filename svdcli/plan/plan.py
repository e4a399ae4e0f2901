"""What was decided, a rank or a reason for every layer, with JSON both ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from svdcli.errors import UsageError
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.recipe import Recipe, recipe_from_json, recipe_to_json
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo
from svdcli.plan.words import (
    METRICS,
    SOLVERS,
    WEIGHTED,
)

FORMAT = 1


@dataclass(frozen=True)
class LayerPlan:
    """One selected layer: its rank, or None with the reason why it stays dense.

    loss is what the rank gives up, where the spectrum was measured: the share of the weight's
    energy (of the outputs' with metric "inputs"), or, with metric "diagonal" or "full", the
    predicted rise of the model's own loss. bias names the bias that is refitted to the inputs'
    mean.
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

    @property
    def keeps_factors(self) -> bool:
        """Would factors be stored, rather than their product."""
        return LAYOUTS[self.layout].keeps_factors

    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors that are written for this layer."""
        if self.rank is None:
            return (self.tensor,)
        return LAYOUTS[self.layout].tensors(self.tensor, self.rank, self.stored_dtype)

    def left_dense(self, reason: str) -> LayerPlan:
        return replace(self, rank=None, reason=reason, loss=None, bias=None)


@dataclass(frozen=True)
class Skipped:
    """A tensor that was not selected, and why."""

    tensor: TensorInfo
    reason: str


@dataclass(frozen=True)
class TextRead:
    """What a calibration has read: samples windows of seq_len tokens, or sentences of at most as
    many; tokens in all."""

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
    """How the factors were refined after they were solved: on which text, and what came of each
    block.

    blocks maps a block to its relative squared error before and after, and the steps between;
    "whole model" to its divergence, mixed with its excess loss on the text by the share
    hard_labels.
    """

    text: str
    text_sha256: str
    samples: int
    seq_len: int
    blocks: dict[str, tuple[float, float, int]]
    hard_labels: float = 0.0

    def to_json(self) -> dict[str, Any]:
        blocks = {
            name: {"before": before, "after": after, "steps": steps}
            for name, (before, after, steps) in self.blocks.items()
        }
        return asdict(self) | {"blocks": blocks}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Healing:
        blocks = {
            str(name): (float(item["before"]), float(item["after"]), int(item["steps"]))
            for name, item in data["blocks"].items()
        }
        hard = float(data.get("hard_labels", 0.0))
        return Healing(
            str(data["text"]),
            str(data["text_sha256"]),
            int(data["samples"]),
            int(data["seq_len"]),
            blocks,
            hard,
        )


@dataclass(frozen=True)
class Plan:
    """What was decided for every tensor of one checkpoint.

    loss_unit is that of the layers' losses: "nats" or "1 - cosine" of the model, "" for shares of a
    layer's own energy. calibration tells the text that they were measured on.
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
            layer.left_dense(reasons[layer.tensor.name]) if layer.tensor.name in reasons else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON; `layers`, `dense` and `skipped` map tensor names to what was
        decided."""
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
                layer.tensor.name: _layer_to_json(layer) | {"reason": layer.reason}
                for layer in self.layers
                if layer.rank is None
            },
            "skipped": {
                s.tensor.name: _tensor_to_json(s.tensor) | {"reason": s.reason}
                for s in self.skipped
            },
            "notes": list(self.notes),
        } | more

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Read a plan back; also accepts the larger record that an output carries. Raises
        UsageError where it is not one."""
        try:
            if data["format"] > FORMAT:
                raise UsageError(
                    f"the plan has format {data['format']}, this svdcli knows {FORMAT}",
                    "upgrade svdcli",
                )
            chosen = {**data["layers"], **data["dense"]}
            return Plan(
                recipe=recipe_from_json(data["recipe"]),
                fingerprint=str(data["fingerprint"]),
                layers=tuple(layer_from_json(name, item) for name, item in chosen.items()),
                skipped=tuple(
                    Skipped(_tensor_from_json(n, item), str(item["reason"]))
                    for n, item in data["skipped"].items()
                ),
                notes=tuple(str(note) for note in data["notes"]),
                loss_unit=str(data.get("loss_unit", "")),
                healing=None if data.get("healing") is None else Healing.from_json(data["healing"]),
                calibration=None
                if data.get("calibration") is None
                else TextRead.from_json(data["calibration"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"not a plan of svdcli ({error})", "write one with --save-plan"
            ) from error


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
