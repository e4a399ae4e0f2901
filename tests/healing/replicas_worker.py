"""What one rank of test_replicas.py does, and what one process does in place of all of them.

    main([TEACHER, STUDENT, ..., FOLDER])

Each rank writes what it found to FOLDER.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import svdcli
from svdcli.errors import SvdcliError
from svdcli.healing import blocks as refinement
from svdcli.healing import refit as closed_form
from svdcli.healing.blocks import Batches, Effort, HealedBlock, heal_blocks, heal_whole
from svdcli.healing.replicas import (
    BFLOAT16,
    PLAIN,
    POWER_SGD,
    POWER_START,
    Ranks,
    Replicas,
    replicas_here,
)
from svdcli.healing.shared_memory import SharedPair
from svdcli.healing.sharing import bring
from svdcli.healing.training import Trained, train
from svdcli.models.load import load_stored
from svdcli.text.texts import Texts

STEPS = 8


def batches() -> Batches:
    """Sixteen batches to train on, and three that are held out, which two ranks cannot halve."""
    made: list[Any] = []
    for seed in range(19):
        generator = torch.Generator().manual_seed(seed)
        made.append({"input_ids": torch.randint(2, 96, (4, 32), generator=generator)})
    return Batches(made[:16], made[16:])


def healed(teacher: Path, student: Path, replicas: Replicas) -> list[HealedBlock]:
    """Every block, and the whole model from where it was: without the noise that moments at outputs
    are led back from, which differs between ranks."""
    read = batches().share(replicas)
    models = load_stored(teacher), load_stored(student)
    with mock.patch.object(closed_form, "_output_moments", return_value={}):
        found = list(
            heal_blocks(
                *models,
                read,
                Effort(steps=STEPS),
                trainable=lambda name: True,
                replicas=replicas,
            )
        )
    return [*found, healed_whole(teacher, student, replicas)[0]]


def healed_whole(
    teacher: Path, student: Path, replicas: Replicas, *, share: bool = False
) -> tuple[HealedBlock, dict[str, tuple[int, int]]]:
    """The whole model from where it was, and, where its weights are shared, how many numbers there
    are of each kind, and how many of them this rank holds."""
    models = load_stored(teacher), load_stored(student)
    dtypes = {name: tensor.dtype for name, tensor in models[1].named_parameters()}
    dtypes |= {name: tensor.dtype for name, tensor in models[1].named_buffers()}
    held = share_both(models, set(dtypes), replicas) if share else {}
    if not share:
        for model in models:
            bring(model, replicas.device)

    def note(weights: Sequence[Trained], *rest: Any) -> None:
        trained = [each.weight for each in weights]
        held["trained"] = sum(map(Tensor.numel, trained)), in_memory(trained)
        train(weights, *rest)

    with mock.patch.object(refinement, "train", note):
        whole = heal_whole(
            *models,
            batches().share(replicas),
            Effort(steps=STEPS),
            trainable=lambda name: True,
            dtypes=dtypes,
            hard_labels=0.1,
            replicas=replicas,
            in_step=share,
        )
    return whole, held


def share_both(
    models: tuple[nn.Module, nn.Module], trained: set[str], replicas: Replicas
) -> dict[str, tuple[int, int]]:
    """Share what is frozen of both: how many numbers, and how many are left of them here."""
    ran = {name for name, _ in models[0].named_modules()}
    pair = SharedPair.of(*models, "", ran, trained)
    found = {}
    for name, model, shared in zip(
        ("teacher", "student"), models, (pair.teacher, pair.student), strict=True
    ):
        count = shared.shared
        before = [weakref.ref(weight) for _, group in shared.groups for weight in group]
        shared.bring(replicas)
        gc.collect()
        left = [weight() for weight in before if weight() is not None]
        parts = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
        found[name] = count, in_memory([*left, *parts])
    return found


def in_memory(weights: Sequence[Any]) -> int:
    """How many float32 numbers this rank holds of some weights."""
    total = 0
    for weight in weights:
        part = weight.to_local() if isinstance(weight, DTensor) else weight
        total += part.untyped_storage().nbytes() // 4
    return total


def by_command(teacher: Path, student: Path, out: Path, memory: int | None) -> Any:
    """What the command tells of a healing, where weights take no memory that are shared."""
    texts = Texts("words", (" ".join(f"w{(i * i + 3 * i) % 94 + 2}" for i in range(3000)),))
    with (
        mock.patch.object(SharedPair, "bytes", return_value=0),
        mock.patch("svdcli.verbs.heal.batch_bytes", return_value=0),
        mock.patch("svdcli.text.tokens.TOKENS_IN_A_BATCH", 128),
    ):
        found = svdcli.heal(
            student,
            out,
            teacher=teacher,
            texts=texts,
            effort=Effort(steps=3),
            samples=64,
            seq_len=32,
            memory=memory,
        )
    return found.report.healing["blocks"], found.plan.notes


def averages(ranks: Ranks) -> dict[str, Any]:
    """What each way to send gradients makes of the same ones: a matrix of rank one on every rank,
    a vector that rank 0 alone has, and one that nobody has."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(64, 1, generator=generator), torch.randn(1, 48, generator=generator)
    found: dict[str, Any] = {}
    for how in (PLAIN, BFLOAT16, POWER_SGD):
        weights = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 48), (5,), (3,))]
        ranks._how = how
        average = ranks.averaging(weights)
        for _ in range(POWER_START + 3):
            before = ranks.traffic["gradients"]
            weights[0].grad = (1 + ranks.rank) * u @ v
            weights[1].grad = torch.ones(5) if ranks.first else None
            weights[2].grad = None
            average()
        sent = ranks.traffic["gradients"] - before
        found[how] = (sent, [weight.grad for weight in weights], u @ v)
    ranks._how = PLAIN
    return found


def main(arguments: Sequence[str]) -> None:
    teacher, *students, folder = map(Path, arguments)
    torch.set_num_threads(1)
    with replicas_here(torch.device("cpu")) as replicas:
        assert isinstance(replicas, Ranks)
        found = {str(student): healed(teacher, student, replicas) for student in students}
        ones = {f"of {replicas.rank}": torch.ones(2), "of all": torch.ones(())}
        exchanged = {
            "says": replicas.says(replicas.rank),
            "least": replicas.least(7 - replicas.rank),
            "union": replicas.union({replicas.rank}),
            "summed": replicas.summed(ones),
            "averages": averages(replicas),
        }
        shared = {
            str(student): healed_whole(teacher, student, replicas, share=True)
            for student in students
        }
        rank = replicas.rank
        replicas.ends_with("done" if replicas.first else None)

    # The same by the command, in rounds of its own
    told = {
        memory: by_command(teacher, students[0], folder / f"by command {memory}", memory)
        for memory in (None, 0)
    }

    # More rounds, which one rank ends before anything is exchanged
    exchanged["refusals"] = []
    for refuses in range(2):
        try:
            with replicas_here(torch.device("cpu")) as replicas:
                if rank == refuses:
                    raise SvdcliError(f"rank {rank} refuses", "do not")
                replicas.gather(None)
        except SvdcliError as error:
            exchanged["refusals"].append((type(error), str(error)))
    exchanged |= {"shared": shared, "told": told}
    torch.save((found, exchanged), folder / f"{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1:])
