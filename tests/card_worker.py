"""The verbs and the stream of blocks on a device that is no CPU (`card`), against a CPU: print, as
JSON, by how much each differs, as a share of the largest number.

    card_worker.py FOLDER FAMILY...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import card
import torch
import zoo
from helpers import load_all
from safetensors.torch import load_file
from torch import Tensor, nn

import svdcli
from svdcli.calibration import memory
from svdcli.calibration.stream import Stream
from svdcli.engine.compute import Compute
from svdcli.verbs import heal as heal_verb

CPU = torch.device("cpu")
Numbers = Mapping[str, Tensor]
TEXT = svdcli.Texts("words", (" ".join(f"w{i % 90 + 2}" for i in range(3000)),))
READ: dict[str, Any] = {"samples": 8, "seq_len": 32}


def distance(found: Numbers, expected: Numbers) -> float:
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    return max(
        float((found[key].double() - value.double()).abs().max())
        / max(1e-30, float(value.double().abs().max()))
        for key, value in expected.items()
        if value.numel()
    )


# Blocks on the card, hidden states on the host ----------------------------------------------------


def streamed(family: str, model: nn.Module, device: torch.device) -> Numbers:
    """Every answer, and every gradient between blocks."""
    seen: dict[str, Tensor] = {}

    def cotangent(index: int, output: Any) -> tuple[Tensor, Tensor]:
        answer: Tensor = getattr(output, zoo.FAMILIES[family].answer)
        assert answer.device == CPU
        seen[f"answer {index}"] = answer.detach().clone()
        generator = torch.Generator().manual_seed(index)
        return answer, torch.randn(answer.shape, generator=generator)

    def gradients(unit: str, index: int, gradient: Tensor) -> None:
        assert gradient.device == device
        seen[f"{unit} {index}"] = gradient.to("cpu").clone()

    inputs = zoo.FAMILIES[family].inputs
    one_row = {key: value[:1] for key, value in inputs.items()}
    stream = Stream(model, device, torch.float32, gradients=gradients, states_on=CPU)
    stream.run([inputs, one_row], cotangent)
    assert len(seen) > 4
    return seen


def of_stream(family: str, device: torch.device) -> float:
    model = zoo.FAMILIES[family].build().requires_grad_(False).eval()
    return distance(streamed(family, model, device), streamed(family, model, CPU))


# The verbs ----------------------------------------------------------------------------------------


def verbs(model: Path, folder: Path, device: torch.device) -> dict[str, Numbers]:
    """What calibrate, compress and heal write when they compute there; compress goes by the CPU's
    calibration each time."""
    Compute.start = lambda self: device  # type: ignore[method-assign]
    told: list[svdcli.Forecast] = []
    moments = folder / "moments.safetensors"
    there: dict[str, Any] = {"precision": "float32", "announce": told.append}
    svdcli.calibrate(model, moments, TEXT, **there, **READ)
    assert told[0].on_host == (device != CPU)

    # losses of a millionth are differences of what rounding makes of larger numbers
    small = folder / "sensitivity.safetensors"
    one: dict[str, Any] = {"samples": 1, "seq_len": 32, "precision": "float32"}
    svdcli.calibrate(model, small, TEXT, gradients=False, sensitivity=True, **one)
    made = {"moments": load_file(moments), "sensitivity": load_file(small)}
    moments = folder.with_name("cpu") / moments.name
    few: dict[str, Any] = {"include": ["*.0.self_attn.o_proj"], "calibration": moments}
    recipes: dict[str, dict[str, Any]] = {
        "plain": {"keep": 0.5},
        "pivoted": {"rank": 9, "layout": "pivoted"},
        "global": {"keep": 0.5, "calibration": moments},
        "packed": {"rank": 12, "bits": 4} | few,
    }
    for name, recipe in recipes.items():
        svdcli.compress(model, folder / name, **recipe)
        made[name] = dense(folder / name)
    effort = svdcli.Effort(steps=2)
    for name in ("global", "packed"):
        out = folder / f"{name}-healed"
        svdcli.heal(folder / name, out, teacher=model, texts=TEXT, effort=effort, **READ)
        made[out.name] = dense(out)
    return made


def dense(output: Path) -> Numbers:
    """The weights that an output stands for."""
    svdcli.expand(output, expanded := output.with_name(f"{output.name}-dense"))
    return load_all(expanded)


# A card for them ----------------------------------------------------------------------------------


@contextmanager
def cast(
    stream: Stream, tensors: Sequence[Tensor], device: torch.device, exact: Any = ()
) -> Iterator[None]:
    with card.placed(tensors, device):
        yield


def bring(module: nn.Module, device: torch.device) -> None:
    """For good, in the place of `healing.sharing.bring`."""
    card.swap([*module.parameters(), *module.buffers()], device)


def main() -> None:
    device = card.install()
    folder, families = Path(sys.argv[1]), sys.argv[2:]
    found: dict[str, float] = {}
    model = zoo.save("llama", folder / "model")
    zoo.words_tokenizer(model)
    (folder / "cpu").mkdir()
    (folder / "card").mkdir()
    expected = verbs(model, folder / "cpu", CPU)

    # the card is full
    Stream._cast = cast  # type: ignore[method-assign]
    heal_verb.bring = bring
    room = memory.memory_for
    memory.memory_for = lambda at, sharers=1: 0 if at.type == card.NAME else room(at, sharers)
    for family in families:
        found[f"stream of {family}"] = of_stream(family, device)
    for name, numbers in verbs(model, folder / "card", device).items():
        found[name] = distance(numbers, expected[name])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
