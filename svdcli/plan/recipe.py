"""What was asked: a Recipe, a frozen value with JSON both ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from svdcli.errors import UsageError
from svdcli.plan.layouts import DENSE, LAYOUTS
from svdcli.plan.packing import Packing
from svdcli.plan.tensors import FACTORED_DTYPES
from svdcli.plan.words import (
    ALLOCATIONS,
    BITS,
    EMBEDDING_BITS,
    METRICS,
    NONFINITE,
    SHARES,
    SOLVERS,
    STORED_AS,
    TARGETS,
    Allocation,
    Bits,
    Dtype,
    EmbeddingBits,
    Layout,
    MetricName,
    OnNonfinite,
    Share,
    Solver,
    Target,
    option_of,
)


@dataclass(frozen=True)
class Recipe:
    """What the person asked for. Everything here changes what the output is; device and threads,
    which change the last bits at most, and verbosity do not belong.

    target is one of words.TARGETS; value is its number (a rank, a share in (0, 1], bytes). bits is
    how many a stored number takes, in groups of group_size with a scale each at four;
    embedding_bits those of a number of an embedding table. dtype is
    a word such as float32, kept as checkpoints call it (F32). calibration is the digest of a file
    of moments, metric how much of them counts: the inputs alone, or the loss gradients besides.
    share says whether layers that read the same input get one basis: where less is lost so, never,
    or wherever they can. Raises UsageError where the values cannot be met together.
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
    bits: Bits = "16"
    group_size: int = 64
    embedding_bits: EmbeddingBits = "16"
    share: Share = "auto"

    def __post_init__(self) -> None:
        # Words first: what follows asks for the layout and the target by their names.
        layouts = tuple(name for name, layout in LAYOUTS.items() if layout.is_asked_for)
        for name, value, words in (
            ("target", self.target, TARGETS),
            ("--allocate", self.allocate, ALLOCATIONS),
            (
                "--layout",
                self.layout,
                layouts,
            ),
            ("--bits", self.bits, BITS),
            ("--embedding-bits", self.embedding_bits, EMBEDDING_BITS),
            ("--solver", self.solver, SOLVERS),
            ("--nonfinite", self.nonfinite, NONFINITE),
            ("--metric", self.metric, METRICS),
            ("--share", self.share, SHARES),
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
        self._check_bits()
        if self.target in ("rank", "size"):  # whole numbers, and JSON shows them so
            object.__setattr__(self, "value", int(self.value))

    @property
    def keeps_factors(self) -> bool:
        """Are factors in the output, rather than their products."""
        return LAYOUTS[self.layout].keeps_factors

    @property
    def packs_whole(self) -> bool:
        """Is every layer packed as it is, so that the output is a checkpoint of the
        compressed-tensors library."""
        return self.layout == DENSE and self.bits != "16"

    @property
    def saves_bytes(self) -> bool:
        """Is the output meant to be smaller than its source."""
        return self.keeps_factors or self.packs_whole

    def _check_target(self) -> None:
        """Raises UsageError where the target's number is no such number, or where another choice
        does not go with the target."""
        # The number itself.
        is_count = math.isfinite(self.value) and self.value >= 1 and self.value == int(self.value)
        if self.target in ("rank", "size") and not is_count:
            raise UsageError(
                f"--{self.target} {self.value:g} is not a whole number above 0", "give at least 1"
            )
        if self.target in ("keep", "keep_bytes", "energy") and not 0 < self.value <= 1:
            raise UsageError(
                f"{option_of(self.target)} {self.value:g} is outside (0, 1]",
                "give a share such as 0.6",
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
        can_share = self.allocate == "global" and self.keeps_factors and self.metric != "inputs"
        if self.share == "always" and not can_share:
            raise UsageError(
                "--share always is for factors whose ranks are chosen for all layers together by "
                "what they cost the model",
                "leave out --allocate uniform, --layout dense and --metric inputs",
            )
        if self.target in ("size", "keep_bytes") and not self.saves_bytes:
            raise UsageError(
                f"{option_of(self.target)} cannot be met in the dense layout, which saves no bytes",
                "use --layout factored or pivoted, or --bits auto with a text",
            )

    def _check_bits(self) -> None:
        """Raises UsageError for fewer bits where they do not go with the rest."""
        if self.group_size not in (32, 64, 128):
            raise UsageError(f"--group-size {self.group_size} is not 32, 64 or 128", "use 64")
        if self.embedding_bits != "16" and not self.keeps_factors:
            raise UsageError(
                f"--embedding-bits {self.embedding_bits} does not go with --layout dense, which is "
                f"for loaders that look up no packed rows",
                "leave out one of them",
            )
        if self.bits == "16":
            return
        if self.layout == "pivoted":
            raise UsageError(
                f"--bits {self.bits} does not go with --layout pivoted, which was measured to be "
                f"no better in fewer bits",
                "leave out --layout",
            )
        if self.packs_whole and self.bits != "auto" and self.target != "keep":
            raise UsageError(
                f"{option_of(self.target)} changes nothing in the dense layout at {self.bits} "
                f"bits: each matrix is rounded as a whole, and takes the same bytes",
                f"leave out {option_of(self.target)}, or --layout",
            )
        if self.packs_whole and self.target == "keep" and self.value != 1:
            raise UsageError(
                f"--keep {self.value:g} cuts nothing off in the dense layout at {self.bits} bits: "
                f"a matrix that is rounded has no low rank",
                "leave out --keep, or --layout",
            )
        if self.bits == "auto":
            _check_budget(self.target)
        if self.bits == "auto" and self.allocate != "global":
            raise UsageError(
                "--bits auto chooses for all layers together", "leave out --allocate uniform"
            )

    @property
    def packings(self) -> tuple[Packing, ...]:
        """How layers may be packed, the widest first; none where numbers stay as they are."""
        allowed = {"16": (), "8": (8,), "4": (4,), "auto": (8, 4)}[self.bits]
        in_words = self.packs_whole
        return tuple(Packing(bits, self.group_size, in_words) for bits in allowed)

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
        size = self.max_shard_size
        if size is not None and (not isinstance(size, int) or size < 1):
            raise UsageError(
                f"--max-shard-size {size} is not a size",
                "give bytes: on the command line such as 5GB, in Python as a number",
            )


def best_defaults(target: Target, *, calibrated: bool, bits: str | None = None) -> dict[str, Any]:
    """What --allocate, --floor and --layout are where a person does not say.

    With a calibration, losses of different layers compare, and the best is what was measured to be
    best: ranks where they are worth most, without a floor, stored pivoted; of a budget in bytes,
    ranks and bits, whose factors are stored as such.
    """
    if not calibrated:
        return {"allocate": "uniform", "floor": 0.6, "layout": "factored"}
    in_bytes = target in ("size", "keep_bytes")
    if in_bytes and bits is None:
        bits = "auto"
    if bits not in (None, "16"):
        allocate = "global" if in_bytes else "uniform"
        return {"allocate": allocate, "floor": 0.0, "layout": "factored", "bits": bits}
    # A bound for each layer leaves nothing to allocate.
    allocate = "uniform" if target in ("energy", "error") else "global"
    return {"allocate": allocate, "floor": 0.0, "layout": "pivoted"}


class Wanted(TypedDict, total=False):
    """What a person may ask of compress: one target, and fields of `Recipe` by their names. What is
    None or left out is as `best_defaults` and `Recipe` have it."""

    rank: int | None
    keep: float | None
    keep_bytes: float | None
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
    bits: Bits | None
    group_size: int
    embedding_bits: EmbeddingBits
    share: Share


WANTED: frozenset[str] = Wanted.__optional_keys__


def recipe_for(wanted: Mapping[str, object], *, calibrated: bool) -> Recipe:
    """The recipe that meets what is wanted. Raises UsageError where that is not exactly one
    target."""
    asked: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    given: list[Target] = [name for name in TARGETS if name in asked]
    if not given and asked.get("layout") == DENSE and str(asked.get("bits")) in ("8", "4"):
        # fewer bits are all that is asked for: every matrix at its full rank
        given, asked["keep"] = ["keep"], 1.0
    if len(given) != 1:
        names = ", ".join(option_of(target) for target in TARGETS)
        raise UsageError(f"give exactly one target, not {len(given)}", f"one of {names}, or --plan")
    [target] = given
    value = asked.pop(target)
    if not isinstance(value, (int, float)):
        raise UsageError(f"{target} {value!r} is no number", "give sizes in bytes")
    for name in ("include", "exclude", "layers"):
        if isinstance(asked.get(name), str):  # one pattern, and no list of letters
            asked[name] = (asked[name],)

    # Python callers may give bits as a number
    if "embedding_bits" in asked:
        asked["embedding_bits"] = str(asked["embedding_bits"])
    bits = None
    if asked.get("bits") is not None:
        bits = asked["bits"] = str(asked["bits"])
    elif _is_about_ranks(asked):
        bits = "16"
    fields = best_defaults(target, calibrated=calibrated, bits=bits) | asked
    if fields.get("bits") == "auto" and not calibrated:
        _check_budget(target)  # which a calibration would not mend
        raise UsageError(
            "--bits auto weighs what layers lose, which takes a calibration",
            "give --text or --calibration too, or --bits 8 or 4",
        )
    recipe = recipe_from_json({"target": target, "value": float(value)} | fields)
    if "floor" in asked and recipe.bits == "auto":
        raise UsageError(
            "--floor bounds ranks, and --bits auto chooses among ranks and bits", "leave it out"
        )
    if "floor" in asked and recipe.allocate != "global":
        raise UsageError("--floor is for --allocate global", "leave it out, or allocate globally")
    return recipe


def _check_budget(target: Target) -> None:
    """Raises UsageError for a target that is no budget for both ranks and bits."""
    if target not in ("size", "keep_bytes"):
        raise UsageError(
            f"--bits auto needs a budget in bytes, and {option_of(target)} is none",
            "use --keep-bytes or --size, or give --bits 8 or 4",
        )


def _is_about_ranks(asked: Mapping[str, object]) -> bool:
    """Was something asked for that only ranks at 16 bits have."""
    layout, allocate = asked.get("layout", "factored"), asked.get("allocate", "global")
    return layout != "factored" or allocate == "uniform" or "floor" in asked


def recipe_to_json(recipe: Recipe) -> dict[str, Any]:
    """The fields of a recipe; those that the first svdcli did not know only where they say
    something else than it did."""
    data = asdict(recipe)
    if recipe.embedding_bits == "16":
        del data["embedding_bits"]
    if recipe.bits == "16":
        del data["bits"]
        del data["group_size"]
    if recipe.share == "auto":
        del data["share"]
    return data


def recipe_from_json(data: dict[str, Any]) -> Recipe:
    """A recipe from its fields. Raises UsageError or TypeError where they are none."""
    fields = dict(data)
    for name in ("include", "exclude", "layers"):  # JSON has lists for them
        if fields.get(name) is not None:
            fields[name] = tuple(fields[name])
    return Recipe(**fields)
