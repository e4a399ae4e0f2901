"""What ranks share of a model, and what that leaves to each: chosen and counted without any ranks.
That they learn the same is in test_replicas.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import svdcli
from svdcli.healing.shared_memory import SharedPair
from svdcli.models.load import load_stored

Written = Callable[[str], Path]


def pair_of(teacher: Path, student: Path) -> SharedPair:
    models = load_stored(teacher), load_stored(student)
    ran = {name for name, _ in models[0].named_modules()}
    trained = {*dict(models[1].named_parameters()), *dict(models[1].named_buffers())}
    return SharedPair.of(*models, "", ran, trained)


def test_matrices_are_shared_by_block_and_what_is_refined_is_not(
    written: Written, tmp_path: Path
) -> None:
    svdcli.compress(written("llama"), tmp_path / "small", svdcli.Recipe("keep", 0.4))
    pair = pair_of(written("llama"), tmp_path / "small")
    teacher, student = pair.teacher, pair.student

    # Llama: seven matrices a block; the table and the head outside
    assert [len(group) for _, group in teacher.groups] == [7, 7, 2]
    matrices = [weight for weight in teacher.model.parameters() if weight.ndim > 1]
    assert teacher.shared == sum(weight.numel() for weight in matrices)
    assert teacher.held(1) == teacher.shared
    assert teacher.held(2) == teacher.shared // 2
    block, _, outside = (sum(weight.numel() for weight in group) for _, group in teacher.groups)
    assert teacher.gathered == outside + block + max(outside, block)

    # Of the student the table and the head alone
    assert [len(group) for _, group in student.groups] == [2]
    factors = sum(
        weight.numel() for name, weight in student.model.named_parameters() if ".svd_" in name
    )
    assert pair.standins.trained == factors
    assert pair.standins.trained_of_experts == 0

    # Each further rank leaves less to all, down to what every one of them holds
    sizes = [pair.bytes(ranks) for ranks in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 4 * 2 * factors


def test_stand_ins_of_experts_are_not_shared(written: Written, tmp_path: Path) -> None:
    """Each rank's text goes to other experts, and nobody would meet there."""
    svdcli.compress(written("mixtral"), tmp_path / "small", svdcli.Recipe("keep", 0.4))
    pair = pair_of(written("mixtral"), tmp_path / "small")
    assert pair.standins.trained > 0
    assert pair.standins.trained_of_experts > 0
    names = {id(module): name for name, module in pair.teacher.model.named_modules()}
    units = [names[id(unit)] for unit, _ in pair.teacher.groups]
    assert units == ["model.layers.0", "model.layers.1", ""]
