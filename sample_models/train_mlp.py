"""Train sample_models/mlp.safetensors: a small network that guesses the next byte of Python source
from the 16 before it.

    pip install -c tests/constraints.txt .
    python sample_models/train_mlp.py            # under a minute on two cores

The architecture is Bengio et al. (2003): embed, concatenate, two hidden layers,
256 outputs. One plain file, no config.
"""

from __future__ import annotations

from pathlib import Path

import torch
from svdcli.files.bytes_of import bytes_of
from svdcli.files.stdlib_text import stdlib_modules
from torch import Tensor, nn

from svdcli.files.header import render_header
from svdcli.plan.tensors import TensorInfo

HERE = Path(__file__).parent
CONTEXT = 16


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 24)
        self.layers = nn.ModuleList([nn.Linear(CONTEXT * 24, 512), nn.Linear(512, 512)])
        self.head = nn.Linear(512, 256)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def all_bytes(*, held_out: bool) -> Tensor:
    text = "\0".join(text for _, text in stdlib_modules(held_out=held_out))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def loss_on(model: Mlp, data: Tensor, count: int) -> Tensor:
    starts = torch.randint(0, len(data) - CONTEXT - 1, (count,))
    windows = data[starts[:, None] + torch.arange(CONTEXT + 1)]
    return nn.functional.cross_entropy(model(windows[:, :-1]), windows[:, -1])


def main() -> None:
    torch.manual_seed(0)
    model, steps = Mlp(), 3000
    data, held_out = all_bytes(held_out=False), all_bytes(held_out=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model, data, 512).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        print(f"held-out loss {loss_on(model, held_out, 20_000).item():.3f} nats a byte")
    tensors = {name: value.detach() for name, value in model.state_dict().items()}
    infos = [TensorInfo(name, "F32", tuple(value.shape)) for name, value in tensors.items()]
    body = b"".join(bytes(bytes_of(value)) for value in tensors.values())
    (HERE / "mlp.safetensors").write_bytes(render_header(infos, {"format": "pt"}) + body)


if __name__ == "__main__":
    main()
