"""Classes that `auto_map` names: they open the model with the stock classes, once the plugin above
is registered.

Only `compress --self-contained` uses this file: it is the last part of what lies beside the
weights.
"""

from __future__ import annotations

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
        opened = stock.from_pretrained(path, *arguments, **(options | {"trust_remote_code": False}))
        model = opened[0] if isinstance(opened, tuple) else opened  # with output_loading_info
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map
        return opened


for _name in AUTO_CLASSES:
    globals()[_name] = type(_name, (Opener,), {})
