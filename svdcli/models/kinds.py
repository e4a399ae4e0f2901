"""Which layers of a checkpoint are plain linear modules of its class, found without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from svdcli.errors import SvdcliError
from svdcli.files.checkpoint import Checkpoint
from svdcli.files.compressed_tensors import METHOD
from svdcli.models.load import empty_model
from svdcli.models.modules import is_linear

_OWN_LAYOUTS = "leave out --layout dense: svdcli's own plugin opens factors and packed weights"
_EXPERTS = "experts"  # transformers unpacks and stacks the weights of these


@dataclass(frozen=True)
class Kinds:
    """misfits maps a tensor to why no loader takes its weight for packed. linear maps every linear
    module of the class to the layer in the files that it is, "" for one without. unknown is why the
    class could not be built. stacked are experts that transformers puts into one parameter, which
    it does with packed weights of one kind alone."""

    misfits: dict[str, str] = field(default_factory=dict)
    linear: dict[str, str] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()
    unknown: str = ""


def kinds_of(checkpoint: Checkpoint, names: Iterable[str], packed: Iterable[str]) -> Kinds:
    """The kinds of these tensors in the class that transformers opens the checkpoint with; packed
    are those that are to be packed. Raises SvdcliError for a class that does not open then."""
    try:
        model = empty_model(checkpoint)
    except SvdcliError as error:
        return Kinds(unknown=str(error))
    except Exception as error:  # a class may do anything, and this is no reason to stop
        return Kinds(unknown=f"{type(error).__name__}: {error}".splitlines()[0])
    from svdcli.models.hf import Naming

    named = Naming(model)
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    misfits: dict[str, str] = {}
    stored: dict[str, str] = {}
    stacked: list[str] = []
    for name in names:
        key, pattern = named(name)
        stored[key.removesuffix(".weight")] = name.removesuffix(".weight")
        misfit = _misfit(model, key, pattern, tied)
        if misfit:
            misfits[name] = misfit
        elif pattern is not None:
            stacked.append(name)
    linear = {
        path: stored.get(path, "")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    weights = {name.removesuffix(".weight") for name in set(packed) - misfits.keys()}
    _check_opens(model, [path for path, layer in linear.items() if layer in weights])
    return Kinds(misfits, linear, tuple(stacked))


def tied_copies(checkpoint: Checkpoint, equal: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """{tensor: the equal one that the checkpoint's class ties it to, which it is made from when
    that alone is in the files}, of tensors that are equal to others."""
    try:
        model = empty_model(checkpoint)
    except Exception:  # a class may do anything, and then both are stored
        return {}
    from svdcli.models.hf import Naming

    named = Naming(model)
    copies: dict[str, str] = {}
    for first, others in equal.items():
        homes = {name: named(name) for name in (first, *others)}
        by_key = {home.key: name for name, home in homes.items() if home.pattern is None}
        for key, name in by_key.items():
            source = by_key.get(model.all_tied_weights_keys.get(key, ""))
            if source is not None:
                copies[name] = source
    return copies


def take_apart_stacks(checkpoint: Checkpoint) -> None:
    """Have the experts of every stack stand as layers that a loader of the checkpoint can hold one
    by one. Stacks of classes that compute in other ways stay, and a note says why."""
    stacks = checkpoint.whole_stacks()
    if not stacks:
        return
    if not checkpoint.transformers_opens_it:
        checkpoint.take_apart(stacks)
        return
    held: set[str] = set()
    why = "its class computes with the whole stack"
    try:
        held = _held_apart(empty_model(checkpoint), checkpoint, stacks)
    except Exception as error:  # a class may do anything, and this is no reason to stop
        why = f"its class is not known: {type(error).__name__}: {error}".splitlines()[0]
    checkpoint.take_apart(held)
    left = [name for name in stacks if name not in held]
    if left:
        checkpoint.notes.append(f"{left[0]} stays one stack ({len(left)} such): {why}")


def _held_apart(model: Any, checkpoint: Checkpoint, stacks: Sequence[str]) -> set[str]:
    """Which of these stacks the model can hold as separate experts."""
    from svdcli.models.hf import Naming, separate_experts

    homes = {name: Naming(model)(name) for name in stacks}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    apart = set(separate_experts(model, checkpoint.tensors))
    held: set[str] = set()
    for name, (key, pattern) in homes.items():
        as_it_is = pattern is None and shapes.get(key) == checkpoint.tensors[name].info.shape
        if as_it_is and key.rpartition(".")[0] in apart:
            held.add(name)
    return held


def _check_opens(model: Any, packed: Sequence[str]) -> None:
    """Raises SvdcliError where transformers cannot open the class with these modules packed. It
    puts others in the place of some, which lack their weights, and has each class initialise its
    modules, and some look at weights that are not there then."""
    from svdcli.models.hf import replaced_for

    replaced = replaced_for(model, METHOD)
    if replaced:
        raise SvdcliError(
            f"transformers replaces the {replaced} of a {type(model).__name__} of packed weights, "
            f"and has no place for what this checkpoint holds of them",
            _OWN_LAYOUTS,
        )
    for path in packed:
        del model.get_submodule(path).weight
    try:
        model.initialize_weights()
    except AttributeError as error:
        raise SvdcliError(
            f"transformers does not open a {type(model).__name__} of packed weights ({error})",
            _OWN_LAYOUTS,
        ) from error


def _misfit(model: Any, key: str, pattern: str | None, tied: set[str]) -> str:
    """Why the weight of this key is not that of a linear layer of its own, or an empty string."""
    name = type(model).__name__
    if pattern is not None and _EXPERTS not in key.split("."):
        return f"{name} stacks it with others in one parameter"
    if key in tied:
        return "tied to another weight"
    if pattern is not None:
        return ""
    path = key.removesuffix(".weight")
    modules = dict(model.named_modules())
    module = modules.get(path)
    if module is None or path == key:
        return f"{name} has no such layer"
    if not isinstance(module, nn.Linear) or not is_linear(module):
        return f"a {type(module).__name__} of {name}, not a Linear"
    return ""
