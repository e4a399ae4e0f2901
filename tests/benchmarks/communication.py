"""What healing on several ranks sends, and what it gains for it; and what tensor parallel inference
sends of low-rank layers. Two tables.

    python tests/benchmarks/communication.py              the sample model on 2 gloo ranks
    python tests/benchmarks/communication.py --quick      few steps and windows
    python tests/benchmarks/communication.py --count      the second table alone, which is counted
    python tests/benchmarks/communication.py --json FILE  what was measured, as JSON

Every row trains the sample model at keep 0.5 as a whole on the same batches, in the same order: a
step takes one batch of 4 windows of 128 tokens on each rank, and the loss is that of `heal`. What
is trained differs:

    dense     the weights of all layers that were factored, multiplied out
    factors   their factors, as `heal` trains them
    scales    of the same factors at 4 bits, scales and the model's norms alone

Steps are as large as `heal` has them; scales are trained with larger ones, too, and the better of
both counts, by the windows that choose the best step. Excess loss is that over the original's on
other windows of text that nothing was trained on, in nats a token. Bytes are those of the tensors
that a worker hands to the exchange of gradients; a ring of n workers sends 2 (n - 1) / n times as
many of each: as many, of 2. PowerSGD begins at the eleventh step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import HERE, building_in, compressed, parser, say, svdcli, table, write_json

SAMPLE = HERE.parents[1] / "sample_models" / "tiny-llama"
RANKS = 2
ROWS_A_BATCH, LENGTH = 4, 128
KEEP, HARD = 0.5, 0.1
MODELS = {"dense": "expanded", "factors": "factors", "scales": "packed"}
# What is trained, how its gradients travel, and the rates that are tried, where there is a choice
ROWS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("dense", "plain", (1.0,)),
    ("dense", "bfloat16", (1.0,)),
    ("dense", "PowerSGD", (1.0,)),
    ("factors", "plain", (1.0,)),
    ("factors", "bfloat16", (1.0,)),
    ("factors", "PowerSGD", (1.0,)),
    ("scales", "plain", (1.0, 3.0)),
)
BLOCK = {  # of Llama 7B: (outputs, inputs), and whether its input lies split over the ranks
    "q": (4096, 4096, False),
    "k": (4096, 4096, False),
    "v": (4096, 4096, False),
    "o": (4096, 4096, True),
    "gate": (11008, 4096, False),
    "up": (11008, 4096, False),
    "down": (4096, 11008, True),
}
KEEPS = (0.8, 0.6, 0.4, 0.3, 0.2)
POWER_START = 10  # steps before PowerSGD: `healing.replicas`
SPLIT_OVER = 4  # ranks of tensor parallel inference


# The ranks ----------------------------------------------------------------------------------------


class Worker:
    """One rank: the text that all rows read, this rank's share of it."""

    def __init__(self, folder: Path, steps: int, windows: int, replicas: Any) -> None:
        from svdcli.healing.blocks import Batches
        from svdcli.text.texts import read_texts
        from svdcli.text.tokens import load_tokenizer, windows_of

        self.folder, self.steps, self.replicas = folder, steps, replicas
        tokenizer = load_tokenizer(SAMPLE)

        def batches(held_out: bool, count: int) -> list[Any]:
            text = read_texts(None, stdlib=True, held_out=held_out)
            ids = windows_of(tokenizer, text, LENGTH, count).ids
            return [{"input_ids": part} for part in ids.split(ROWS_A_BATCH)]

        # Of the held-out windows every fourth chooses the best step, and the others judge
        held_out = batches(True, windows)
        choosing = held_out[::4]
        judging = [batch for index, batch in enumerate(held_out) if index % 4]
        read = batches(False, steps * RANKS * ROWS_A_BATCH)
        self.read = Batches(read, choosing).share(replicas)
        self.judged = Batches([{}] * RANKS, judging).share(replicas)

    def run(self) -> list[dict[str, Any]]:
        found = []
        for what, how, rates in ROWS:
            runs = [self.row(what, how, rate) for rate in rates]
            found.append(min(runs, key=lambda run: run["chosen by"]))
            if self.replicas.first:
                say(json.dumps(found[-1]))
        return found

    def row(self, what: str, how: str, rate: float) -> dict[str, Any]:
        """Train one model from where it was compressed to."""
        import torch

        from svdcli.healing.blocks import Effort, _Whole, heal_whole
        from svdcli.models.load import load_stored

        # Both models in float32
        teacher = load_stored(SAMPLE)
        student = load_stored(self.folder / MODELS[what])
        tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        for model in (teacher, student):
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.float()

        # Before, training, and after it with the best weights
        judge = _Whole(teacher, student, self.judged, 1.0, torch.device("cpu"), self.replicas)
        with torch.no_grad():
            before = judge.errors()[0]
        self.replicas._how = how
        sent = self.replicas.traffic["gradients"]
        if what == "factors":
            effort, every = Effort(steps=self.steps), dtypes.__contains__
            block = heal_whole(
                teacher,
                student,
                self.read,
                effort,
                trainable=every,
                dtypes=dtypes,
                hard_labels=HARD,
                replicas=self.replicas,
            )
            error, weights = block.after, dict(block.weights)
        else:
            error, weights = self.tuned(teacher, student, what, rate, dtypes)
        for name, value in weights.items():
            tensors[name].data = value.to(tensors[name].dtype)
        with torch.no_grad():
            after = judge.errors()[0]
        return {
            "trained": what,
            "travels": how,
            "rate": rate,
            "bytes": self.replicas.traffic["gradients"] - sent,
            "steps": self.steps,
            "before": before,
            "after": after,
            "chosen by": error,
        }

    def tuned(
        self, teacher: Any, student: Any, what: str, rate: float, dtypes: dict[str, Any]
    ) -> tuple[float, dict[str, Any]]:
        """(least loss, the weights that had it) of training dense weights, or scales and norms."""
        import torch

        from svdcli.healing.blocks import (
            WHOLE_RATE,
            _learned_roundings,
            _scale_dtypes,
            _trainable,
            _Whole,
        )
        from svdcli.healing.standins import StandIns
        from svdcli.healing.training import Best, Schedule, by_size, train

        # What may change: all dense weights that were factored, or norms and packed layers
        parameters = dict(student.named_parameters())
        if what == "dense":
            names = [name for name in parameters if "_proj.weight" in name]
        else:
            names = [name for name in parameters if "norm" in name]
        kept = {name: parameters[name] for name in names} | _trainable(
            student, "", dtypes.__contains__
        )
        roundings = _learned_roundings(student, _scale_dtypes(student, "", dtypes))
        layers = StandIns(student, roundings)

        # The loss and the size of steps as `heal` has them for the whole model
        device = torch.device("cpu")
        goal = _Whole(teacher, student, self.read, HARD, device, self.replicas)
        distances: list[float] = []

        def error() -> float:
            loss, distance = goal.errors()
            distances.append(distance)
            return loss

        best = Best(kept, dtypes, error)
        rate *= WHOLE_RATE * max(0.0, distances[0]) ** 0.5
        trained = [parameters[name] for name in names]
        trained += [layer.scales for layer in roundings.values()]

        def keep_if_better() -> bool:
            with layers.stored():
                return best.keep_if_better()

        schedule = Schedule(self.steps, None, lambda share: None, self.replicas)
        indices = range(len(self.read.train))
        weights = by_size(trained, rate)
        with layers.training():
            train(weights, schedule, indices, goal.loss, keep_if_better, 0, self.replicas)
        return best.error, dict(self.replicas.same(best.weights))


def work(folder: Path, steps: int, windows: int) -> None:
    """What torchrun starts."""
    import torch

    from svdcli.healing.replicas import replicas_here

    torch.set_num_threads(1)
    with replicas_here(torch.device("cpu")) as replicas:
        found = Worker(folder, steps, windows, replicas).run()
        if replicas.first:
            (folder / "found.json").write_text(json.dumps(found))
        replicas.ends_with("done" if replicas.first else None)


# What is counted ----------------------------------------------------------------------------------


def tensor_parallel(keep: float | None, ranks: int) -> dict[str, float]:
    """Numbers that a block of Llama 7B sends for each token, and the products of each rank.

    A ring's all-reduce of x numbers sends 2 x (ranks - 1) / ranks of them from each rank, its
    all-gather half of that. Dense, the outputs of o and down are reduced, and every rank has its
    part of all products. At a rank r, o and down first make their vectors of r numbers from what a
    rank has of their inputs, and these are reduced in place of the outputs: every rank then
    multiplies by all of `svd_up`; the other layers have all of `svd_down` on every rank, and their
    part of `svd_up`. Where nothing is done twice (`divided`), each rank makes its part of the other
    layers' vectors, which are gathered, and its part of the outputs of o and down, which are
    gathered too.
    """
    way = (ranks - 1) / ranks
    sent, divided, done, products = 0.0, 0.0, 0.0, 0.0
    for m, n, split in BLOCK.values():
        if keep is None:
            sent += 2 * m * way if split else 0
            done += m * n / ranks
            products += m * n
            continue
        r = int(keep * m * n / (m + n))
        products += r * (m + n)
        sent += 2 * r * way if split else 0
        divided += (2 * r + m) * way if split else r * way
        done += r * m + r * n / ranks if split else r * n + r * m / ranks
    return {"sent": sent, "divided": divided or sent, "done": done, "products": products}


def counted() -> str:
    """The table of tensor parallel inference."""
    dense = tensor_parallel(None, SPLIT_OVER)
    lines = [
        (
            "keep",
            "r of o, down",
            "sent, r reduced",
            "of dense",
            "products of a rank",
            "sent, divided",
        )
    ]
    for keep in (None, *KEEPS):
        found = tensor_parallel(keep, SPLIT_OVER)
        ranks = "-"
        if keep is not None:
            ranks = ", ".join(
                str(int(keep * m * n / (m + n))) for m, n, split in BLOCK.values() if split
            )
        lines.append(
            (
                "dense" if keep is None else f"{keep:g}",
                ranks,
                f"{2 * found['sent'] / 1e3:.1f} KB",
                f"{found['sent'] / dense['sent']:.2f}",
                f"{found['done'] / dense['done']:.2f}",
                f"{found['divided'] / dense['sent']:.2f}",
            )
        )
    return table(lines)


# The tables ---------------------------------------------------------------------------------------


def measured(folder: Path, steps: int, windows: int) -> list[dict[str, Any]]:
    """All rows, by ranks that torchrun starts."""
    compressed(SAMPLE, folder / MODELS["factors"], "--keep", KEEP)
    compressed(SAMPLE, folder / MODELS["scales"], "--keep", KEEP, "--bits", "4")
    if not (folder / MODELS["dense"]).is_dir():
        svdcli("expand", folder / MODELS["factors"], "-o", folder / MODELS["dense"])
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", RANKS, __file__)
    arguments = (*launch, "--worker", "--folder", folder, "--steps", steps, "--windows", windows)
    subprocess.run([sys.executable, *map(str, arguments)], check=True)
    found: list[dict[str, Any]] = json.loads((folder / "found.json").read_text())
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    lines = [("trained", "gradients travel", "sent in all", "a late step", "before", "after")]
    plain = {row["trained"]: row["bytes"] for row in found if row["travels"] == "plain"}
    for row in found:
        # The first steps of PowerSGD are plain ones
        early = POWER_START if row["travels"] == "PowerSGD" else 0
        late = row["bytes"] - early * plain[row["trained"]] / row["steps"]
        late /= row["steps"] - early
        lines.append(
            (
                row["trained"],
                row["travels"],
                f"{row['bytes'] / 1e6:.1f} MB",
                f"{late / 1e3:.0f} KB",
                f"{row['before']:.4f}",
                f"{row['after']:.4f}",
            )
        )
    return table(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="few steps and windows")
    options.add_argument("--count", action="store_true", help="the counted table alone")
    options.add_argument("--steps", type=int, default=60)
    options.add_argument("--windows", type=int, default=64, help="of the held-out text")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.quick:
        given.steps, given.windows = 12, 16
    if given.worker:
        work(given.folder, given.steps, given.windows)
        return
    if not given.count:
        with building_in(given.folder) as folder:
            found = measured(folder, given.steps, given.windows)
        print(markdown(found))
        print()
        write_json(given.json, found)
    print(counted())


if __name__ == "__main__":
    main()
