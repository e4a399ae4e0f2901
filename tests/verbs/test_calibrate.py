"""calibrate against sums over ordinary passes of the whole float32 model, and its predictions
against what the model loses."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from helpers import changed, tree
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo import Sums, albert, close, words_tokenizer

import svdcli
from svdcli import Recipe
from svdcli.calibration import gather as module
from svdcli.calibration.loss import drawing
from svdcli.calibration.moments import LayerMoments, Moments, Spool, open_moments
from svdcli.errors import BadCheckpointError, NotFiniteError, SvdcliError, UsageError
from svdcli.files.checkpoint import open_checkpoint
from svdcli.linalg.whitening import Metric, weighted
from svdcli.plan.words import Precision
from svdcli.text.texts import Texts
from svdcli.text.tokens import Amount, grouped, load_tokenizer, sentences_of, windows_of
from svdcli.verbs.calibrate import Calibrated, Forecast, calibrate
from svdcli.verbs.compress import Reading

Readable = Callable[..., Path]
SAMPLES, LENGTH = 10, 16


def words(count: int, seed: int = 0) -> list[str]:
    numbers = torch.randint(2, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [f"w{number}" for number in numbers]


TEXT = Texts("words", (" ".join(words(400)),))
SENTENCES = Texts("lines", ("\n".join(" ".join(words(3 + at % 11, at)) for at in range(40)),))


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four windows in a batch, so that a little text makes several."""
    monkeypatch.setattr("svdcli.text.tokens.TOKENS_IN_A_BATCH", 4 * LENGTH)


def run(model: Path, out: Path, texts: Texts = TEXT, **options: Any) -> tuple[Moments, Calibrated]:
    done = calibrate(model, out, texts, **({"samples": SAMPLES, "seq_len": LENGTH} | options))
    return open_moments(out), done


def from_logits(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, int]:
    """The loss of labels drawn from the predictions, and how many there are."""
    flat = logits.flatten(0, -2)
    labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
    return nn.functional.cross_entropy(flat, labels, reduction="sum"), len(labels)


def token_batches(path: Path, samples: int = SAMPLES) -> list[dict[str, Tensor]]:
    batches = [
        {"input_ids": ids}
        for ids in windows_of(load_tokenizer(path), TEXT, LENGTH, samples).ids.split(4)
    ]
    if (open_checkpoint(path).config or {}).get("is_encoder_decoder"):
        batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
    return batches


def by_windows(path: Path, seed: int = 0) -> tuple[Sums, int]:
    """Of a model with logits for every token."""
    model, events = svdcli.load(path).float().eval(), 0
    sums = Sums(model)
    for index, batch in enumerate(token_batches(path)):
        loss, count = from_logits(model(**batch).logits, drawing(seed, index))
        loss.backward()
        events += count
    return sums, events


def by_sentences(path: Path, seed: int = 0) -> tuple[Sums, int]:
    """Of an encoder that reads each sentence alone, so that there is no padding."""
    model, tokenizer, events = svdcli.load(path).float().eval(), load_tokenizer(path), 0
    sums = Sums(model)
    groups = grouped(sentences_of(tokenizer, SENTENCES, 64, Amount(40)), padded=True)
    for index, group in enumerate(groups):
        generator = drawing(seed, index)
        outputs = [model(**tokenizer(sentence.text, return_tensors="pt")) for sentence in group]
        if hasattr(outputs[0], "logits"):
            loss, count = from_logits(torch.cat([output.logits for output in outputs]), generator)
        else:
            means = torch.cat([output.last_hidden_state.mean(1) for output in outputs])
            embeddings, count = nn.functional.normalize(means, dim=-1), len(outputs)
            loss = (embeddings * torch.randn(embeddings.shape, generator=generator)).sum()
        loss.backward()
        events += count
    return sums, events


def assert_moments(moments: Moments, sums: Sums, events: int) -> None:
    assert moments.layers
    for name in moments.layers:
        found = moments.of(name)
        assert found is not None
        close(found.inputs, sums.inputs[name] / sums.rows[name])
        close(found.mean, sums.mean[name] / sums.rows[name])
        assert (found.outputs is not None) == (name in sums.outputs)
        if found.outputs is not None:
            close(found.outputs, sums.outputs[name] / events)


def assert_same_moments(one: Moments, other: Moments) -> None:
    assert one.layers == other.layers
    for name in one.layers:
        a, b = one.of(name), other.of(name)
        assert a is not None
        assert b is not None
        for x, y in ((a.inputs, b.inputs), (a.mean, b.mean), (a.outputs, b.outputs)):
            assert (x is None) == (y is None)
            if x is not None and y is not None:
                close(x, y.double())


# Moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gpt2", torch.float32),
        ("t5", torch.float32),
        ("marian", torch.bfloat16),
    ],
)
def test_moments_are_the_sums_of_ordinary_passes(
    family: str, dtype: torch.dtype, readable: Readable, tmp_path: Path
) -> None:
    path = readable(family, dtype)
    moments, done = run(path, tmp_path / "c.safetensors", seed=3)
    assert_moments(moments, *by_windows(path, seed=3))
    selected = {row.name for row in svdcli.inspect(path).selected}
    assert set(moments.layers) | set(done.uncalibrated) == selected
    assert not done.uncalibrated
    assert {moments.metric_name(name) for name in selected} == {"full"}
    assert {keys["transposed"] for keys in moments.layers.values()} == {family == "gpt2"}
    assert moments.provenance.unit == "nats"


@pytest.mark.parametrize("family", ["bert", "bert-classifier"])
def test_padding_is_no_input_and_has_no_gradient(
    family: str, readable: Readable, tmp_path: Path
) -> None:
    path = readable(family)
    pooler = {"bert": "pooler.dense", "bert-classifier": "bert.pooler.dense"}[family]
    moments, done = run(
        path, tmp_path / "c.safetensors", SENTENCES, samples=40, seed=5, include=("*", pooler)
    )
    assert f"{pooler}.weight" in moments.layers
    assert_moments(moments, *by_sentences(path, seed=5))
    assert done.tokens == sum(3 + at % 11 for at in range(40))
    assert moments.provenance.unit == ("1 - cosine" if family == "bert" else "nats")


def test_layers_outside_of_blocks_have_their_moments_too(tmp_path: Path) -> None:
    path = tmp_path / "m"
    albert().save_pretrained(path)
    words_tokenizer(path)
    moments, done = run(path, tmp_path / "c.safetensors", SENTENCES, samples=40)
    assert not done.uncalibrated
    assert {moments.metric_name(name) for name in moments.layers if "pooler" not in name} == {
        "full"
    }
    assert_moments(moments, *by_sentences(path))


def test_moments_take_the_labels_of_their_seed(readable: Readable, tmp_path: Path) -> None:
    path = readable("llama")
    one, again, other = (
        run(path, tmp_path / f"{at}.safetensors", seed=seed)[0] for at, seed in enumerate((1, 1, 2))
    )
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(one.of(name).inputs, other.of(name).inputs)
    assert not torch.allclose(again.of(name).outputs, other.of(name).outputs, rtol=1e-3)


def shared(moments: Moments) -> set[frozenset[str]]:
    """The groups of layers that read the same input, without what they all begin with."""
    groups: dict[str, set[str]] = {}
    for name, keys in moments.layers.items():
        groups.setdefault(keys["input"], set()).add(name.removesuffix(".weight"))
    return {frozenset(group) for group in groups.values()}


def test_layers_that_read_the_same_share_one_input(readable: Readable, tmp_path: Path) -> None:
    def groups(family: str, texts: Texts = TEXT) -> set[frozenset[str]]:
        return shared(
            run(readable(family), tmp_path / f"{family}.safetensors", texts, gradients=False)[0]
        )

    def of(prefix: str, *groups: str) -> set[frozenset[str]]:
        return {
            frozenset(f"{prefix}.{at}.{name}" for name in group.split())
            for at in (0, 1)
            for group in groups
        }

    attention = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
    llama = of(
        "model.layers", attention, "self_attn.o_proj", "mlp.gate_proj mlp.up_proj", "mlp.down_proj"
    )
    assert groups("llama") == llama
    own = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert groups("gpt2") == of("transformer.h", *own)
    inner = ("attention.output.dense", "intermediate.dense", "output.dense")
    query = " ".join(f"attention.self.{name}" for name in ("query", "key", "value"))
    assert groups("bert", SENTENCES) == of("encoder.layer", query, *inner) | {
        frozenset({"pooler.dense"})
    }
    both = (
        "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v",
        "layer.0.SelfAttention.o",
    )
    cross = (
        "layer.1.EncDecAttention.q",
        "layer.1.EncDecAttention.k layer.1.EncDecAttention.v",
        "layer.1.EncDecAttention.o",
        "layer.2.DenseReluDense.wi",
        "layer.2.DenseReluDense.wo",
    )
    encoder = of("encoder.block", *both, "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo")
    assert groups("t5") == encoder | of("decoder.block", *both, *cross)


def test_a_shared_input_is_stored_once(readable: Readable, tmp_path: Path) -> None:
    moments, done = run(readable("llama"), tmp_path / "c.safetensors")
    keys = load_file(tmp_path / "c.safetensors").keys()
    assert (done.layers, done.inputs) == (14, 8)
    assert len([key for key in keys if key.startswith("input.")]) == 8
    assert len([key for key in keys if key.startswith("output.")]) == 14
    assert done.bytes == (tmp_path / "c.safetensors").stat().st_size
    assert moments.provenance.fingerprint == open_checkpoint(readable("llama")).fingerprint()


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("gradients", [False, True])
def test_rounds_add_up_to_the_same_moments(
    family: str, gradients: bool, readable: Readable, tmp_path: Path
) -> None:
    """The labels of a batch do not depend on the round that it is read in, so H is the same too."""
    told: list[Forecast] = []
    texts, samples = (SENTENCES, 40) if family == "bert" else (TEXT, SAMPLES)
    how = {"samples": samples, "gradients": gradients, "announce": told.append}
    whole, done = run(readable(family), tmp_path / "a.safetensors", texts, memory=10**9, **how)
    parts, more = run(readable(family), tmp_path / "b.safetensors", texts, memory=1, **how)
    assert done.rounds == 1
    assert more.rounds >= 3
    assert [forecast.rounds for forecast in told] == [1, more.rounds]
    assert told[1].state_bytes < told[0].state_bytes
    assert_same_moments(parts, whole)
    assert {
        keys["output"] is not None for name, keys in whole.layers.items() if "pooler" not in name
    } == {gradients}


def test_hidden_states_fit_into_the_memory_or_a_batch_is_all_there_is(
    readable: Readable, tmp_path: Path
) -> None:
    told: list[Forecast] = []
    room = [forecast(readable("llama"), tmp_path, told, memory) for memory in (10**9, 2 * 10**5, 1)]
    assert [item.rounds for item in told] == sorted(item.rounds for item in told)
    assert all(item.state_bytes <= memory for item, memory in zip(told[:-1], room, strict=False))


def forecast(model: Path, folder: Path, told: list[Forecast], memory: int) -> int:
    run(
        model,
        folder / "c.safetensors",
        force=True,
        samples=12,
        gradients=True,
        memory=memory,
        announce=told.append,
    )
    return memory


def test_gradients_are_left_out_where_they_do_not_fit_and_that_is_told(
    readable: Readable, tmp_path: Path
) -> None:
    told: list[Forecast] = []
    moments, done = run(
        readable("llama"), tmp_path / "c.safetensors", memory=1, announce=told.append
    )
    assert not told[0].gradients
    assert "do not fit" in told[0].reason
    assert not done.gradients
    assert not moments.provenance.gradients
    assert {moments.metric_name(name) for name in moments.layers} == {"inputs"}
    run(readable("llama"), tmp_path / "c.safetensors", force=True, announce=told.append)
    assert told[1].gradients
    assert not told[1].reason


def test_wide_outputs_keep_the_diagonal(
    readable: Readable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, _ = run(readable("llama"), tmp_path / "a.safetensors")
    monkeypatch.setattr(module, "FULL_OUTPUTS", 64)
    cut, _ = run(readable("llama"), tmp_path / "b.safetensors")
    for name in full.layers:
        wide = name.endswith(("gate_proj.weight", "up_proj.weight"))
        assert cut.metric_name(name) == ("diagonal" if wide else "full")
        one, other = cut.of(name), full.of(name)
        close(one.outputs, (other.outputs.diagonal() if wide else other.outputs).double())
        assert torch.equal(one.inputs, other.inputs)


def test_only_what_is_asked_for_is_measured(readable: Readable, tmp_path: Path) -> None:
    path = readable("llama")
    whole, _ = run(path, tmp_path / "a.safetensors")
    some, done = run(
        path, tmp_path / "b.safetensors", include=("*.1.mlp.*",), exclude=("*gate_proj",)
    )
    assert set(some.layers) == {
        f"model.layers.1.mlp.{name}.weight" for name in ("up_proj", "down_proj")
    }
    assert done.layers == 2
    for name in some.layers:
        for x, y in zip(values_of(some.of(name)), values_of(whole.of(name)), strict=True):
            close(x, y.double())


def values_of(moments: LayerMoments | None) -> list[Tensor]:
    assert moments is not None
    assert moments.outputs is not None
    return [moments.inputs, moments.mean, moments.outputs]


def test_a_calibration_knows_where_it_comes_from(readable: Readable, tmp_path: Path) -> None:
    moments, done = run(readable("llama"), tmp_path / "c.safetensors", seed=7)
    found = moments.provenance
    assert (found.text, found.text_sha256, found.seed) == (TEXT.name, TEXT.digest, 7)
    assert (found.tokens, found.samples, found.seq_len) == (SAMPLES * LENGTH, SAMPLES, LENGTH)
    assert done.to_json()["kind"] == "calibration"


# The Fisher identity ------------------------------------------------------------------------------


def predicted(moments: LayerMoments | None, d: Tensor) -> float:
    """Half of tr(H D G D^T)."""
    assert moments is not None
    assert moments.outputs is not None
    return 0.5 * float(torch.trace(moments.outputs.double() @ d @ moments.inputs.double() @ d.T))


def divergence(model: Any, batches: Sequence[dict[str, Tensor]], name: str, d: Tensor) -> float:
    """KL(model || model with `name` moved by d) in nats a prediction, in float64."""
    layer = model.get_submodule(name.removesuffix(".weight"))
    sums, count = 0.0, 0
    with torch.no_grad():
        before = [model(**batch).logits.log_softmax(-1) for batch in batches]
        layer.weight += d
        for batch, p in zip(batches, before, strict=True):
            q = model(**batch).logits.log_softmax(-1)
            sums += float((p.exp() * (p - q)).sum())
            count += p.flatten(0, -2).shape[0]
        layer.weight -= d
    return sums / count


def nudge(model: Any, name: str) -> Tensor:
    """A small change of one layer: a thousandth of the weight's size."""
    w = model.get_submodule(name.removesuffix(".weight")).weight
    d = torch.randn(w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return 1e-3 * d * w.detach().norm() / d.norm()


def louder(model: Path, folder: Path) -> Path:
    """Weights five times as large: predictions that are far from uniform."""
    return changed(
        model,
        folder,
        lambda tensors: tensors.update({n: 5 * t for n, t in tensors.items() if t.ndim == 2}),
    )


def test_the_predicted_loss_is_the_divergence_where_the_factors_are_exact(
    readable: Readable, tmp_path: Path
) -> None:
    """One word over and over: every token of the last block has the same input, and its change
    reaches no other token. What is left is the noise of 4096 labels drawn: (g v)^2 of a gradient
    has a relative spread of about 2, so 10 % is three times it."""
    path = louder(readable("llama"), tmp_path / "m")
    texts = Texts("one word", (" ".join(["w7"] * 4096),))
    moments, _ = run(path, tmp_path / "c.safetensors", texts, samples=260, seq_len=16)
    model = svdcli.load(path, dtype=torch.float64)
    ids = windows_of(load_tokenizer(path), texts, 16, 2).ids
    for layer in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.1.{layer}.weight"
        d = nudge(model, name)
        assert predicted(moments.of(name), d) == pytest.approx(
            divergence(model, [{"input_ids": ids}], name, d), rel=0.1
        ), name


def test_the_predicted_loss_is_the_divergence_of_a_classifier_s_pooler(
    readable: Readable, tmp_path: Path
) -> None:
    """One row for each prediction, and one sentence over and over. 1600 labels of three classes."""
    path = louder(readable("bert-classifier"), tmp_path / "m")
    texts = Texts("one line", ("\n".join(["w5 w9 w30 w2"] * 1600),))
    name = "bert.pooler.dense.weight"
    moments, _ = run(path, tmp_path / "c.safetensors", texts, samples=1600, include=(name,))
    model = svdcli.load(path, dtype=torch.float64)
    batch = dict(load_tokenizer(path)("w5 w9 w30 w2", return_tensors="pt"))
    d = nudge(model, name)
    assert predicted(moments.of(name), d) == pytest.approx(
        divergence(model, [batch], name, d), rel=0.15
    )


def test_the_predicted_loss_is_of_the_size_of_the_divergence(
    readable: Readable, tmp_path: Path
) -> None:
    """K-FAC takes the tokens of a window as independent of each other, and inputs as independent of
    gradients. The first is wrong where a change of one layer reaches the same prediction through
    many alike tokens: values above all."""
    path = louder(readable("llama"), tmp_path / "m")
    moments, _ = run(path, tmp_path / "c.safetensors", samples=16)
    model = svdcli.load(path, dtype=torch.float64)
    for name in moments.layers:
        d = nudge(model, name)
        ratio = predicted(moments.of(name), d) / divergence(model, token_batches(path, 16), name, d)
        assert (0.25 if "v_proj" in name else 0.6) < ratio < 1.4, name


@pytest.mark.parametrize("length", [3, 8])
def test_the_predicted_loss_of_an_encoder_is_low_by_its_rows_at_most(
    length: int, readable: Readable, tmp_path: Path
) -> None:
    """An embedding is a mean over rows whose changes add up where they are alike; K-FAC adds their
    squares, and by Cauchy and Schwarz that is low by a factor of `length` at most. Inputs and
    gradients that depend on each other are worth another 2."""
    path = louder(readable("bert"), tmp_path / "m")
    texts = Texts("lines", ("\n".join(" ".join(words(length, at)) for at in range(160)),))
    moments, _ = run(path, tmp_path / "c.safetensors", texts, samples=160)
    model = svdcli.load(path, dtype=torch.float64)
    batch = dict(load_tokenizer(path)(texts.documents[0].splitlines(), return_tensors="pt"))

    def embeddings() -> Tensor:
        with torch.no_grad():
            return nn.functional.normalize(model(**batch).last_hidden_state.mean(1), dim=-1)

    before = embeddings()
    assert (
        moments.metric_name("pooler.dense.weight") == "inputs"
    )  # sentence embeddings do not depend on it
    for name in moments.layers.keys() - {"pooler.dense.weight"}:
        layer, d = model.get_submodule(name.removesuffix(".weight")), nudge(model, name)
        layer.weight.data += d
        measured = float((1 - (before * embeddings()).sum(-1)).mean())
        layer.weight.data -= d
        assert 0.5 < measured / predicted(moments.of(name), d) < 2 * length, name


def test_sensitivity_goes_with_gradients_where_a_layer_stands_outside_the_blocks(
    readable: Readable, tmp_path: Path
) -> None:
    """An encoder's pooler reads what a block sends on, with the graph behind it."""
    moments, _ = run(readable("bert"), tmp_path / "c.safetensors", samples=4, sensitivity=True)
    assert moments.layers
    assert all((moments.loss_scale(name) or 0) >= 0 for name in moments.layers)


def test_sensitivity_is_the_loss_of_cutting_one_layer_alone(
    readable: Readable, tmp_path: Path
) -> None:
    path = louder(readable("llama"), tmp_path / "m")
    moments, _ = run(path, tmp_path / "c.safetensors", samples=4, sensitivity=True)
    model = svdcli.load(path, dtype=torch.float64)
    for name in moments.layers:
        known, w = (
            moments.of(name),
            model.get_submodule(name.removesuffix(".weight")).weight.detach(),
        )
        factors = weighted(w, min(w.shape) // 4, Metric(known.inputs.double(), known.outputs))
        loss = divergence(model, token_batches(path, 4), name, factors.up @ factors.down - w)
        share = factors.tail / (factors.tail + float(factors.sigma.square().sum()))
        assert moments.loss_scale(name) == pytest.approx(loss / share, rel=1e-2), name


# Errors -------------------------------------------------------------------------------------------

SPOILED = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.mlp.up_proj.weight",
)
BEHIND = ("model.norm.weight", "model.layers.1.mlp.down_proj.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("spoiled", "gradients"),
    [(name, False) for name in SPOILED] + [(name, True) for name in SPOILED + BEHIND],
)
def test_nan_is_an_error_that_names_the_weight_that_holds_it(
    spoiled: str, gradients: bool, readable: Readable, tmp_path: Path
) -> None:
    path = changed(
        readable("llama"),
        tmp_path / "m",
        lambda tensors: tensors[spoiled].view(-1)[-200:].fill_(float("nan")),
    )
    everything = tree(tmp_path)
    with pytest.raises(BadCheckpointError, match=f"m: {spoiled} holds NaN"):
        run(path, tmp_path / "c.safetensors", gradients=gradients)
    assert tree(tmp_path) == everything


def test_numbers_that_overflow_name_the_first_layer_that_meets_them(
    readable: Readable, tmp_path: Path
) -> None:
    path = changed(
        readable("llama"),
        tmp_path / "m",
        lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].fill_(3e38),
    )
    says = (
        "m: .*0.mlp.down_proj.weight meets NaN.*the largest number, 3e\\+38, is in .*0.mlp.up_proj"
    )
    with pytest.raises(NotFiniteError, match=says):
        run(path, tmp_path / "c.safetensors")


def test_what_does_not_read_text_is_refused(readable: Readable, tmp_path: Path) -> None:
    for family in ("vit", "whisper"):
        with pytest.raises(SvdcliError, match="does not read text"):
            run(readable(family), tmp_path / "c.safetensors")
    with pytest.raises(SvdcliError, match="no tokenizer"):
        run(zoo.save("llama", tmp_path / "m"), tmp_path / "c.safetensors")
    with pytest.raises(SvdcliError, match="only 1 tokens"):
        run(readable("llama"), tmp_path / "c.safetensors", Texts("short", ("w3",)))
    with pytest.raises(SvdcliError, match="three words"):
        run(readable("bert"), tmp_path / "c.safetensors", Texts("short", ("w3 w4",)))
    with pytest.raises(UsageError, match="matches no tensor"):
        run(readable("llama"), tmp_path / "c.safetensors", include=("*nothing*",))
    save_file({"a.weight": torch.ones(40, 40)}, tmp_path / "plain.safetensors")
    with pytest.raises(SvdcliError, match=r"no config\.json .*; give the directory of a Hugging"):
        run(tmp_path / "plain.safetensors", tmp_path / "c.safetensors")
    with pytest.raises(SvdcliError, match=r"give the folder that it lies in, .*m$"):
        run(tmp_path / "m" / "model.safetensors", tmp_path / "c.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"m", "plain.safetensors"}


@pytest.mark.parametrize("before", [None, b"what was there"])
@pytest.mark.parametrize("stop_at", [0, 5])
def test_the_file_appears_whole_or_not_at_all(
    before: bytes | None, stop_at: int, readable: Readable, tmp_path: Path
) -> None:
    out, calls = tmp_path / "c.safetensors", []

    def progress(*_: Any) -> None:
        calls.append(out.read_bytes() if out.exists() else None)
        if len(calls) > stop_at:
            raise KeyboardInterrupt

    if before is not None:
        out.write_bytes(before)
    everything = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(readable("llama"), out, force=True, progress=progress)
    assert set(calls) == {before}
    assert tree(tmp_path) == everything
    run(readable("llama"), out, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_full_disk_is_told_by_the_name_of_the_file(
    readable: Readable, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "hidden")

    monkeypatch.setattr(Spool, "put", full)
    told = r"^cannot write c\.safetensors: No space left on device; free space"
    for part in (None, (1, 2)):
        with pytest.raises(SvdcliError, match=told):
            run(readable("llama"), Path("c.safetensors"), part=part)
    assert not list(folder.iterdir())


def test_progress_rises_to_the_end(readable: Readable, tmp_path: Path) -> None:
    told: list[tuple[str, float, float]] = []
    run(
        readable("llama"),
        tmp_path / "c.safetensors",
        gradients=True,
        memory=1,
        progress=lambda stage, item, done, total: told.append((stage, done, total)),
    )
    done = [value for _, value, _ in told]
    assert {stage for stage, _, _ in told} == {"calibrate"}
    assert done == sorted(done)
    assert done[-1] <= told[-1][2] == 3
    assert done[-1] > 2.5


# While compressing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("metric", "precision"), [("auto", "bfloat16"), ("inputs", "float32")])
def test_compress_reads_as_calibrate_does(
    metric: str, precision: Precision, readable: Readable, tmp_path: Path
) -> None:
    path, recipe = readable("llama"), Recipe("keep", 0.5, metric=metric, allocate="global")
    moments = tmp_path / "c.safetensors"
    run(path, moments, gradients=metric == "auto", precision=precision)
    assert open_moments(moments).provenance.precision == precision
    svdcli.compress(path, tmp_path / "a", recipe, calibration=moments)
    reading = Reading(TEXT, samples=SAMPLES, seq_len=LENGTH, precision=precision)
    svdcli.compress(path, tmp_path / "b", recipe, reading=reading)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b", "c.safetensors"}


@pytest.mark.parametrize("stage", ["calibrate", "measure", "write"])
def test_a_run_that_is_interrupted_continues_to_the_same_bytes(
    stage: str, readable: Readable, tmp_path: Path
) -> None:
    path, recipe = readable("llama"), Recipe("keep", 0.5)
    reading = Reading(TEXT, samples=SAMPLES, seq_len=LENGTH)
    svdcli.compress(path, tmp_path / "a", recipe, reading=reading)
    seen: list[str] = []

    def progress(now: str, *_: Any) -> None:
        seen.append(now)
        if seen.count(stage) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdcli.compress(path, tmp_path / "b", recipe, reading=reading, progress=progress)
    assert not (tmp_path / "b").exists()
    again: list[str] = []
    svdcli.compress(
        path, tmp_path / "b", recipe, reading=reading, progress=lambda now, *_: again.append(now)
    )
    assert ("calibrate" in again) == (stage == "calibrate")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}


def test_a_refusal_keeps_the_calibration_for_the_next_try(
    readable: Readable, tmp_path: Path
) -> None:
    path, reading = readable("llama"), Reading(TEXT, samples=SAMPLES, seq_len=LENGTH)
    svdcli.compress(path, tmp_path / "a", Recipe("keep", 0.5), reading=reading)
    with pytest.raises(
        UsageError,
        match=r"is not reachable.*; the calibration waits in .*/b\.partial for the next try",
    ):
        svdcli.compress(path, tmp_path / "b", Recipe("keep", 0.0001), reading=reading)
    again: list[str] = []
    done = svdcli.compress(
        path,
        tmp_path / "b",
        Recipe("keep", 0.5),
        reading=reading,
        progress=lambda now, *_: again.append(now),
    )
    assert "calibrate" not in again
    assert not done.started_over
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    "first",
    [{"seq_len": 8}, {"samples": 6}, {"metric": "inputs"}, {"text": " ".join(words(400, 9))}],
)
def test_what_an_interrupted_run_read_otherwise_is_not_used(
    first: dict[str, Any], readable: Readable, tmp_path: Path
) -> None:
    how = {"seq_len": LENGTH, "samples": SAMPLES, "metric": "full", "text": TEXT.documents[0]}

    def compress(
        out: str, seq_len: int, samples: int, metric: str, text: str, **options: Any
    ) -> None:
        reading = Reading(Texts("words", (text,)), samples=samples, seq_len=seq_len)
        svdcli.compress(
            readable("llama"),
            tmp_path / out,
            Recipe("keep", 0.5, metric=metric),
            reading=reading,
            **options,
        )

    def stop(now: str, *_: Any) -> None:
        if now == "write":
            raise KeyboardInterrupt

    compress("a", **how)
    with pytest.raises(KeyboardInterrupt):
        compress("b", **(how | first), progress=stop)
    compress("b", **how)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert {file.name for file in tmp_path.iterdir()} == {"a", "b"}


def test_layers_that_the_model_ignores_stay_dense(readable: Readable, tmp_path: Path) -> None:
    """As a layer beyond the last one: it is in the files, and nothing runs it."""
    extra = {"model.layers.7.mlp.up_proj.weight": torch.linspace(-1, 1, 160 * 64).reshape(160, 64)}
    model = changed(readable("llama"), tmp_path / "m", lambda tensors: tensors.update(extra))
    run(model, tmp_path / "s.safetensors")
    recipe = Recipe("keep", 0.7, include=("*", "model.layers.7.mlp.up_proj"))
    plan = svdcli.compress(
        model, tmp_path / "o", recipe, calibration=tmp_path / "s.safetensors"
    ).plan
    left = {layer.tensor.name: layer.reason for layer in plan.layers if layer.rank is None}
    assert "was not calibrated" in left["model.layers.7.mlp.up_proj.weight"]


def test_nothing_is_overwritten_unasked(readable: Readable, tmp_path: Path) -> None:
    model, there = readable("llama"), tmp_path / "there.safetensors"
    there.write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    for out, says in (
        (there, "there.safetensors exists; use --force"),
        (tmp_path / "folder.safetensors", "is a directory"),
        (tmp_path / "no" / "c.safetensors", "does not exist; create it first"),
        (tmp_path / "c.bin", "does not end in .safetensors"),
        (model / "c.safetensors", "is the source, or inside or around it"),
    ):
        with pytest.raises(SvdcliError, match=says):
            run(model, out)
    assert there.read_text() == "mine"
    _, done = run(model, there, force=True)
    assert done.bytes == there.stat().st_size


def test_an_output_is_refused_since_no_command_takes_its_moments(
    readable: Callable[..., Path], tmp_path: Path
) -> None:
    svdcli.compress(readable("llama"), tmp_path / "o", keep=0.5)
    with pytest.raises(SvdcliError, match="compressed already"):
        svdcli.calibrate(tmp_path / "o", tmp_path / "m.safetensors", svdcli.Texts("t", ("w2 w3",)))
    assert not (tmp_path / "m.safetensors").exists()


def test_a_text_may_be_a_path(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("w2 w3")
    assert svdcli.read_texts(tmp_path / "t.txt").name == str(tmp_path / "t.txt")
