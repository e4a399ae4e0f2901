"""Opening: with svdcli.load, with stock transformers after the plugin's import, and without it."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from helpers import run_code, weight
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import svdcli
import svdcli.models.hf
from svdcli.errors import BadCheckpointError, SvdcliError, UsageError
from svdcli.models.modules import (
    LOW_RANK,
    LowRankEmbedding,
    LowRankLinear,
    PivotedEmbedding,
    PivotedLinear,
)

Written = Callable[[str], Path]
Compressed = Callable[..., Path]


# What opens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_stock_auto_classes_open_it_after_one_import(layout: str, compressed: Compressed) -> None:
    out = compressed("llama", layout)
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(zoo.answer("llama", model), zoo.answer("llama", svdcli.load(out)))
    assert AutoModel.from_pretrained(out).layers[0].mlp.up_proj.rank > 0


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_bfloat16_in_shards_with_a_rank_for_each_layer(layout: str, tmp_path: Path) -> None:
    source = zoo.save("llama-tied", tmp_path / "model", torch.bfloat16, max_shard_size="60KB")
    recipe = svdcli.Recipe(
        "keep", 0.5, allocate="global", floor=0.2, layout=layout, max_shard_size=50_000
    )
    outcome = svdcli.compress(source, tmp_path / "out", recipe)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    model = svdcli.load(tmp_path / "out")
    ranks = {
        f"{name}.weight": m.rank for name, m in model.named_modules() if isinstance(m, LOW_RANK)
    }
    assert ranks == {layer.tensor.name: layer.rank for layer in outcome.plan.factored}
    assert len(set(ranks.values())) > 1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("layout", "kind", "head"),
    [("factored", LowRankEmbedding, LowRankLinear), ("pivoted", PivotedEmbedding, PivotedLinear)],
)
@pytest.mark.parametrize(
    ("family", "name"),
    [("llama-tied", "model.embed_tokens"), ("marian", "model.shared"), ("t5", "shared")],
)
def test_a_factored_embedding_stays_tied_to_the_head(
    family: str, name: str, layout: str, kind: type, head: type, written: Written, tmp_path: Path
) -> None:
    svdcli.compress(
        written(family),
        tmp_path / "out",
        svdcli.Recipe("rank", 12, layout=layout, include=(name, "*")),
    )
    model = svdcli.load(tmp_path / "out")
    table, out = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, kind)
    assert isinstance(out, head)
    assert out.svd_up.weight is table.svd_up.weight
    assert out.svd_down.weight is table.svd_down.weight
    dense = svdcli.load(svdcli.expand(tmp_path / "out", tmp_path / "dense"))
    assert torch.allclose(
        zoo.answer(family, model), zoo.answer(family, dense), atol=2e-5, rtol=2e-5
    )
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(
        zoo.answer(family, model), zoo.answer(family, svdcli.load(tmp_path / "again"))
    )


TIED = {
    "llama": ("LlamaForCausalLM", "lm_head", "model.embed_tokens"),
    "gemma": ("Gemma3ForCausalLM", "lm_head", "model.embed_tokens"),  # scales what it looks up
    "bert": (
        "BertForMaskedLM",
        "cls.predictions.decoder",
        "bert.embeddings.word_embeddings",
    ),  # a head with a bias
}
IN_THE_FILE = {
    "table": (True, "absent"),
    "head": (False, "same"),
    "equal": (True, "same"),
    "different": (True, "another"),
}


NO_LONGER_TIED = (
    "hold the same numbers: tied before, they are two weights now; name both to keep one"
)


def write_tied(family: str, folder: Path, copies: str) -> Path:
    """A model that ties its head to its table, with the copies of IN_THE_FILE in its weight
    file."""
    name, head, table = TIED[family]
    config = zoo._decoder(tie_word_embeddings=True, head_dim=16) if family != "bert" else zoo._BERT
    zoo._model(name, **config)().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    keeps_table, kept_head = IN_THE_FILE[copies]
    weight = tensors[f"{table}.weight"] if keeps_table else tensors.pop(f"{table}.weight")
    other = {"same": weight.clone(), "another": torch.randn_like(weight)}
    tensors |= {f"{head}.weight": other[kept_head]} if kept_head in other else {}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("copies", IN_THE_FILE)
@pytest.mark.parametrize("family", TIED)
def test_tied_weights_named_in_full_answer_as_stock_transformers_does_after_expand(
    family: str, copies: str, layout: str, tmp_path: Path
) -> None:
    name, head, table = TIED[family]
    source = write_tied(family, tmp_path / "model", copies)
    keeps_table, kept_head = IN_THE_FILE[copies]
    there = [head] * (kept_head != "absent") + [table] * keeps_table
    for named in {(there[0],), (there[-1],), tuple(there)}:
        out = tmp_path / "-".join(["out", *named])
        plan = svdcli.compress(
            source, out, svdcli.Recipe("rank", 20, layout=layout, include=named)
        ).plan
        apart = copies == "equal" and len(named) == 1
        assert plan.notes == ((f"{head} and {table} {NO_LONGER_TIED}",) if apart else ())
        stock = getattr(transformers, name).from_pretrained(
            svdcli.expand(out, tmp_path / f"{out.name}-dense")
        )
        model = svdcli.load(out)
        ids = {"input_ids": zoo.IDS}
        expected, answer = stock.eval()(**ids).logits, model.eval()(**ids).logits
        assert torch.allclose(answer, expected, atol=2e-5, rtol=2e-5), named
        assert family == "gemma" or isinstance(
            model.get_submodule(named[0]), LOW_RANK
        )  # whose table scales what it reads
        if copies != "different" and family != "gemma":
            model.tie_weights()
        model.save_pretrained(tmp_path / f"{out.name}-again")
        assert torch.equal(
            answer, svdcli.load(tmp_path / f"{out.name}-again").eval()(**ids).logits
        ), named


def test_tied_weights_that_share_their_storage_are_factored_under_all_their_names(
    tmp_path: Path,
) -> None:
    source = write_tied("llama", tmp_path / "model", "table")
    model = transformers.LlamaForCausalLM.from_pretrained(source)
    (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    with pytest.raises(
        UsageError,
        match=r"lm_head is tied: it shares its storage with model\.embed_tokens; name all of them",
    ):
        svdcli.compress(source, tmp_path / "out", svdcli.Recipe("rank", 20, include=("lm_head",)))
    both = ("lm_head", "model.embed_tokens")
    svdcli.compress(source, tmp_path / "out", svdcli.Recipe("rank", 20, include=both))
    opened = svdcli.load(tmp_path / "out")
    assert opened.lm_head.svd_up.weight is opened.model.embed_tokens.svd_up.weight


_HYBRID = {
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
# Families whose class leaves layers of its files out, or whose router is a module of its own:
# (class, config, what lies in the files besides, what is asked for, what of it stays dense for what
# it does).
ODD_LAYERS = {
    "a head of multi-token prediction": (
        "Qwen3NextForCausalLM",
        zoo._decoder(head_dim=16, **_HYBRID),
        {"mtp.fc.weight": (64, 128), "mtp.layers.0.self_attn.o_proj.weight": (64, 64)},
        ("*.gate.*", "mtp.*", "*attn*"),
        {
            "mtp.fc",
            "mtp.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.gate",
            "model.layers.1.mlp.gate",
        },
    ),
    "a layer beyond the last": (
        "Glm4MoeForCausalLM",
        zoo._decoder(
            head_dim=16,
            n_routed_experts=16,
            moe_intermediate_size=64,
            num_hidden_layers=46,
            first_k_dense_replace=45,
        ),
        {
            "model.layers.46.eh_proj.weight": (64, 128),
            "model.layers.46.shared_head.head.weight": (96, 64),
        },
        ("model.layers.4[56].*",),
        {"model.layers.45.mlp.gate", "model.layers.46.eh_proj", "model.layers.46.shared_head.head"},
    ),
    "a router in a class of its own": (
        "GraniteMoeForCausalLM",
        zoo._decoder(num_local_experts=16, num_experts_per_tok=2),
        {},
        ("*",),
        {
            "model.layers.0.block_sparse_moe.router.layer",
            "model.layers.1.block_sparse_moe.router.layer",
        },
    ),
}


@pytest.mark.parametrize("case", ODD_LAYERS)
def test_what_no_class_takes_and_what_routes_stays_as_it_is(case: str, tmp_path: Path) -> None:
    name, config, besides, include, dense = ODD_LAYERS[case]
    source = tmp_path / "model"
    zoo._model(name, **config)().save_pretrained(source)
    tensors = load_file(source / "model.safetensors") | {
        key: torch.randn(shape) for key, shape in besides.items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    original, told = getattr(transformers, name).from_pretrained(source, output_loading_info=True)
    assert not told["unexpected_keys"]
    outcome = svdcli.compress(source, tmp_path / "out", svdcli.Recipe("keep", 0.6, include=include))
    other = ("no --include", "too small", "1-D", "3-D", "embedding", "output head")
    assert {
        item.tensor.module for item in outcome.plan.skipped if not item.reason.startswith(other)
    } == dense
    selected = svdcli.inspect(source, include=include).selected
    assert [row.name for row in selected] == [layer.tensor.name for layer in outcome.plan.layers]
    model = svdcli.load(tmp_path / "out")
    assert type(model) is type(original)
    assert any(isinstance(module, LOW_RANK) for module in model.modules())
    assert zoo.IDS.shape == model(input_ids=zoo.IDS).logits.argmax(-1).shape
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as written:
        assert all(torch.equal(written.get_tensor(key), tensors[key]) for key in besides)


# Layers of classes that torch does not know, and names that are others in the model: (class,
# config, what is asked for).
OWN_CLASSES = {
    "linear layers of its own": ("IBertForMaskedLM", zoo._BERT, ("*layer.0*",)),
    "layers in groups": ("DeepseekV4ForCausalLM", zoo.GROUPED, (r"re:attn\.",)),
    "a head and a table under other names": (
        "DeepseekV4ForCausalLM",
        zoo.GROUPED,
        ("head", "model.embed_tokens"),
    ),
    "a router that is named in full": (
        "PhimoeForCausalLM",
        zoo._decoder(num_local_experts=16, num_experts_per_tok=2),
        ("model.layers.0.block_sparse_moe.gate",),
    ),
}


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
@pytest.mark.parametrize("case", OWN_CLASSES)
def test_layers_of_any_class_answer_as_their_factors_do(
    case: str, layout: str, tmp_path: Path
) -> None:
    name, config, include = OWN_CLASSES[case]
    zoo._model(name, **config)().save_pretrained(tmp_path / "model")
    recipe = svdcli.Recipe("rank", 10, include=include, layout=layout)
    outcome = svdcli.compress(
        tmp_path / "model", tmp_path / "out", recipe, allow_larger=True
    )  # a router is small
    dense = (
        getattr(transformers, name)
        .from_pretrained(svdcli.expand(tmp_path / "out", tmp_path / "dense"))
        .eval()
    )
    expected = dense(input_ids=zoo.IDS).logits
    model = svdcli.load(tmp_path / "out").eval()
    assert outcome.plan.factored
    assert torch.allclose(model(input_ids=zoo.IDS).logits, expected, atol=2e-5, rtol=2e-5)
    model.save_pretrained(tmp_path / "again")
    again = svdcli.load(tmp_path / "again").eval()
    assert torch.equal(again(input_ids=zoo.IDS).logits, model(input_ids=zoo.IDS).logits)


def test_device_map_and_dtype_reach_from_pretrained(compressed: Compressed) -> None:
    model = svdcli.load(compressed("llama"), device_map={"": "cpu"}, dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", "factored"),
        ("llama", "pivoted"),
        ("gpt2", "pivoted"),
        ("bert", "factored"),
        # Of the same modules as these
        pytest.param("gpt2", "factored", marks=pytest.mark.slow),
        pytest.param("bert", "pivoted", marks=pytest.mark.slow),
        pytest.param("t5", "factored", marks=pytest.mark.slow),
        pytest.param("t5", "pivoted", marks=pytest.mark.slow),
    ],
)
def test_compiles_as_one_graph(family: str, layout: str, compressed: Compressed) -> None:
    model = svdcli.load(compressed(family, layout))
    expected = zoo.answer(family, model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.allclose(zoo.answer(family, model), expected, atol=1e-5)


def test_dequantize_is_there_for_those_who_ask(compressed: Compressed) -> None:
    out = compressed("llama", "pivoted")
    config = AutoConfig.from_pretrained(out)
    config.quantization_config["dequantize"] = True
    dense = AutoModelForCausalLM.from_pretrained(out, config=config)
    assert not any(isinstance(module, LOW_RANK) for module in dense.modules())
    model = svdcli.load(out)
    assert torch.allclose(zoo.answer("llama", dense), zoo.answer("llama", model), atol=2e-5)
    assert torch.allclose(
        zoo.answer("llama", model.dequantize()), zoo.answer("llama", dense), atol=2e-5
    )


def test_a_dense_model_opens_too(written: Written) -> None:
    assert not any(
        isinstance(module, LOW_RANK) for module in svdcli.load(written("bert")).modules()
    )


# Into a module of one's own -----------------------------------------------------------------------


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40, bias=False))


def write_mlp(path: Path) -> Path:
    save_file(
        {
            "0.weight": weight(48, 40, 1),
            "0.bias": torch.linspace(-1, 1, 48),
            "2.weight": weight(40, 48, 2),
        },
        path,
    )
    return path


@pytest.mark.parametrize("layout", ["factored", "pivoted", "dense"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_file_loads_into_a_module(layout: str, device: str, tmp_path: Path) -> None:
    svdcli.compress(
        write_mlp(tmp_path / "m.safetensors"),
        tmp_path / "o.safetensors",
        svdcli.Recipe("rank", 8, layout=layout),
    )
    with torch.device(device):
        model = svdcli.load(tmp_path / "o.safetensors", into=mlp())
    dense = mlp()
    dense.load_state_dict(
        load_file(svdcli.expand(tmp_path / "o.safetensors", tmp_path / "d.safetensors"))
    )
    x = weight(5, 40, 7)
    assert torch.allclose(model(x), dense(x), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Linear(40, 48), nn.ReLU()), "the module has no 2"),
        (
            nn.Sequential(nn.Linear(40, 49), nn.ReLU(), nn.Linear(49, 40, bias=False)),
            "0 is [48, 40]",
        ),
        (nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40)), "lacks 2.bias"),
        (
            nn.Sequential(nn.Linear(40, 48, bias=False), nn.ReLU(), nn.Linear(48, 40, bias=False)),
            "holds, and the module does not, 0.bias",
        ),
        (nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Conv1d(40, 48, 1)), "cannot hold factors"),
    ],
    ids=["no module", "shape", "lacks", "more", "kind"],
)
def test_a_module_that_does_not_fit_is_refused(model: nn.Module, says: str, tmp_path: Path) -> None:
    svdcli.compress(
        write_mlp(tmp_path / "m.safetensors"), tmp_path / "o.safetensors", svdcli.Recipe("rank", 8)
    )
    with pytest.raises(SvdcliError) as error:
        svdcli.load(tmp_path / "o.safetensors", into=model)
    assert says in str(error.value)


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_a_tied_weight_counts_as_there(
    layout: str, written: Written, compressed: Compressed
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(written("llama-tied")))
    svdcli.load(compressed("llama-tied", layout), into=model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = zoo.answer("llama-tied", svdcli.load(compressed("llama-tied", layout)))
    assert torch.allclose(zoo.answer("llama-tied", model.eval()), wanted, atol=1e-5)


PREFIXES = ["", "_orig_mod.", "module.", "_orig_mod.module.module."]
WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda module: module,
    "compiled": lambda module: torch.compile(module, backend="eager"),  # type: ignore[dict-item]
    "parallel": nn.DataParallel,
    "both": lambda module: nn.DataParallel(torch.compile(module, backend="eager")),  # type: ignore[arg-type]
    "compiled within": lambda module: nn.Sequential(
        *(torch.compile(child, backend="eager") for child in module)
    ),
}


@pytest.mark.parametrize(
    ("prefix", "wrapper", "layout"),
    [
        *(
            (prefix, wrapper, "factored")
            for prefix, wrapper in itertools.product(PREFIXES, WRAPPERS)
        ),
        *(
            (prefix, "plain", layout)
            for prefix, layout in itertools.product(PREFIXES, ("pivoted", "dense"))
        ),
    ],
)
def test_what_compile_and_ddp_add_to_names_does_not_matter(
    prefix: str, wrapper: str, layout: str, tmp_path: Path
) -> None:
    tensors = {
        prefix + name: tensor
        for name, tensor in load_file(write_mlp(tmp_path / "m.safetensors")).items()
    }
    save_file(tensors, tmp_path / "m.safetensors")
    svdcli.compress(
        tmp_path / "m.safetensors",
        tmp_path / "o.safetensors",
        svdcli.Recipe("rank", 8, layout=layout),
    )
    model = svdcli.load(tmp_path / "o.safetensors", into=WRAPPERS[wrapper](mlp()))
    expanded = load_file(svdcli.expand(tmp_path / "o.safetensors", tmp_path / "d.safetensors"))
    dense = mlp()
    dense.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in expanded.items()})
    with torch.no_grad():
        assert torch.allclose(model(weight(5, 40, 7)), dense(weight(5, 40, 7)), atol=1e-6)


def test_compile_may_be_anywhere_in_a_name(tmp_path: Path) -> None:
    tensors = load_file(write_mlp(tmp_path / "m.safetensors"))
    renamed = {
        f"module.{name.replace('.', '._orig_mod.')}": tensor for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "m.safetensors")
    svdcli.compress(
        tmp_path / "m.safetensors", tmp_path / "o.safetensors", svdcli.Recipe("rank", 8)
    )
    assert isinstance(svdcli.load(tmp_path / "o.safetensors", into=mlp())[2], LowRankLinear)


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize(
    "names", [["net.0", "net.2"], ["module.0", "0"]], ids=["another prefix", "ambiguous"]
)
def test_where_prefixes_do_not_match_it_says_so(
    names: list[str], factored: bool, tmp_path: Path
) -> None:
    source = tmp_path / "m.safetensors"
    save_file({f"{name}.weight": weight(48, 40) for name in names}, source)
    if factored:
        svdcli.compress(source, tmp_path / "o.safetensors", svdcli.Recipe("rank", 8))
        source = tmp_path / "o.safetensors"
    with pytest.raises(SvdcliError, match="prefix"):
        svdcli.load(
            source,
            into=nn.Sequential(
                nn.Linear(40, 48, bias=False), nn.ReLU(), nn.Linear(40, 48, bias=False)
            ),
        )


def test_a_file_without_a_module_asks_for_one(tmp_path: Path) -> None:
    with pytest.raises(SvdcliError, match="into=module"):
        svdcli.load(write_mlp(tmp_path / "m.safetensors"))


# Without the plugin -------------------------------------------------------------------------------

STOCK = (
    "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
)


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_without_the_plugin_it_fails_loudly(
    layout: str, compressed: Compressed, tmp_path: Path
) -> None:
    done = run_code(STOCK, compressed("llama", layout), folder=tmp_path)
    assert done.code == 1
    assert "svdcli" in done.err


SELF_CONTAINED = """
import os, sys, torch
from transformers import AutoModelForCausalLM, AutoModel, dynamic_module_utils
dynamic_module_utils.HF_MODULES_CACHE = os.path.abspath("cache")
sys.modules["svdcli"] = None  # not installed
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(base).__name__ == "LlamaModel", type(base)
    torch.save(model(torch.arange(12)[None]).logits, f"{folder}-logits.pt")
    model.save_pretrained(f"{folder}-again")
"""


def test_self_contained_opens_where_svdcli_is_not_installed(
    written: Written, tmp_path: Path
) -> None:
    outs = [tmp_path / "factored", tmp_path / "pivoted"]
    for out in outs:
        svdcli.compress(
            written("llama"), out, svdcli.Recipe("keep", 0.5, layout=out.name, self_contained=True)
        )
    done = run_code(SELF_CONTAINED, *outs, folder=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "cache").is_dir()
    for out in outs:
        expected = svdcli.load(out)(torch.arange(12)[None]).logits
        assert torch.equal(torch.load(f"{out}-logits.pt"), expected)
        assert torch.equal(svdcli.load(f"{out}-again")(torch.arange(12)[None]).logits, expected)
        assert svdcli.verify(out, written("llama")).ok


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"auto_map": {"AutoModel": "x.Y"}}, "brings its own code"),
        ({"model_type": None, "architectures": None}, "config.json of transformers"),
    ],
)
def test_self_contained_refuses_what_it_cannot_serve(
    change: dict[str, object], says: str, written: Written, tmp_path: Path
) -> None:
    source = shutil.copytree(written("llama"), tmp_path / "model")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    with pytest.raises(UsageError, match=says):
        svdcli.compress(source, tmp_path / "out", svdcli.Recipe("keep", 0.6, self_contained=True))


# What must not open -------------------------------------------------------------------------------


def edit_config(out: Path, **changes: object) -> None:
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= changes
    (out / "config.json").write_text(json.dumps(config))


def edit_tensors(
    out: Path, change: Callable[[dict[str, torch.Tensor]], object], *, forget: bool
) -> None:
    """Rewrite the weights; with forget as a model that transformers saved, which has no record of
    svdcli."""
    path = out / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        metadata = {"format": "pt"} if forget else opened.metadata()
    change(tensors)
    save_file(tensors, path, metadata)
    if forget:
        (out / "svdcli.json").unlink()


UP = "model.layers.1.mlp.up_proj.svd_up.weight"
DOWN = "model.layers.1.mlp.up_proj.svd_down.weight"
CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a missing factor": lambda tensors: tensors.pop(UP),
    "another rank in one factor": lambda tensors: tensors.update(
        {UP: tensors[UP][:, :-1].contiguous()}
    ),
    "another rank in both": lambda tensors: tensors.update(
        {UP: tensors[UP][:, :4].contiguous(), DOWN: tensors[DOWN][:4].contiguous()}
    ),
    "another shape": lambda tensors: tensors.update({UP: tensors[UP][:-1].contiguous()}),
    "a layer that no module takes": lambda tensors: tensors.update(
        {
            UP.replace("layers.1", "layers.7"): tensors[UP].clone(),
            DOWN.replace("layers.1", "layers.7"): tensors[DOWN].clone(),
        }
    ),
    "a missing tensor": lambda tensors: tensors.pop("model.norm.weight"),
    "a tensor too many": lambda tensors: tensors.update(
        {"model.layers.0.extra.weight": torch.ones(3)}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_edited_directory_is_refused(
    change: str, compressed: Compressed, tmp_path: Path
) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    edit_tensors(out, CHANGES[change], forget=False)
    with pytest.raises(BadCheckpointError):
        svdcli.load(out)


@pytest.mark.parametrize(
    "change", ["a missing factor", "another rank in one factor", "another shape"]
)
def test_so_is_one_that_lost_its_record(
    change: str, compressed: Compressed, tmp_path: Path
) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    edit_tensors(out, CHANGES[change], forget=True)
    with pytest.raises(SvdcliError) as error:
        svdcli.load(out)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", ["a missing factor", "another rank in one factor", "another shape"]
)
def test_stock_classes_refuse_it_as_well(
    change: str, compressed: Compressed, tmp_path: Path
) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    edit_tensors(out, CHANGES[change], forget=True)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("kind", ["skipped", "dense"])
def test_a_tensor_of_the_record_must_be_there(
    kind: str, compressed: Compressed, tmp_path: Path
) -> None:
    """Whatever transformers would do without it: the files are not those that were written."""
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    record = json.loads((out / "svdcli.json").read_text())
    record[kind]["model.gone.weight"] = next(iter(record["skipped"].values())) | next(
        iter(record["layers"].values())
    )
    (out / "svdcli.json").write_text(json.dumps(record))
    for opening in (svdcli.load, lambda path: svdcli.expand(path, tmp_path / "dense")):
        with pytest.raises(
            BadCheckpointError, match=r"lacks 'model\.gone\.weight', which its record lists"
        ):
            opening(out)


@pytest.mark.parametrize("change", ["no factors at all", "another rank in both"])
def test_stock_classes_believe_the_record_in_the_file(
    change: str, compressed: Compressed, tmp_path: Path
) -> None:
    """Without it they would fill the layer with random numbers, or take a rank for another."""
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    remove = {"no factors at all": lambda tensors: [tensors.pop(name) for name in (UP, DOWN)]}
    edit_tensors(out, (remove | CHANGES)[change], forget=False)
    with pytest.raises(ValueError, match=r"factors of model\.layers\.1\.mlp\.up_proj are"):
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("rows", [torch.zeros(160), torch.arange(160) + 1, -torch.arange(160)])
def test_a_row_order_that_is_none_is_refused(
    rows: torch.Tensor, compressed: Compressed, tmp_path: Path
) -> None:
    out = shutil.copytree(compressed("llama", "pivoted"), tmp_path / "out")
    edit_tensors(
        out,
        lambda tensors: tensors.update({UP.replace(svdcli.models.hf.UP, "svd_rows"): rows.int()}),
        forget=True,
    )
    for opening in (svdcli.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises((SvdcliError, ValueError), match="is no order of 160 rows"):
            opening(out)


def test_a_changed_weight_file_is_not_expanded(compressed: Compressed, tmp_path: Path) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    edit_tensors(out, lambda tensors: tensors[UP].mul_(2), forget=False)
    with pytest.raises(BadCheckpointError, match="was changed after svdcli wrote it"):
        svdcli.expand(out, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_what_transformers_saved_has_a_way_back_to_an_ordinary_checkpoint(
    compressed: Compressed, tmp_path: Path
) -> None:
    svdcli.load(compressed("llama", "pivoted")).save_pretrained(tmp_path / "saved")
    with pytest.raises(SvdcliError, match=r"dequantize\(\)\.save_pretrained"):
        svdcli.expand(tmp_path / "saved", tmp_path / "dense")
    svdcli.load(tmp_path / "saved").dequantize().save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, LOW_RANK) for module in dense.modules())
    assert torch.allclose(
        zoo.answer("llama", dense), zoo.answer("llama", svdcli.load(tmp_path / "saved")), atol=2e-5
    )


def test_a_newer_format_asks_for_an_upgrade(compressed: Compressed, tmp_path: Path) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    edit_config(out, format=2)
    with pytest.raises(BadCheckpointError, match="upgrade svdcli"):
        svdcli.load(out)
    with pytest.raises(ValueError, match="upgrade svdcli"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_config_that_lost_its_quantization_is_refused(
    compressed: Compressed, tmp_path: Path
) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpointError, match="lost its quantization_config"):
        svdcli.load(out)


def test_a_class_that_this_transformers_lacks_is_refused(
    compressed: Compressed, tmp_path: Path
) -> None:
    out = shutil.copytree(compressed("llama"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    with pytest.raises(SvdcliError, match="has no NoSuchModel"):
        svdcli.load(out)
