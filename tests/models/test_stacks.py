"""Experts that a file holds in one tensor are layers too, and come back as that tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from helpers import cli, complaint, load_all, run_code
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdcli
from svdcli.files.checkpoint import open_checkpoint
from svdcli.files.stacks import slices_of
from svdcli.models.experts import SeparateExperts
from svdcli.models.hf import SvdConfig, separate_experts
from svdcli.plan.tensors import TensorInfo

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
MISTRAL4 = SIZES | {
    "n_routed_experts": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoe": ("GraniteMoeForCausalLM", SIZES | {"num_local_experts": 4}),
    "mistral4": ("Mistral4ForCausalLM", MISTRAL4),
    # (experts, in, out), with biases
    "gpt_oss": ("GptOssForCausalLM", SIZES | {"num_local_experts": 4, "head_dim": 16}),
    # which transformers saves one by one, and opens in either way
    "qwen3_moe": ("Qwen3MoeForCausalLM", SIZES | {"num_experts": 4, "head_dim": 16}),
}
TEXT = svdcli.Texts("words", (" ".join(f"w{i * i % 90 + 2}" for i in range(3000)),))
Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of one of them, with a tokenizer."""
    made: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name in made:
            return made[name]
        torch.manual_seed(0)
        model_class = getattr(transformers, MIXTURES[name][0])
        model = model_class(model_class.config_class(**MIXTURES[name][1]))
        made[name] = tmp_path_factory.mktemp(name) / "model"
        model.save_pretrained(made[name])
        if name == "qwen3_moe":
            state = {key: value.contiguous() for key, value in model.state_dict().items()}
            save_file(state, made[name] / "model.safetensors", {"format": "pt"})
        zoo.words_tokenizer(made[name])
        return made[name]

    return save


def stacks(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in load_all(folder).items() if tensor.ndim == 3}


def answer(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=zoo.IDS).logits
    return found


# In files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
def test_each_matrix_is_a_stretch_of_the_file(name: str, saved: Saved) -> None:
    with open_checkpoint(saved(name)) as checkpoint:
        fingerprint, whole = checkpoint.fingerprint(), stacks(saved(name))
        assert sorted(checkpoint.whole_stacks()) == sorted(whole)
        assert len(whole) == 4
        checkpoint.take_apart(checkpoint.whole_stacks())
        for stack, tensor in whole.items():
            assert stack not in checkpoint.tensors
            slices = list(slices_of(TensorInfo(stack, "F32", tuple(tensor.shape))))
            for number, (matrix, _) in enumerate(slices):
                assert f".experts.{number}." in matrix.name
                assert torch.equal(checkpoint.read_tensor(matrix.name), tensor[number])
        assert checkpoint.fingerprint() == fingerprint
        again = checkpoint.opener()
        assert again.tensors == checkpoint.tensors
        assert checkpoint.parameters == sum(t.numel() for t in load_all(saved(name)).values())


@pytest.mark.parametrize("recipe", [{"keep": 0.5}, {"rank": 8, "bits": 8}], ids=str)
@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("name", MIXTURES)
def test_from_end_to_end(
    name: str, layout: str, recipe: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    if "bits" in recipe and layout == "pivoted":
        pytest.skip("packed layers are no pivoted ones")
    out, source = tmp_path / "out", saved(name)
    predicted = svdcli.compress(source, out, dry_run=True, layout=layout, **recipe).report
    outcome = svdcli.compress(source, out, layout=layout, **recipe)
    assert outcome.report.files == predicted.files
    layers = [row.name for row in outcome.report.layers if ".experts." in row.name]
    assert len(layers) == 16
    assert svdcli.verify(out, source).ok

    # Low-rank in memory, and as the stock model of what it stands for
    svdcli.expand(out, tmp_path / "dense")
    assert {name: t.shape for name, t in load_all(tmp_path / "dense").items()} == {
        name: t.shape for name, t in load_all(source).items()
    }
    model: Any = svdcli.load(out).eval()
    assert any(isinstance(module, SeparateExperts) for module in model.modules())
    dense: Any = svdcli.load(tmp_path / "dense").eval()
    assert not any(isinstance(module, SeparateExperts) for module in dense.modules())
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert numbers < 0.7 * sum(parameter.numel() for parameter in dense.parameters())
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = svdcli.load(tmp_path / "again").eval()
    torch.testing.assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_matrix_has_the_error_of_its_own_truncation(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    """Eckart and Young, matrix by matrix."""
    svdcli.compress(saved(name), tmp_path / "o", rank=10)
    svdcli.expand(tmp_path / "o", tmp_path / "d")
    dense = stacks(tmp_path / "d")
    for stack, tensor in stacks(saved(name)).items():
        for before, after in zip(tensor.double(), dense[stack].double(), strict=True):
            best = torch.linalg.svdvals(before)[10:].norm()
            assert float((after - before).norm()) == pytest.approx(float(best), rel=1e-4)


def test_stacks_of_which_nothing_is_factored_stay_what_they_were(
    saved: Saved, tmp_path: Path
) -> None:
    source, out = saved("mistral4"), tmp_path / "o"
    svdcli.compress(source, out, keep=0.5, exclude=["*experts.*"])
    before, after = stacks(source), stacks(out)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert svdcli.verify(out, source).ok
    assert not any(isinstance(m, SeparateExperts) for m in svdcli.load(out).modules())
    svdcli.expand(out, tmp_path / "d")
    assert all(torch.equal(stacks(tmp_path / "d")[name], before[name]) for name in before)


def test_a_stack_beside_others_that_are_factored(saved: Saved, tmp_path: Path) -> None:
    """A loader that has one expert as a layer has all of them so."""
    source, out = saved("mistral4"), tmp_path / "o"
    svdcli.compress(source, out, keep=0.5, exclude=["*layers.0.*experts.*.down_proj"])
    assert stacks(out) == {}
    assert svdcli.verify(out, source).ok
    svdcli.expand(out, tmp_path / "d")
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(stacks(tmp_path / "d")[name], stacks(source)[name])
    dense = svdcli.load(tmp_path / "d").eval()
    torch.testing.assert_close(answer(svdcli.load(out).eval()), answer(dense), rtol=1e-4, atol=1e-5)


def test_a_stack_that_stands_where_experts_are_wanted_is_refused(
    saved: Saved, tmp_path: Path
) -> None:
    """Else transformers would make the experts up."""
    source, out = saved("mistral4"), tmp_path / "o"
    svdcli.compress(source, out, keep=0.5, exclude=["*layers.0.*experts.*.down_proj"])
    tensors = load_file(out / "model.safetensors")
    for name in [name for name in tensors if ".layers.0." in name and name.endswith("j.weight")]:
        if ".experts." in name and "shared" not in name:
            del tensors[name]
    tensors["model.layers.0.mlp.experts.down_proj"] = stacks(source)[
        "model.layers.0.mlp.experts.down_proj"
    ]
    with safe_open(out / "model.safetensors", "pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, out / "model.safetensors", metadata)
    with pytest.raises(ValueError, match="is an expert beside one that is factored"):
        transformers.Mistral4ForCausalLM.from_pretrained(out)


def test_matrices_that_stayed_dense_come_back_to_the_byte(saved: Saved, tmp_path: Path) -> None:
    source, out = saved("qwen3_moe"), tmp_path / "o"
    svdcli.compress(source, out, keep=0.5, exclude=["*experts.1.*"])
    svdcli.expand(out, tmp_path / "d")
    for stack, tensor in stacks(source).items():
        again = stacks(tmp_path / "d")[stack]
        assert torch.equal(again[1], tensor[1])
        assert not torch.equal(again[0], tensor[0])


def test_a_file_alone(tmp_path: Path) -> None:
    tensors = {"experts.up_proj": torch.randn(3, 64, 80), "q.weight": torch.randn(64, 64)}
    save_file(tensors, tmp_path / "m.safetensors")
    outcome = svdcli.compress(tmp_path / "m.safetensors", tmp_path / "o.safetensors", keep=0.5)
    assert len(outcome.report.layers) == 4
    svdcli.expand(tmp_path / "o.safetensors", tmp_path / "d.safetensors")
    dense = load_file(tmp_path / "d.safetensors")
    assert {name: tensor.shape for name, tensor in dense.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }


def test_names_that_are_taken_leave_a_stack_as_it_is(tmp_path: Path) -> None:
    tensors = {"experts.up_proj": torch.randn(3, 64, 80), "experts.1.up_proj.weight": torch.ones(9)}
    save_file(tensors, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.whole_stacks() == []


@pytest.mark.parametrize("entry", [["F32"], ["F32", 4, "x", 8], ["F32", 4, 8], "F32", 7])
def test_a_damaged_record_is_one_line(entry: Any, saved: Saved, tmp_path: Path) -> None:
    svdcli.compress(saved("granitemoe"), tmp_path / "o", keep=0.5)
    record = json.loads((tmp_path / "o" / "svdcli.json").read_text())
    record["source"]["stacks"] = dict.fromkeys(record["source"]["stacks"], entry)
    (tmp_path / "o" / "svdcli.json").write_text(json.dumps(record))
    for arguments in (("expand", tmp_path / "o"), ("verify", tmp_path / "o")):
        assert "record is damaged" in complaint(cli(*arguments))


# Opened by others ---------------------------------------------------------------------------------

STOCK = """
import sys, transformers
sys.modules["svdcli"] = None
getattr(transformers, sys.argv[1]).from_pretrained("o")
"""


def warnings_in(folder: Path) -> set[str]:
    return {name for name, tensor in load_all(folder).items() if not tensor.numel()}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_loader_without_svdcli_makes_no_experts_up(
    name: str, saved: Saved, tmp_path: Path
) -> None:
    """Where experts alone are factored, what warns is called after their stack."""
    source, out, model_class = saved(name), tmp_path / "o", MIXTURES[name][0]
    report = svdcli.compress(source, out, rank=8, include=["*.experts.*"]).report
    warned = warnings_in(out)
    assert len(warned) == 1
    assert warned < stacks(source).keys()
    assert (
        report.files
        == svdcli.compress(
            source, tmp_path / "p", rank=8, include=["*.experts.*"], dry_run=True
        ).report.files
    )
    assert run_code(STOCK, model_class, folder=tmp_path).code
    assert svdcli.verify(out, source).ok

    # Those with it go on, and what they save again warns too
    svdcli.expand(out, tmp_path / "d")
    assert load_all(tmp_path / "d").keys() == load_all(source).keys()
    dense: Any = svdcli.load(tmp_path / "d").eval()
    model, told = getattr(transformers, model_class).from_pretrained(out, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    torch.testing.assert_close(answer(model.eval()), answer(dense), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert warnings_in(tmp_path / "again") == warned
    again = svdcli.load(tmp_path / "again").eval()
    torch.testing.assert_close(answer(again), answer(model), rtol=1e-5, atol=1e-6)
    (tmp_path / "o").rename(tmp_path / "first")
    (tmp_path / "again").rename(tmp_path / "o")
    assert run_code(STOCK, model_class, folder=tmp_path).code


SELF_CONTAINED = """
import sys, transformers
sys.modules["svdcli"] = None
for folder, trust in (("o", True), ("o", True), (sys.argv[1], False)):
    try:
        transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    except ValueError as error:
        print(str(error).partition(" <")[0])
opened = transformers.AutoModelForImageTextToText.from_pretrained("o", trust_remote_code=True)
print(type(opened).__name__, hasattr(opened.config, "auto_map"))
"""


def test_an_auto_class_that_the_config_is_not_mapped_to_says_so(
    saved: Saved, tmp_path: Path
) -> None:
    """As it does of the source, though the output's config names a class for it."""
    svdcli.compress(saved("mistral4"), tmp_path / "o", rank=8, self_contained=True)
    done = run_code(SELF_CONTAINED, saved("mistral4"), folder=tmp_path)
    assert done.code == 0, done.err
    told = ["Unrecognized configuration class"] * 3
    assert done.out.decode().splitlines() == [*told, "Mistral4ForCausalLM False"]


def test_what_warns_is_no_tensor_of_a_module(tmp_path: Path, saved: Saved) -> None:
    """An own module of one expert after the other takes what is there."""
    source = saved("mistral4")
    svdcli.compress(source, tmp_path / "o", rank=8, include=["*.experts.*"])
    stock: Any = svdcli.load(source)
    separate_experts(stock, load_all(source))
    svdcli.load(tmp_path / "o", into=stock)
    model: Any = svdcli.load(tmp_path / "o")
    assert torch.equal(answer(stock.eval()), answer(model.eval()))


@pytest.mark.parametrize("how", [{}, {"exclude": ["*gate_up_proj*"]}], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_experts_are_multiplied_out_where_that_is_asked_for(
    name: str, how: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    svdcli.compress(saved(name), tmp_path / "o", rank=8, **how)
    model: Any = svdcli.load(tmp_path / "o").eval()
    stock_class = getattr(transformers, MIXTURES[name][0])
    multiplied = {"quantization_config": SvdConfig(dequantize=True)}
    dense = stock_class.from_pretrained(tmp_path / "o", **multiplied).eval()
    assert not any(isinstance(module, SeparateExperts) for module in dense.modules())
    torch.testing.assert_close(answer(dense), answer(model), rtol=1e-4, atol=1e-5)
    dense.save_pretrained(tmp_path / "d")
    plain = stock_class.from_pretrained(tmp_path / "d").eval()
    torch.testing.assert_close(answer(plain), answer(model), rtol=1e-4, atol=1e-5)


def test_the_model_without_its_head_has_the_experts_too(saved: Saved, tmp_path: Path) -> None:
    svdcli.compress(saved("mistral4"), tmp_path / "o", rank=8)
    whole: Any = svdcli.load(tmp_path / "o").eval()
    body = transformers.AutoModel.from_pretrained(tmp_path / "o").eval()
    with torch.inference_mode():
        found = whole.lm_head(body(input_ids=zoo.IDS).last_hidden_state)
    torch.testing.assert_close(found, answer(whole))


# Written as ordinary matrices ---------------------------------------------------------------------


def opened_as_stock(folder: Path, model_class: Any) -> Any:
    """The model that transformers makes of it, which asks nothing of svdcli's plugin."""
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    model, told = model_class.from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert not told["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("how", [{}, {"exclude": ["*experts.1.*"]}, {"max_shard_size": 60_000}])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_dense_layout_writes_stacks(
    name: str, how: dict[str, Any], saved: Saved, tmp_path: Path
) -> None:
    source, out = saved(name), tmp_path / "o"
    wanted: dict[str, Any] = {"rank": 8, "layout": "dense"} | how
    predicted = svdcli.compress(source, out, dry_run=True, allow_larger=True, **wanted).report
    report = svdcli.compress(source, out, allow_larger=True, **wanted).report
    assert report.files == predicted.files
    assert stacks(out).keys() == stacks(source).keys()
    assert svdcli.verify(out, source).ok
    stock = opened_as_stock(out, getattr(transformers, MIXTURES[name][0]))
    assert torch.equal(answer(stock), answer(svdcli.load(out).eval()))
    for stack, tensor in stacks(source).items():
        for number, (before, after) in enumerate(zip(tensor, stacks(out)[stack], strict=True)):
            if "exclude" in how and number == 1:
                assert torch.equal(before, after)
                continue
            best = torch.linalg.svdvals(before.double())[8:].norm()
            assert float((after - before).norm()) == pytest.approx(float(best), rel=1e-4)
    svdcli.expand(out, tmp_path / "d")
    before, after = load_all(out), load_all(tmp_path / "d")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("exclude", [(), ("*experts.1.down*",)], ids=["all", "but one"])
def test_a_stack_of_ordinary_matrices_has_one_dtype(
    exclude: tuple[str, ...], saved: Saved, tmp_path: Path
) -> None:
    """That of the source, where not all of it is in the dtype that was asked for."""
    source, out = saved("granitemoe"), tmp_path / "o"
    how: dict[str, Any] = {"rank": 8, "layout": "dense", "dtype": "bfloat16"}
    svdcli.compress(source, out, exclude=exclude, **how)
    for name, stack in stacks(out).items():
        kept = bool(exclude) and "output_linear" in name
        assert stack.dtype == (torch.float32 if kept else torch.bfloat16)
    assert svdcli.verify(out, source).ok
    opened_as_stock(out, transformers.GraniteMoeForCausalLM)
    svdcli.expand(out, tmp_path / "d")
    assert {tensor.dtype for tensor in load_all(tmp_path / "d").values()} == {torch.float32}


def test_a_stack_that_was_cut_short_is_continued(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import svdcli.engine.job as job

    source, how = saved("granitemoe"), {"rank": 8, "layout": "dense"}
    svdcli.compress(source, tmp_path / "whole", **how)  # type: ignore[arg-type]
    solved: list[str] = []
    solve = job.solve

    def counting(work: Any, *arguments: Any) -> Any:
        solved.append(work.unit.name)
        if len(solved) == 12:
            raise KeyboardInterrupt
        return solve(work, *arguments)

    monkeypatch.setattr(job, "solve", counting)
    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(source, tmp_path / "o", **how)  # type: ignore[arg-type]
    svdcli.compress(source, tmp_path / "o", **how)  # type: ignore[arg-type]
    assert len(set(solved[:11]) & set(solved[12:])) <= 1
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "o" / file.name).read_bytes() == file.read_bytes()


# Quantised ----------------------------------------------------------------------------------------

FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}


def in_float8(source: Path, out: Path, *, one_scale: bool = False) -> Path:
    """A copy whose stacks are codes and scales, and how many there are."""
    shutil.copytree(source, out)
    tensors = load_all(source)
    for name, stack in stacks(source).items():
        blocks = stack.unflatten(1, (-1, 32)).unflatten(3, (-1, 32))
        scale = blocks.abs().amax((2, 4)) / 448
        spread = scale.repeat_interleave(32, 1).repeat_interleave(32, 2)
        if one_scale:
            scale = spread = scale.max().reshape(1)
        tensors[name] = (stack / spread).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": FP8, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("one_scale", [False, True], ids=["blocks", "one scale"])
@pytest.mark.parametrize("name", ["granitemoe", "mistral4"])
def test_stacks_of_codes_are_taken_apart_too(
    name: str, one_scale: bool, saved: Saved, tmp_path: Path
) -> None:
    source = in_float8(saved(name), tmp_path / "m", one_scale=one_scale)
    with open_checkpoint(source) as checkpoint:
        whole = {stack: checkpoint.read_tensor(stack) for stack in checkpoint.whole_stacks()}
        assert whole.keys() == stacks(saved(name)).keys()
        fingerprint = checkpoint.fingerprint()
        checkpoint.take_apart(whole)
        assert checkpoint.fingerprint() == fingerprint
        for stack, tensor in whole.items():
            slices = list(slices_of(TensorInfo(stack, "F32", tuple(tensor.shape))))
            for number, (matrix, _) in enumerate(slices):
                assert torch.equal(checkpoint.read_tensor(matrix.name), tensor[number])
    report = svdcli.compress(source, tmp_path / "o", rank=8).report
    assert len([row for row in report.layers if ".experts." in row.name]) == 16
    assert svdcli.verify(tmp_path / "o", source).ok
    svdcli.expand(tmp_path / "o", tmp_path / "d")
    for stack, tensor in stacks(tmp_path / "d").items():
        for before, after in zip(whole[stack].double(), tensor.double(), strict=True):
            best = torch.linalg.svdvals(before)[8:].norm()
            assert float((after - before).norm()) == pytest.approx(float(best), rel=1e-4)
    dense = svdcli.load(tmp_path / "d").eval()
    model = svdcli.load(tmp_path / "o").eval()
    torch.testing.assert_close(answer(model), answer(dense), rtol=1e-4, atol=1e-5)
    exclude = {"exclude": ["*.experts.*"]}
    svdcli.compress(source, tmp_path / "w", rank=8, allow_larger=True, **exclude)
    assert all(torch.equal(stacks(tmp_path / "w")[stack], whole[stack]) for stack in whole)


# Of classes that compute in other ways ------------------------------------------------------------


def test_stacks_that_a_class_computes_with_stay_and_a_note_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 96}
    config = transformers.Llama4TextConfig(**sizes, interleave_moe_layer_step=1)
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path / "m")
    outcome = svdcli.compress(tmp_path / "m", tmp_path / "o", keep=0.5)
    [note] = [note for note in outcome.report.notes if "one stack" in note]
    assert note.endswith("(4 such): its class computes with the whole stack")
    assert stacks(tmp_path / "o").keys() == stacks(tmp_path / "m").keys()
    assert svdcli.load(tmp_path / "o")


# Calibrated and healed ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["granitemoe", "qwen3_moe", "gpt_oss"])
def test_every_expert_is_measured_and_healed(name: str, saved: Saved, tmp_path: Path) -> None:
    how: dict[str, Any] = {"samples": 8, "seq_len": 32}
    done = svdcli.calibrate(saved(name), tmp_path / "m.safetensors", TEXT, **how)
    assert done.uncalibrated == ()
    assert done.layers >= 16
    recipe: dict[str, Any] = {"keep": 0.4, "allocate": "uniform"}
    svdcli.compress(saved(name), tmp_path / "o", calibration=tmp_path / "m.safetensors", **recipe)
    effort = svdcli.Effort(steps=2)
    healed = svdcli.heal(
        tmp_path / "o", tmp_path / "h", teacher=saved(name), texts=TEXT, effort=effort, **how
    )
    assert healed.report.healing is not None
    assert svdcli.verify(tmp_path / "h", saved(name)).ok
    svdcli.expand(tmp_path / "h", tmp_path / "d")
    assert stacks(tmp_path / "d").keys() == stacks(saved(name)).keys()


def test_inspect_counts_them(saved: Saved) -> None:
    found = svdcli.inspect(saved("mistral4"))
    names = [row.name for row in found.tensors if row.selected and ".experts." in row.name]
    assert len(names) == 16
