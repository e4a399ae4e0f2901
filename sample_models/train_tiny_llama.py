"""Train sample_models/tiny-llama: a Llama with grouped-query attention on the source of
Python's standard library.

    pip install -c tests/constraints.txt '.[train]'
    python sample_models/train_tiny_llama.py --steps 5400  about an hour on two cores
    python sample_models/train_tiny_llama.py --evaluate
        validation loss of the model in the repository

Every module goes to training or to validation by a hash of its path (svdcli/text/stdlib.py).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from svdcli.files.stdlib_text import stdlib_modules
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
END = "<|endoftext|>"
VOCABULARY, CONTEXT = 2048, 512


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; every module ends with END, which also starts a text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=END,
        eos_token=END,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All modules one after the other, each started by END: (tokens,) int64."""
    stream: list[int] = []
    for text in texts:
        stream.append(tokenizer.eos_token_id)
        stream.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(stream)


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=672,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 150 steps, then a cosine down to a fiftieth."""
    if step < 150:
        return peak * (step + 1) / 150
    progress = (step - 150) / max(1, steps - 150)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean nats a token over all full windows of CONTEXT tokens, in order, in float32."""
    model.eval()
    windows = stream[: (len(stream) - 1) // CONTEXT * CONTEXT + 1].unfold(0, CONTEXT + 1, CONTEXT)
    total = 0.0
    for batch in windows.split(8):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    return total / (windows.shape[0] * CONTEXT)


def make_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    training, held_out = ([t for _, t in stdlib_modules(held_out=h)] for h in (False, True))
    tokenizer = train_tokenizer(training)
    stream, validation = encode(tokenizer, training), encode(tokenizer, held_out)
    print(f"{len(stream):,} training tokens, {len(validation):,} held out", flush=True)
    model = make_model()
    optimizer = make_optimizer(model)
    started = time.monotonic()
    for step in range(args.steps):
        starts = torch.randint(0, len(stream) - CONTEXT - 1, (args.batch,)).tolist()
        loss = loss_of(model, torch.stack([stream[s : s + CONTEXT + 1] for s in starts]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        optimizer.step()
        if step % 100 == 99 or step == args.steps - 1:
            spent = time.monotonic() - started
            print(
                f"step {step + 1}/{args.steps}  loss {loss.item():.3f}  {spent:.0f} s", flush=True
            )
        if step % 600 == 599:
            print(f"  held-out loss {validation_loss(model, validation):.4f}", flush=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(
        f"held-out loss of the saved model {validation_loss(model.float(), validation):.4f} "
        f"nats a token",
        flush=True,
    )


def evaluate(out: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    texts = [text for _, text in stdlib_modules(held_out=True)]
    stream = encode(tokenizer, texts)
    loss = validation_loss(model, stream)
    size = sum(len(text.encode()) for text in texts)
    bits = loss * len(stream) / size / math.log(2)
    print(
        f"held-out loss {loss:.4f} nats a token, perplexity {math.exp(loss):.2f}, {bits:.3f} "
        f"bits a byte, {len(stream):,} tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5400)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "tiny-llama")
    parser.add_argument("--evaluate", action="store_true")
    args = parser.parse_args()
    if args.evaluate:
        evaluate(args.out)
    else:
        train(args)


if __name__ == "__main__":
    main()
