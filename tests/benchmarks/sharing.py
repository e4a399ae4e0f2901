"""What one basis for several layers costs or gains, at equal parameters and at equal bytes: one
table.

    python tests/benchmarks/sharing.py              the sample model; 20 minutes on 2 cores
    python tests/benchmarks/sharing.py --quick      few windows, two budgets
    python tests/benchmarks/sharing.py --json FILE  what was measured, as JSON

Every row reads the same calibration (the training half of Python's standard library) and is judged
on text that it never saw, by the excess of its loss over the original's, paired by window.
Parameters and bytes are those of the block linears; at `keep` layers are pivoted, in bytes each has
its rank and bits. All rows choose ranks by what they cost the model in the same metric:

    separate       every layer has a basis of its own
    by choice      layers that read the same input share one where less is lost so (svdcli)
    always         query, key and value share one, as do gate and up
    across blocks  the layers of one name in two neighbouring blocks share one, but those whose
                   output leaves the block's branch (Basis Sharing: Wang et al., 2025, arXiv
                   2410.03765, section 3): their inputs differ, and the mean of both moments stands
                   for each
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import bits
import torch
from bits import SAMPLE
from common import building_in, parser, say, table, write_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import svdcli
from svdcli.calibration.moments import METADATA

BUDGETS = (("keep", 0.8), ("keep", 0.6), ("keep", 0.4), ("keep", 0.3))
BUDGETS += (("keep_bytes", 0.2), ("keep_bytes", 0.13))
ROWS = {"separate": "never", "by choice": "auto", "always": "always", "across blocks": "always"}
ACROSS = "across blocks"
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_LEAVE = ("o_proj", "down_proj")


class Bench(bits.Bench):
    """The sample model, its calibration, and the text that everything is judged on."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        super().__init__(folder, options)
        self.windows = 16 if options.quick else 256
        self.budgets = BUDGETS[1::3] if options.quick else BUDGETS

    @cached_property
    def across(self) -> Path:
        """The same where layers of one name in two neighbouring blocks read one input: both."""

        def pair_of(name: str) -> str | None:
            found = _BLOCK.search(name)
            if found is None or any(leaf in name for leaf in _LEAVE):
                return None
            return name.replace(found[0], f".layers.{int(found[1]) // 2} and next.")

        return with_common_inputs(self.moments, self.folder / "across.safetensors", pair_of)

    def measured(self, row: str, budget: tuple[str, float]) -> dict[str, Any] | None:
        """Excess loss in nats a token, its standard error over windows, and what was predicted;
        None where the budget cannot be reached."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        how: dict[str, Any] = {"share": ROWS[row], budget[0]: budget[1]}
        calibration = self.across if row == ACROSS else self.moments
        try:
            outcome = svdcli.compress(SAMPLE, out, calibration=calibration, **how)
        except svdcli.SvdcliError:
            return None
        value, error = self.excess(out)
        shared = sum(layer.layers for layer in outcome.report.layers if layer.members)
        return {
            "budget": list(budget),
            "excess": value,
            "error": error,
            "predicted": outcome.report.predicted_loss,
            "shared": shared,
        }


def with_common_inputs(moments: Path, out: Path, group_of: Callable[[str], str | None]) -> Path:
    """A calibration in which all layers of a group read one input, the mean of what they read;
    group_of names the group of a weight, None for one that keeps its own."""
    tensors = load_file(moments)
    with safe_open(moments, "pt") as opened:
        data = json.loads(opened.metadata()[METADATA])
    groups: dict[str, list[str]] = {}
    for name in data["layers"]:
        group = group_of(name)
        if group is not None:
            groups.setdefault(group, []).append(name)
    common: dict[str, torch.Tensor] = {}
    for group, names in groups.items():
        for kind in ("input", "mean"):
            read = [tensors[f"{kind}.{data['layers'][name]['input']}"] for name in names]
            common[f"{kind}.{group}"] = torch.stack(read).mean(0)
    for group, names in groups.items():
        for name in names:
            data["layers"][name]["input"] = group
    save_file(tensors | common, out, {METADATA: json.dumps(data)})
    return out


def measure(bench: Bench) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for row in ROWS:
        results[row] = []
        for budget in bench.budgets:
            say(f"{row}, {budget[0]} {budget[1]}")
            results[row].append(bench.measured(row, budget))
    return results


def markdown(results: dict[str, Any]) -> str:
    """Excess losses, a line for each budget."""
    budgets = [found["budget"] for found in results["separate"]]
    lines = [("budget", *results, "shared by choice")]
    for at, (target, value) in enumerate(budgets):
        option = f"`--{target.replace('_', '-')} {value:g}`"
        cells = []
        for found in (row[at] for row in results.values()):
            if found is None:
                cells.append("")
            else:
                cells.append(f"{found['excess']:.4f} ± {found['error']:.4f}")
        chosen = results["by choice"][at]
        lines.append((option, *cells, "" if chosen is None else f"{chosen['shared']} layers"))
    return table(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="few windows, two budgets")
    options.set_defaults(shares=None)  # of bits.py, which has budgets in bytes alone
    given = options.parse_args()
    with building_in(given.folder) as folder:
        results = measure(Bench(folder, given))
    print(markdown(results))
    write_json(given.json, results)


if __name__ == "__main__":
    main()
