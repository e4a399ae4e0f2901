"""How work tells how far it is. The null object is `silent`; bars live in render."""

from __future__ import annotations

from collections.abc import Callable

# Phase, name of what was just done, work done so far, all work; in seconds of a guess, good enough
# for the time left.
Progress = Callable[[str, str, float, float], None]


def silent(phase: str, name: str, done: float, total: float) -> None:
    """No progress."""
