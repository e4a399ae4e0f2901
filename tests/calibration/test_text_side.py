"""Models that read more than text, or read it otherwise: which part is run, against the stock
classes of that part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import cli, complaint, contents
from torch import nn
from transformers import CLIPTextModel
from zoo import Sums, close, words_tokenizer

import svdcli
from svdcli.calibration.loss import drawing
from svdcli.calibration.moments import open_moments
from svdcli.calibration.text_side import TextSide, text_side
from svdcli.errors import SvdcliError
from svdcli.healing.blocks import Effort
from svdcli.text.texts import Texts
from svdcli.text.tokens import Amount, grouped, load_tokenizer, sentences_of
from svdcli.verbs.calibrate import calibrate
from svdcli.verbs.evaluate import evaluate

LINES = Texts(
    "lines",
    (
        "\n".join(
            " ".join(f"w{(i * i + 3 * i + j * j) % 94 + 2}" for i in range(4 + j % 9))
            for j in range(60)
        ),
    ),
)
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TOWER = NARROW | ENDS | {"vocab_size": 96, "max_position_embeddings": 64}
PICTURES = NARROW | {"image_size": 16, "patch_size": 8}
DECODER = TOWER | {"num_key_value_heads": 2}
T5 = {"vocab_size": 96, "d_model": 64, "d_ff": 160, "d_kv": 16, "num_layers": 2, "num_heads": 4}
HEARD = {
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_size": 32,
    "codebook_dim": 16,
    "upsampling_ratios": [2],
    "num_lstm_layers": 1,
}
SUNG = {
    "vocab_size": 32,
    "hidden_size": 64,
    "ffn_dim": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_codebooks": 4,
}
QWEN = DECODER | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
}
SPEECH = {
    "num_mel_bins": 16,
    "hidden_size": 64,
    "depths": [1, 1],
    "num_attention_heads": [2, 4],
    "patch_embeds_hidden_size": 16,
}
SPEECH |= {"spec_size": 32, "window_size": 4, "num_classes": 5}


def _ends(**more: int) -> dict[str, int]:
    return {
        "image_token_id": 90,
        "video_token_id": 91,
        "vision_start_token_id": 92,
        "vision_end_token_id": 93,
    } | more


Wanted = tuple[str, str]  # kind, and the part that runs
BUILT: dict[str, tuple[str, dict[str, Any], Wanted]] = {
    "clip": (
        "CLIPModel",
        {"text_config": TOWER, "vision_config": PICTURES},
        ("encoder", "get_text_features"),
    ),
    "siglip": (
        "SiglipModel",
        {"text_config": TOWER, "vision_config": PICTURES},
        ("encoder", "get_text_features"),
    ),
    "clap": (
        "ClapModel",
        {"text_config": TOWER, "audio_config": SPEECH},
        ("encoder", "get_text_features"),
    ),
    "blip": (
        "BlipModel",
        {"text_config": TOWER, "vision_config": PICTURES},
        ("encoder", "get_text_features"),
    ),
    "owlvit": (
        "OwlViTForObjectDetection",
        {"text_config": TOWER, "vision_config": PICTURES},
        ("encoder", "owlvit.get_text_features"),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": DECODER | {"model_type": "llama"},
            "vision_config": PICTURES | {"model_type": "clip_vision_model"},
            "image_token_index": 90,
        },
        ("decoder", ""),
    ),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": QWEN,
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 4,
                "patch_size": 8,
            },
            **_ends(),
        },
        ("decoder", ""),
    ),
    "blip-2": (
        "Blip2ForConditionalGeneration",
        {
            "text_config": {
                "model_type": "opt",
                "ffn_dim": 160,
                "word_embed_proj_dim": 64,
                **TOWER,
            },
            "vision_config": PICTURES,
            "qformer_config": NARROW | {"encoder_hidden_size": 64, "vocab_size": 96},
            "image_token_index": 90,
        },
        ("decoder", "language_model"),
    ),
    "git": ("GitForCausalLM", TOWER | {"vision_config": PICTURES}, ("decoder", "")),
    "musicgen": (
        "MusicgenForConditionalGeneration",
        {
            "text_encoder": T5 | {"model_type": "t5"},
            "audio_encoder": HEARD | {"model_type": "encodec"},
            "decoder": SUNG,
        },
        ("encoder", "text_encoder"),
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        {"vocab_size": 96, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 160},
        ("encoder", ""),
    ),
    "bert-lm": ("BertLMHeadModel", TOWER, ("encoder", "")),
    "bert-questions": ("BertForQuestionAnswering", TOWER, ("encoder", "bert")),
    "llama-classes": (
        "LlamaForSequenceClassification",
        DECODER | {"pad_token_id": None},
        ("encoder", "model"),
    ),
    "electra-pretraining": ("ElectraForPreTraining", TOWER, ("encoder", "electra")),
    "fnet": ("FNetModel", TOWER, ("encoder", "")),
}


def build(name: str) -> Any:
    class_name, config, _ = BUILT[name]
    torch.manual_seed(0)
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**config)).eval()


Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of one of them, with a tokenizer."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            build(name).save_pretrained(made[name])
            words_tokenizer(made[name])
        return made[name]

    return save


def side_of(model: Any) -> TextSide:
    return text_side(model, "it", 96, "do something else")


# Which part ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT)
def test_the_part_that_reads_text_alone_is_found(name: str) -> None:
    found = side_of(build(name))
    assert (found.kind, found.shown) == BUILT[name][2]
    assert found.words == 96


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_language_model_is_read_whole(family: str) -> None:
    found = side_of(zoo.FAMILIES[family].build())
    assert (found.kind, found.shown, found.in_windows, found.longest) == ("decoder", "", True, 64)


def test_encoders_read_sentences_and_pairs_windows() -> None:
    found = {
        family: side_of(zoo.FAMILIES[family].build())
        for family in ("bert", "bert-classifier", "t5", "marian")
    }
    assert {side.kind for side in found.values()} == {"encoder"}
    assert {family for family, side in found.items() if side.in_windows} == {"t5", "marian"}


def test_finding_it_changes_nothing() -> None:
    model = zoo.FAMILIES["llama"].build().to(torch.bfloat16)
    before = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    side_of(model)
    assert model.config.use_cache
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert not any(
        module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules()
    )


def test_a_model_that_answers_nan_is_still_what_it_is() -> None:
    model = zoo.FAMILIES["llama"].build()
    model.model.norm.weight.data.fill_(float("nan"))
    assert side_of(model).kind == "decoder"


@pytest.mark.parametrize(
    ("family", "why"),
    [("vit", "takes pixel_values"), ("whisper", "reads text only beside what its other side")],
)
def test_what_has_no_such_part_is_refused_with_the_reason(family: str, why: str) -> None:
    with pytest.raises(SvdcliError, match=f"it does not read text alone.*{why}.*do something else"):
        side_of(zoo.FAMILIES[family].build())


def test_a_decoder_that_listens_to_pictures_is_refused() -> None:
    pictures = transformers.ViTConfig(**PICTURES)
    words = transformers.BertConfig(**TOWER, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(pictures, words)
    with pytest.raises(SvdcliError, match="reads text only beside what its other side"):
        side_of(transformers.VisionEncoderDecoderModel(config).eval())


def test_a_table_of_positions_keeps_room_for_padding() -> None:
    """RoBERTa counts positions from padding_idx + 1 on: 64 rows are 62 tokens with padding_idx
    1."""
    model = transformers.RobertaModel(
        transformers.RobertaConfig(**TOWER | {"pad_token_id": 1})
    ).eval()
    found = side_of(model)
    assert found.longest == 62
    found.ask(model, input_ids=torch.full((1, 62), 5))
    with pytest.raises((IndexError, RuntimeError)):
        found.ask(model, input_ids=torch.full((1, 63), 5))


# What is measured ---------------------------------------------------------------------------------


def by_hooks(
    model: nn.Module, path: Path, answer: Callable[..., torch.Tensor], padded: bool = True
) -> tuple[Sums, int]:
    """Sums over ordinary passes of one sentence each, with the gradients of e . z for normalised
    answers e."""
    sums, tokenizer, events = Sums(model), load_tokenizer(path), 0
    groups = grouped(sentences_of(tokenizer, LINES, 64, Amount(40)), padded=padded)
    for index, group in enumerate(groups):
        answers = [answer(**tokenizer(sentence.text, return_tensors="pt")) for sentence in group]
        rows = nn.functional.normalize(torch.cat(answers), dim=-1)
        (rows * torch.randn(rows.shape, generator=drawing(0, index))).sum().backward()
        events += len(group)
    return sums, events


def test_moments_of_a_text_tower_are_those_of_the_stock_class(saved: Saved, tmp_path: Path) -> None:
    """CLIPTextModel opens the same folder. With the projection behind it, it is what CLIPModel
    makes of text."""
    path = saved("clip")
    done = calibrate(path, tmp_path / "c.safetensors", LINES, samples=40, gradients=True)
    tower = CLIPTextModel.from_pretrained(path).eval()
    projection = svdcli.load(path).text_projection
    sums, events = by_hooks(tower, path, lambda **inputs: projection(tower(**inputs).pooler_output))
    moments = open_moments(tmp_path / "c.safetensors")
    names = [name for name in moments.layers if name != "text_projection.weight"]
    assert len(names) == 12
    prefix = "" if next(iter(sums.rows)).startswith("text_model.") else "text_model."
    for name in names:
        layer, key = moments.of(name), name.removeprefix(prefix)
        assert layer is not None
        assert layer.outputs is not None
        close(layer.inputs, sums.inputs[key] / sums.rows[key])
        close(layer.mean, sums.mean[key] / sums.rows[key])
        close(layer.outputs, sums.outputs[key] / events)
    assert moments.provenance.unit == "1 - cosine"
    assert done.side == "get_text_features"


@pytest.mark.parametrize("name", ["xlnet", "fnet"])
def test_where_padding_would_be_read_sentences_of_one_length_come_together(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    """XLNet works with time first, so that no mask fits; FNet takes no mask at all."""
    path = saved(name)
    calibrate(path, tmp_path / "c.safetensors", LINES, samples=40, gradients=False)
    model, tokenizer = svdcli.load(path), load_tokenizer(path)
    sums = Sums(model.requires_grad_(True))
    for sentence in sentences_of(tokenizer, LINES, 64, Amount(40)):
        model(**tokenizer(sentence.text, return_tensors="pt", return_attention_mask=False))
    moments = open_moments(tmp_path / "c.safetensors")
    assert moments.layers
    for layer in moments.layers:
        found = moments.of(layer)
        assert found is not None
        close(found.inputs, sums.inputs[layer] / sums.rows[layer])


def test_what_does_not_run_in_bfloat16_is_told_and_runs_in_float32(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FNet is made of Fourier transforms, which torch has none of in bfloat16."""
    path, told = saved("fnet"), []
    with pytest.raises(SvdcliError, match=r"does not run in bfloat16: .*; use --precision float32"):
        calibrate(path, tmp_path / "c.safetensors", LINES, samples=40, precision="bfloat16")

    name = "svdcli.calibration.precision.is_faster_in_bfloat16"
    monkeypatch.setattr(name, lambda device: True)
    how = {"samples": 40, "precision": "auto", "announce": told.append}
    done = calibrate(path, tmp_path / "c.safetensors", LINES, **how)
    assert done.precision == told[0].precision == "float32"
    assert "BFloat16" in told[0].no_bfloat16


@pytest.mark.parametrize("name", BUILT)
def test_all_of_it_is_calibrated_and_judged(name: str, saved: Saved, tmp_path: Path) -> None:
    """Compressed by what its text sees, it opens and is compared with its original; to itself it is
    equal."""
    path, out = saved(name), tmp_path / "c.safetensors"
    done = calibrate(path, out, LINES, samples=12, seq_len=16)
    selected = {row.name for row in svdcli.inspect(path).selected}
    assert set(open_moments(out).layers) | set(done.uncalibrated) == selected
    recipe = svdcli.Recipe("rank", 12, layout="pivoted")
    svdcli.compress(path, tmp_path / "small", recipe, calibration=out)
    same, other = (
        evaluate(one, LINES, against=path, samples=8, seq_len=16)
        for one in (path, tmp_path / "small")
    )
    assert same.side == other.side == BUILT[name][2][1]
    if same.drift is not None and other.drift is not None:
        assert same.drift.kl.value < 1e-6 < other.drift.kl.value
    else:
        assert same.similarity is not None
        assert other.similarity is not None
        assert same.similarity.minimum > 1 - 1e-5 > other.similarity.mean


def test_a_tower_s_embedding_is_the_one_that_the_model_makes(saved: Saved) -> None:
    model, tokenizer = svdcli.load(saved("clip")), load_tokenizer(saved("clip"))
    inputs = dict(tokenizer(["w3 w4 w5", "w6 w7 w8"], return_tensors="pt"))
    with torch.no_grad():
        found, wanted = side_of(model).embed(model, inputs), model.get_text_features(**inputs)
    assert torch.equal(found, getattr(wanted, "pooler_output", wanted))


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_what_reads_text_is_healed_and_the_rest_stays(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    path = saved(name)
    svdcli.compress(path, tmp_path / "small", svdcli.Recipe("keep", 0.5))
    how: dict[str, Any] = {"effort": Effort(steps=10), "samples": 40, "seq_len": 16}
    found = svdcli.heal(tmp_path / "small", tmp_path / "healed", teacher=path, texts=LINES, **how)
    assert found.report.healing is not None
    blocks = found.report.healing["blocks"]
    assert not any("vision" in block for block in blocks)
    assert len(blocks) == 3
    assert any(item["after"] < item["before"] for item in blocks.values())
    before, after = (
        contents(tmp_path / name / "model.safetensors") for name in ("small", "healed")
    )
    changed = {key for key in before if before[key] != after[key]}
    assert changed
    assert not any("vision" in key for key in changed)
    assert any(
        "since no block that the text goes through holds them" in note
        for note in found.report.notes
    )


# The commands -------------------------------------------------------------------------------------


def test_the_commands_say_what_runs(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(LINES.documents[0])
    text = ("--text", tmp_path / "t.txt", "--samples", "8")
    done = cli("calibrate", saved("clip"), *text, "-o", tmp_path / "c.safetensors", "--json")
    assert done.code == 0, done.err
    assert "8 sentences of at most 64" in done.err
    assert "only get_text_features of the model reads text alone" in done.err
    assert "saw no input" in done.err
    found = json.loads(done.out)
    assert (found["samples"], found["seq_len"], found["side"]) == (8, 64, "get_text_features")
    judged = cli("eval", saved("clip"), "--against", saved("clip"), *text, "--json")
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["side"] == "get_text_features"


def test_what_does_not_read_text_gets_one_line_everywhere(tmp_path: Path) -> None:
    path = zoo.save("whisper", tmp_path / "model")
    words_tokenizer(path)
    (tmp_path / "t.txt").write_text(LINES.documents[0])
    text = ("--text", tmp_path / "t.txt")
    svdcli.compress(path, tmp_path / "small", svdcli.Recipe("keep", 0.6))
    said = [
        complaint(cli("calibrate", path, *text, "-o", tmp_path / "c.safetensors")),
        complaint(cli("compress", path, "--keep", "0.6", *text, "-o", tmp_path / "out")),
        complaint(cli("eval", tmp_path / "small", "--against", path, *text)),
        complaint(
            cli("heal", tmp_path / "small", "--teacher", path, *text, "-o", tmp_path / "healed")
        ),
    ]
    for line in said:
        assert (
            "WhisperForConditionalGeneration reads text only beside what its other side sends there"
            in line
        )
    assert all("without --text" in line for line in said[:2])
    assert {path.name for path in tmp_path.iterdir()} == {"model", "small", "t.txt"}


def test_the_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model"
    config = transformers.BertConfig(**TOWER | {"vocab_size": 50})
    transformers.BertModel(config).save_pretrained(path)
    words_tokenizer(path)
    with pytest.raises(SvdcliError, match=r"gives token \d+, and the model knows 50"):
        calibrate(path, tmp_path / "c.safetensors", LINES, samples=40)


def test_a_tokenizer_without_padding_will_do(tmp_path: Path) -> None:
    path = zoo.save("bert", tmp_path / "model")
    words_tokenizer(path)
    plain = calibrate(path, tmp_path / "a.safetensors", LINES, samples=12)
    config = json.loads((path / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(path).pad_token is None
    assert calibrate(path, tmp_path / "b.safetensors", LINES, samples=12).tokens == plain.tokens
    one, other = (open_moments(tmp_path / f"{name}.safetensors") for name in "ab")
    for name in one.layers:
        assert torch.equal(one.of(name).inputs, other.of(name).inputs)  # type: ignore[union-attr]
