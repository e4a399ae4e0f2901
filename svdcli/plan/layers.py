"""Which tensors are factored: by name and shape, with a reason for each one that is not."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence

from svdcli.errors import UsageError
from svdcli.plan.recipe import Skipped
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo, module_of

# The largest rank that saves must be at least this, or a layer has nothing worth sharing.
SMALLEST_BREAK_EVEN = 8

_EMBEDDING = re.compile(r"embed|(^|[._])(emb|wte|wpe|word_emb\w*|relative_attention_bias)($|[._])|(^|[.])shared$", re.IGNORECASE)
# Tables of positions and kinds of tokens: no output head has their shape, but a square layer of a small model may.
_NO_VOCABULARY = re.compile(r"posit|pos_?emb|wpe|relative|token_type|segment", re.IGNORECASE)
_HEAD_LEAVES = frozenset({"lm_head", "embed_out", "head", "classifier", "score", "qa_outputs"})
_HEAD_TOPS = frozenset({"lm_head", "embed_out", "output", "head", "classifier", "score", "qa_outputs", "proj_out", "cls"})
_ROUTER_LEAVES = frozenset({"gate", "router", "shared_expert_gate"})


def choose_layers(
    tensors: Sequence[TensorInfo],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layers: Sequence[str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> tuple[tuple[TensorInfo, ...], tuple[Skipped, ...]]:
    """Split a checkpoint's tensors into layers to factor and skipped ones with their reasons.

    include and exclude are globs, or regular expressions behind `re:`, tried on the tensor's name and on the name without
    `.weight`; layers are exact names. A pattern without wildcards that names a tensor overrides the rules that go by name
    (embeddings, heads, norms, routers), never those that go by dtype and shape. tied maps a tensor to the one whose storage
    it shares. Raises UsageError for a pattern or name that matches nothing.
    """
    names = [tensor.name for tensor in tensors]
    for pattern in (*include, *exclude):
        if not any(_matches(pattern, name) for name in names):
            raise UsageError(f"the pattern {pattern!r} matches no tensor", near_names(pattern, names))
    wanted = None if layers is None else _exact(layers, names)
    named = {name for name in names if name in include or module_of(name) in include} | (wanted or set())
    context = _Context(tensors, tied or {})
    selected, skipped = [], []
    for tensor in tensors:
        reason = _not_asked_for(tensor.name, include, exclude, wanted) or context.reason(tensor, by_name=tensor.name not in named)
        if reason:
            skipped.append(Skipped(tensor, reason))
        else:
            selected.append(tensor)
    return tuple(selected), tuple(skipped)


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
            raise UsageError(f"{pattern!r} is not a regular expression ({error})", "see Python's re syntax") from error
    return any(pattern == text or fnmatch.fnmatchcase(text, pattern) for text in (name, module_of(name)))


def _exact(layers: Sequence[str], names: Sequence[str]) -> set[str]:
    known = {module_of(name): name for name in names} | {name: name for name in names}
    for layer in layers:
        if layer not in known:
            raise UsageError(f"there is no tensor {layer!r}", near_names(layer, names))
    return {known[layer] for layer in layers}


def _not_asked_for(name: str, include: Sequence[str], exclude: Sequence[str], wanted: set[str] | None) -> str:
    if wanted is not None and name not in wanted:
        return "not in the list of layers"
    if include and not any(_matches(pattern, name) for pattern in include):
        return "no --include matches"
    return next((f"excluded by {pattern!r}" for pattern in exclude if _matches(pattern, name)), "")


class _Context:
    """What one tensor's reason may depend on in the rest of the checkpoint."""

    def __init__(self, tensors: Sequence[TensorInfo], tied: Mapping[str, str]) -> None:
        self.tied = tied
        self.has_experts = any("expert" in tensor.name for tensor in tensors)
        tables = [t for t in tensors if len(t.shape) == 2 and _EMBEDDING.search(t.module)]
        self.embedding_shapes = {table.shape for table in tables if not _NO_VOCABULARY.search(table.module)}

    def reason(self, tensor: TensorInfo, *, by_name: bool) -> str:
        """Why this tensor is not factored, or an empty string where it is."""
        return _reason_by_shape(tensor) or (self._reason_by_name(tensor) if by_name else "") or self._reason_tied(tensor)

    def _reason_tied(self, tensor: TensorInfo) -> str:
        return f"tied: shares its storage with {self.tied[tensor.name]}" if tensor.name in self.tied else ""

    def _reason_by_name(self, tensor: TensorInfo) -> str:
        parts = tensor.module.split(".")
        in_a_block = any(part.isdigit() for part in parts)
        if _EMBEDDING.search(tensor.module):
            return "embedding"
        if parts[0] in _HEAD_TOPS or (parts[-1] in _HEAD_LEAVES and not in_a_block):
            return "output head"
        if tensor.shape in self.embedding_shapes and not in_a_block:
            return "output head (shaped like the embedding)"
        if "norm" in parts[-1].lower():
            return "norm"
        if self.has_experts and parts[-1] in _ROUTER_LEAVES:
            return "expert router"
        return ""


def _reason_by_shape(tensor: TensorInfo) -> str:
    dimensions = len(tensor.shape)
    if dimensions == 3 and "expert" in tensor.name:
        return "3-D expert stack: not a matrix"
    if dimensions != 2:
        return f"{dimensions}-D: not a matrix"
    if tensor.dtype not in FACTORED_DTYPES:
        kind = "quantised" if tensor.dtype.startswith(("F8", "F6", "F4", "I8", "U8")) else "not a real floating dtype"
        return f"{tensor.dtype}: {kind}"
    if tensor.name != "weight" and not tensor.name.endswith(".weight"):
        return "not the weight of a linear layer"
    if break_even(tensor.shape) < SMALLEST_BREAK_EVEN:
        return f"too small to gain: {tensor.shape[0]} x {tensor.shape[1]}"
    return ""
