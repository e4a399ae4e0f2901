"""What compression costs in quality: svdcli's methods and other people's at equal stored
parameters, one table a model.

    python tests/benchmarks/quality.py  the sample model; an hour of it is healing
    python tests/benchmarks/quality.py --quick  few windows, nothing healed
    python tests/benchmarks/quality.py --data FOLDER
        also two models trained on stories, if they are there
    python tests/benchmarks/quality.py --rows svd-llm fisher  some methods
    python tests/benchmarks/quality.py --folder WORK
        keep everything; the same command continues after a break
    python tests/benchmarks/quality.py --json FILE --plot FILE
        for README and svdcli/docs: tests/benchmarks/quality.json and tests/readme/quality.svg

Every method reads the calibration text and is judged on text that it never saw, by the excess of
its loss over the original's, paired by window. The others (methods.py) are stored as two factors,
svdcli's own pivoted; each keeps at most the same share of the parameters of the same layers, in the
model's own dtype. The sample model reads Python's standard library: its training half, then its
held-out half. FOLDER holds stories260K/, babyllama105/ and text/tinystories.txt, the first half of
which calibrates; these are not healed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import building_in, python, say, table, verdict
from methods import METHODS, Inputs, even_rank, inputs_of, with_factors

import svdcli
from svdcli.calibration.text_side import longest_of
from svdcli.files.dtypes import TORCH_DTYPES
from svdcli.models.load import load_quietly
from svdcli.text.texts import Texts, read_texts
from svdcli.text.tokens import Windows, load_tokenizer, window_length, windows_of
from svdcli.verbs.calibrate import calibrate
from svdcli.verbs.evaluate import compare

HERE = Path(__file__).resolve().parent
SAMPLE = HERE.parents[1] / "sample_models" / "tiny-llama"
SMALL = ("stories260K", "babyllama105")
KEEPS = (0.8, 0.6, 0.4)
ROWS = {
    "plain": "plain SVD",
    "asvd": "ASVD",
    "svd-llm": "SVD-LLM(W)",
    "pivoted": "svdcli, pivoted",
    "sensitivity": "svdcli, ranks by measured sensitivity",
    "fisher": "svdcli, Fisher metric and ranks by it",
    "shared": "svdcli, the same with bases shared by choice",
    "soft": "svdcli, Fisher, healed, --hard-labels 0",
    "heal": "svdcli, Fisher, healed",
}
MEASURES = {"excess": "excess loss", "kl": "KL divergence"}
OURS, HEALED, RIVAL = "fisher", "heal", "svd-llm"
BOUNDS = {0.8: 0.2, 0.6: 0.35, 0.4: 0.5}  # excess loss of ours over the rival's
HEALS: dict[str, tuple[Any, ...]] = {"soft": ("--hard-labels", 0), "heal": ()}
HEAL_BOUND = 0.6  # healed over not healed
ALL_OF_IT = 10**6  # windows

Results = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One of svdcli's own rows: which calibration it takes, and what its recipe has besides keep
    and the pivoted layout."""

    calibration: str
    recipe: Mapping[str, Any]


STEPS = {
    "pivoted": Step("gradients", {"metric": "inputs"}),
    "sensitivity": Step("sensitivity", {"metric": "inputs", "allocate": "global"}),
    "fisher": Step("gradients", {"allocate": "global", "floor": 0.0, "share": "never"}),
    "shared": Step("gradients", {"allocate": "global", "floor": 0.0}),
}
CALIBRATIONS = {
    "gradients": {"gradients": True},
    "sensitivity": {"gradients": False, "sensitivity": True},
}


@dataclass(frozen=True)
class Settings:
    """How much text is read and how long is healed. samples None leaves the number of windows to
    the model."""

    samples: int | None
    seq_len: int
    eval_samples: int
    minutes: float


@dataclass(frozen=True)
class Subject:
    """A model, the text that it is calibrated with and the text that it is judged on."""

    path: Path
    calibration: Texts
    held_out: Texts
    samples: int
    minutes: float

    @property
    def name(self) -> str:
        return self.path.name


def subjects(data: Path | None, names: Sequence[str], settings: Settings) -> Iterator[Subject]:
    if SAMPLE.name in names:
        texts = [read_texts(None, stdlib=True, held_out=held_out) for held_out in (False, True)]
        yield Subject(SAMPLE, *texts, settings.samples or 256, settings.minutes)
    for name in SMALL:
        if data is not None and name in names:
            texts = halves(data / "text" / "tinystories.txt")
            yield Subject(data / name, *texts, settings.samples or ALL_OF_IT, minutes=0.0)


def halves(file: Path) -> list[Texts]:
    """The two halves of a text, parted between paragraphs."""
    text = file.read_text(encoding="utf-8")
    middle = text.index("\n\n", len(text) // 2) + 2
    return [
        Texts(f"{file.name}, {half} half", (part,))
        for half, part in (("first", text[:middle]), ("second", text[middle:]))
    ]


# One model ----------------------------------------------------------------------------------------


class Work:
    """Everything that is made from one model. What lies in the folder already is not made again."""

    def __init__(self, subject: Subject, folder: Path, settings: Settings) -> None:
        self.subject, self.folder, self.settings = subject, folder / subject.name, settings
        self.folder.mkdir(exist_ok=True)

    @cached_property
    def model(self) -> Any:
        return load_quietly(self.subject.path, torch.device("cpu"))

    @cached_property
    def windows(self) -> Windows:
        """What everything is judged on."""
        return self._windows(self.subject.held_out, self.settings.eval_samples)

    def _windows(self, texts: Texts, count: int) -> Windows:
        length = window_length(longest_of(self.model), self.settings.seq_len)
        return windows_of(load_tokenizer(self.subject.path), texts, length, count)

    @cached_property
    def layers(self) -> dict[str, Any]:
        """The layers that svdcli selects, by the names of their modules."""
        return {
            row.name.removesuffix(".weight"): row
            for row in svdcli.inspect(self.subject.path).selected
        }

    @cached_property
    def inputs(self) -> dict[str, Inputs]:
        """What the other methods learn of the same calibration text."""
        say(f"{self.subject.name}: inputs of {len(self.layers)} layers, for the other methods")
        ids = self._windows(self.subject.calibration, self.subject.samples).ids
        return inputs_of(self.model, list(self.layers), ids.split(max(1, 2048 // ids.shape[1])))

    def measure(self, rows: Sequence[str]) -> Results:
        """Every row at every keep, and what they are compared with; without minutes nothing is
        healed."""
        points = [
            self.point(row, keep)
            for row in rows
            if row not in HEALS or self.subject.minutes
            for keep in KEEPS
        ]
        return {
            "selected_parameters": sum(row.parameters for row in self.layers.values()),
            "calibrated_on": self.subject.calibration.name,
            "judged_on": self.subject.held_out.name,
            "judged_tokens": self.windows.ids.shape[0] * (self.windows.ids.shape[1] - 1),
            "dense": points[0]["dense"],
            "calibrations": {kind: self._kept(kind) for kind in CALIBRATIONS if self._kept(kind)},
            "points": [
                {key: value for key, value in point.items() if key != "dense"} for point in points
            ],
        }

    def point(self, row: str, keep: float) -> Results:
        """One method at one keep: how it did, its size, and the seconds that it took after
        calibration."""
        known = self._kept(f"{row}-{keep:g}")
        if known:
            return known
        self.prepare(row)
        begin = time.perf_counter()
        model, about = self.theirs(row, keep) if row in METHODS else self.ours(row, keep)
        if about["parameters"] > keep:
            raise SystemExit(
                f"{row} keeps {about['parameters']} of the parameters where {keep} were allowed"
            )
        seconds = time.perf_counter() - begin
        scores, dense, drift = compare(model, self.model, self.windows)
        assert dense is not None
        assert drift is not None
        say(
            f"{self.subject.name}: {ROWS[row]}, keep {keep:g}: excess loss "
            f"{plus_minus(asdict(drift.excess_loss))}"
        )
        measured = {
            "perplexity": scores.perplexity,
            "excess": drift.excess_loss,
            "kl": drift.kl,
            "top1": drift.top1,
        }
        means = {name: asdict(mean) for name, mean in measured.items()}
        original = {"loss": asdict(dense.loss), "perplexity": asdict(dense.perplexity)}
        return self._keep(
            f"{row}-{keep:g}",
            {"row": row, "keep": keep} | means | about | {"seconds": seconds, "dense": original},
        )

    def prepare(self, row: str) -> None:
        """What a row's points share, so that none of them has to answer for the time."""
        if row in METHODS:
            assert self.inputs
        elif row not in HEALS:
            self.calibration(STEPS[row].calibration)

    def theirs(self, row: str, keep: float) -> tuple[Any, Results]:
        """Another method's model, in memory, and its share of parameters and bytes, which is the
        same: two factors a layer."""
        factors, kept = {}, 0
        for name, layer in self.layers.items():
            rank = even_rank(layer.shape, keep)
            weight = self.model.get_submodule(name).weight.detach()
            factors[name] = METHODS[row](weight, rank, self.inputs[name])
            kept += rank * sum(layer.shape)
        share = kept / sum(layer.parameters for layer in self.layers.values())
        dtypes = {TORCH_DTYPES[layer.dtype] for layer in self.layers.values()}
        return with_factors(self.model, factors, dtypes.pop()), {
            "parameters": share,
            "bytes": share,
        }

    def ours(self, row: str, keep: float) -> tuple[Any, Results]:
        """svdcli's model, opened from what it wrote, and what its report says."""
        about: Results = {}
        if row in HEALS:
            out, about["cores_busy_with_others"] = self.healed(row, keep)
        else:
            out = self.compressed(row, keep)
            plan = svdcli.Plan.from_json(json.loads((out / "svdcli.json").read_text()))
            about["predicted"] = (
                math.fsum(layer.loss or 0.0 for layer in plan.layers) if row == OURS else None
            )
        # Healing changes numbers, not sizes.
        total = svdcli.report(self.compressed(OURS, keep) if row in HEALS else out).selected
        about |= {"parameters": total.keep, "bytes": total.bytes_after / total.bytes_before}
        return load_quietly(out, torch.device("cpu")), about

    def compressed(self, row: str, keep: float) -> Path:
        out, step = self.folder / f"{row}-{keep:g}", STEPS[row]
        if not out.exists():
            calibration = self.calibration(step.calibration)
            recipe = svdcli.Recipe("keep", keep, layout="pivoted", **step.recipe)
            svdcli.compress(self.subject.path, out, recipe, calibration=calibration)
        return out

    def calibration(self, kind: str) -> Path:
        file = self.folder / f"{kind}.safetensors"
        if not file.exists():
            say(f"{self.subject.name}: svdcli calibrate with {kind}")
            begin = time.perf_counter()
            how = CALIBRATIONS[kind] | {
                "samples": self.subject.samples,
                "seq_len": self.settings.seq_len,
                "precision": "float32",
            }
            done = calibrate(self.subject.path, file, self.subject.calibration, **how)
            self._keep(kind, {"tokens": done.tokens, "seconds": time.perf_counter() - begin})
        return file

    def healed(self, row: str, keep: float) -> tuple[Path, float]:
        """`svdcli heal` of our own output, by the command; and how many cores others kept busy
        meanwhile."""
        out, text = self.folder / f"{row}-{keep:g}", self.folder / "calibration.txt"
        text.write_text("\n".join(self.subject.calibration.documents), encoding="utf-8")
        source = self.compressed(OURS, keep)
        if out.exists():
            return out, 0.0
        say(
            f"{self.subject.name}: {ROWS[row]}, keep {keep:g}, at most "
            f"{self.subject.minutes:g} minutes"
        )
        where = ("--teacher", self.subject.path, "--text", text, "-o", out)
        done = python(
            "-m", "svdcli", "heal", source, *where, *HEALS[row], "--minutes", self.subject.minutes
        )
        return out, done.others

    def _kept(self, name: str) -> Results:
        """What an earlier run noted under that name; empty where it noted nothing."""
        file = self.folder / f"{name}.json"
        found: Results = json.loads(file.read_text()) if file.exists() else {}
        return found

    def _keep(self, name: str, values: Results) -> Results:
        write_json(self.folder / f"{name}.json", values)
        return self._kept(name)


def write_json(path: Path, values: Results) -> None:
    """Whole or not at all, floats with six digits."""
    partly = path.with_name(f"{path.name}.partial")
    partly.write_text(json.dumps(rounded(values), indent=2) + "\n")
    partly.replace(path)


def rounded(values: Any) -> Any:
    if isinstance(values, float):
        return float(f"{values:.6g}")
    if isinstance(values, Mapping):
        return {str(key): rounded(value) for key, value in values.items()}
    return [rounded(value) for value in values] if isinstance(values, list | tuple) else values


# What the points say ------------------------------------------------------------------------------


def points_of(model: Results, row: str) -> dict[float, Results]:
    """The points of one row by keep."""
    return {point["keep"]: point for point in model["points"] if point["row"] == row}


def relations(models: Mapping[str, Results]) -> Results:
    """measured = a predicted^b of our own row, by least squares of the logarithms: for each model,
    and for all together.

    Measured as excess loss, which is what people ask for, and as KL divergence, which is what the
    metric is the second order of: on text that the model was not trained on, the excess loss has a
    first-order part that no quadratic form knows.
    """
    found: Results = {}
    for measure in MEASURES:
        pairs = {
            name: [(p["predicted"], p[measure]["value"]) for p in points_of(model, OURS).values()]
            for name, model in models.items()
        }
        pairs = {name: [pair for pair in some if min(pair) > 0] for name, some in pairs.items()}
        pairs["all"] = [pair for some in pairs.values() for pair in some]
        found[measure] = {name: fitted(some) for name, some in pairs.items() if len(set(some)) > 1}
    return found


def fitted(pairs: Sequence[tuple[float, float]]) -> Results:
    """a and b, and by which factor the worst point is off."""
    x, y = ([math.log(value) for value in side] for side in zip(*pairs, strict=True))
    b, log_a = statistics.linear_regression(x, y)
    off = max(
        abs(log_a + b * predicted - measured) for predicted, measured in zip(x, y, strict=True)
    )
    return {"a": math.exp(log_a), "b": b, "off_by_at_most": math.exp(off), "points": len(x)}


def verdicts(models: Mapping[str, Results]) -> list[Results]:
    """What is required on the sample model, and whether it holds."""
    if SAMPLE.name not in models:
        return []
    rival, ours, healed = (points_of(models[SAMPLE.name], row) for row in (RIVAL, OURS, HEALED))
    wanted = [
        (ROWS[OURS], ours, ROWS[RIVAL], rival, BOUNDS),
        (ROWS[HEALED], healed, "not healed", ours, dict.fromkeys(KEEPS, HEAL_BOUND)),
    ]
    found = []
    for what, upper, against, lower, bounds in wanted:
        for keep in KEEPS:
            if keep in upper and keep in lower:
                ratio = upper[keep]["excess"]["value"] / lower[keep]["excess"]["value"]
                line = {
                    "what": f"{what} / {against}",
                    "keep": keep,
                    "ratio": ratio,
                    "bound": bounds[keep],
                }
                found.append(line | {"holds": ratio <= bounds[keep]})
    return found


# Tables and the plot ------------------------------------------------------------------------------


def markdown(results: Results) -> str:
    """The tables of svdcli/docs/benchmarks.md from what --json wrote: one for each model."""
    return "\n\n".join(_model_table(name, model) for name, model in results["models"].items())


def _model_table(name: str, model: Results) -> str:
    head = [
        "",
        *(f"{what}, keep {keep:g}" for keep in KEEPS for what in ("perplexity", "excess loss")),
    ]
    lines = [head]
    for row, label in ROWS.items():
        points = points_of(model, row)
        if points:
            lines.append([label, *(cell for keep in KEEPS for cell in _cells(points.get(keep)))])
    about = f"{model['selected_parameters'] / 1e6:.3g}M parameters in the selected layers"
    return (
        f"`{name}`: {about}, perplexity "
        f"{_perplexity(model['dense']['perplexity']['value'])}\n\n{table(lines)}"
    )


def in_short(model: Results, rows: Mapping[str, str]) -> str:
    """The perplexities of some rows, under names of their own."""
    before = _perplexity(model["dense"]["perplexity"]["value"])
    lines = [[f"perplexity ({before} before)", *(f"keep {keep:g}" for keep in KEEPS)]]
    for row, label in rows.items():
        points = points_of(model, row)
        values = [_perplexity(points[keep]["perplexity"]["value"]) for keep in KEEPS]
        lines.append([label, *values])
    return table(lines)


def _cells(point: Results | None) -> tuple[str, str]:
    if point is None:
        return "", ""
    return _perplexity(point["perplexity"]["value"]), plus_minus(point["excess"])


def _perplexity(value: float) -> str:
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def plus_minus(mean: Mapping[str, float]) -> str:
    """A mean with its standard error, both as far as the first digit of the error."""
    digits = 4 if mean["error"] <= 0 else min(5, max(2, -math.floor(math.log10(mean["error"]))))
    return f"{mean['value']:.{digits}f} ± {mean['error']:.{digits}f}"


def predictions(results: Results) -> str:
    """Predicted and measured losses of our own row, and the relation between them."""
    ratios = [f"{what} / predicted" for what in MEASURES.values()]
    lines = [["model", "keep", "predicted", *MEASURES.values(), *ratios]]
    for name, model in results["models"].items():
        for keep, point in points_of(model, OURS).items():
            predicted, found = point["predicted"], [point[measure] for measure in MEASURES]
            shares = [f"{one['value'] / predicted:.2f}" if predicted else "" for one in found]
            lines.append([name, f"{keep:g}", f"{predicted:.5f}", *map(plus_minus, found), *shares])
    fits = [["measured = a predicted^b", "model", "a", "b", "worst point off by"]]
    for measure, what in MEASURES.items():
        for name, fit in results["relations"][measure].items():
            fits.append(
                [what, name, f"{fit['a']:.2f}", f"{fit['b']:.2f}", f"{fit['off_by_at_most']:.2f} ×"]
            )
    return f"{table(lines)}\n\n{table(fits)}"


def requirements(results: Results) -> str:
    lines = [["excess loss on the sample model", "keep", "ratio", "bound", "holds"]]
    for line in results["required"]:
        lines.append(
            [
                line["what"],
                f"{line['keep']:g}",
                f"{line['ratio']:.3f}",
                f"≤ {line['bound']:g}",
                verdict(line["holds"]),
            ]
        )
    return table(lines)


def plot(results: Results, file: Path) -> None:
    """Excess loss against the bytes that the selected layers take, row numbers of the pivoted
    layout included."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "svdcli", "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    models = results["models"]
    figure, panels = pyplot.subplots(
        1, len(models), figsize=(1 + 4 * len(models), 4), squeeze=False, layout="constrained"
    )
    for panel, (name, model) in zip(panels[0], models.items(), strict=True):
        for number, (row, label) in enumerate(ROWS.items()):
            points = list(points_of(model, row).values())
            if points:
                x, y, error = zip(
                    *((100 * p["bytes"], *p["excess"].values()) for p in points), strict=True
                )
                style = (
                    {"linestyle": "--", "marker": "s"}
                    if row in METHODS
                    else {"linestyle": "-", "marker": "o"}
                )
                panel.errorbar(
                    x, y, error, label=label, color=f"C{number}", markersize=4, capsize=2, **style
                )
        panel.set(
            title=name,
            yscale="log",
            xlabel="bytes of the selected layers, % of the original",
            ylabel="excess loss, nats a token",
        )
        panel.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2 if len(models) == 1 else 4,
        frameon=False,
    )
    figure.savefig(file, metadata={"Date": None})


# The command --------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="the sample model with few windows, nothing healed"
    )
    parser.add_argument(
        "--data", type=Path, help="folder with the two models trained on stories, and their text"
    )
    parser.add_argument(
        "--model",
        choices=(SAMPLE.name, *SMALL),
        action="append",
        help="only this model; repeatable",
    )
    parser.add_argument("--rows", choices=ROWS, nargs="+", help="only these methods")
    parser.add_argument(
        "--samples",
        type=int,
        help="windows to calibrate with (256; the small models read all there is)",
    )
    parser.add_argument(
        "--seq-len", type=int, default=512, help="tokens in a window (512, or what the model takes)"
    )
    parser.add_argument(
        "--eval-samples", type=int, default=128, help="windows of held-out text (128)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        help="healing of each output of the sample model (10)",
    )
    parser.add_argument(
        "--folder", type=Path, help="work here, leave everything and use what is there"
    )
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    parser.add_argument("--plot", type=Path, help="draw loss against size into this .svg file")
    options = parser.parse_args(argv)
    if options.quick:
        options.samples, options.seq_len, options.eval_samples, options.data = 32, 256, 16, None
    options.rows = [
        row
        for row in ROWS
        if row in (options.rows or ROWS) and not (options.quick and row in HEALS)
    ]
    options.model = options.model or (SAMPLE.name, *(SMALL if options.data else ()))
    if options.data is None and not {*options.model} <= {SAMPLE.name}:
        parser.error("--data says where the other models are")
    return options


def measure(options: argparse.Namespace) -> Results:
    settings = Settings(options.samples, options.seq_len, options.eval_samples, options.minutes)
    with building_in(options.folder) as folder:
        check_settings(folder, settings)
        models = {
            s.name: Work(s, folder, settings).measure(options.rows)
            for s in subjects(options.data, options.model, settings)
        }
    machine = {"cores": os.cpu_count()} | {
        name: version(name) for name in ("torch", "transformers", "svdcli")
    }
    derived = {"relations": relations(models), "required": verdicts(models)}
    return rounded({"machine": machine, "settings": asdict(settings), "models": models} | derived)


def check_settings(folder: Path, settings: Settings) -> None:
    """A folder holds what one choice of settings gave."""
    file, wanted = folder / "settings.json", rounded(asdict(settings))
    if file.exists() and json.loads(file.read_text()) != wanted:
        raise SystemExit(
            f"{folder} was made with {json.loads(file.read_text())}; name another --folder"
        )
    write_json(file, wanted)


def main() -> None:
    options = parse()
    begin = time.perf_counter()
    results = measure(options)
    about = results["machine"]
    minutes = (time.perf_counter() - begin) / 60
    print(
        f"{about['cores']} cores, torch {about['torch']}, transformers {about['transformers']}; "
        f"{minutes:.0f} minutes\n"
    )
    print(markdown(results))
    if OURS in options.rows:
        print(f"\n{predictions(results)}")
    if results["required"]:
        print(f"\n{requirements(results)}")
    if options.json is not None:
        write_json(options.json, results)
    if options.plot is not None:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
