"""Tiny models of many families, made from their configs with random weights: what users compress,
in miniature."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from svdcli.files.checkpoint import open_checkpoint
from svdcli.linalg.layouts import CODECS
from svdcli.linalg.solvers import svd
from svdcli.plan.layers import choose_layers
from svdcli.plan.layouts import LAYOUTS

IDS = (torch.arange(24).reshape(2, 12) * 7 + 3) % 96
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


@dataclass(frozen=True)
class Family:
    """How to build one tiny model, what to feed it, and which tensor of its answer counts."""

    task: str
    build: Callable[[], Any]
    inputs: dict[str, Tensor]
    answer: str = "logits"
    generates: bool = False


def _model(name: str, **config: Any) -> Callable[[], Any]:
    def build() -> Any:
        torch.manual_seed(0)
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**config)).eval()

    return build


def _decoder(**more: Any) -> dict[str, Any]:
    base = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    ends = {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return base | ends | more


_BERT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_T5 = {
    "vocab_size": 96,
    "d_model": 64,
    "d_ff": 160,
    "d_kv": 16,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_WHISPER = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 160,
    "decoder_ffn_dim": 160,
    "num_mel_bins": 16,
    "max_source_positions": 50,
    "max_target_positions": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}
_GPT2 = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VIT = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 5,
}
_MARIAN = {
    "vocab_size": 96,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 160,
    "decoder_ffn_dim": 160,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "decoder_start_token_id": 0,
}
_PAIR = TEXT | {"decoder_input_ids": IDS[:, :6]}

FAMILIES = {
    "llama": Family("generation", _model("LlamaForCausalLM", **_decoder()), TEXT, generates=True),
    "llama-tied": Family(
        "generation",
        _model("LlamaForCausalLM", **_decoder(tie_word_embeddings=True)),
        TEXT,
        generates=True,
    ),
    "qwen3": Family(
        "generation", _model("Qwen3ForCausalLM", **_decoder(head_dim=16)), TEXT, generates=True
    ),
    "mistral": Family(
        "generation", _model("MistralForCausalLM", **_decoder()), TEXT, generates=True
    ),
    "gpt2": Family("generation", _model("GPT2LMHeadModel", **_GPT2), TEXT, generates=True),
    "mixtral": Family(
        "generation, mixture of experts",
        _model("MixtralForCausalLM", **_decoder(num_local_experts=4, num_experts_per_tok=2)),
        TEXT,
        generates=True,
    ),
    "t5": Family("translation", _model("T5ForConditionalGeneration", **_T5), _PAIR, generates=True),
    "marian": Family("translation", _model("MarianMTModel", **_MARIAN), _PAIR, generates=True),
    "bert-classifier": Family(
        "sentiment", _model("BertForSequenceClassification", num_labels=3, **_BERT), TEXT
    ),
    "bert": Family("sentence embeddings", _model("BertModel", **_BERT), TEXT, "last_hidden_state"),
    "whisper": Family(
        "speech",
        _model("WhisperForConditionalGeneration", **_WHISPER),
        {
            "input_features": torch.linspace(-1, 1, 2 * 16 * 100).reshape(2, 16, 100),
            "decoder_input_ids": IDS[:, :6],
        },
        generates=True,
    ),
    "vit": Family(
        "vision",
        _model("ViTForImageClassification", **_VIT),
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
    ),
}


def save(family: str, folder: Path, dtype: torch.dtype | None = None, **how: Any) -> Path:
    """Write one of them as a Hugging Face directory."""
    model = FAMILIES[family].build()
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, **how)
    return folder


def write_full_rank(source: Path, out: Path, layout: str) -> Path:
    """Every layer that compress would select, factored at its full rank: larger than dense, and
    equal to it."""
    out.mkdir()
    checkpoint = open_checkpoint(source)
    selected, _ = choose_layers(checkpoint.infos, facts=checkpoint.facts)
    tensors = {name: checkpoint.read_tensor(name) for name in checkpoint.tensors}
    for info in selected:
        rank = min(info.shape)
        factors = svd(tensors.pop(info.name).double(), rank)
        parts = CODECS[layout].encode(factors, torch.float32)
        tensors |= {
            part.name: tensor
            for part, tensor in zip(LAYOUTS[layout].tensors(info, rank, "F32"), parts, strict=True)
        }
    tensors[selected[0].name] = torch.empty(0)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = checkpoint.config | {
        "quantization_config": {"quant_method": "svdcli", "format": 1, "layout": layout}
    }
    (out / "config.json").write_text(json.dumps(config))
    return out


def answer(family: str, model: Any) -> Tensor:
    """What the model says to its family's input."""
    with torch.inference_mode():
        found: Tensor = getattr(model(**FAMILIES[family].inputs), FAMILIES[family].answer)
    return found


def words_tokenizer(folder: Path) -> None:
    """A tokenizer of 96 words, so that tiny encoders can read."""
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 96)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


class Sums:
    """Sums over everything that enters the linear layers of a whole model, and over the gradients
    at what leaves them."""

    def __init__(self, model: nn.Module) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.mean: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
                layer.register_forward_hook(partial(self._hook, f"{name}.weight"))

    def _hook(
        self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        x = inputs[0].detach().double().flatten(0, -2)
        self.inputs[name] = self.inputs.get(name, 0) + x.T @ x
        self.mean[name] = self.mean.get(name, 0) + x.sum(0)
        self.rows[name] = self.rows.get(name, 0) + x.shape[0]
        output.register_hook(partial(self._outputs, name))

    def _outputs(self, name: str, gradient: Tensor) -> None:
        g = gradient.double().flatten(0, -2)
        self.outputs[name] = self.outputs.get(name, 0) + g.T @ g


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the rounding of float32 sums."""
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
    )


def albert() -> Any:
    """One group of layers that is run three times."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 96,
        "embedding_size": 32,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
    }
    model = transformers.AlbertModel(transformers.AlbertConfig(num_hidden_layers=3, **sizes))
    return model.requires_grad_(False).eval()


# DeepSeek-V4, some of whose linear layers work in groups.
GROUPED: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 4,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}
