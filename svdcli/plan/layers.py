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
_NOT_MEANT = ("not in the list of layers", "no --include matches", "excluded by ")


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
    names, roles, shared = [tensor.name for tensor in tensors], Roles(tensors, facts), tied or {}
    for pattern in (*include, *exclude):
        if not any(_matches(pattern, name) for name in names):
            raise _no_such(f"the pattern {pattern!r} matches no tensor", pattern, names, roles)
    wanted = None if layers is None else _exact(layers, names, roles)
    named = {name for name in names if name in include or module_of(name) in include} | (
        wanted or set()
    )
    _check_whole(named, shared)
    selected, skipped = [], []
    for tensor in tensors:
        reason = _not_asked_for(tensor.name, include, exclude, wanted) or _reason_by_shape(
            tensor, roles
        )
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
    reasons = [item.reason for item in skipped]
    meant = [item for item in skipped if not item.reason.startswith(_NOT_MEANT)]
    if meant and len(meant) < len(
        skipped
    ):  # what was asked for by a pattern stays dense for what it is
        what = f"{meant[0].tensor.module} stays dense: {meant[0].reason}"
        hint = "its full name as --include overrides what a layer does"
        return NothingSelectedError(f"no layer of {shown} is selected ({what})", hint)
    top = max(dict.fromkeys(reasons), key=reasons.count, default="")
    why = (
        f" ({reasons.count(top)} of {len(reasons)} tensors: {top})"
        if top
        else ": it holds no tensors"
    )
    return NothingSelectedError(f"no layer of {shown} is selected{why}", "see `svdcli inspect`")


def near_names(pattern: str, names: Iterable[str]) -> str:
    """A hint with the names of which a part looks most like `pattern`."""
    modules = list(dict.fromkeys(map(module_of, names)))
    plain = re.sub(r"[^\w.]", "", module_of(pattern.removeprefix("re:"))).strip(".")
    depth = plain.count(".") + 1
    parts: dict[str, str] = {}
    for module in modules:
        words = module.split(".")
        for start in range(len(words) - depth + 1):
            parts.setdefault(".".join(words[start : start + depth]), module)
    close = [parts[part] for part in difflib.get_close_matches(plain, list(parts), n=3, cutoff=0.6)]
    close = close or difflib.get_close_matches(plain, modules, n=3, cutoff=0.3) or modules[:3]
    return f"near names: {', '.join(close)}" if close else "the checkpoint is empty"


def break_even(shape: tuple[int, ...]) -> int:
    """The largest rank at which the factored layout has fewer parameters than the (m, n) weight."""
    m, n = shape
    return (m * n - 1) // (m + n) if m and n else 0


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise UsageError(
                f"{pattern!r} is not a regular expression ({error})", "see Python's re syntax"
            ) from error
    return any(
        pattern == text or fnmatch.fnmatchcase(text, pattern) for text in (name, module_of(name))
    )


def _exact(layers: Sequence[str], names: Sequence[str], roles: Roles) -> set[str]:
    known = {module_of(name): name for name in names} | {name: name for name in names}
    for layer in layers:
        if layer not in known:
            raise _no_such(f"there is no tensor {layer!r}", layer, names, roles)
    return {known[layer] for layer in layers}


def _no_such(problem: str, pattern: str, names: Sequence[str], roles: Roles) -> UsageError:
    """A head that is tied to the embedding is not in the file, or the embedding is not: the other
    one is meant."""
    other = roles.stands_for(module_of(pattern))
    if not other:
        return UsageError(problem, near_names(pattern, names))
    return UsageError(
        f"{problem}: tied weights are in the file once, here as {other}",
        f"name {other}, which is both",
    )


def _check_whole(named: Set[str], tied: Mapping[str, str]) -> None:
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
    more = {name}
    while more:
        group |= more
        more = {one for one, other in tied.items() if other in group} | {
            tied[one] for one in group if one in tied
        }
        more -= group
    return group


def _not_asked_for(
    name: str, include: Sequence[str], exclude: Sequence[str], wanted: set[str] | None
) -> str:
    if wanted is not None and name not in wanted:
        return "not in the list of layers"
    if include and not any(_matches(pattern, name) for pattern in include):
        return "no --include matches"
    return next((f"excluded by {pattern!r}" for pattern in exclude if _matches(pattern, name)), "")


def _reason_tied(tensor: TensorInfo, tied: Mapping[str, str]) -> str:
    return f"tied: shares its storage with {tied[tensor.name]}" if tensor.name in tied else ""


def _reason_by_shape(tensor: TensorInfo, roles: Roles) -> str:
    dimensions = len(tensor.shape)
    if dimensions == 3 and "expert" in tensor.name:
        return "3-D expert stack: not a matrix"
    if dimensions != 2:
        return f"{dimensions}-D: not a matrix"
    if tensor.dtype not in FACTORED_DTYPES:
        kind = (
            "quantised"
            if tensor.dtype.startswith(("F8", "F6", "F4", "I8", "U8"))
            else "not a real floating dtype"
        )
        return f"{tensor.dtype}: {kind}"
    alone = tensor.name == "weight" and not roles.facts.by_class
    if not (alone or tensor.name.endswith(".weight")):
        return "not the weight of a linear layer"
    if break_even(tensor.shape) < SMALLEST_BREAK_EVEN:
        return f"too small to gain: {tensor.shape[0]} x {tensor.shape[1]}"
    return ""
