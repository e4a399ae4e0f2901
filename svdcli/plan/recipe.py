"""What was asked: a Recipe, a frozen value with JSON both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from svdcli.errors import UsageError
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.tensors import FACTORED_DTYPES
from svdcli.plan.words import (
    ALLOCATIONS,
    METRICS,
    NONFINITE,
    SOLVERS,
    STORED_AS,
    TARGETS,
    Allocation,
    Dtype,
    Layout,
    MetricName,
    OnNonfinite,
    Solver,
    Target,
)


@dataclass(frozen=True)
class Recipe:
    """What the person asked for. Everything here changes what the output is; device and threads,
    which change the last bits at most, and verbosity do not belong.

    target is one of words.TARGETS; value is its number (a rank, a share in (0, 1], bytes). dtype is
    a word such as float32, kept as checkpoints call it (F32). calibration is the digest of a file
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
    metric: MetricName = "auto"

    def __post_init__(self) -> None:
        # Words first: what follows asks for the layout and the target by their names.
        for name, value, words in (
            ("target", self.target, TARGETS),
            ("--allocate", self.allocate, ALLOCATIONS),
            ("--layout", self.layout, tuple(LAYOUTS)),
            ("--solver", self.solver, SOLVERS),
            ("--nonfinite", self.nonfinite, NONFINITE),
            ("--metric", self.metric, METRICS),
        ):
            if value not in words:
                raise UsageError(f"{name} {value!r} is unknown", f"use one of {', '.join(words)}")

        # A dtype may come as a person or as a checkpoint calls it; a saved plan has the latter.
        if self.dtype is not None:
            object.__setattr__(self, "dtype", STORED_AS.get(self.dtype, self.dtype))
        if self.dtype is not None and self.dtype not in FACTORED_DTYPES:
            raise UsageError(
                f"--dtype {self.dtype!r} cannot hold factors",
                f"use one of {', '.join(FACTORED_DTYPES)}",
            )
        if self.self_contained and not self.keeps_factors:
            raise UsageError(
                "--self-contained has nothing to add to the dense layout",
                "any loader opens it as it is",
            )
        self._check_target()
        self._check_numbers()
        if self.target in ("rank", "size"):  # whole numbers, and JSON shows them so
            object.__setattr__(self, "value", int(self.value))

    @property
    def keeps_factors(self) -> bool:
        """Are factors in the output, rather than their products."""
        return LAYOUTS[self.layout].keeps_factors

    def _check_target(self) -> None:
        """Raises UsageError where the target's number is no such number, or where another choice
        does not go with the target."""
        # The number itself.
        is_count = math.isfinite(self.value) and self.value >= 1 and self.value == int(self.value)
        if self.target in ("rank", "size") and not is_count:
            raise UsageError(
                f"--{self.target} {self.value:g} is not a whole number above 0", "give at least 1"
            )
        if self.target in ("keep", "energy") and not 0 < self.value <= 1:
            raise UsageError(
                f"--{self.target} {self.value:g} is outside (0, 1]", "give a share such as 0.6"
            )
        if self.target == "error" and not 0 < self.value < 1:
            raise UsageError(
                f"--error {self.value:g} is outside (0, 1)", "give a relative error such as 0.1"
            )

        # What else was chosen.
        if self.allocate == "global" and self.target in ("energy", "error"):
            raise UsageError(
                f"--allocate global needs a budget, and --{self.target} is a bound for each layer",
                "use --keep, --size or --rank",
            )
        if self.solver == "randomized" and self.target in ("energy", "error"):
            raise UsageError(
                f"--solver randomized may miss what --{self.target} asks for", "use --solver auto"
            )
        if self.target == "rank" and self.value < self.multiple_of:
            raise UsageError(
                f"--rank {self.value:g} is below --multiple-of {self.multiple_of}",
                "no rank is both",
            )
        if self.target == "size" and not self.keeps_factors:
            raise UsageError(
                "--size cannot be met in the dense layout, which saves no bytes",
                "use --layout factored or pivoted",
            )

    def _check_numbers(self) -> None:
        """Raises UsageError for a number out of its range, whatever the target."""
        if not 0 <= self.floor <= 1:
            raise UsageError(
                f"--floor {self.floor:g} is outside [0, 1]",
                "give a share of the uniform rank such as 0.6",
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed} is outside [0, 2^63)", "give a smaller one")
        if self.multiple_of < 1:
            raise UsageError(
                f"--multiple-of {self.multiple_of} is not a whole number above 0", "give at least 1"
            )
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise UsageError(
                f"--max-shard-size {self.max_shard_size} is not a size", "give bytes such as 5GB"
            )


def best_defaults(target: Target, *, calibrated: bool) -> dict[str, Any]:
    """What --allocate, --floor and --layout are where a person does not say.

    With a calibration, losses of different layers compare, and the best is what was measured to be
    best: ranks where they are worth most, without a floor, stored pivoted.
    """
    if not calibrated:
        return {"allocate": "uniform", "floor": 0.6, "layout": "factored"}
    # A bound for each layer leaves nothing to allocate.
    allocate = "uniform" if target in ("energy", "error") else "global"
    return {"allocate": allocate, "floor": 0.0, "layout": "pivoted"}


class Wanted(TypedDict, total=False):
    """What a person may ask of compress: one target, and fields of `Recipe` by their names. What is
    None or left out is as `best_defaults` and `Recipe` have it."""

    rank: int | None
    keep: float | None
    size: int | None
    energy: float | None
    error: float | None
    allocate: Allocation | None
    floor: float | None
    multiple_of: int
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    layers: Sequence[str] | None
    layout: Layout | None
    dtype: Dtype | None
    solver: Solver
    seed: int
    nonfinite: OnNonfinite
    max_shard_size: int | None
    self_contained: bool
    metric: MetricName


WANTED: frozenset[str] = Wanted.__optional_keys__


def recipe_for(wanted: Mapping[str, object], *, calibrated: bool) -> Recipe:
    """The recipe that meets what is wanted. Raises UsageError where that is not exactly one
    target."""
    asked: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    given: list[Target] = [name for name in TARGETS if name in asked]
    if len(given) != 1:
        names = ", ".join(f"--{target}" for target in TARGETS)
        raise UsageError(f"give exactly one target, not {len(given)}", f"one of {names}, or --plan")
    [target] = given
    value = asked.pop(target)
    if not isinstance(value, (int, float)):
        raise UsageError(f"{target} {value!r} is no number", "give sizes in bytes")
    for name in ("include", "exclude", "layers"):
        if isinstance(asked.get(name), str):  # one pattern, and no list of letters
            asked[name] = (asked[name],)
    fields = best_defaults(target, calibrated=calibrated) | asked
    recipe = recipe_from_json({"target": target, "value": float(value)} | fields)
    if "floor" in asked and recipe.allocate != "global":
        raise UsageError("--floor is for --allocate global", "leave it out, or allocate globally")
    return recipe


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    return asdict(recipe)


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """A recipe from its fields. Raises UsageError or TypeError where they are none."""
    fields = dict(data)
    for name in ("include", "exclude", "layers"):  # JSON has lists for them
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    return Recipe(**fields)
