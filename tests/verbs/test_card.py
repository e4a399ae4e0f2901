"""What runs on a GPU, on a device that is one only by name: every tensor is where it has to be, and
the numbers are a CPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
FAMILIES = ("llama", "t5", "whisper")


def test_a_device_that_is_no_cpu_gives_the_numbers_of_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, TESTS / "card_worker.py", tmp_path, *FAMILIES],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    distances = json.loads(done.stdout)
    assert len(distances) == len(FAMILIES) + 8
    # small losses are differences of large numbers, and a code flips where it is near the middle
    assert distances.pop("sensitivity") < 0.05
    assert distances.pop("packed-healed") < 0.1
    assert distances.pop("global-healed") < 1e-3
    assert max(distances.values()) < 1e-5, distances
