"""What the layouts of `plan.layouts` do with numbers: encode factors, give rows back, measure the
error of what is stored."""

from __future__ import annotations

from svdcli.linalg.layouts.base import Codec
from svdcli.linalg.layouts.dense import DenseCodec
from svdcli.linalg.layouts.factored import FactoredCodec
from svdcli.linalg.layouts.pivoted import PivotedCodec

__all__ = ["CODECS", "Codec"]

CODECS: dict[str, Codec] = {
    "factored": FactoredCodec(),
    "pivoted": PivotedCodec(),
    "dense": DenseCodec(),
    "whole": DenseCodec(),
}
