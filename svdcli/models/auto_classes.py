"""Classes that `auto_map` names: they open the model with the stock classes, once the plugin above
is registered.

Only `compress --self-contained` uses this file: it is the last part of what lies beside the
weights.
"""

from __future__ import annotations

import copy
from typing import Any

import transformers

from svdcli.models.hf import SvdQuantizer

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForAudioClassification",
    "AutoModelForCTC",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForPreTraining",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForTokenClassification",
)


class Opener:
    """Stands in `auto_map` for the stock class of the same name."""

    quantizer = SvdQuantizer

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Save nothing beside a copy: the plugin opens it."""

    @classmethod
    def from_pretrained(cls, path: Any, *arguments: Any, **options: Any) -> Any:
        stock = getattr(transformers, cls.__name__)
        _withdraw(stock)
        config = options.get("config")
        if hasattr(config, "auto_map"):  # else transformers asks for trust in this class
            options["config"] = copy.copy(config)
            del options["config"].auto_map
        opened = stock.from_pretrained(path, *arguments, **(options | {"trust_remote_code": False}))
        model = opened[0] if isinstance(opened, tuple) else opened  # with output_loading_info
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map
        return opened


def _withdraw(stock: Any) -> None:
    """Undo that transformers registered an opener as the class of a config that `stock` has none
    for: it would open itself again and again, where there is an error to be told."""
    registered = getattr(stock._model_mapping, "_extra_content", {})
    for config_class, model_class in list(registered.items()):
        if isinstance(model_class, type) and issubclass(model_class, Opener):
            del registered[config_class]


for _name in AUTO_CLASSES:
    globals()[_name] = type(_name, (Opener,), {})
