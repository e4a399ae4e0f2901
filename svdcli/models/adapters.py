"""LoRA of PEFT on packed layers, as QLoRA has it: integers stay as they are, adapters beside them
train, and gradients pass through to the layers before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from svdcli.errors import SvdcliError
from svdcli.models.modules import PackedLinear

if TYPE_CHECKING:
    from peft import LoraConfig


def on_packed(config: LoraConfig) -> LoraConfig:
    """Let a LoraConfig name packed layers (`svd_down`, `svd_up`, or the layer itself where it is
    packed whole), and return it.

    It is needed again where an adapter is opened, since PEFT saves no such thing with it:
    `PeftModel.from_pretrained(model, path, config=on_packed(LoraConfig.from_pretrained(path)))`.
    Raises SvdcliError where PEFT is missing.
    """
    config._register_custom_module({PackedLinear: _packed_lora()})
    return config


def _packed_lora() -> Any:
    """Return PEFT's LoRA layer for packed weights."""
    try:
        from peft.tuners.lora import Linear
    except ImportError as error:
        raise SvdcliError("adapters need PEFT", "pip install peft") from error

    class PackedLora(Linear):
        """y = x W^T + b + scaling B A x, with W packed."""

        @property
        def lora_variants(self) -> Any:
            """Others than LoRA itself compute with, or change, the weight that they are beside."""
            return {(): None}

        def _get_in_out_features(self, module: Any) -> tuple[int, int]:
            return module.in_features, module.out_features

        def merge(self, *_: Any, **__: Any) -> None:
            raise SvdcliError(
                "an adapter cannot be merged into packed integers, which would round it away",
                "keep it beside them, as save_pretrained and PeftModel.from_pretrained do",
            )

    return PackedLora
