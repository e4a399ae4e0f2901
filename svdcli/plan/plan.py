"""What was decided, a rank or a reason for every layer, with JSON both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from svdcli.errors import UsageError
from svdcli.plan.groups import home_of, span_tensors, stacked_shape
from svdcli.plan.layouts import DENSE, LAYOUTS
from svdcli.plan.packing import PLAIN, Packing
from svdcli.plan.recipe import Recipe, recipe_from_json, recipe_to_json
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo
from svdcli.plan.words import METRICS, NEAREST, SOLVERS, WEIGHTED

FORMAT = 1
EMBEDDING = "embedding"


@dataclass(frozen=True)
class LayerPlan:
    """One selected layer, or a group that shares a basis: its rank, or None with the reason why it
    stays dense.

    loss is what the rank gives up, where the spectrum was measured: the share of the weight's
    energy (of the outputs' with metric "inputs"), or, with metric "diagonal" or "full", the
    predicted rise of the model's own loss. biases are those that are refitted to the inputs' mean.
    packing says how the numbers of each stored matrix are written. role is EMBEDDING for a
    table whose rows are looked up, which counts for no target. members are the weights of a group,
    which tensor is then all of, one below the other, under the name of the first.
    """

    tensor: TensorInfo
    rank: int | None
    layout: str
    stored_dtype: str
    solver: str
    reason: str = ""
    loss: float | None = None
    metric: str = ""
    biases: tuple[TensorInfo, ...] = ()
    packing: Packing = PLAIN
    role: str = ""
    members: tuple[TensorInfo, ...] = ()

    @property
    def originals(self) -> tuple[TensorInfo, ...]:
        """The weights that it takes the place of."""
        return self.members or (self.tensor,)

    @property
    def home(self) -> TensorInfo:
        """The weight that its factors are called after: its own, or that of what a group shares."""
        return home_of(self.members, self.tensor.dtype) if self.members else self.tensor

    @property
    def keeps_factors(self) -> bool:
        """Would factors be stored, rather than their product."""
        return LAYOUTS[self.layout].keeps_factors

    def stored(self) -> tuple[TensorInfo, ...]:
        """The tensors that hold the weight of this layer."""
        if self.rank is None:
            return (self.tensor,)
        layout = LAYOUTS[self.layout]
        return layout.tensors(self.home, self.rank, self.stored_dtype, self.packing)

    def spans(self) -> tuple[TensorInfo, ...]:
        """The tensors that say where the outputs of a group's layers are."""
        return span_tensors(self.members)

    def written(self) -> tuple[TensorInfo, ...]:
        """All tensors that are written for this layer, refitted biases among them."""
        return (*self.stored(), *self.spans(), *self.biases)

    def left_dense(self, reason: str) -> tuple[LayerPlan, ...]:
        """The same layer, or every layer of a group, which stays dense for `reason`."""
        dense = []
        for tensor in self.originals:
            layer = replace(self, tensor=tensor, rank=None, reason=reason, loss=None)
            dense.append(replace(layer, biases=(), packing=PLAIN, members=()))
        return tuple(dense)


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
        return TextRead(
            text=str(data["text"]),
            text_sha256=str(data["text_sha256"]),
            samples=int(data["samples"]),
            seq_len=int(data["seq_len"]),
            tokens=int(data["tokens"]),
        )


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
            str(name): (float(block["before"]), float(block["after"]), int(block["steps"]))
            for name, block in data["blocks"].items()
        }
        return Healing(
            text=str(data["text"]),
            text_sha256=str(data["text_sha256"]),
            samples=int(data["samples"]),
            seq_len=int(data["seq_len"]),
            blocks=blocks,
            hard_labels=float(data.get("hard_labels", 0.0)),  # early records do not have it
        )


@dataclass(frozen=True)
class Plan:
    """What was decided for every tensor of one checkpoint.

    loss_unit is that of the layers' losses: "nats" or "1 - cosine" of the model, "" for shares of a
    layer's own energy. calibration tells the text that they were measured on. ignored are modules
    that loaders must not take for packed, besides the layers that stay dense: those without a
    weight in the files, such as a tied head, and those that the model calls by another name. same
    maps tensors that are left out, since another one has the same bytes, to that one.
    """

    recipe: Recipe
    fingerprint: str
    layers: tuple[LayerPlan, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = field(default=())
    loss_unit: str = ""
    healing: Healing | None = None
    calibration: TextRead | None = None
    ignored: tuple[str, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)

    @property
    def factored(self) -> tuple[LayerPlan, ...]:
        """The layers that have a rank."""
        return tuple(layer for layer in self.layers if layer.rank is not None)

    @property
    def originals(self) -> tuple[TensorInfo, ...]:
        """The selected weights."""
        return tuple(tensor for layer in self.layers for tensor in layer.originals)

    def with_dense(self, reasons: dict[str, str]) -> Plan:
        """The same plan with the named layers left dense, and with one of a group all of it."""
        layers: list[LayerPlan] = []
        for layer in self.layers:
            named = [tensor for tensor in layer.originals if tensor.name in reasons]
            if not named:
                layers.append(layer)
                continue
            reason = reasons[named[0].name]
            for dense in layer.left_dense(f"shares a basis with {named[0].module}, which {reason}"):
                own = reasons.get(dense.tensor.name)
                layers.append(dense if own is None else replace(dense, reason=own))
        return replace(self, layers=tuple(layers))

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON; `layers`, `dense` and `skipped` map tensor names to what was
        decided."""
        # What every plan has. The order of keys is that of the record in an output.
        dense = [layer for layer in self.layers if layer.rank is None]
        data: dict[str, Any] = {
            "format": FORMAT,
            "recipe": recipe_to_json(self.recipe),
            "fingerprint": self.fingerprint,
            "layers": {layer.tensor.name: _layer_to_json(layer) for layer in self.factored},
            "dense": {
                layer.tensor.name: _layer_to_json(layer) | {"reason": layer.reason}
                for layer in dense
            },
            "skipped": {
                skipped.tensor.name: _tensor_to_json(skipped.tensor) | {"reason": skipped.reason}
                for skipped in self.skipped
            },
            "notes": list(self.notes),
        }

        # What only plans with a calibration, or of a healed output, have.
        if self.loss_unit:
            data["loss_unit"] = self.loss_unit
        if self.healing is not None:
            data["healing"] = self.healing.to_json()
        if self.calibration is not None:
            data["calibration"] = self.calibration.to_json()
        if self.ignored:
            data["ignored"] = list(self.ignored)
        if self.same:
            data["same"] = dict(self.same)
        return data

    @staticmethod
    def from_json(data: Any) -> Plan:
        """Read a plan back; also accepts the larger record that an output carries. Raises
        UsageError where it is not one."""
        try:
            # A newer format may mean anything; what an older one lacks has a default below.
            if data["format"] > FORMAT:
                raise UsageError(
                    f"the plan has format {data['format']}, this svdcli knows {FORMAT}",
                    "upgrade svdcli",
                )
            selected = {**data["layers"], **data["dense"]}
            plan = Plan(
                recipe=recipe_from_json(data["recipe"]),
                fingerprint=str(data["fingerprint"]),
                layers=tuple(layer_from_json(name, layer) for name, layer in selected.items()),
                skipped=tuple(
                    Skipped(_tensor_from_json(name, tensor), str(tensor["reason"]))
                    for name, tensor in data["skipped"].items()
                ),
                notes=tuple(str(note) for note in data["notes"]),
                loss_unit=str(data.get("loss_unit", "")),
                ignored=tuple(str(name) for name in data.get("ignored", ())),
                same={str(name): str(other) for name, other in data.get("same", {}).items()},
            )
            if data.get("healing") is not None:
                plan = replace(plan, healing=Healing.from_json(data["healing"]))
            if data.get("calibration") is not None:
                plan = replace(plan, calibration=TextRead.from_json(data["calibration"]))
            return plan
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UsageError(
                f"not a plan of svdcli ({error})", "write one with --save-plan"
            ) from error


def _tensor_to_json(tensor: TensorInfo) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": tensor.dtype}


def _tensor_from_json(name: str, data: dict[str, Any]) -> TensorInfo:
    return TensorInfo(name, str(data["dtype"]), tuple(int(size) for size in data["shape"]))


def _layer_to_json(layer: LayerPlan) -> dict[str, Any]:
    data = _tensor_to_json(layer.tensor) | {
        "rank": layer.rank,
        "layout": layer.layout,
        "stored_dtype": layer.stored_dtype,
        "solver": layer.solver,
    }
    if layer.loss is not None:
        data["loss"] = layer.loss
    if layer.metric:
        data["metric"] = layer.metric
    if layer.members:
        data["members"] = {member.name: member.shape[0] for member in layer.members}
        if layer.biases:
            data["biases"] = {bias.name: _tensor_to_json(bias) for bias in layer.biases}
    elif layer.biases:
        [bias] = layer.biases
        data["bias"] = {"name": bias.name} | _tensor_to_json(bias)
    if layer.packing != PLAIN:
        data["bits"] = layer.packing.bits
        data["group"] = layer.packing.group
    if layer.role:
        data["role"] = layer.role
    return data


def layer_from_json(name: str, data: dict[str, Any]) -> LayerPlan:
    """One layer of a plan or record. Raises ValueError, KeyError or TypeError where that is not
    what `data` is: it may come from anywhere."""
    # The shape, and a rank that fits it.
    tensor = _tensor_from_json(name, data)
    if len(tensor.shape) != 2:
        raise ValueError(f"{name} is not a matrix")
    rank = None if data["rank"] is None else int(data["rank"])
    if rank is not None and not 1 <= rank <= min(tensor.shape):
        raise ValueError(f"{name}: rank {rank} does not fit its shape {tensor.shape}")

    # Words are ones that svdcli writes. Records may name a solver with its precision, which is no
    # part of the word.
    for key in ("dtype", "stored_dtype"):
        if data[key] not in FACTORED_DTYPES:
            raise ValueError(f"{name}: {key} {data[key]!r} cannot be factored")
    solver = str(data["solver"]).split(" ")[0]
    if solver not in (*SOLVERS[1:], WEIGHTED, NEAREST):
        raise ValueError(f"{name}: solver {data['solver']!r} is unknown")
    if data.get("metric", "") not in ("", *METRICS[1:]):
        raise ValueError(f"{name}: metric {data['metric']!r} is unknown")
    if data["layout"] not in LAYOUTS:
        raise ValueError(f"{name}: layout {data['layout']!r} is unknown")

    return LayerPlan(
        tensor=tensor,
        rank=rank,
        layout=str(data["layout"]),
        stored_dtype=str(data["stored_dtype"]),
        solver=solver,
        reason=str(data.get("reason", "")),
        loss=data.get("loss"),
        metric=str(data.get("metric", "")),
        biases=_biases_from_json(data),
        packing=packing_from_json(data),
        role=str(data.get("role", "")),
        members=_members_from_json(tensor, data),
    )


def _biases_from_json(data: Mapping[str, Any]) -> tuple[TensorInfo, ...]:
    if data.get("bias") is not None:
        return (_tensor_from_json(str(data["bias"]["name"]), data["bias"]),)
    biases = data.get("biases") or {}
    return tuple(_tensor_from_json(str(name), bias) for name, bias in biases.items())


def _members_from_json(tensor: TensorInfo, data: Mapping[str, Any]) -> tuple[TensorInfo, ...]:
    """The weights of a group. Raises ValueError where they are not what `tensor` is all of."""
    members = []
    for name, rows in (data.get("members") or {}).items():
        members.append(TensorInfo(str(name), tensor.dtype, (int(rows), tensor.shape[1])))
    if not members:
        return ()
    heights = all(member.shape[0] > 0 for member in members)
    named = members[0].name == tensor.name and all(
        member.name.endswith(".weight") for member in members
    )
    if len(members) < 2 or not heights or not named or stacked_shape(members) != tensor.shape:
        raise ValueError(f"{tensor.name}: its group does not fit its shape {tensor.shape}")
    return tuple(members)


def packing_from_json(data: Mapping[str, Any]) -> Packing:
    """How a layer of a plan or record is packed. Raises ValueError where there is no such
    packing."""
    if "bits" not in data:
        return PLAIN
    packing = Packing(int(data["bits"]), int(data["group"]), in_words=data["layout"] == DENSE)
    if packing.bits not in (8, 4) or packing.group < 1:
        raise ValueError(f"{packing.bits} bits in groups of {packing.group} are unknown")
    return packing
