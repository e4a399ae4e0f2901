"""Stacks of experts in a file, a 3-D tensor each, as the matrices of the experts.

A stack (experts, out, in) holds one matrix after the other, so that each of them is a stretch of
the file, and is read like any other tensor. Stdlib only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo

# What transformers calls the stacks of its experts modules, and what Granite's files call them.
_STACK = re.compile(r"^(?P<experts>(.+\.)?experts)\.(?P<name>gate_up_proj|up_proj|down_proj)$")
_GRANITE = re.compile(r"^(?P<block>.+\.block_sparse_moe)\.(?P<name>input|output)_linear\.weight$")
_NAMES_OF_GRANITE = {"input": "gate_up_proj", "output": "down_proj"}


def slices_of(stack: TensorInfo) -> Iterator[tuple[TensorInfo, int]]:
    """Every expert's matrix, as a layer of its own, and at which byte of the stack it begins;
    nothing for what is no stack of experts."""
    experts, layer = _parts_of(stack.name)
    if not experts or len(stack.shape) != 3 or stack.dtype not in FACTORED_DTYPES:
        return
    count, m, n = stack.shape
    for number in range(count if m and n else 0):
        name = f"{experts}.{number}.{layer}.weight"
        matrix = TensorInfo(name, stack.dtype, (m, n))
        yield matrix, number * matrix.nbytes


def _parts_of(name: str) -> tuple[str, str]:
    """What transformers calls the module of a stack, and the stack in it; ("", "") for what is
    none."""
    found = _STACK.match(name)
    if found is not None:
        return found["experts"], found["name"]
    found = _GRANITE.match(name)
    if found is not None:
        return f"{found['block']}.experts", _NAMES_OF_GRANITE[found["name"]]
    return "", ""


def stacks_by_matrix(stacks: Iterable[TensorInfo]) -> dict[str, TensorInfo]:
    """{name of a matrix: the stack that it is a slice of}."""
    return {matrix.name: stack for stack in stacks for matrix, _ in slices_of(stack)}


def is_split(stack: TensorInfo, names: Collection[str]) -> bool:
    """Tell whether none of the names of a stack's matrices is another tensor's."""
    matrices = [matrix.name for matrix, _ in slices_of(stack)]
    return bool(matrices) and not any(name in names for name in matrices)
