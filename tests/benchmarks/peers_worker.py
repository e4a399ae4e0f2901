"""One of the packages that peers.py compares with, in their environment: without svdcli.

    python peers_worker.py METHOD BITS MODEL WINDOWS OUT

Reads token ids from WINDOWS, and writes the block linears as the package rounded them, unpacked, to
OUT.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer


def group_of(columns: int) -> int:
    """Columns that share a scale: the packages refuse groups that do not divide them."""
    return 32 if columns % 64 else 64


def gptq(source: str, ids: Tensor, bits: int) -> Any:
    """llm-compressor's GPTQ with its defaults."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    groups = {}
    for name, module in linears(model):
        width = {"strategy": "group", "group_size": group_of(module.in_features)}
        if bits == 8:
            width = {"strategy": "channel"}
        weights = {"num_bits": bits, "type": "int", "symmetric": True, **width}
        group = groups.setdefault(str(width), {"targets": [], "weights": weights})
        group["targets"].append(name)
    rows = ids.tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows]})
    return oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(config_groups=groups),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(rows),
    )


def auto_round(source: str, ids: Tensor, bits: int) -> Any:
    """AutoRound with its defaults: 200 steps of signed gradients on rounding and clipping."""
    from auto_round import AutoRound, QuantizationScheme

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    apart = {}
    for name, module in linears(model):
        if group_of(module.in_features) != 64:
            apart[name] = {"bits": bits, "group_size": group_of(module.in_features), "sym": True}
    rounding = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(source),
        scheme=QuantizationScheme(bits=bits, group_size=64, sym=True),
        layer_config=apart,
        dataset=list(ids.split(1)),
        seqlen=ids.shape[1],
        nsamples=len(ids),
        device_map="cpu",
    )
    rounded, _ = rounding.quantize()
    return rounded


def linears(model: Any) -> Iterator[tuple[str, Any]]:
    """The linear layers of the blocks, by name."""
    for name, module in model.named_modules():
        if name.startswith("model.layers.") and getattr(module, "in_features", None):
            yield name, module


METHODS = {"gptq": gptq, "auto-round": auto_round}


def main() -> None:
    method, bits, source, windows, out = sys.argv[1:]
    model = METHODS[method](source, load_file(windows)["ids"], int(bits))
    save_file({f"{name}.weight": m.weight.detach().contiguous() for name, m in linears(model)}, out)


if __name__ == "__main__":
    main()
