"""What the experts of one layer lend each other: moments of those that saw few tokens.

A second moment of n inputs that was measured on fewer tokens than n is noise in most directions.
The experts of a layer read the same stream, so their average is what is known of each before it
has read anything. It counts as much as n tokens do: (S + n M) / (t + n) for the sum S over t tokens
and the average M of all experts, a shrinkage to a common target (Ledoit and Wolf, 2004) whose
weight falls with what was read. Gradients are averaged likewise, and still count as often as the
router sends tokens to the expert, at least once: none is free of charge because the text was short.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from svdcli.calibration.moments import Spool

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


def sibling_groups(names: Iterable[str]) -> list[list[str]]:
    """The names of weights that differ in the number of the expert alone, in groups of two or
    more."""
    groups: dict[str, list[str]] = {}
    for name in names:
        if _NUMBER.search(name):
            groups.setdefault(_NUMBER.sub("*", name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def lend(
    layers: Iterable[str], leaders: dict[str, str], rows: dict[str, int], spool: Spool
) -> list[str]:
    """Add to the sums of every expert what its siblings know, and return the names of the weights
    that read fewer tokens than they have inputs.

    layers are the names of all weights that were to be measured. leaders maps each weight that was
    reached to the one whose input it shares, rows those to how many rows they read; both are filled
    in for experts that no token was sent to.
    """
    few: list[str] = []
    read = dict(rows)
    lent: set[str] = set()
    for group in sibling_groups(layers):
        seen = [name for name in group if name in leaders]
        if not seen:
            continue
        for name in group:
            leaders.setdefault(name, _of_the_same_expert(leaders[seen[0]], name))
        inputs = [leaders[name] for name in group]
        counts = [read.get(leader, 0) for leader in inputs]
        width = spool.shapes[f"input.{leaders[seen[0]]}"][0]
        few += [name for name, count in zip(group, counts, strict=True) if count < width]

        # Inputs, once for those that share them; then gradients
        if inputs[0] not in lent:
            lent.update(inputs)
            for kind in ("input", "mean"):
                _add_average(spool, [f"{kind}.{leader}" for leader in inputs], counts, width)
            for leader, count in zip(inputs, counts, strict=True):
                rows[leader] = count + width
        _shrink_gradients(spool, [f"output.{name}" for name in group], counts, width)
    return few


def _of_the_same_expert(leader: str, name: str) -> str:
    """The name of a leader, as it is in the expert of another weight."""
    number = _NUMBER.search(name)
    assert number is not None
    return _NUMBER.sub(number[0], leader)


def _add_average(spool: Spool, keys: list[str], counts: list[int], weight: int) -> None:
    """Add to each sum what so many tokens of the average expert would have added."""
    average = _total(spool, keys) / max(1, sum(counts))
    for key in keys:
        spool.add(key, average * weight)


def _total(spool: Spool, keys: list[str]) -> Tensor:
    """The sum of those that are there, at least one, held one at a time."""
    there = [key for key in keys if key in spool.shapes]
    total = spool.get(there[0])
    for key in there[1:]:
        total += spool.get(key)
    return total


def _shrink_gradients(spool: Spool, keys: list[str], counts: list[int], weight: int) -> None:
    """Have the gradients of each expert drawn to those of the average one, as many as before."""
    if not any(key in spool.shapes for key in keys):
        return
    average = _total(spool, keys) / max(1, sum(counts))
    for key, count in zip(keys, counts, strict=True):
        before = spool.get(key) if key in spool.shapes else torch.zeros_like(average)
        after = (before + weight * average) * (max(1, count) / (count + weight))
        spool.add(key, after - before)
