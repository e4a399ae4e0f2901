"""Open a model once, in a process of its own: `python opened.py FOLDER` prints peak memory above
what the imports take.

Three times: after svdcli.load, whose weights stay in the mapped file; after every weight was read;
after one pass.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from svdcli.models.bench_worker import Worker

TOKENS = 8


def read_all(model: torch.nn.Module) -> None:
    """Every byte once, without a copy: what the kernel maps in counts as memory of this process."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().max()


def main(folder: str) -> None:
    worker = Worker(
        {
            "path": folder,
            "device": "cpu",
            "threads": None,
            "prompt_tokens": TOKENS,
            "new_tokens": 1,
            "batch": 1,
        }
    )
    found: dict[str, Any] = {"imports_bytes": worker.bytes_before, **worker.load()}
    found["opened"] = worker.memory()["peak_bytes"]
    read_all(worker.model)
    found["read"] = worker.memory()["peak_bytes"]
    worker.prefill()
    found["run"] = worker.memory()["peak_bytes"]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
