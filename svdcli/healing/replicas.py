"""The processes that heal one model together: each reads its own share of the text, and all of them
hold the same weights.

In a step every rank differentiates a batch of its own, and the gradients of what is trained, and
nothing else, are averaged over the ranks. Closed forms are solved from sums over all ranks, each
layer by one of them. Rank 0 decides all that depends on time or chance, and what it holds is sent
to the others wherever their rounding could differ: all ranks hold the same bits.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from svdcli.errors import INTERRUPTED, SvdcliError, UsageError
from svdcli.ranks import BEAT, FollowedError, LostRankError, Team, assembled, place_here

T = TypeVar("T")

TIMEOUT = 600.0  # seconds until the last rank must have come to an exchange
GOES_ON = "run the same command again, it continues with the block it had reached"
_BUCKET = 25 * 2**20  # bytes that travel together
_POLL = 0.02  # seconds
_SOME_RANK = "another rank"

# How gradients travel: as they are, in half the bytes, or as the factors of torch's PowerSGD hook
PLAIN, BFLOAT16, POWER_SGD = "plain", "bfloat16", "PowerSGD"
# From rank 3 on the hook makes bases by QR, which takes gradients that are zero or of lower rank
POWER_RANK = 4
POWER_START = 10  # steps before it; gradients change most in the first ones


class Replicas:
    """One process alone: every exchange gives back what it is given.

    accumulated is how many batches make a step of this process: with k of them it learns what k
    ranks learn. traffic counts the bytes handed to exchanges, by what they were for.
    """

    rank = 0
    size = 1
    here = 1  # ranks on this machine
    gathers = False  # can tensors be gathered where they are computed with

    def __init__(self, device: torch.device | None = None, accumulated: int = 1) -> None:
        self.device = device or torch.device("cpu")
        self.accumulated = accumulated
        self.traffic: Counter[str] = Counter()

    @property
    def first(self) -> bool:
        """Does this process decide, keep the journal and publish."""
        return self.rank == 0

    def says(self, value: T | None) -> T | None:
        """Return rank 0's value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in their order."""
        return [value]

    def same(self, tensors: Mapping[str, Tensor], source: int = 0) -> Mapping[str, Tensor]:
        """Return the tensors that rank `source` has, to the bit, on its kind of device; what the
        others give does not matter."""
        return tensors

    def summed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the sums over all ranks by name; a rank that lacks one has zeros there."""
        return tensors

    def averaging(self, weights: Sequence[nn.Parameter]) -> Callable[[], None]:
        """Return what averages the gradients of these weights over the batches of a step. A weight
        that no batch gave a gradient keeps None."""

        def average() -> None:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad /= self.accumulated

        return average if self.accumulated > 1 else _nothing

    def ended_before(self) -> bool:
        """Have the ranks been started again when all was done."""
        return False

    def mesh(self) -> Any:
        """Return torch's own name for these ranks, where tensors can be gathered."""
        return None

    def sharing(self) -> AbstractContextManager[None]:
        """Return a context for passes through weights that the ranks share, which a rank that is
        gone ends with one line."""
        return nullcontext()

    def ends_with(self, outcome: T | None) -> T:
        """Return what rank 0 gives, however long that takes; the last exchange of all."""
        assert outcome is not None
        return outcome

    # What follows from these

    def total(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all ranks, added in the ranks' order."""
        return [sum(column) for column in zip(*self.gather(tuple(values)), strict=True)]

    def least(self, value: int) -> int:
        """Return the smallest of all ranks' numbers."""
        return min(self.gather(value))

    def most(self, value: int) -> int:
        """Return the largest of all ranks' numbers."""
        return max(self.gather(value))

    def union(self, names: Collection[str]) -> set[str]:
        """Return what any rank names."""
        return set().union(*self.gather(set(names)))

    def meet_at(self, place: str) -> None:
        """Check that all ranks are at the same place. Raises SvdcliError where they are not."""
        if len(set(self.gather(place))) > 1:
            raise SvdcliError(
                "the blocks that a text goes through differ between the ranks' texts",
                "heal this model in one process",
            )


def _nothing() -> None:
    """A gradient of one batch is its own average."""


ALONE = Replicas()


@contextmanager
def replicas_here(
    device: torch.device, asked: Callable[[], str] = str, *, compress: bool = False
) -> Iterator[Replicas]:
    """The ranks that a launcher started together with this one, or this process alone.

    asked tells what this rank is to do: all are to do the same. compress sends gradients through
    torch's PowerSGD hook. Raises UsageError for that where nothing travels, and LostRankError where
    a rank does not come. An error of one rank, such as that it was asked for something else, ends
    them all, and rank 0 tells it: the others raise FollowedError.
    """
    place = place_here()
    if place is None or place.size == 1:
        if compress:
            raise UsageError(
                "--compress-gradients: there is one process, and no gradients travel",
                "leave it out, or start several with torchrun",
            )
        yield Replicas(device)
        return

    with assembled(place) as team:
        with team.sharing_errors():
            team.check_same(f"heal {asked()}")
        replicas = Ranks(team, device, POWER_SGD if compress else PLAIN)
        try:
            with team.sharing_errors():
                yield replicas
        except KeyboardInterrupt:
            replicas.raise_reason_of_interrupt()
            raise
        finally:
            replicas.close()


class Ranks(Replicas):
    """This rank among the others of a team, with torch's process group between them: gloo, and nccl
    for what lies on GPUs where each rank has its own.

    how says how gradients travel. Every exchange raises LostRankError where a rank is gone, and
    SvdcliError with the reason that another rank gave for ending.
    """

    def __init__(self, team: Team, device: torch.device, how: str = PLAIN) -> None:
        place = team.place
        self.rank, self.size = place.rank, place.size
        self._team = team
        self._how = how
        self._mesh: Any = None

        # Who shares a machine with whom, and whether each has a GPU of its own
        count = torch.cuda.device_count() if device.type == "cuda" else 0
        team.put(f"machine/{self.rank}", json.dumps([socket.gethostname(), count]).encode())
        machines = [json.loads(team.wait(f"machine/{r}", r)) for r in range(self.size)]
        names = Counter(name for name, _ in machines)
        self.here = names[machines[self.rank][0]]
        if device.type == "cuda":
            device = torch.device("cuda", place.local % count)
            torch.cuda.set_device(device)
        super().__init__(device)

        # One process group for everything
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        own_gpus = all(gpus >= names[name] for name, gpus in machines)
        self.gathers = device.type != "cuda" or own_gpus
        with self._together():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if own_gpus else "gloo",
                store=PrefixStore("heal", team.store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=TIMEOUT),
            )

    def close(self) -> None:
        """Leave the others: those that still wait for this rank stop waiting."""
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()

    # Exchanges

    def says(self, value: T | None) -> T | None:
        said: T | None = self._sent_by(0, value)
        return said

    def _sent_by(self, source: int, value: Any) -> Any:
        """Return the value of one rank; the others' do not matter."""
        holder = [value]
        with self._together():
            dist.broadcast_object_list(holder, source, device=torch.device("cpu"))
        return holder[0]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        with self._together():
            dist.all_gather_object(values, value)
        return values

    def same(self, tensors: Mapping[str, Tensor], source: int = 0) -> Mapping[str, Tensor]:
        # What comes: names, shapes and dtypes
        header = None
        if self.rank == source:
            header = [(n, t.shape, t.dtype, t.device.type) for n, t in tensors.items()]
        header = self._sent_by(source, header)
        assert header is not None

        # The numbers as bytes, which every backend sends
        received: dict[str, Tensor] = {}
        for name, shape, dtype, kind in header:
            if self.rank == source:
                tensor = tensors[name].detach().contiguous()
            else:
                place = self.device if kind == self.device.type else torch.device(kind)
                tensor = torch.empty(shape, dtype=dtype, device=place)
            if tensor.numel():
                self.traffic["weights"] += tensor.nbytes
                with self._together():
                    dist.broadcast(tensor.reshape(-1).view(torch.uint8), source)
            received[name] = tensor
        return received

    def summed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # All names that any rank has, in an order that all have
        known: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for shapes in self.gather({n: (t.shape, t.dtype) for n, t in tensors.items()}):
            known.update(shapes)
        sums: dict[str, Tensor] = {}
        for name in sorted(known):
            shape, dtype = known[name]
            mine = tensors.get(name)
            sums[name] = torch.zeros(shape, dtype=dtype, device=self.device)
            if mine is not None:
                sums[name].copy_(mine)

        # In few messages, then back into their places
        for bucket in _buckets(list(sums.values())):
            self.traffic["sums"] += bucket.flat.nbytes
            with self._together():
                dist.all_reduce(bucket.flat)
            bucket.put_back()
        return sums

    def averaging(self, weights: Sequence[nn.Parameter]) -> Callable[[], None]:
        return _Averaging(self, weights, self._how)

    def ended_before(self) -> bool:
        return self._team.ended_before()

    def mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if self._mesh is None:
            self._mesh = init_device_mesh(self.device.type, (self.size,))
        return self._mesh

    @contextmanager
    def sharing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:
            # An error of this rank's own, unless another one has ended
            self._team.check_others()
            gone = self._without_a_sign()
            if gone:
                self._raise_lost(f"rank {gone[0]}")
            raise

    def ends_with(self, outcome: T | None) -> T:
        # By the store, which waits for as long as rank 0 shows signs of life
        if outcome is not None:
            self._team.end(outcome)
            return outcome
        result: T = self._team.outcome()
        return result

    def _others_alive(self) -> bool:
        return all(map(self._team.alive, self._others()))

    # Ends

    def _others(self) -> list[int]:
        return [rank for rank in range(self.size) if rank != self.rank]

    def raise_reason_of_interrupt(self) -> None:
        """Raise why the launcher interrupted this rank, where another one has failed, or is gone
        without a word; one that was interrupted itself is no reason."""
        before = {rank: self._beats(rank) for rank in self._others()}
        deadline = time.monotonic() + 3 * BEAT
        while time.monotonic() < deadline and not all(map(self._team.failure_of, self._others())):
            time.sleep(_POLL)
        for rank in self._others():
            told = self._team.failure_of(rank)
            if told is not None and told.exit_code != INTERRUPTED:
                raise told
            if told is None and self._beats(rank) == before[rank]:
                self._raise_lost(f"rank {rank}")

    def _beats(self, rank: int) -> int:
        return self._team.count(f"beats/{rank}", 0)

    def _raise_lost(self, gone: str) -> NoReturn:
        """Raise LostRankError, or FollowedError where rank 0 meets the same."""
        if not self.first and gone not in ("rank 0", _SOME_RANK):
            raise FollowedError(f"{gone} is gone")
        raise LostRankError(f"{gone} is gone", GOES_ON)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """An exchange, which a rank that is gone ends with one line."""
        try:
            yield
        except RuntimeError as error:
            self._team.check_others()
            if "timed out" in str(error).lower() and self._others_alive():
                message = f"a rank did not answer for {TIMEOUT / 60:.0f} minutes"
                raise LostRankError(message, GOES_ON) from error
            self._raise_lost(self._who_is_gone())

    def _who_is_gone(self) -> str:
        """Name the rank that shows no sign of life, as far as a short look can tell."""
        others = self._others()
        if len(others) == 1:
            return f"rank {others[0]}"
        still = self._without_a_sign()
        return f"rank {still[0]}" if still else _SOME_RANK

    def _without_a_sign(self) -> list[int]:
        """Return the other ranks that show no sign of life for a short while."""
        before = {rank: self._beats(rank) for rank in self._others()}
        time.sleep(3 * BEAT)
        return [rank for rank in before if self._beats(rank) == before[rank]]


# Gradients ----------------------------------------------------------------------------------------


class _Bucket:
    """Tensors of one dtype that travel as one: `flat` has all of their numbers. torch's hooks for
    gradients read it as they read a bucket of its own."""

    def __init__(self, tensors: Sequence[Tensor], number: int) -> None:
        self.tensors = tensors
        self.flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._number = number
        self.last = False

    def views(self) -> list[Tensor]:
        """Return the tensors as they lie in `flat`."""
        views: list[Tensor] = []
        start = 0
        for tensor in self.tensors:
            views.append(self.flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()
        return views

    def put_back(self) -> None:
        """Set the tensors to what `flat` holds."""
        for tensor, view in zip(self.tensors, self.views(), strict=True):
            tensor.copy_(view)

    # By the names that torch's hooks use

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return self.views()

    def index(self) -> int:
        return self._number

    def is_last(self) -> bool:
        return self.last


def _buckets(tensors: Sequence[Tensor]) -> Iterator[_Bucket]:
    """Yield neighbours of one dtype together, up to `_BUCKET` bytes."""
    waiting: list[Tensor] = []
    number = 0
    for position, tensor in enumerate(tensors):
        waiting.append(tensor)
        after = tensors[position + 1] if position + 1 < len(tensors) else None
        size = sum(each.nbytes for each in waiting)
        if after is None or after.dtype != tensor.dtype or size + after.nbytes > _BUCKET:
            bucket = _Bucket(waiting, number)
            bucket.last = after is None
            yield bucket
            waiting, number = [], number + 1


class _Averaging:
    """The average over all ranks of the gradients of some weights, step after step."""

    def __init__(self, ranks: Ranks, weights: Sequence[nn.Parameter], how: str) -> None:
        self._ranks = ranks
        self._weights = weights
        self._how = how
        self._power = None
        if how == POWER_SGD:
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

            self._power = powerSGD_hook.PowerSGDState(
                dist.group.WORLD, POWER_RANK, start_powerSGD_iter=POWER_START
            )

    @torch.no_grad()
    def __call__(self) -> None:
        # Whether a weight has a gradient at all travels with them: experts have some by chance
        weights = self._weights
        has = [float(weight.grad is not None) for weight in weights]
        gradients = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights
        ]
        flags = torch.tensor(has, dtype=torch.float32, device=self._ranks.device)
        for bucket in _buckets([*gradients, flags]):
            with self._ranks._together():
                self._average(bucket)
            bucket.put_back()
        for weight, gradient, flag in zip(weights, gradients, flags.tolist(), strict=True):
            weight.grad = gradient if flag > 0 else None

    def _average(self, bucket: _Bucket) -> None:
        """Average one bucket in place, and count the bytes that are handed to the exchanges."""
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        numbers: float = bucket.flat.numel()
        hooked: Any = bucket  # by the names that the hooks use
        if self._power is not None:
            before = self._power.total_numel_after_compression
            future = powerSGD_hook.powerSGD_hook(self._power, hooked)
            future.wait()
            numbers = self._power.total_numel_after_compression - before or numbers
        elif self._how == BFLOAT16:
            default_hooks.bf16_compress_hook(dist.group.WORLD, hooked).wait()  # type: ignore[arg-type]
            numbers /= 2
        else:
            dist.all_reduce(bucket.flat)
            bucket.flat /= self._ranks.size
        self._ranks.traffic["gradients"] += math.ceil(numbers * bucket.flat.element_size())
