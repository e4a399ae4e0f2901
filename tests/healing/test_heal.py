"""heal: blocks never get worse, sizes stay, what it was not to touch stays, and a kill loses one
block at most."""

from __future__ import annotations

import gc
import json
import textwrap
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import changed, cli, complaint, contents, tree
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from zoo import words_tokenizer

import svdcli
from svdcli.calibration.loss import ModelLoss, block_moments
from svdcli.errors import BadCheckpointError, SvdcliError
from svdcli.files.workspace import Workspace
from svdcli.healing import blocks as module
from svdcli.healing import refit as closed_form
from svdcli.healing.blocks import WHOLE, Batches, Effort, heal_blocks
from svdcli.models.modules import LowRankLinear
from svdcli.verbs.outcome import Outcome

TEXT = svdcli.Texts("words", (" ".join(f"w{(i * i + 3 * i) % 94 + 2}" for i in range(3000)),))
HOW: dict[str, Any] = {"effort": Effort(steps=8), "samples": 32, "seq_len": 32}
# Where a little learning is as good as more
LITTLE = HOW | {"effort": Effort(steps=2), "samples": 8}
Written = Callable[[str], Path]
Pair = tuple[Path, Path]


@pytest.fixture(scope="module", params=["factored", "pivoted"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """(a tiny Llama, the same at keep 0.4), both with a tokenizer."""
    return a_pair(tmp_path_factory.mktemp("heal"), request.param)


@pytest.fixture(scope="module")
def factored(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The same, for what no layout changes."""
    return a_pair(tmp_path_factory.mktemp("heal"), "factored")


def a_pair(folder: Path, layout: str) -> Pair:
    teacher = zoo.save("llama", folder / "model")
    words_tokenizer(teacher)
    svdcli.compress(teacher, folder / "small", svdcli.Recipe("keep", 0.4, layout=layout))
    return teacher, folder / "small"


@pytest.fixture(scope="module", autouse=True)
def _small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svdcli.text.tokens.TOKENS_IN_A_BATCH", 128)
        yield


@pytest.fixture(scope="module")
def healed(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a run makes of the pair that nothing interrupts."""
    out = tmp_path_factory.mktemp("heal") / "healed"
    before = tree(pair[1])
    found = svdcli.heal(pair[1], out, teacher=pair[0], texts=TEXT, **HOW)
    assert tree(pair[1]) == before
    return found


def test_every_block_gets_better_and_the_model_with_them(pair: Pair, healed: Outcome) -> None:
    blocks = healed.report.healing["blocks"]
    assert list(blocks) == ["model.layers.0", "model.layers.1", WHOLE]
    assert all(item["after"] < item["before"] for item in blocks.values())
    assert svdcli.verify(healed.path, pair[0]).ok
    dense, ours, better = (svdcli.load(path) for path in (*pair, healed.path))
    ids = torch.randint(2, 96, (8, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        gaps = [
            (m.model(ids).last_hidden_state - dense.model(ids).last_hidden_state).norm()
            for m in (ours, better)
        ]
    assert gaps[1] < gaps[0]


def test_only_factors_change(pair: Pair, healed: Outcome) -> None:
    old, new = (contents(folder / "model.safetensors") for folder in (pair[1], healed.path))
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name] != new[name]}
    assert changed
    assert all(name.endswith(("svd_up.weight", "svd_down.weight", "svd_rows")) for name in changed)
    assert all(old[name][:2] == new[name][:2] for name in old)


def test_the_reported_errors_are_those_of_the_stored_weights(
    pair: Pair, tmp_path: Path, monkeypatch: Any
) -> None:
    """An oracle for a block, and for all of them: both models run in one piece, the gradient's
    moment by an ordinary backward pass, the model's own loss on the text by transformers."""
    from svdcli.calibration.reading import read_batches
    from svdcli.calibration.text_side import text_side
    from svdcli.text.tokens import Amount, load_tokenizer

    teacher, small = pair
    monkeypatch.setattr("svdcli.verbs.heal._WHOLE_READS", 1)
    how = HOW | {"effort": Effort(steps=2), "teacher": teacher, "texts": TEXT}
    whole = svdcli.heal(small, tmp_path / "whole", **how, hard_labels=0.3)
    found = svdcli.heal(small, tmp_path / "healed", **how, memory=0)
    dense, ours, healed = (svdcli.load(folder) for folder in (teacher, small, tmp_path / "healed"))
    side = text_side(dense, "", 96, "")
    reading = Batches.split(
        read_batches(side, load_tokenizer(teacher), TEXT, Amount(32), 32).batches
    )
    few = reading.fewer(12).train
    torch.manual_seed(0)
    h = block_moments(
        dense.requires_grad_(False), few, {"model.layers.0"}, 1000, torch.device("cpu")
    )["model.layers.0"].double()
    h += module.DAMPING * h.diagonal().mean() * torch.eye(h.shape[0], dtype=torch.float64)
    for model, key in ((ours, "before"), (healed, "after")):
        wrong = energy = 0.0
        for batch in reading.held_out:
            with torch.no_grad():
                y, z = (
                    m.model(**batch, output_hidden_states=True).hidden_states[1].double()
                    for m in (dense, model)
                )
            wrong += float(((z - y) @ h * (z - y)).sum())
            energy += float((y @ h * y).sum())
        assert found.report.healing["blocks"]["model.layers.0"][key] == pytest.approx(
            wrong / energy, rel=1e-3
        )
    for model, key in ((healed, "before"), (svdcli.load(tmp_path / "whole"), "after")):
        with torch.no_grad():
            losses = [
                [m(**batch, labels=batch["input_ids"]).loss.double() for m in (dense, model)]
                for batch in reading.held_out
            ]
            pairs = [
                [m(**batch).logits.double().log_softmax(-1) for m in (dense, model)]
                for batch in reading.held_out
            ]
        kl = torch.stack(
            [torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum") for p, q in pairs]
        ).sum()
        count = sum(batch["input_ids"].numel() for batch in reading.held_out)
        excess = sum(float(ours - theirs) for theirs, ours in losses) / len(losses)
        mixed = 0.7 * float(kl) / count + 0.3 * excess
        assert whole.report.healing["blocks"][WHOLE][key] == pytest.approx(mixed, rel=1e-3)
    assert (whole.report.healing["hard_labels"], found.report.healing["hard_labels"]) == (0.3, 0.0)


def test_hard_labels_teach_the_text_and_their_absence_the_original(
    factored: Pair, tmp_path: Path
) -> None:
    """The sequence of TEXT is periodic, and the dense model has never seen it."""
    losses, (teacher, small) = {}, factored
    how = HOW | {"effort": Effort(steps=20), "samples": 16}
    for share in (0.0, 0.9):
        svdcli.heal(
            small, tmp_path / str(share), teacher=teacher, texts=TEXT, **how, hard_labels=share
        )
        ids = torch.tensor([[int(word[1:]) for word in TEXT.documents[0].split()[:32]]])
        with torch.no_grad():
            losses[share] = float(svdcli.load(tmp_path / str(share))(ids, labels=ids).loss)
    assert losses[0.9] < losses[0.0] - 0.005


def test_a_model_that_does_not_fit_into_memory_is_healed_in_blocks_and_says_so(
    factored: Pair, tmp_path: Path
) -> None:
    teacher, small = factored
    found = svdcli.heal(small, tmp_path / "healed", teacher=teacher, texts=TEXT, **LITTLE, memory=0)
    assert list(found.report.healing["blocks"]) == ["model.layers.0", "model.layers.1"]
    assert any("did not train the whole model" in note for note in found.report.notes)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_calibrated_model_with_biases_heals(
    family: str, readable: Written, tmp_path: Path
) -> None:
    """Its biases are refitted with its layers, and are trained with them."""
    teacher = readable(family)
    lines = svdcli.Texts("lines", (textwrap.fill(TEXT.documents[0], 90),))
    reading = svdcli.Reading(lines, samples=8, seq_len=32)
    recipe = svdcli.Recipe("keep", 0.5, allocate="global", floor=0.0, layout="pivoted")
    plan = svdcli.compress(teacher, tmp_path / "small", recipe, reading=reading).plan
    assert any(layer.biases for layer in plan.factored)
    healed = svdcli.heal(
        tmp_path / "small", tmp_path / "healed", teacher=teacher, texts=lines, **LITTLE
    ).plan
    assert svdcli.verify(tmp_path / "healed", teacher).ok
    small, better = (
        load_file(tmp_path / name / "model.safetensors") for name in ("small", "healed")
    )
    biases = [bias.name for layer in healed.factored for bias in layer.biases]
    assert any(not torch.equal(small[name], better[name]) for name in biases)


def test_a_size_that_the_record_of_healing_exceeds_is_noted(
    readable: Written, tmp_path: Path
) -> None:
    """Ranks stay, and what healing did takes room in the record."""
    teacher = readable("llama")
    svdcli.compress(teacher, tmp_path / "small", svdcli.Recipe("rank", 12))
    record = json.loads((tmp_path / "small" / "svdcli.json").read_text())
    small = sum(path.stat().st_size for path in (tmp_path / "small").iterdir())
    record["recipe"] |= {"target": "size", "value": small - 1000}
    (tmp_path / "small" / "svdcli.json").write_text(json.dumps(record))
    found = svdcli.heal(
        tmp_path / "small",
        tmp_path / "healed",
        teacher=teacher,
        texts=TEXT,
        **LITTLE,
    )
    missed = [
        note
        for note in found.report.notes
        if note.startswith("the target is missed: the output is larger than --size")
    ]
    assert found.report.total.bytes_after > record["recipe"]["value"]
    assert len(missed) == 1


def test_what_is_held_out_is_never_learned_from() -> None:
    for count in (2, 3, 7, 8, 40):
        batches = [{"input_ids": torch.full((1, 1), i)} for i in range(count)]
        reading = Batches.split(batches)
        read, held = (
            {int(b["input_ids"]) for b in part} for part in (reading.train, reading.held_out)
        )
        assert read | held == set(range(count))
        assert not read & held
        assert 1 <= len(held) <= 4
        assert len(reading.fewer(5).train) == min(5, len(read))
        assert reading.fewer(5).held_out is reading.held_out


def test_batches_in_halves_are_the_same_text() -> None:
    batches = [{"input_ids": torch.arange(3)[:, None] + 10 * i} for i in range(8)]
    reading = Batches.split([*batches, {"input_ids": torch.tensor([[99]])}])
    halves = reading.in_halves()
    rows = [
        torch.cat([batch["input_ids"] for batch in part]) for part in (reading.train, halves.train)
    ]
    assert torch.equal(*rows)
    assert max(len(batch["input_ids"]) for batch in halves.train) == 2
    assert halves.held_out is reading.held_out


def test_little_text_is_parted_and_a_single_window_refused(factored: Pair, tmp_path: Path) -> None:
    rows = {"input_ids": torch.arange(3)[:, None], "attention_mask": torch.ones(3, 1)}
    reading = Batches.split([rows])
    (read,), (held,) = reading.train, reading.held_out
    assert torch.cat((read["input_ids"], held["input_ids"])).tolist() == [[0], [1], [2]]
    assert read.keys() == held.keys() == rows.keys()
    with pytest.raises(SvdcliError, match="held out"):
        svdcli.heal(
            factored[1],
            tmp_path / "healed",
            teacher=factored[0],
            texts=svdcli.Texts("few", ("w3 w4 w5 w6",)),
            **HOW,
        )
    assert not (tmp_path / "healed").exists()


class Sometimes(nn.Module):
    """Two blocks, the second only for texts that begin with 0."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(layer()), nn.Sequential(layer())])
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.layers[0](nn.functional.one_hot(input_ids, 8).float())
        return self.layers[1](x) if int(input_ids[0, 0]) == 0 else x


def test_a_block_that_no_held_out_text_reaches_is_named() -> None:
    batches = [{"input_ids": torch.tensor([[first, 1, 2]])} for first in (0, 3, 4, 5)]
    dense, low_rank = (
        Sometimes(lambda: nn.Linear(8, 8)),
        Sometimes(lambda: LowRankLinear(8, 8, 3, bias=True)),
    )
    reading = Batches(batches[:2], batches[2:])
    healed = heal_blocks(dense, low_rank, reading, Effort(steps=1), trainable=lambda name: True)
    assert next(healed).name == "layers.0"
    with pytest.raises(SvdcliError, match=r"layers\.1 saw 1 of the batches"):
        next(healed)


@pytest.mark.parametrize("layer", ["mlp.down_proj", "self_attn.o_proj", "mlp.gate_proj"])
def test_a_layer_is_refitted_to_the_least_squares_of_what_it_should_answer(
    layer: str, pair: Pair, monkeypatch: Any
) -> None:
    """An oracle in float64, in the second block, whose inputs the first one has spoilt: with H = I
    and no ridge the best weight of rank r is the projection of the regression's fitted values on
    their leading directions (reduced rank regression)."""
    from svdcli.models.load import load_stored

    monkeypatch.setattr(closed_form, "RIDGE", 1e-9)
    monkeypatch.setattr(closed_form, "_output_moments", lambda *_: {})
    solved: dict[str, Any] = {}
    solve = closed_form._solve

    def watch(site: Any, sums: Any) -> None:
        solve(site, sums)
        solved[site.name] = (
            site.feeds_output,
            sums,
            site.weight(),
            site.student.rank,
            module_weight(site.student).double(),
        )

    monkeypatch.setattr(closed_form, "_solve", watch)
    from svdcli.models.modules import weight_of as module_weight

    batches = [
        {"input_ids": torch.randint(2, 96, (4, 32), generator=torch.Generator().manual_seed(i))}
        for i in range(12)
    ]
    blocks = heal_blocks(
        load_stored(pair[0]),
        load_stored(pair[1]),
        Batches(batches[:10], batches[10:]),
        Effort(seconds=1e9, steps=1),
        trainable=lambda n: True,
    )
    list(blocks)
    closing, sums, dense, rank, weight = solved[layer]
    assert closing == (layer == "mlp.down_proj")
    cross, inputs = sums.cross / sums.count, sums.inputs / sums.count

    def missed(w: torch.Tensor) -> float:
        """E||y - W x||^2 but for what no W changes."""
        return float((w @ inputs * w).sum() - 2 * (w * cross).sum())

    def truncated(w: torch.Tensor) -> torch.Tensor:
        vectors = torch.linalg.eigh(w @ inputs @ w.T).eigenvectors[:, -rank:]
        return vectors @ vectors.T @ w

    optimum, plain = (
        missed(truncated(cross @ torch.linalg.pinv(inputs, hermitian=True))),
        missed(truncated(dense)),
    )
    assert optimum < plain
    assert missed(weight) - optimum < 1e-3 * (plain - optimum)


def test_a_refit_aims_at_what_the_original_answers(pair: Pair, monkeypatch: Any) -> None:
    """An oracle for the sums behind a refit: both models run in one piece, the student as it is
    when the layer's turn comes. A layer that closes its block is aimed at what the original's block
    sends on, less what reaches the end without it."""
    from svdcli.models.load import load_stored

    student = load_stored(pair[1])
    dense, copy = (svdcli.load(path).to(torch.float32) for path in pair)
    batches = [
        {"input_ids": torch.randint(2, 96, (4, 32), generator=torch.Generator().manual_seed(i))}
        for i in range(8)
    ]
    reading = Batches(batches[:6], batches[6:])
    checked: list[str] = []

    def of_the_block(model: Any, layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of the layer's inputs, its outputs and the block's, over all that is read."""
        block, seen = model.model.layers[0], []
        handles = [
            block.get_submodule(layer).register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
        ]
        handles += [
            block.register_forward_hook(
                lambda m, x, y: seen.append(y[0] if isinstance(y, tuple) else y)
            )
        ]
        with torch.no_grad():
            for batch in reading.train:
                model(**batch)
        for handle in handles:
            handle.remove()
        x, y = (torch.cat([rows[i] for rows in seen[::2]]).flatten(0, 1).double() for i in (0, 1))
        return x, y, torch.cat(list(seen[1::2])).flatten(0, 1).double()

    solve = closed_form._solve

    def watch(site: Any, sums: Any) -> None:
        if site.student is student.model.layers[0].get_submodule(site.name):
            ours = copy.model.layers[0].state_dict(keep_vars=True)
            for name, tensor in student.model.layers[0].state_dict(keep_vars=True).items():
                ours[name].data = tensor.data.clone()
            x, y, out = of_the_block(copy, site.name)
            _, wanted, sent = of_the_block(dense, site.name)
            target = sent - (out - y) if site.name == "mlp.down_proj" else wanted
            torch.testing.assert_close(
                sums.cross / sums.count, target.T @ x / len(x), rtol=1e-3, atol=1e-6
            )
            torch.testing.assert_close(
                sums.inputs / sums.count, x.T @ x / len(x), rtol=1e-3, atol=1e-6
            )
            checked.append(site.name)
        solve(site, sums)

    monkeypatch.setattr(closed_form, "_solve", watch)
    effort = Effort(seconds=1e9, steps=1)
    next(heal_blocks(load_stored(pair[0]), student, reading, effort, trainable=lambda n: True))
    assert {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"} <= {*checked}


def test_what_went_through_a_block_is_let_go_with_it(
    factored: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Garbage is looked for once in a great while: what lies in a circle stays until then."""
    from svdcli.models.load import load_stored

    blocks: list[weakref.ref[module.Block]] = []
    living: list[int] = []

    def watch(block: module.Block, *_: Any) -> None:
        living.append(sum(each() is not None for each in blocks))
        blocks.append(weakref.ref(block))

    monkeypatch.setattr(module, "refit", watch)
    reading = Batches(*[[{"input_ids": torch.randint(2, 96, (2, 12))} for _ in "ab"] for _ in "ab"])
    models = map(load_stored, factored)
    gc.disable()
    try:
        list(heal_blocks(*models, reading, Effort(steps=1), trainable=lambda name: True))
    finally:
        gc.enable()
    assert living == [0, 0]


def test_block_moments_are_those_of_a_backward_pass_in_one_piece(factored: Pair) -> None:
    model = svdcli.load(factored[0]).requires_grad_(False)
    batches = [
        {"input_ids": torch.randint(2, 96, (2, 12), generator=torch.Generator().manual_seed(i))}
        for i in range(3)
    ]
    blocks = {"model.layers.0", "model.layers.1"}
    found = block_moments(model, batches, blocks, 1, torch.device("cpu"), seed=5)
    loss, sums = ModelLoss(5), dict.fromkeys(found, 0)
    for index, batch in enumerate(batches):
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        last = []
        hook = model.model.layers[1].register_forward_hook(
            lambda m, a, out, last=last: last.append(out)
        )
        output = model(inputs_embeds=embedded, output_hidden_states=True, use_cache=False)
        hook.remove()
        hidden = output.hidden_states
        tensor, gradient = loss.cotangent(index, batch, output)
        ends = [hidden[1], last[0][0] if isinstance(last[0], tuple) else last[0]]
        for name, grad in zip(
            sorted(found), torch.autograd.grad(tensor, ends, gradient), strict=True
        ):
            rows = grad.reshape(-1, grad.shape[-1])
            sums[name] = sums[name] + rows.T @ rows
    for name, moment in found.items():
        torch.testing.assert_close(moment, sums[name] / loss.events, rtol=1e-4, atol=1e-9)


def test_a_block_that_finds_nothing_better_stays_as_it_was(
    pair: Pair, tmp_path: Path, monkeypatch: Any
) -> None:
    teacher, small = pair
    for rate in ("BLOCK_RATE", "WHOLE_RATE"):
        monkeypatch.setattr(module, rate, 50.0)
    monkeypatch.setattr(module, "refit", lambda *_: None)
    found = svdcli.heal(
        small,
        tmp_path / "healed",
        teacher=teacher,
        texts=TEXT,
        **LITTLE | {"effort": Effort(steps=8)},
        hard_labels=0,
    )
    assert all(item["after"] == item["before"] for item in found.report.healing["blocks"].values())
    old, new = (contents(folder / "model.safetensors") for folder in (small, tmp_path / "healed"))
    assert old == new


def test_a_run_that_was_cut_short_continues_to_the_same_bytes(
    pair: Pair, healed: Outcome, tmp_path: Path, monkeypatch: Any
) -> None:
    teacher, small = pair
    note, trained = Workspace.note, []

    def stop_after_one_block(self: Workspace, line: dict[str, Any]) -> None:
        note(self, line)
        if "block" in line:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "note", stop_after_one_block)
        with pytest.raises(KeyboardInterrupt):
            svdcli.heal(small, tmp_path / "cut", teacher=teacher, texts=TEXT, **HOW)
    assert not (tmp_path / "cut").exists()
    heal = module._Healer.heal
    monkeypatch.setattr(
        module._Healer, "heal", lambda self, *how: (trained.append(self.name), heal(self, *how))[1]
    )
    svdcli.heal(small, tmp_path / "cut", teacher=teacher, texts=TEXT, **HOW)
    assert trained == ["model.layers.1"]
    assert tree(tmp_path / "cut") == tree(healed.path)
    assert not (tmp_path / "cut.partial").exists()


def test_a_full_disk_is_told_as_one(
    factored: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the library that writes blocks in words of its own."""
    teacher, small = factored

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SvdcliError, match=r"cannot write .*healed: No space left on device"):
        svdcli.heal(small, tmp_path / "healed", teacher=teacher, texts=TEXT, **HOW)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert"])
def test_other_architectures_heal(family: str, readable: Written, tmp_path: Path) -> None:
    teacher = readable(family)
    svdcli.compress(teacher, tmp_path / "small", svdcli.Recipe("keep", 0.4, layout="pivoted"))
    lines = svdcli.Texts(
        "lines",
        (
            "\n".join(
                " ".join(f"w{(i * j) % 94 + 2}" for j in range(3, 12 + i % 9)) for i in range(300)
            ),
        ),
    )
    text = lines if family == "bert" else TEXT
    if family == "bert":
        with pytest.raises(SvdcliError, match="does not predict the next token"):
            svdcli.heal(
                tmp_path / "small",
                tmp_path / "healed",
                teacher=teacher,
                texts=text,
                **LITTLE,
                hard_labels=0.1,
            )
    healed = tmp_path / "healed"
    found = svdcli.heal(tmp_path / "small", healed, teacher=teacher, texts=text, **LITTLE)
    assert found.report.healing["hard_labels"] == (0.1 if family == "gpt2" else 0.0)
    blocks = found.report.healing["blocks"]
    assert blocks
    assert any(item["after"] < item["before"] for item in blocks.values())
    assert svdcli.verify(healed, teacher).ok


def test_what_cannot_be_healed_is_refused(
    factored: Pair, written: Written, compressed_mlp: Path, tmp_path: Path
) -> None:
    teacher, small = factored
    with pytest.raises(SvdcliError, match="is not the model that"):
        svdcli.heal(small, tmp_path / "healed", teacher=written("qwen3"), texts=TEXT)
    with pytest.raises(SvdcliError, match="was not written by svdcli"):
        svdcli.heal(teacher, tmp_path / "healed", teacher=teacher, texts=TEXT)
    with pytest.raises(SvdcliError, match="no config"):
        svdcli.heal(compressed_mlp, tmp_path / "healed", teacher=teacher, texts=TEXT)
    svdcli.compress(teacher, tmp_path / "dense", svdcli.Recipe("keep", 0.4, layout="dense"))
    with pytest.raises(SvdcliError, match="which heal does not take; compress again without"):
        svdcli.heal(tmp_path / "dense", tmp_path / "healed", teacher=teacher, texts=TEXT)
    assert not (tmp_path / "healed").exists()
    before = tree(teacher)
    with pytest.raises(SvdcliError, match="is the source, or inside or around it"):
        svdcli.heal(small, teacher, teacher=teacher, texts=TEXT, force=True)
    assert tree(teacher) == before


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_nan_is_told_by_the_weight_that_holds_it(name: str, factored: Pair, tmp_path: Path) -> None:
    teacher = changed(
        factored[0], tmp_path / "m", lambda tensors: tensors[name].view(-1)[-900:].fill_(torch.nan)
    )
    svdcli.compress(teacher, tmp_path / "small", svdcli.Recipe("keep", 0.4))
    with pytest.raises(BadCheckpointError, match=f"m: {name} holds NaN"):
        svdcli.heal(tmp_path / "small", tmp_path / "out", teacher=teacher, texts=TEXT, **LITTLE)
    assert not (tmp_path / "out").exists()


def test_the_command(factored: Pair, tmp_path: Path) -> None:
    teacher, small = factored
    text = tmp_path / "text.txt"
    text.write_text(TEXT.documents[0])
    line = [
        "heal",
        small,
        "--teacher",
        teacher,
        "--text",
        text,
        "--seq-len",
        "32",
        "--samples",
        "8",
    ]
    done = cli(*line, "-o", tmp_path / "healed", "--steps", "2", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["healing"]["blocks"].keys() == {
        "model.layers.0",
        "model.layers.1",
        WHOLE,
    }
    shown = cli("report", tmp_path / "healed").out.decode()
    assert "model.layers.1: " in shown
    assert "exists" in complaint(cli(*line, "-o", tmp_path / "healed", "--steps", "2"))
    assert "--minutes" in complaint(cli(*line, "-o", tmp_path / "b", "--minutes", "0"), 2)
    assert "--steps" in complaint(cli(*line, "-o", tmp_path / "b", "--steps", "0"), 2)
    assert "--hard-labels" in complaint(cli(*line, "-o", tmp_path / "b", "--hard-labels", "1.5"), 2)
