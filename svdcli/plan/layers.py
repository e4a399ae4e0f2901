"""Which tensors are factored: by name and shape, with a reason for each one that is not."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence, Set

from svdcli.errors import NothingSelectedError, UsageError
from svdcli.plan.facts import ModelFacts
from svdcli.plan.plan import Skipped
from svdcli.plan.roles import Roles
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo, module_of

# The largest rank that saves must be at least this, or a layer has nothing worth sharing.
SMALLEST_BREAK_EVEN = 8
# So begin the reasons of what a person did not ask for.
_NOT_ASKED_FOR = ("not in the list of layers", "no --include matches", "excluded by ")


def choose_layers(
    tensors: Sequence[TensorInfo],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Sequence[str] | None = None,
    tied: Mapping[str, str] | None = None,
    facts: ModelFacts | None = None,
) -> tuple[tuple[TensorInfo, ...], tuple[Skipped, ...]]:
    """Split a checkpoint's tensors into layers to factor and skipped ones with their reasons.

    include and exclude are globs, or regular expressions behind `re:`, tried on the tensor's name
    and on the name without `.weight`; layers are exact names. A pattern without wildcards that
    names a tensor overrides the rules that go by what a layer does (embeddings, heads, norms,
    routers, layers that the model's class leaves out), never those that go by dtype and shape. tied
    maps a tensor to the one whose storage it shares. facts is what config.json says, None where
    there is none. Raises UsageError for a pattern or name that matches nothing, or that names one
    of several names of one weight.
    """
    # What was asked for must be there, under all of its names.
    names = [tensor.name for tensor in tensors]
    roles = Roles(tensors, facts)
    shared = tied or {}
    for pattern in (*include, *exclude):
        if not any(_matches(pattern, name) for name in names):
            raise _no_such(f"the pattern {pattern!r} matches no tensor", pattern, names, roles)
    wanted = None if layers is None else _tensors_of(layers, names, roles)
    named = {name for name in names if name in include or module_of(name) in include}
    named |= wanted or set()
    _check_ties(named, shared)

    # The first reason counts; a tensor that was named is not asked for its role.
    selected: list[TensorInfo] = []
    skipped: list[Skipped] = []
    for tensor in tensors:
        reason = _not_asked_for(tensor.name, include, exclude, wanted)
        reason = reason or _reason_by_shape(tensor, roles)
        if not reason and tensor.name not in named:
            reason = roles.reason(tensor) or _reason_tied(tensor, shared)
        if reason:
            skipped.append(Skipped(tensor, reason))
        else:
            selected.append(tensor)
    return tuple(selected), tuple(skipped)


def nothing_selected(shown: str, skipped: Sequence[Skipped]) -> NothingSelectedError:
    """The error of a checkpoint without layers to factor, with the reason that most of its tensors
    have."""
    # A pattern chose some tensors, and those stay dense for what they are.
    asked_for = [entry for entry in skipped if not entry.reason.startswith(_NOT_ASKED_FOR)]
    if asked_for and len(asked_for) < len(skipped):
        first = asked_for[0]
        return NothingSelectedError(
            f"no layer of {shown} is selected ({first.tensor.module} stays dense: {first.reason})",
            "its full name as --include overrides what a layer does",
        )

    # All were asked for, or none was.
    reasons = [entry.reason for entry in skipped]
    why = ": it holds no tensors"
    if reasons:
        top = max(dict.fromkeys(reasons), key=reasons.count)
        why = f" ({reasons.count(top)} of {len(reasons)} tensors: {top})"
    return NothingSelectedError(f"no layer of {shown} is selected{why}", "see `svdcli inspect`")


def near_names(pattern: str, names: Iterable[str]) -> str:
    """A hint with the names of which a part looks most like `pattern`."""
    modules = list(dict.fromkeys(map(module_of, names)))
    name = module_of(pattern.removeprefix("re:"))
    plain = re.sub(r"[^\w.]", "", name).strip(".")  # without wildcards and brackets

    # Parts of module names that have as many words as the pattern, and a module with each.
    depth = plain.count(".") + 1
    parts: dict[str, str] = {}
    for module in modules:
        words = module.split(".")
        for start in range(len(words) - depth + 1):
            part = ".".join(words[start : start + depth])
            parts.setdefault(part, module)

    # Whole names where no part is near; the first ones where those are not either.
    near_parts = difflib.get_close_matches(plain, list(parts), n=3, cutoff=0.6)
    near = [parts[part] for part in near_parts]
    if not near:
        near = difflib.get_close_matches(plain, modules, n=3, cutoff=0.3)
    if not near:
        near = modules[:3]
    if not near:
        return "the checkpoint is empty"
    return f"near names: {', '.join(near)}"


def break_even(shape: tuple[int, ...]) -> int:
    """The largest rank at which the factored layout has fewer parameters than the (m, n) weight."""
    m, n = shape
    if not m or not n:
        return 0
    return (m * n - 1) // (m + n)


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise UsageError(
                f"{pattern!r} is not a regular expression ({error})", "see Python's re syntax"
            ) from error
    return any(
        pattern == spelling or fnmatch.fnmatchcase(spelling, pattern)
        for spelling in (name, module_of(name))
    )


def _tensors_of(layers: Sequence[str], names: Sequence[str], roles: Roles) -> set[str]:
    """The tensors of these layers, which are named with `.weight` or without."""
    tensors = {module_of(name): name for name in names}
    tensors |= {name: name for name in names}
    for layer in layers:
        if layer not in tensors:
            raise _no_such(f"there is no tensor {layer!r}", layer, names, roles)
    return {tensors[layer] for layer in layers}


def _no_such(problem: str, pattern: str, names: Sequence[str], roles: Roles) -> UsageError:
    """The error of a name that is not there. Of a head and an embedding that are tied only one is
    in the file: that one is meant."""
    stored = roles.stands_for(module_of(pattern))
    if not stored:
        return UsageError(problem, near_names(pattern, names))
    return UsageError(
        f"{problem}: tied weights are in the file once, here as {stored}",
        f"name {stored}, which is both",
    )


def _check_ties(named: Set[str], tied: Mapping[str, str]) -> None:
    """Raises UsageError where a tensor is named and one that shares its storage is not."""
    for name in sorted(named & tied.keys()):
        others = _same_storage(name, tied) - {name}
        if not others <= named:
            listed = ", ".join(sorted(map(module_of, others)))
            raise UsageError(
                f"{module_of(name)} is tied: it shares its storage with {listed}",
                "name all of them",
            )


def _same_storage(name: str, tied: Mapping[str, str]) -> set[str]:
    """Every name that a chain of ties leads to, the first one included."""
    group: set[str] = set()
    added = {name}
    while added:
        group |= added
        tied_to_group = {tensor for tensor, partner in tied.items() if partner in group}
        partners = {tied[tensor] for tensor in group if tensor in tied}
        added = (tied_to_group | partners) - group
    return group


def _not_asked_for(
    name: str, include: Sequence[str], exclude: Sequence[str], wanted: set[str] | None
) -> str:
    """Why a tensor is not among those that a person wants factored, or an empty string."""
    if wanted is not None and name not in wanted:
        return "not in the list of layers"
    if include and not any(_matches(pattern, name) for pattern in include):
        return "no --include matches"
    for pattern in exclude:
        if _matches(pattern, name):
            return f"excluded by {pattern!r}"
    return ""


def _reason_tied(tensor: TensorInfo, tied: Mapping[str, str]) -> str:
    if tensor.name not in tied:
        return ""
    return f"tied: shares its storage with {tied[tensor.name]}"


def _reason_by_shape(tensor: TensorInfo, roles: Roles) -> str:
    """Why a tensor cannot be factored, whatever it does; an empty string where it can be."""
    # Not a matrix of real numbers.
    dimensions = len(tensor.shape)
    if dimensions == 3 and "expert" in tensor.name:
        return "3-D expert stack: not a matrix"
    if dimensions != 2:
        return f"{dimensions}-D: not a matrix"
    if tensor.dtype not in FACTORED_DTYPES:
        if tensor.dtype.startswith(("F8", "F6", "F4", "I8", "U8")):
            return f"{tensor.dtype}: quantised"
        return f"{tensor.dtype}: not a real floating dtype"

    # No layer that a low-rank module could take the place of, or one too small for that. A lone
    # `weight` is the state dict of one layer, unless a class opens the model.
    alone = tensor.name == "weight" and not roles.facts.by_class
    if not (alone or tensor.name.endswith(".weight")):
        return "not the weight of a linear layer"
    if break_even(tensor.shape) < SMALLEST_BREAK_EVEN:
        return f"too small to gain: {tensor.shape[0]} x {tensor.shape[1]}"
    return ""
