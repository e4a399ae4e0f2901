"""The other side of the bench verb: a process that opens one model and measures it on command.

argv[1] is JSON: path, device, threads, prompt_tokens, new_tokens, batch, trust_remote_code.
Commands come a line each on standard input (load, prefill, decode, compiled, memory), answers go as
JSON lines to standard output; the end of the input ends it.
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

# ru_maxrss is in bytes on macOS, in KiB elsewhere.
_MAX_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_SEED = 0


class Worker:
    """One model, and what was done with it so far. Imports come first: memory and time to load do
    not count them."""

    def __init__(self, task: dict[str, Any]) -> None:
        # Imports, of the folder's own code too where it has some and may run it
        self.task = task
        path = Path(task["path"])
        trusted = bool(task.get("trust_remote_code"))
        self.runs_own_code = trusted and bool(own_code.model_sources(path))
        _import_all(path, runs_own_code=self.runs_own_code)
        import torch

        # The device, and the memory that is taken before there is a model
        if task["threads"] is not None:
            torch.set_num_threads(task["threads"])
        self.device = _device(task["device"])
        if self.device.type == "cuda":
            torch.zeros(1, device=self.device)  # the context belongs to no model
        self.bytes_before = resident_bytes()

        # The model, the arguments of its first pass, and what that answered
        self.model: Any = None
        self.prompt: dict[str, Any] = {}
        self.prefilled: Any = None

        # One pass for one token, as the compiler has it, and the cache for it
        self.step: Any = None
        self.cache: Any = None

    def about(self) -> dict[str, Any]:
        """Say where the model will run."""
        import torch

        return {"device": str(self.device), "threads": torch.get_num_threads()}

    def load(self) -> dict[str, Any]:
        """Open the model; refuse what does not read text, or not that much of it."""
        from svdcli.models.load import load
        from svdcli.models.modules import numbers_of

        # Timed until the weights are on the device
        begin = time.perf_counter()
        self.model = load(self.task["path"], trust_remote_code=self.runs_own_code).to(self.device)
        self._wait()
        seconds = time.perf_counter() - begin

        self._check()
        self.prompt = self._prompt()
        return {
            "seconds": seconds,
            "model_class": type(self.model).__name__,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "parameters": numbers_of(self.model),
        }

    def prefill(self) -> dict[str, Any]:
        """Read the prompt in one pass."""
        import torch

        self.prefilled = None  # what an earlier pass left in memory goes first
        with torch.inference_mode():
            begin = time.perf_counter()
            self.prefilled = self.model(**self.prompt)
            self._wait()
            return {"seconds": time.perf_counter() - begin}

    def decode(self) -> dict[str, Any]:
        """Go on from the last prefill, greedily; the model's own cache saves it from reading the
        prompt again."""
        import torch

        answer = self.prefilled
        if not self.model.can_generate() or getattr(answer, "past_key_values", None) is None:
            return {"seconds": None}

        # Of a pair the decoder goes on, with what the encoder made of the prompt
        name = "input_ids"
        fixed: dict[str, Any] = {}
        if "decoder_input_ids" in self.prompt:
            from transformers.modeling_outputs import BaseModelOutput

            name = "decoder_input_ids"
            fixed["encoder_outputs"] = BaseModelOutput(answer.encoder_last_hidden_state)

        # One pass for each new token
        with torch.inference_mode():
            begin = time.perf_counter()
            for _ in range(self.task["new_tokens"]):
                ids = answer.logits[:, -1].argmax(-1, keepdim=True)
                cache = answer.past_key_values
                answer = self.model(**{name: ids}, past_key_values=cache, use_cache=True, **fixed)
            self._wait()
            return {"seconds": time.perf_counter() - begin}

    def compiled(self) -> dict[str, Any]:
        """Write the same tokens through torch.compile, with a cache of fixed size; decoders alone.
        The first time takes as long as the compiler does.

        Raises SvdcliError for a model that does not compile.
        """
        import torch
        from transformers import StaticCache

        config = self.model.config
        if not self.model.can_generate() or getattr(config, "is_encoder_decoder", False):
            return {"seconds": None}
        try:
            if self.step is None:
                tokens = self.task["prompt_tokens"] + self.task["new_tokens"]
                self.cache = StaticCache(config.get_text_config(), max_cache_len=tokens)
                self.step = torch.compile(self.model.forward, dynamic=False)

            # The prompt, which is not timed, and then one pass for each new token
            with torch.inference_mode():
                self.cache.reset()
                answer = self.model(**self.prompt, past_key_values=self.cache)
                self._wait()
                begin = time.perf_counter()
                for _ in range(self.task["new_tokens"]):
                    ids = answer.logits[:, -1].argmax(-1, keepdim=True)
                    answer = self.step(input_ids=ids, past_key_values=self.cache, use_cache=True)
                self._wait()
                return {"seconds": time.perf_counter() - begin}
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise SvdcliError(
                f"{self.task['path']} does not decode through torch.compile ({why})",
                "leave out --compile",
            ) from error

    def memory(self) -> dict[str, Any]:
        """Return the memory at rest, and at its highest since the imports."""
        self.prefilled = None
        if self.device.type == "cuda":
            import torch

            return {
                "memory_bytes": torch.cuda.memory_allocated(),
                "peak_bytes": torch.cuda.max_memory_allocated(),
            }
        return {
            "memory_bytes": max(0, resident_bytes() - self.bytes_before),
            "peak_bytes": max(0, resident_bytes("VmHWM") - self.bytes_before),
        }

    def _check(self) -> None:
        """Raise SvdcliError for a model that does not read text, UsageError for one that does not
        read as much."""
        # Text is what it reads first of all
        path = self.task["path"]
        takes_ids = "input_ids" in inspect.signature(self.model.forward).parameters
        if self.model.main_input_name != "input_ids" or not takes_ids:
            raise SvdcliError(
                f"{path} does not read text ({type(self.model).__name__})",
                "bench knows language models and text encoders",
            )

        # As many tokens as its configuration allows, where it sets a limit
        config = self.model.config.get_text_config()
        limits: list[int] = []
        for name in ("max_position_embeddings", "n_positions"):
            value = getattr(config, name, None)
            if isinstance(value, int) and value > 0:
                limits.append(value)
        tokens = self.task["prompt_tokens"]
        if self.model.can_generate():
            tokens += self.task["new_tokens"]
        if limits and tokens > min(limits):
            raise UsageError(
                f"{path} takes {min(limits)} tokens, not {tokens}",
                "give fewer --prompt-tokens or --new-tokens",
            )

    def _prompt(self) -> dict[str, Any]:
        """Return the arguments of the first pass: random tokens, the same for every model with that
        vocabulary."""
        import torch

        # Drawn on the CPU, so that they are the same on every device
        config = self.model.config.get_text_config()
        size = (self.task["batch"], self.task["prompt_tokens"])
        generator = torch.Generator().manual_seed(_SEED)
        ids = torch.randint(config.vocab_size, size, generator=generator).to(self.device)
        takes = inspect.signature(self.model.forward).parameters
        prompt: dict[str, Any] = {"input_ids": ids}

        # As generation does it: a cache to go on from, and logits of the last token alone
        if self.model.can_generate():
            only_last = {"use_cache": True, "logits_to_keep": 1}
            prompt |= {name: value for name, value in only_last.items() if name in takes}

        # The decoder of a pair begins with its start token
        if getattr(self.model.config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
            start = getattr(self.model.config, "decoder_start_token_id", None) or 0
            prompt["decoder_input_ids"] = torch.full((size[0], 1), start, device=self.device)
        return prompt

    def _wait(self) -> None:
        """Wait until the device is done: accelerators answer before that."""
        import torch

        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()


def _import_all(path: Path, *, runs_own_code: bool) -> None:
    """Import everything that opening the model will import, the file of its class included; own
    code of the folder where it may run."""
    try:
        import transformers

        import svdcli.models.hf
        import svdcli.models.load  # noqa: F401
    except ImportError as error:
        raise SvdcliError(
            "opening a model needs transformers 5.12 or later", "pip install 'svdcli[transformers]'"
        ) from error
    transformers.utils.logging.disable_progress_bar()

    # transformers imports the file of a class when it is first asked for it
    with suppress(OSError, ValueError, TypeError, AttributeError):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for name in config.get("architectures") or ():
            getattr(transformers, str(name), None)
    if runs_own_code:
        transformers.AutoConfig.from_pretrained(path, trust_remote_code=True)


def _device(name: str) -> Any:
    """Return the torch.device of that name. Raises UsageError where there is none."""
    import torch

    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name, False):
        usable = ", ".join(device for device in available if available[device])
        raise UsageError(f"--device {name} is not available here", f"use {usable}")
    return torch.device(name)


def resident_bytes(which: str = "VmRSS") -> int:
    """Return the resident memory of this process: now (VmRSS) or at its highest (VmHWM); where
    there is no /proc, always the highest.

    The kernel counts VmHWM from exec on, while ru_maxrss of a child starts at its parent's.
    """
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(f"{which}:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAX_RSS_UNIT


def _as_answer(error: Exception) -> dict[str, Any]:
    """Return an error as the one line of JSON that the verb raises it from."""
    if isinstance(error, SvdcliError):
        return {"error": error.message, "hint": error.hint, "exit_code": error.exit_code}
    text = " ".join(str(error).split())[:300]
    return {
        "error": f"{type(error).__name__}: {text}",
        "hint": "see `svdcli verify`",
        "exit_code": FAILED,
    }


def _listen(commands: SimpleQueue[str]) -> None:
    """Queue the commands; end the process with the input, even while a model loads or computes: the
    process that asked is gone then."""
    for line in sys.stdin:
        commands.put(line.strip())
    os._exit(0)


def main() -> None:
    """Answer commands until the input ends. Whatever libraries print goes to standard error."""
    commands: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()

    # The real standard output is for answers alone; descriptor 1 now leads to standard error
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
        answer(_as_answer(error))
