"""A folder is read as its loader reads it, and what does not go along is named with its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import size_of, weight, write_model
from safetensors.torch import save_file

from svdcli.errors import BadCheckpointError, UsageError
from svdcli.files.checkpoint import Checkpoint, open_checkpoint
from svdcli.files.folder import in_hub_cache
from svdcli.plan.recipe import Recipe
from svdcli.verbs.compress import compress

HALF = Recipe("keep", 0.5)


def put(path: Path, nbytes: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\xa5" * nbytes)
    return path


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((4,), value), "b.weight": torch.full((3,), value)}


def shards(folder: Path, stem: str, value: float, ending: str = "safetensors") -> dict[str, str]:
    """Two shards of the two tensors, without an index: {tensor: shard}."""
    places = {}
    for at, (name, tensor) in enumerate(tensors(value).items(), 1):
        places[name] = f"{stem}-{at:05d}-of-00002.{ending}"
        path = folder / places[name]
        save_file({name: tensor}, path) if ending == "safetensors" else torch.save(
            {name: tensor}, path
        )
    return places


def indexed(folder: Path, stem: str, value: float, name: str) -> None:
    (folder / name).write_text(json.dumps({"weight_map": shards(folder, stem, value)}))


def value_of(checkpoint: Checkpoint) -> float:
    values = {checkpoint.read_tensor(name)[0].item() for name in checkpoint.tensors}
    assert len(values) == 1
    return float(values.pop())


# Which weights ------------------------------------------------------------------------------------


def test_a_single_file_comes_before_shards(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "model.safetensors")
    indexed(tmp_path, "model", 2, "model.safetensors.index.json")
    checkpoint = open_checkpoint(tmp_path)
    assert value_of(checkpoint) == 1
    assert set(checkpoint.left_out) == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }
    assert all(
        checkpoint.left_out_bytes[name] == (tmp_path / name).stat().st_size
        for name in checkpoint.left_out
    )


def test_the_usual_index_comes_before_others(tmp_path: Path) -> None:
    indexed(tmp_path, "consolidated", 1, "consolidated.safetensors.index.json")
    indexed(tmp_path, "model", 2, "model.safetensors.index.json")
    indexed(tmp_path, "model.fp16", 3, "model.safetensors.index.fp16.json")
    checkpoint = open_checkpoint(tmp_path)
    assert value_of(checkpoint) == 2
    assert len(checkpoint.left_out) == 6


def test_stale_shards_stay_behind(tmp_path: Path) -> None:
    indexed(tmp_path, "model", 1, "model.safetensors.index.json")
    save_file({"old": torch.ones(5)}, tmp_path / "model-00003-of-00003.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.left_out) == {"model-00003-of-00003.safetensors"}
    assert "old" not in checkpoint.tensors


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_without_an_index(tmp_path: Path, ending: str) -> None:
    shards(tmp_path, "model", 1, ending)
    assert value_of(open_checkpoint(tmp_path)) == 1


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_missing_shard_without_an_index_is_named(tmp_path: Path, ending: str) -> None:
    shards(tmp_path, "model", 1, ending)
    (tmp_path / f"model-00002-of-00002.{ending}").unlink()
    with pytest.raises(BadCheckpointError, match=rf"model-00002-of-00002\.{ending} is missing"):
        open_checkpoint(tmp_path)


def test_a_whole_set_of_shards_comes_before_a_broken_one(tmp_path: Path) -> None:
    shards(tmp_path, "model", 1)
    save_file({"a.weight": torch.ones(4)}, tmp_path / "model-00001-of-00007.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert value_of(checkpoint) == 1
    assert set(checkpoint.left_out) == {"model-00001-of-00007.safetensors"}


def test_two_whole_sets_of_shards_are_refused(tmp_path: Path) -> None:
    shards(tmp_path, "one", 1)
    shards(tmp_path, "two", 2)
    with pytest.raises(BadCheckpointError, match="several sets of shards"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin", "index"])
def test_a_variant_alone_is_read_and_remembered(tmp_path: Path, name: str) -> None:
    if name == "index":
        indexed(tmp_path, "model.fp16", 1, "model.safetensors.index.fp16.json")
    elif name.endswith("bin"):
        torch.save(tensors(1), tmp_path / name)
    else:
        save_file(tensors(1), tmp_path / name)
    checkpoint = open_checkpoint(tmp_path)
    assert (value_of(checkpoint), checkpoint.variant) == (1, "fp16")


def test_several_variants_are_refused(tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        save_file(tensors(1), tmp_path / f"model.{variant}.safetensors")
    with pytest.raises(BadCheckpointError, match="several variants: bf16, fp16"):
        open_checkpoint(tmp_path)


def test_a_file_that_the_config_names(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "model.safetensors")
    save_file(tensors(2), tmp_path / "special.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"transformers_weights": "special.safetensors"})
    )
    assert value_of(open_checkpoint(tmp_path)) == 2


def test_mistral_files_alone(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "consolidated.safetensors")
    assert value_of(open_checkpoint(tmp_path)) == 1


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors.incomplete",
        "model-00002-of-00002.safetensors.crdownload",
        "model.safetensors.part",
        "model.safetensors.aria2",
        "Unconfirmed 12345.crdownload",
        ".model.safetensors.Ab12Cd",
        ".cache/huggingface/download/x.1234.incomplete",
    ],
)
def test_a_half_finished_download_is_refused(tmp_path: Path, name: str) -> None:
    save_file(tensors(1), tmp_path / "model.safetensors")
    put(tmp_path / name)
    with pytest.raises(BadCheckpointError, match="is not finished") as caught:
        open_checkpoint(tmp_path)
    assert name in caught.value.message


def test_what_only_looks_half_finished(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "model.safetensors")
    put(tmp_path / "second.part")
    put(tmp_path / ".cache/huggingface/download/model.safetensors.metadata")
    assert set(open_checkpoint(tmp_path).carried) == {"second.part"}


# Folders that hold no model -----------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises(BadCheckpointError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_a_diffusers_pipeline_names_its_parts(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("unet", "text_encoder"):
        put(tmp_path / part / "diffusion_pytorch_model.safetensors")
    put(tmp_path / "scheduler" / "scheduler_config.json")
    said = refused(tmp_path)
    assert "diffusers pipeline" in said
    assert str(tmp_path / "unet") in said
    assert str(tmp_path / "text_encoder") in said
    assert "scheduler" not in said


def test_a_pipeline_with_a_single_file_beside_its_parts_is_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    put(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(tensors(1), tmp_path / "v1-5-pruned.safetensors")
    assert str(tmp_path / "unet") in refused(tmp_path)
    assert value_of(open_checkpoint(tmp_path / "v1-5-pruned.safetensors")) == 1


def test_parts_by_rank_are_no_strays(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(tensors(rank), tmp_path / f"consolidated.{rank:02d}.pth")
    assert "Meta's own format" in refused(tmp_path)


def test_a_pointer_beside_whole_weights_is_told(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").write_bytes(b"version https://git-lfs.example/spec/v1\n")
    assert any(
        "tokenizer.model is a Git LFS pointer" in note
        for note in open_checkpoint(tmp_path / "m").notes
    )


def cache_entry(folder: Path) -> Path:
    """A hub cache with one model of two revisions, the second of which is main: the path of main's
    snapshot."""
    entry = folder / "models--org--name"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text("bbb")
    for revision in ("aaa", "bbb"):
        write_model_at(entry / "snapshots" / revision)
    return entry / "snapshots" / "bbb"


def write_model_at(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_model(folder)


def test_a_hub_cache_names_the_snapshot(tmp_path: Path) -> None:
    snapshot = cache_entry(tmp_path)
    said = refused(snapshot.parent.parent)
    assert "hub's cache" in said
    assert said.index(str(snapshot)) < said.index("aaa")
    assert str(snapshot) in refused(tmp_path)


def test_an_unfinished_snapshot_says_so(tmp_path: Path) -> None:
    snapshot = cache_entry(tmp_path)
    (snapshot / "model.safetensors").unlink()
    put(snapshot.parent.parent / "blobs" / "x.incomplete")
    assert "is not finished" in refused(snapshot)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    assert "model.safetensors is a link to nothing" in refused(tmp_path)


def test_one_shard_by_itself_says_so(tmp_path: Path) -> None:
    indexed(tmp_path, "model", 1, "model.safetensors.index.json")
    notes = open_checkpoint(tmp_path / "model-00001-of-00002.safetensors").notes
    assert ["one of 2 shards" in note for note in notes] == [True]


def test_a_training_folder_names_its_checkpoints(tmp_path: Path) -> None:
    for step in (500, 1000):
        write_model_at(tmp_path / f"checkpoint-{step}")
    said = refused(tmp_path)
    assert all(str(tmp_path / f"checkpoint-{step}") in said for step in (500, 1000))


@pytest.mark.parametrize(
    ("names", "word"),
    [
        ((".metadata", "__0_0.distcp"), "dcp_to_torch"),
        (("pytorch_model_fsdp_0/__0_0.distcp",), "dcp_to_torch"),
        (("latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"), "DeepSpeed"),
        (
            ("latest_checkpointed_iteration.txt", "iter_0000100/mp_rank_00/model_optim_rng.pt"),
            "Megatron",
        ),
    ],
)
def test_a_distributed_checkpoint_says_how_to_join_it(
    tmp_path: Path, names: tuple[str, ...], word: str
) -> None:
    for name in names:
        put(tmp_path / name)
    said = refused(tmp_path)
    assert "distributed checkpoint" in said
    assert word in said


@pytest.mark.parametrize(
    "name", ["model-q4.gguf", "flax_model.msgpack", "tf_model.h5", "model.onnx", "onnx/model.onnx"]
)
def test_only_weights_of_another_kind(tmp_path: Path, name: str) -> None:
    put(tmp_path / "config.json").write_text("{}")
    put(tmp_path / name)
    assert name in refused(tmp_path)


# What goes along ----------------------------------------------------------------------------------


OTHERS = (
    "tf_model.h5",
    "tf_model-00001-of-00002.h5",
    "tf_model.h5.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "model.ckpt.index",
    "model.ckpt.data-00000-of-00001",
    "rust_model.ot",
    "ggml-model-q4_0.bin",
    "model-q4.gguf",
    "model.onnx",
    "model.onnx_data",
    "openvino/openvino_model.bin",
    "onnx/decoder.onnx.data",
    "coreml/model.mlpackage/Data/weight.bin",
    "mlx/weights.npz",
    "model.tflite",
    "MODEL.ONNX",
    "model.onnx_data_1",
    "model.ckpt-1000.data-00000-of-00001",
    "model.mnn.weight",
    "custom_checkpoint_0.pkl",
    "critic_optimizer.pt",
    "checkpoint-best/model.safetensors",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "model.fp16.safetensors",
    "consolidated.00.pth",
    "weights.npz",
    "model.pt",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "checkpoint-500/model.safetensors",
    "global_step500/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "pytorch_model_fsdp_0/__0_0.distcp",
)


@pytest.mark.parametrize("name", OTHERS)
def test_other_weights_and_states_stay_behind(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "m")
    size = put(tmp_path / "m" / name, 4321).stat().st_size
    checkpoint = open_checkpoint(tmp_path / "m")
    assert name not in checkpoint.carried
    assert checkpoint.left_out_bytes == {name: size}
    assert checkpoint.left_out[name]
    assert name in open_checkpoint(tmp_path / "m", carry=[name]).carried


GOES_ALONG = (
    "training_args.bin",
    "trainer_state.json",
    "tokenizer.model",
    "merges.txt",
    "voices/af.pt",
    "mel_filters.npz",
    "speakers.pth",
    "speaker_embeddings/en_0.npy",
    "onnx/config.json",
    "optimizer_notes.md",
    "2_Dense/pytorch_model.bin",
    ".gitattributes",
    "adapter_model.safetensors",
    "speech_tokenizer/model.safetensors",
)


@pytest.mark.parametrize("name", GOES_ALONG)
def test_what_belongs_to_a_model_goes_along(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "m")
    put(tmp_path / "m" / name, 100)
    checkpoint = open_checkpoint(tmp_path / "m")
    assert checkpoint.carried[name] == 100
    assert not checkpoint.left_out


def test_an_older_save_of_the_same_model_stays_behind(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    write_model(tmp_path / "m" / "best")
    write_model(tmp_path / "m" / "speech_tokenizer", {"model_type": "another"})
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.left_out) == {"best/"}
    assert checkpoint.left_out_bytes == {"best/": size_of(tmp_path / "m" / "best")}
    assert "speech_tokenizer/model.safetensors" in checkpoint.carried


def test_modules_of_a_sentence_transformer_go_along(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    write_model(tmp_path / "m" / "2_Dense")
    (tmp_path / "m" / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Dense"}]))
    assert "2_Dense/model.safetensors" in open_checkpoint(tmp_path / "m").carried


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    put(tmp_path / "shared" / "config.json")
    for name in ("2_Pooling", "3_Pooling"):
        (tmp_path / "m" / name).symlink_to("../shared")
    (tmp_path / "m" / "self").symlink_to(".")
    (tmp_path / "shared" / "back").symlink_to("../m")
    carried = open_checkpoint(tmp_path / "m").carried
    assert {"2_Pooling/config.json", "3_Pooling/config.json"} <= set(carried)
    assert not any("self" in name or "back" in name for name in carried)


def test_carry_takes_along_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    for name in ("optimizer.pt", "checkpoint-5/optimizer.pt", "model.onnx"):
        put(tmp_path / "m" / name)
    outcome = compress(tmp_path / "m", recipe=HALF, carry=["checkpoint-5/", "*.onnx"])
    assert outcome.path is not None
    assert (outcome.path / "checkpoint-5" / "optimizer.pt").read_bytes() == b"\xa5" * 64
    assert (outcome.path / "model.onnx").exists()
    assert not (outcome.path / "optimizer.pt").exists()
    assert outcome.report.left_out_bytes == {"optimizer.pt": 64}
    with pytest.raises(UsageError, match=r"--carry '\*\.xyz' matches no file"):
        open_checkpoint(tmp_path / "m", carry=["*.xyz"])


def test_size_counts_what_will_be_there(tmp_path: Path) -> None:
    """States of training are no part of the output, notes about the source are: the size holds to
    the byte."""
    indexed(tmp_path, "model", 1, "model.safetensors.index.json")
    save_file(
        {"layers.0.weight": weight(64, 64), "a.weight": torch.ones(4)},
        tmp_path / "model-00001-of-00002.safetensors",
    )
    put(tmp_path / "optimizer.pt", 1_000_000)
    outcome = compress(tmp_path, tmp_path.parent / "out", Recipe("size", 14_000))
    assert outcome.path is not None
    written = sum(path.stat().st_size for path in outcome.path.rglob("*") if path.is_file())
    assert 13_000 < written <= 14_000
    assert written == outcome.report.total.bytes_after
    assert outcome.report.total.bytes_before < 1_000_000


def test_a_large_file_that_goes_along_is_told(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    put(tmp_path / "m" / "extra" / "voices.bank", 2_000_000)
    assert any("voices.bank" in note for note in open_checkpoint(tmp_path / "m").notes)


# The hub's cache ----------------------------------------------------------------------------------


def test_no_output_lands_in_the_hub_cache_by_default(tmp_path: Path) -> None:
    snapshot = cache_entry(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="give -o"):
        compress(snapshot, recipe=HALF)
    with pytest.raises(UsageError, match="give -o"):
        compress(snapshot / "model.safetensors", recipe=HALF)
    assert sorted(tmp_path.rglob("*")) == before
    assert compress(snapshot, tmp_path / "models--org--name" / "mine", HALF).path is not None


def test_what_lies_in_a_hub_cache(tmp_path: Path) -> None:
    snapshot = cache_entry(tmp_path)
    assert in_hub_cache(snapshot / "model.safetensors") == tmp_path / "models--org--name"
    (tmp_path / "models--mine").mkdir()
    assert in_hub_cache(write_model(tmp_path / "models--mine" / "m")) is None


def test_a_name_of_the_hub_is_told_how_to_come_here() -> None:
    with pytest.raises(BadCheckpointError, match="hf download org/name"):
        open_checkpoint("org/name")


def test_weights_of_one_kind_only(tmp_path: Path) -> None:
    """Loose safetensors come before pickles, and both without what training left."""
    save_file({"a.weight": weight(8, 8)}, tmp_path / "a.safetensors")
    save_file({"b.weight": weight(8, 8)}, tmp_path / "b.safetensors")
    torch.save({"c.weight": weight(8, 8)}, tmp_path / "c.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    assert open_checkpoint(tmp_path).tensors.keys() == {"a.weight", "b.weight"}
