"""The words that options and recipes take: each list has its one home here, as a type and, where
a recipe is checked against them, as the tuple of its values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

Target = Literal["rank", "keep", "keep_bytes", "size", "energy", "error"]
Allocation = Literal["uniform", "global"]
Layout = Literal["factored", "pivoted", "dense"]
Bits = Literal["16", "8", "4", "auto"]
EmbeddingBits = Literal["16", "8"]
Solver = Literal["auto", "svd", "gram", "randomized"]
OnNonfinite = Literal["error", "skip"]
MetricName = Literal["auto", "inputs", "diagonal", "full"]
Share = Literal["auto", "never", "always"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["float32", "float16", "bfloat16", "float64"]
OnnxDtype = Literal["float32", "float16"]
Precision = Literal["auto", "float32", "bfloat16"]

# In which a model runs while it is measured, where nothing else is asked for.
PRECISION: Precision = "auto"

TARGETS: tuple[Target, ...] = get_args(Target)
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
BITS: tuple[Bits, ...] = get_args(Bits)
EMBEDDING_BITS: tuple[EmbeddingBits, ...] = get_args(EmbeddingBits)
SOLVERS: tuple[Solver, ...] = get_args(Solver)
NONFINITE: tuple[OnNonfinite, ...] = get_args(OnNonfinite)
SHARES: tuple[Share, ...] = get_args(Share)
METRICS: tuple[MetricName, ...] = get_args(MetricName)


def option_of(target: Target) -> str:
    """The option that asks for a target."""
    return f"--{target.replace('_', '-')}"


# What a checkpoint calls the dtypes that people ask for.
STORED_AS: Mapping[str, str] = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
}
# Solvers that are not to be asked for: that of calibrated layers, and that of embedding tables.
WEIGHTED = "weighted"
NEAREST = "nearest"
