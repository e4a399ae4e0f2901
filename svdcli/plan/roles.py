"""Layers that stay dense for what they do, recognised by their names, their shapes, the layers
beside them and the model's config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import chain, product

from svdcli.plan.adapters import is_adapter_factor
from svdcli.plan.facts import ModelFacts
from svdcli.plan.tensors import TensorInfo

_EMBEDDING = re.compile(
    r"embed|(^|[._])(emb|wte|wpe|word_emb\w*|relative_attention_bias|codebook)($|[._])|(^|[.])shared$",
    re.IGNORECASE,
)
# Heads of detectors, which give a class and a box: they embed nothing.
_DETECTION_HEAD = re.compile(r"(^|\.)(enc_out_)?(class|bbox)_embed($|\.)")
# Learned tables that a decoder starts from, one row a query; in attention the name is that of a
# layer, within a block.
_QUERIES = re.compile(r"(^|\.)(query|queries)(_feat\w*)?$")
# Tables of positions and kinds of tokens: no output head has their shape, but a square layer of a
# small model may.
_NO_VOCABULARY = re.compile(r"posit|pos_?emb|wpe|relative|token_type|segment", re.IGNORECASE)
_HEAD_LEAVES = frozenset(
    {"lm_head", "embed_out", "head", "head_linear", "classifier", "score", "qa_outputs"}
)
_HEAD_TOPS = frozenset(
    {
        "lm_head",
        "embed_out",
        "output",
        "head",
        "classifier",
        "score",
        "qa_outputs",
        "proj_out",
        "cls",
    }
)
# Rows of a size that is a vocabulary's and hardly a layer's.
_SURELY_A_VOCABULARY = 1000
# A part of a name that speaks of a head; the shape must agree.
_HEAD_PART = re.compile(
    r"(^|_)(heads?|classifiers?|logits?|scores?|embed_out|predictor)$", re.IGNORECASE
)
_ROUTER = re.compile(r"(^|_)routers?($|_)", re.IGNORECASE)
# Also what gated MLPs and attention call their gates: in a mixture of experts alone, and where it
# sits beside the experts.
_GATE = re.compile(
    r"^(moe_|expert_|switch_)?(gate|gates|gating|switch|wg)(_net|_network|_layer)?$", re.IGNORECASE
)
_EXPERTS = re.compile(r"^(local_|moe_|routed_)?experts$", re.IGNORECASE)
_MIXTURE = re.compile(r"(^|_)moe(_block|_layer)?$", re.IGNORECASE)
# What picks tokens for attention, or codewords: its outputs are compared and thrown away.
_CHOOSER = re.compile(r"(^|_)index(er)?($|_)|^quantizer$", re.IGNORECASE)
_MTP = re.compile(r"^mtp($|_)", re.IGNORECASE)
# The layers of the main text stack, not those of towers beside it.
_MAIN_LAYER = re.compile(
    r"^(?:(?:base_model|model|language_model|text_model|transformer|backbone)\.)*(?:layers|h|blocks)\.(\d+)\."
)


class Roles:
    """The roles of a checkpoint's layers. facts are those of its config.json, None where it has
    none."""

    def __init__(self, tensors: Sequence[TensorInfo], facts: ModelFacts | None = None) -> None:
        self.facts = facts or ModelFacts()
        self.mixtures = set(chain.from_iterable(map(self._mixtures_around, tensors)))
        self.tables = [tensor for tensor in tensors if self._is_vocabulary(tensor)]
        self.table_shapes = {table.shape for table in self.tables}
        matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
        self.heads = [
            tensor
            for tensor in matrices
            if not _is_embedding(tensor) and self._head(tensor, tensor.module.split("."))
        ]

    def reason(self, tensor: TensorInfo) -> str:
        """Why a matrix stays dense for what it does, or an empty string."""
        parts = tensor.module.split(".")
        left_out = self._not_in_the_class(tensor)
        if left_out:
            return left_out
        if is_adapter_factor(tensor.name):
            return "a factor of an adapter that is not merged"
        if _is_embedding(tensor):
            return "embedding"
        head = self._head(tensor, parts)
        if head:
            return head
        if "norm" in parts[-1].lower():
            return "norm"
        router = self._router(tensor, parts)
        if router:
            return router
        for part in parts:
            if _CHOOSER.search(part):
                return f"feeds a choice ({part})"
        return ""

    def copies(self) -> list[tuple[TensorInfo, TensorInfo]]:
        """(head, embedding) that a class which ties them makes one weight of, where they are
        equal."""
        return [
            (head, table)
            for head, table in product(self.heads, self.tables)
            if (head.shape, head.dtype) == (table.shape, table.dtype)
        ]

    def stands_for(self, module: str) -> str:
        """What holds the weight of a head or embedding of this name that the checkpoint lacks,
        because the two are tied; "" where that is not so."""
        if self.facts.tied is False or self.copies():
            return ""
        parts = module.split(".")
        vocabularies = self.facts.vocabularies
        candidates: list[TensorInfo] = []
        # T5 and its kin store one table, and call it shared.
        if parts[-2:] in (["encoder", "embed_tokens"], ["decoder", "embed_tokens"]):
            candidates = [t for t in self.tables if t.module.split(".")[-1] == "shared"]
        # The embedding is not there: the head has its weight.
        elif _EMBEDDING.search(module) and not _NO_VOCABULARY.search(module) and not self.tables:
            candidates = [head for head in self.heads if head.shape[0] in vocabularies]
        # The head is not there: the embedding has its weight.
        elif parts[0] in _HEAD_TOPS or _HEAD_PART.search(parts[-1]):
            candidates = [
                table for table in self.tables if not vocabularies or table.shape[0] in vocabularies
            ]
        if not candidates:
            return ""
        return max(candidates, key=lambda tensor: tensor.parameters).module

    def _is_vocabulary(self, tensor: TensorInfo) -> bool:
        """A table of what the model reads and writes, whose shape a head may have. Square ones
        (queries, positions) have the shape of a layer by chance, unless config.json says that so
        many rows are a vocabulary."""
        is_weight = len(tensor.shape) == 2 and tensor.name.endswith(".weight")
        if not is_weight or not _is_embedding(tensor) or _NO_VOCABULARY.search(tensor.module):
            return False
        rows, columns = tensor.shape
        return rows != columns or rows in self.facts.vocabularies

    def _not_in_the_class(self, tensor: TensorInfo) -> str:
        """Layers that predict further tokens lie in the files of many models whose classes leave
        them out."""
        if not self.facts.by_class:
            return ""
        if any(map(_MTP.search, tensor.module.split("."))):
            return "multi-token prediction: left out by transformers"
        main = _MAIN_LAYER.match(tensor.module)
        if main and self.facts.depth is not None and int(main[1]) >= self.facts.depth:
            return f"beyond the {self.facts.depth} layers that config.json gives the model"
        return ""

    def _head(self, tensor: TensorInfo, parts: Sequence[str]) -> str:
        """Why a matrix is an output head, or an empty string. parts are those of its module's
        name."""
        # Names that are a head's alone. One at the top may be a whole network, whose blocks have
        # layers like any other.
        below = _below_blocks(tensor.module).split(".")
        in_a_block = any(part.isdigit() for part in parts)
        in_a_stack = in_a_block and len(below) > 1 and not parts[-1].isdigit()
        is_top = parts[0] in _HEAD_TOPS and not in_a_stack
        is_leaf = parts[-1] in _HEAD_LEAVES and not in_a_block
        if _DETECTION_HEAD.search(tensor.module) or is_top or is_leaf:
            return "output head"

        # Names that speak of a head, and shapes. In a block only both together count.
        words = [part for part in parts if not part.isdigit()]
        named = any(_HEAD_PART.search(part) for part in words[-2:])
        if in_a_block and not named:
            return ""
        if tensor.shape in self.table_shapes:
            return "output head (shaped like the embedding)"
        rows, columns = tensor.shape
        if rows in self.facts.vocabularies and (named or rows > max(columns, _SURELY_A_VOCABULARY)):
            return "embedding or output head (as many rows as the vocabulary)"
        if named and rows in self.facts.codes:
            return "output head (as many rows as there are codes)"
        # Detectors and segmenters have one more, for nothing; losses of speaker models keep theirs
        # the other way round.
        if {rows, columns} & self.facts.labels or (named and rows - 1 in self.facts.labels):
            return "output head (as many rows as labels)"
        return ""

    def _router(self, tensor: TensorInfo, parts: Sequence[str]) -> str:
        """Why a matrix is the router of a mixture of experts, or an empty string."""
        if any(map(_ROUTER.search, parts)):
            return "expert router"
        if not self.mixtures:
            return ""
        scores_experts = tensor.shape[0] in self.facts.experts
        for depth, part in enumerate(parts):
            beside_experts = ".".join(parts[:depth]) in self.mixtures
            if _GATE.search(part) and (beside_experts or scores_experts):
                return "expert router"
        if scores_experts and ".".join(parts[:-1]) in self.mixtures:
            return "expert router (as many rows as experts)"
        return ""

    def _mixtures_around(self, tensor: TensorInfo) -> list[str]:
        """The blocks whose experts this tensor belongs to: what holds `experts`, is called a
        mixture, or holds one stack of matrices for all experts."""
        parts = tensor.module.split(".")
        mixtures = []
        for depth, part in enumerate(parts):
            if _EXPERTS.search(part):
                mixtures.append(".".join(parts[:depth]))
            if _MIXTURE.search(part) and depth < len(parts) - 1:
                mixtures.append(".".join(parts[: depth + 1]))
        is_stack = len(tensor.shape) == 3 and tensor.shape[0] in self.facts.experts
        if is_stack and min(tensor.shape) > 1:
            mixtures.append(".".join(parts[:-1]))
        return mixtures


def _is_embedding(tensor: TensorInfo) -> bool:
    """Is this a table of which single rows are read."""
    if _DETECTION_HEAD.search(tensor.module):
        return False
    return _EMBEDDING.search(_below_blocks(tensor.module)) is not None or _is_queries(tensor)


def _is_queries(tensor: TensorInfo) -> bool:
    """A square matrix of that name, or one in a block, is a layer of attention."""
    in_a_block = any(part.isdigit() for part in tensor.module.split("."))
    square = len(set(tensor.shape)) == 1
    return not in_a_block and not square and _QUERIES.search(tensor.module) is not None


def _below_blocks(module: str) -> str:
    """The part of a name below its innermost numbered block; all of it where there is none."""
    parts = module.split(".")
    while len(parts) > 1 and parts[-1].isdigit():
        parts.pop()
    for depth in reversed(range(len(parts))):
        if parts[depth].isdigit():
            return ".".join(parts[depth + 1 :])
    return ".".join(parts)
