"""Where the mathematics runs. Imports no torch before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from svdcli.errors import UsageError
from svdcli.plan.words import Device

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Compute:
    """Where and how fast the mathematics runs. device is cpu, cuda, mps or auto; threads None
    leaves torch's choice; jobs is how many processes share the layers, None for this one. Raises
    UsageError for a number that is none."""

    device: Device = "auto"
    threads: int | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise UsageError(
                f"--threads {self.threads} is outside [1, 4096]",
                "leave it out for torch's own choice",
            )
        if self.jobs is not None and not 1 <= self.jobs <= 256:
            raise UsageError(
                f"--jobs {self.jobs} is outside [1, 256]", "give a number of processes"
            )

    def start(self) -> torch.device:
        """Set the threads and find the device. Raises UsageError where this machine has no such
        device."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        available = ["cpu"]
        if torch.cuda.is_available():
            available.append("cuda")
        if torch.backends.mps.is_available():
            available.append("mps")
        if self.device == "auto":
            # never mps by itself, which has no float64
            name = "cuda" if "cuda" in available else "cpu"
            return torch.device(name)
        if self.device not in available:
            raise UsageError(
                f"--device {self.device} is not available here", f"use {', '.join(available)}"
            )
        return torch.device(self.device)
