"""The other side of speed.py: a process that opens one model and measures it when it is told to.

argv[1] is JSON: path, device, threads, prompt_tokens, new_tokens, batch, trust_remote_code.
Commands come a line each on standard input (load, prefill, decode, memory), answers go as JSON
lines to standard output; the end of the input ends it.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from svdcli.errors import FAILED, SvdcliError, UsageError
from svdcli.models import own_code

_MAX_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_SEED = 0


class Worker:
    """One model, and what was done with it so far. Imports come first: memory and time to load do
    not count them."""

    def __init__(self, task: dict[str, Any]) -> None:
        self.task = task
        self.own = bool(task.get("trust_remote_code")) and bool(
            own_code.model_sources(Path(task["path"]))
        )
        _import_all(Path(task["path"]), own=self.own)
        import torch

        if task["threads"] is not None:
            torch.set_num_threads(task["threads"])
        self.device = _device(task["device"])
        self.model: Any = None
        self.prompt: dict[str, Any] = {}
        self.begun: Any = None
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)  # the context belongs to no model
        self.before = resident_bytes()

    def about(self) -> dict[str, Any]:
        import torch

        return {"device": str(self.device), "threads": torch.get_num_threads()}

    def load(self) -> dict[str, Any]:
        """Open the model; refuse what does not read text, or not that much of it."""
        from svdcli.models.load import load

        begin = time.perf_counter()
        self.model = load(self.task["path"], trust_remote_code=self.own).to(self.device)
        self._wait()
        seconds = time.perf_counter() - begin
        self._check()
        self.prompt = self._prompt()
        weights = list(self.model.parameters())
        return {
            "seconds": seconds,
            "model_class": type(self.model).__name__,
            "dtype": str(weights[0].dtype).removeprefix("torch."),
            "parameters": sum(weight.numel() for weight in weights),
        }

    def prefill(self) -> dict[str, Any]:
        """Read the prompt in one pass."""
        import torch

        self.begun = None
        with torch.inference_mode():
            begin = time.perf_counter()
            self.begun = self.model(**self.prompt)
            self._wait()
            return {"seconds": time.perf_counter() - begin}

    def decode(self) -> dict[str, Any]:
        """Go on from the last prefill, greedily; the model's own cache saves it from reading the
        prompt again."""
        import torch

        out, more = self.begun, dict[str, Any]()
        if not self.model.can_generate() or getattr(out, "past_key_values", None) is None:
            return {"seconds": None}
        name = "input_ids"
        if "decoder_input_ids" in self.prompt:
            from transformers.modeling_outputs import BaseModelOutput

            name, more = (
                "decoder_input_ids",
                {"encoder_outputs": BaseModelOutput(out.encoder_last_hidden_state)},
            )
        with torch.inference_mode():
            begin = time.perf_counter()
            for _ in range(self.task["new_tokens"]):
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                out = self.model(
                    **{name: ids}, past_key_values=out.past_key_values, use_cache=True, **more
                )
            self._wait()
            return {"seconds": time.perf_counter() - begin}

    def memory(self) -> dict[str, Any]:
        """At rest, and at its highest since the imports."""
        self.begun = None
        if self.device.type == "cuda":
            import torch

            return {
                "memory_bytes": torch.cuda.memory_allocated(),
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }
        return {
            "memory_bytes": max(0, resident_bytes() - self.before),
            "peak_bytes": max(0, resident_bytes("VmHWM") - self.before),
        }

    def _check(self) -> None:
        kind, path = type(self.model).__name__, self.task["path"]
        if (
            self.model.main_input_name != "input_ids"
            or "input_ids" not in inspect.signature(self.model.forward).parameters
        ):
            raise SvdcliError(
                f"{path} does not read text ({kind})",
                "bench knows language models and text encoders",
            )
        config = self.model.config.get_text_config()
        limits = [
            getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")
        ]
        limit = min(
            (value for value in limits if isinstance(value, int) and value > 0), default=None
        )
        wanted = self.task["prompt_tokens"] + (
            self.task["new_tokens"] if self.model.can_generate() else 0
        )
        if limit is not None and wanted > limit:
            raise UsageError(
                f"{path} takes {limit} tokens, not {wanted}",
                "give fewer --prompt-tokens or --new-tokens",
            )

    def _prompt(self) -> dict[str, Any]:
        """Arguments of the first pass: random tokens, the same for every model with that
        vocabulary."""
        import torch

        config = self.model.config.get_text_config()
        size = (self.task["batch"], self.task["prompt_tokens"])
        ids = torch.randint(
            config.vocab_size, size, generator=torch.Generator().manual_seed(_SEED)
        ).to(self.device)
        takes = inspect.signature(self.model.forward).parameters
        prompt: dict[str, Any] = {"input_ids": ids}
        if self.model.can_generate():
            only_last = {"use_cache": True, "logits_to_keep": 1}
            prompt |= {name: value for name, value in only_last.items() if name in takes}
        if getattr(self.model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            start = getattr(self.model.config, "decoder_start_token_id", None) or 0
            prompt["decoder_input_ids"] = torch.full((size[0], 1), start, device=self.device)
        return prompt

    def _wait(self) -> None:
        """Accelerators answer before they are done."""
        import torch

        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def _import_all(path: Path, *, own: bool) -> None:
    """Everything that opening the model will import, the file of its class included; own code of
    the folder where it may run."""
    try:
        import transformers

        import svdcli.models.hf
        import svdcli.models.load  # noqa: F401
    except ImportError as error:
        raise SvdcliError(
            "opening a model needs transformers 5.12 or later", "pip install 'svdcli[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    with suppress(OSError, ValueError, TypeError, AttributeError):
        for name in (
            json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures")
            or ()
        ):
            getattr(transformers, str(name), None)
    if own:
        transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)


def _device(name: str) -> Any:
    import torch

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name, False):
        raise UsageError(
            f"--device {name} is not available here",
            f"use {', '.join(d for d in available if available[d])}",
        )
    return torch.device(name)


def resident_bytes(which: str = "VmRSS") -> int:
    """Resident memory of this process: now (VmRSS) or at its highest (VmHWM); where there is no
    /proc, always the highest.

    The kernel counts VmHWM from exec on, while ru_maxrss of a child starts at its parent's.
    """
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAX_RSS_UNIT


def _one_line(error: Exception) -> dict[str, Any]:
    if isinstance(error, SvdcliError):
        return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    text = " ".join(str(error).split())[:300]
    return {
        "error": f"{type(error).__name__}: {text}",
        "hint": "see `svdcli verify`",
        "exit_code": FAILED,
    }


def _listen(commands: SimpleQueue[str]) -> None:
    """Who asked may be gone while a model loads or computes: nothing goes on for nobody."""
    for line in sys.stdin:
        commands.put(line.strip())
    os._exit(0)


def main() -> None:
    """Answer commands until the input ends. Whatever libraries print goes to standard error."""
    commands: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    try:
        worker = Worker(json.loads(sys.argv[1]))
        answer(worker.about())
        while True:
            answer(getattr(worker, commands.get())())
    except Exception as error:
        answer(_one_line(error))
