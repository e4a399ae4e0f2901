"""What a small mixture of experts loses: ranks and bits by what each expert counts, against even
ones, and against leaving out the experts that are used least. One table.

    python tests/benchmarks/mixture.py               trains the mixture first, for ten minutes
    python tests/benchmarks/mixture.py --minutes 2   for less
    python tests/benchmarks/mixture.py --folder WORK keeps it; the next run goes on from there
    python tests/benchmarks/mixture.py --speed       speed and memory of a larger one instead

Shaped as Qwen3-MoE (4 layers, 8 experts of which 2 are chosen, 4 M parameters), trained on the
training half of Python's standard library with the sample model's tokenizer, and judged on the
held-out half by the excess of its loss over its own. Shares are of the block linears, parameters
at 16 bits and bytes at fewer. Speed is that of a mixture of 0.4 B random parameters (8 layers, 32
experts of which 4 are chosen) at keep 0.5, beside the dense one by turns.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from bits import SAMPLE
from common import building_in, parser, say, table, write_json
from safetensors.torch import load_file, save_file
from sharing import with_common_inputs

import svdcli
from svdcli.calibration.moments import open_moments
from svdcli.text.texts import read_texts
from svdcli.text.tokens import load_tokenizer, windows_of

EXPERTS = 8
COUNTS = {"num_experts", "num_local_experts"}  # what versions of the config call it
SHOWN = ("decode", "prefill", "memory_bytes", "file_bytes", "weights")
LENGTH = 256
CONFIG: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 256,
    "moe_intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LARGE: dict[str, Any] = CONFIG | {
    "vocab_size": 4096,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "output_router_logits": False,
}
RATE, WARM_UP, BATCH = 3e-3, 50, 16


def train(out: Path, minutes: float) -> None:
    """Train the mixture, and save it in bfloat16 beside its tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(SAMPLE)
    ids = windows_of(tokenizer, read_texts(None, stdlib=True), LENGTH).ids
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**CONFIG))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95))
    begin, step = time.perf_counter(), 0
    while (share := (time.perf_counter() - begin) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / WARM_UP) * max(0.02, 1 - share)
        batch = ids[torch.randint(len(ids), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            say(f"step {step}: {float(loss):.3f}")
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


class Mixture:
    """The model, its calibration, and the text that everything is judged on."""

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder = folder
        self.model = folder / "mixture"
        self.moments = folder / "mixture-moments.safetensors"
        if not self.model.exists():
            say(f"training for {minutes:g} minutes")
            train(self.model, minutes)
        if not self.moments.exists():
            say("calibrating")
            text = read_texts(None, stdlib=True)
            read: dict[str, Any] = {"samples": 256, "seq_len": LENGTH, "precision": "float32"}
            svdcli.calibrate(self.model, self.moments, text, **read)
        self.held_out = read_texts(None, stdlib=True, held_out=True)

    @cached_property
    def common(self) -> Path:
        """The calibration where gate and up of all experts of a layer read one input."""

        def layer_of(name: str) -> str | None:
            mlp, experts, expert = name.partition(".experts.")
            return f"{mlp} experts" if experts and "down_proj" not in expert else None

        return with_common_inputs(self.moments, self.folder / "common.safetensors", layer_of)

    def excess(self, model: Path) -> tuple[float, float]:
        """Excess loss in nats a token, and its standard error over windows."""
        found = svdcli.evaluate(
            model, self.held_out, against=self.model, seq_len=LENGTH, samples=128
        )
        assert found.drift is not None
        return found.drift.excess_loss.value, found.drift.excess_loss.error or 0.0

    def compressed(self, source: Path | None = None, **wanted: Any) -> dict[str, Any]:
        """svdcli's output for these options."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        if source is None:
            wanted = {"calibration": self.moments} | wanted
        outcome = svdcli.compress(source or self.model, out, **wanted)
        selected = outcome.report.selected
        value, error = self.excess(out)
        share = selected.bytes_after / selected.bytes_before
        return {"share": share, "excess": value, "error": error}

    def without_experts(self, kept: int) -> tuple[Path, float]:
        """The model with so many experts in each layer, those that most tokens are sent to, and the
        share of the block linears that is left."""
        out = self.folder / f"experts-{kept}"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(self.model, out)
        use = open_moments(self.moments)
        tensors = load_file(self.model / "model.safetensors")
        before = _of_blocks(tensors)
        for layer in range(CONFIG["num_hidden_layers"]):
            mlp = f"model.layers.{layer}.mlp"
            counts = torch.tensor([_used(use, mlp, number) for number in range(EXPERTS)])
            most = counts.topk(kept).indices.sort().values.tolist()
            tensors[f"{mlp}.gate.weight"] = tensors[f"{mlp}.gate.weight"][most].contiguous()
            for name in ("gate_proj", "up_proj", "down_proj"):
                weights = [tensors.pop(f"{mlp}.experts.{n}.{name}.weight") for n in range(EXPERTS)]
                for place, number in enumerate(most):
                    tensors[f"{mlp}.experts.{place}.{name}.weight"] = weights[number]
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(
            json.dumps(config | dict.fromkeys(COUNTS & config.keys(), kept))
        )
        return out, _of_blocks(tensors) / before


def _used(moments: Any, mlp: str, number: int) -> float:
    """How much an expert counts for the loss: the energy of the gradients that reach it."""
    outputs = moments.of(f"{mlp}.experts.{number}.down_proj.weight").outputs
    return float(outputs.diagonal().sum() if outputs.ndim == 2 else outputs.sum())


def _of_blocks(tensors: dict[str, torch.Tensor]) -> int:
    return sum(
        tensor.numel()
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and ".layers." in name and not name.endswith("mlp.gate.weight")
    )


def rows(mixture: Mixture) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The name of each row, and what measures it."""
    apart = {"share": "never"}
    by_loss = {"allocate": "global", "floor": 0.0, "layout": "pivoted"} | apart

    def dropped(kept: int, **wanted: Any) -> dict[str, Any]:
        source, share = mixture.without_experts(kept)
        if not wanted:
            value, error = mixture.excess(source)
            return {"share": share, "excess": value, "error": error}
        found = mixture.compressed(source, **wanted)
        return found | {"share": share * found["share"]}

    yield "even ranks, keep 0.6", lambda: mixture.compressed(keep=0.6, allocate="uniform")
    yield "5 of 8 experts", lambda: dropped(5)
    yield "4 of 8 experts", lambda: dropped(4)
    yield "ranks by what each counts, keep 0.6", lambda: mixture.compressed(keep=0.6, **by_loss)
    four = {"bits": 4, "group_size": 64}
    yield "even ranks, 4 bits", lambda: mixture.compressed(keep=0.73, allocate="uniform", **four)
    yield "6 of 8 experts, 4 bits", lambda: dropped(6, layout="dense", **four)
    yield "ranks and bits by what each counts", lambda: mixture.compressed(keep_bytes=0.2, **apart)

    # Bases that layers share: gate and up of an expert, or the first layers of all experts
    for keep in (0.4, 0.25):
        how = {"keep": keep} | by_loss
        yield f"keep {keep}, all apart", partial(mixture.compressed, **how)
        choice = how | {"share": "auto"}
        yield f"keep {keep}, gate and up share by choice", partial(mixture.compressed, **choice)
        common = choice | {"share": "always", "calibration": mixture.common}
        yield f"keep {keep}, all experts share a basis", partial(mixture.compressed, **common)


def speed(folder: Path) -> dict[str, Any]:
    """Decode, prompt and memory of a large mixture at keep 0.5 beside itself."""
    source, out = folder / "large", folder / "large-svd"
    if not source.exists():
        say("building")
        with torch.device("meta"):
            model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**LARGE))
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(source)
    if not out.exists():
        say("compressing")
        svdcli.compress(source, out, keep=0.5, solver="randomized")
    say("bench")
    return svdcli.bench(out, source, prompt_tokens=128, new_tokens=32, rounds=3).to_json()


def markdown(results: dict[str, Any]) -> str:
    lines = [("way", "share", "excess loss, nats a token")]
    for name, found in results.items():
        shown = f"{found['excess']:.4f} ± {found['error']:.4f}"
        lines.append((name, f"{found['share']:.3f}", shown))
    return table(lines)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=10, help="of training (10)")
    options.add_argument("--speed", action="store_true", help="speed of a larger one")
    given = options.parse_args()
    if given.speed:
        with building_in(given.folder) as folder:
            found = speed(folder)
        for side in ("original", "compressed", "ratios"):
            print(side, {key: found[side].get(key) for key in SHOWN})
        return
    results: dict[str, Any] = {}
    with building_in(given.folder) as folder:
        mixture = Mixture(folder, given.minutes)
        for name, measure in rows(mixture):
            say(name)
            results[name] = measure()
    print(markdown(results))
    write_json(given.json, results)


if __name__ == "__main__":
    main()
