"""Parts of a compressed whole, opened alone: right with the plugin, refused without it, never made
up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import run_code
from safetensors import safe_open
from torch import Tensor

import svdcli
from svdcli.models.hf import SvdConfig
from svdcli.models.modules import LOW_RANK

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
READS = SMALL | {"vocab_size": 96, "max_position_embeddings": 64, "projection_dim": 64}
SEES = SMALL | {"image_size": 32, "patch_size": 8, "projection_dim": 64}
LLAMA = READS | {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = LLAMA | {
    "model_type": "qwen2_vl_text",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 4]},
}
QWEN_SEES = {"embed_dim": 64, "hidden_size": 64, "depth": 2, "num_heads": 4, "patch_size": 8}
QWEN_TOKENS = {
    "image_token_id": 91,
    "video_token_id": 92,
    "vision_start_token_id": 93,
    "vision_end_token_id": 94,
}

IDS = {"input_ids": zoo.IDS}
PIXELS = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
PAIR = IDS | {"decoder_input_ids": zoo.IDS}
SOUND = {"input_features": torch.linspace(-1, 1, 2 * 16 * 100).reshape(2, 16, 100)}


@dataclass(frozen=True)
class Whole:
    """A model, and what to feed the classes that open it or a part of it."""

    build: Callable[[], Any]
    classes: dict[str, dict[str, Tensor]]


def pair_of_berts() -> Any:
    torch.manual_seed(0)
    bert = {key: value for key, value in READS.items() if key != "projection_dim"}
    encoder = transformers.BertConfig(**bert)
    decoder = transformers.BertConfig(**bert, is_decoder=True, add_cross_attention=True)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.EncoderDecoderModel(both).eval()


WHOLES = {
    "clip": Whole(
        zoo._model("CLIPModel", text_config=READS, vision_config=SEES, projection_dim=64),
        {
            "CLIPModel": IDS | PIXELS,
            "CLIPVisionModel": PIXELS,
            "CLIPTextModel": IDS,
            "CLIPVisionModelWithProjection": PIXELS,
            "CLIPTextModelWithProjection": IDS,
        },
    ),
    "siglip": Whole(
        zoo._model("SiglipModel", text_config=READS, vision_config=SEES),
        {"SiglipModel": IDS | PIXELS, "SiglipVisionModel": PIXELS, "SiglipTextModel": IDS},
    ),
    "llava": Whole(
        zoo._model(
            "LlavaForConditionalGeneration",
            text_config=LLAMA,
            vision_config=SEES | {"model_type": "clip_vision_model"},
            image_token_id=90,
            image_seq_length=16,
        ),
        {"LlavaForConditionalGeneration": IDS, "LlavaModel": IDS},
    ),
    "qwen2-vl": Whole(
        zoo._model(
            "Qwen2VLForConditionalGeneration",
            text_config=QWEN,
            vision_config=QWEN_SEES,
            **QWEN_TOKENS,
        ),
        {"Qwen2VLForConditionalGeneration": IDS, "Qwen2VLModel": IDS, "Qwen2VLTextModel": IDS},
    ),
    "t5": Whole(
        zoo.FAMILIES["t5"].build,
        {"T5ForConditionalGeneration": PAIR, "T5Model": PAIR, "T5EncoderModel": IDS},
    ),
    "whisper": Whole(
        zoo.FAMILIES["whisper"].build,
        {"WhisperModel": SOUND | {"decoder_input_ids": zoo.IDS}, "WhisperForCausalLM": IDS},
    ),
    "marian": Whole(zoo.FAMILIES["marian"].build, {"MarianMTModel": PAIR}),
    "berts": Whole(pair_of_berts, {"EncoderDecoderModel": PAIR}),
    "llama": Whole(zoo.FAMILIES["llama"].build, {"LlamaForCausalLM": IDS, "LlamaModel": IDS}),
    "gpt2": Whole(zoo.FAMILIES["gpt2"].build, {"GPT2LMHeadModel": IDS, "GPT2Model": IDS}),
    "bert": Whole(zoo._model("BertForMaskedLM", **zoo._BERT), {"BertForMaskedLM": IDS}),
}


@pytest.fixture(autouse=True, scope="module")
def _no_reports() -> Iterator[None]:
    """Parts leave most of the files aside, and transformers lists all of it each time."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A folder with `model`, its compressed `out`, and the `dense` that expand makes of that."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, layout: str) -> Path:
        if (name, layout) not in made:
            folder = made[name, layout] = tmp_path_factory.mktemp(f"{name}-{layout}")
            WHOLES[name].build().save_pretrained(folder / "model")
            svdcli.compress(
                folder / "model", folder / "out", svdcli.Recipe("keep", 0.6, layout=layout)
            )
            svdcli.expand(folder / "out", folder / "dense")
        return made[name, layout]

    return make


Made = Callable[[str, str], Path]


def opened(name: str, path: Path, **how: Any) -> Any:
    model, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True, **how)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    return model


def incomplete(name: str, path: Path) -> bool:
    _, info = getattr(transformers, name).from_pretrained(path, output_loading_info=True)
    return bool(info["missing_keys"])


def answers(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return [value for value in model(**inputs).to_tuple() if isinstance(value, Tensor)]


def low_rank_count(model: Any) -> int:
    return sum(isinstance(module, LOW_RANK) for module in model.modules())


# Of every kind of whole (two towers, a model in a model, two stacks, one) some in each layout
LAYOUT = {
    **dict.fromkeys(("clip", "llava", "t5", "marian", "llama", "bert"), "factored"),
    **dict.fromkeys(("siglip", "qwen2-vl", "whisper", "berts", "gpt2"), "pivoted"),
}


@pytest.mark.parametrize(("name", "layout"), [*LAYOUT.items(), ("clip", "pivoted")])
def test_every_part_answers_as_that_of_the_expanded_whole(
    name: str, layout: str, whole: Made, tmp_path: Path
) -> None:
    folder = whole(name, layout)
    first, *_ = classes = WHOLES[name].classes
    opened(first, folder / "out").save_pretrained(tmp_path / "saved")
    for part in classes:
        if part != first and incomplete(part, folder / "model"):
            continue  # not in every version
        expected = answers(opened(part, folder / "dense"), classes[part])
        for path in (folder / "out", tmp_path / "saved"):
            model = opened(part, path)
            assert low_rank_count(model)
            for found, right in zip(answers(model, classes[part]), expected, strict=True):
                assert torch.allclose(found, right, atol=2e-5, rtol=2e-5), (
                    part,
                    path,
                    (found - right).abs().max(),
                )


OPEN = """
import json, sys, transformers
for name, folder in json.loads(sys.argv[1]):
    try:
        getattr(transformers, name).from_pretrained(folder)
    except (RuntimeError, ValueError) as error:
        print(name, "refused")
    else:
        print(name, folder, "OPENED")
"""


def test_no_part_opens_without_the_plugin(whole: Made, tmp_path: Path) -> None:
    """Neither from what compress wrote nor from what save_pretrained made of it."""
    jobs = []
    for name, model in WHOLES.items():
        jobs += [(part, str(whole(name, LAYOUT[name]) / "out")) for part in model.classes]
    for name in ("clip", "t5", "berts"):
        classes = WHOLES[name].classes
        opened(next(iter(classes)), whole(name, LAYOUT[name]) / "out").save_pretrained(
            tmp_path / name
        )
        jobs += [(part, str(tmp_path / name)) for part in classes]
    jobs += [
        ("BertModel", str(whole("bert", "factored") / "out")),
        ("MarianModel", str(whole("marian", "factored") / "out")),
    ]
    done = run_code(OPEN, json.dumps(jobs), folder=tmp_path)
    assert done.code == 0, done.err
    assert done.out.decode().splitlines() == [f"{part} refused" for part, _ in jobs]
    assert "Unknown quantization type, got svdcli" in done.err


@pytest.mark.parametrize("name", WHOLES)
def test_expand_leaves_no_warning_tensor_behind(name: str, whole: Made) -> None:
    folder, keys = whole(name, LAYOUT[name]), {}
    for kind in ("model", "out", "dense"):
        with safe_open(folder / kind / "model.safetensors", "pt") as file:
            keys[kind] = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    assert [0] in keys["out"].values()
    assert keys["dense"] == keys["model"]
    configs = [(folder / kind / "config.json").read_bytes() for kind in ("model", "dense")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("way", ["method", "config"])
@pytest.mark.parametrize("name", ["clip", "llava", "berts", "gpt2"])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_a_dequantized_model_says_svdcli_nowhere(
    name: str, way: str, whole: Made, tmp_path: Path
) -> None:
    folder = whole(name, "pivoted")
    classes = WHOLES[name].classes
    first = next(iter(classes))
    if way == "method":
        model = opened(first, folder / "out").dequantize()
    else:
        model = opened(first, folder / "out", quantization_config=SvdConfig(dequantize=True))
    assert low_rank_count(model) == 0
    model.save_pretrained(tmp_path / "saved")
    assert "svdcli" not in (tmp_path / "saved" / "config.json").read_text()
    for part in classes:
        found = answers(opened(part, tmp_path / "saved"), classes[part])
        expected = answers(opened(part, folder / "dense"), classes[part])
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=2e-5, rtol=2e-5)


def test_a_part_is_opened_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    WHOLES["clip"].build().to(torch.bfloat16).save_pretrained(tmp_path / "m")
    svdcli.compress(
        tmp_path / "m", tmp_path / "out", svdcli.Recipe("keep", 0.6, dtype="F32"), allow_larger=True
    )
    for part in WHOLES["clip"].classes:
        model = opened(part, tmp_path / "out", dtype="auto")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    svdcli.expand(tmp_path / "out", tmp_path / "dense")
    assert (tmp_path / "dense" / "config.json").read_bytes() == (
        tmp_path / "m" / "config.json"
    ).read_bytes()
