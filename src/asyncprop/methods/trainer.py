"""Trainer: what every method is when it runs. `open_trainer` makes one of a method's row and a run's options."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from torch import nn
from torch.optim import Optimizer

from asyncprop.config import Options
from asyncprop.delay import Delay, Delays, current_rank, on_rank, parse_delays, refuse_nobody
from asyncprop.devices import Device
from asyncprop.engine import (
    Attenuation,
    Compensation,
    Correction,
    Coupled,
    Decoupled,
    Engine,
    Exchange,
    Partition,
    Turn,
)
from asyncprop.engine.partition import Blocks
from asyncprop.engine.passes import LossFn
from asyncprop.engine.update import Update
from asyncprop.exchange import Averaging, LayerGossip, Members
from asyncprop.methods import Method, get_method, meeting_of
from asyncprop.methods.ddp import DdpLoop, PostLocalSgdLoop
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.recorder import Recorder
from asyncprop.trace import Statistics, Step


class Trainer(Protocol):
    """A context manager that trains on batches and reports each."""

    def __enter__(self) -> Self:
        """Start."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End; nothing of the trainer is left."""

    def run(self, loader: Iterable[Any]) -> Iterator[Step]:
        """Train on every batch of `loader` and yield its Step."""

    def settle(self) -> None:
        """Let the models of all ranks become equal; all must call it, with nothing in flight."""

    def statistics(self) -> Statistics:
        """Return counts and times so far."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beyond model and optimizer."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a run is, for what a method does in phases: batches of one rank, and ranks.

    `done` are batches of one rank that were trained before, in a run that goes on: trainers count from their own start.
    """

    batches_per_epoch: int
    epochs: int
    ranks: int = 1
    blocks: Blocks | None = None
    done: int = 0

    def batches(self, epochs: float) -> int:
        """Return the batches of one rank in so many epochs."""
        return round(epochs * self.batches_per_epoch / self.ranks)

    def left(self, epochs: float) -> int:
        """Return how many of the run's first so many epochs are still to come, in batches of one rank."""
        return max(0, self.batches(epochs) - self.done)


def open_trainer(
    options: Options,
    method: str,
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    *,
    extent: Extent,
    turn: Literal["free", "lockstep"] | Turn = "free",
    trace: Recorder | None = None,
    seed: int = 0,
    members: Members | None = None,
    alone: bool = False,
    rank: int | None = None,
    device: Device | None = None,
    exchange: Exchange | None = None,
) -> Trainer:
    """Make the trainer of a method.

    Args:
        options: of the run; those that a method does not have are refused.
        method: a name in METHODS.
        model, optimizer, loss_fn: as for `asyncprop.Engine`.
        extent: how long the run is.
        turn: who may go next; of one loop, whatever it is, nobody else.
        trace: notes what each thread does.
        seed: of what is drawn: delays, and to whom gossip goes.
        members: for gossip: who else is there; None for the ranks of torch.distributed's default group.
        alone: not to gossip, as in a warm-up; to average all the same, which needs no more than being called by all.
        rank: whose delays are meant, if several ranks are in this process; None for this process's own.
        device: the face of the device; None for the model's own.
        exchange: how replicas meet, if not as the method has it.

    Raises:
        ValueError: if the method is unknown, or an option does not fit it.
    """
    row = get_method(method)
    meeting = meeting_of(method, options.exchange)
    refuse_what_it_lacks(options, row, meeting, extent.ranks)
    given = parse_delays(options.delay)
    refuse_nobody(given, ranks=None if members else extent.ranks)  # where there are members, others may join
    delays = tuple(replace(delay, seed=delay.seed + seed, steps_before=extent.done) for delay in given)
    if rank is not None:
        delays = on_rank(delays, rank)
    if row.workers is None and isinstance(turn, Turn):
        raise ValueError(f"turn must not be ordered for method {row.name}, which trains the same each time anyway")
    if row.workers is None or row.update is None:
        return _open_loop(options, row, model, optimizer, loss_fn, extent, delays, trace)
    return Engine(
        model,
        optimizer,
        loss_fn,
        workers=_workers(options, row.workers),
        update=_update(options, row.update),
        partition=_partition(options, row, extent) if row.partition else None,
        exchange=exchange
        or (_exchange(options, extent, meeting, seed, members, alone=alone) if extent.ranks > 1 else None),
        device=device,
        delays=delays,
        turn=turn,
        trace=trace,
    )


def _open_loop(
    options: Options,
    row: Method,
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    extent: Extent,
    delays: tuple[Delay, ...],
    trace: Recorder | None,
) -> Trainer:
    refuse_nobody(delays, workers=1)
    waits = Delays(delays, current_rank())
    if extent.ranks == 1:
        return SequentialLoop(model, optimizer, loss_fn, delays=waits, trace=trace)
    refuse_factors_of_waits(delays, row)
    if row.exchange == "gradients in step":
        return DdpLoop(model, optimizer, loss_fn, delays=waits, trace=trace, comm_hook=options.comm_hook or "none")
    if row.exchange == "buckets in step":
        from asyncprop.methods.decent import DecentLoop

        return DecentLoop(model, optimizer, loss_fn, delays=waits, trace=trace)
    return PostLocalSgdLoop(
        model, optimizer, loss_fn, delays=waits, trace=trace, period=options.period or 8,
        warm_up_batches=extent.left(options.prepass_epochs or 0),
    )  # fmt: skip


def refuse_factors_of_waits(delays: tuple[Delay, ...], row: Method) -> None:
    """Refuse a factor that would multiply waits for other ranks, which are part of what passes take (see `Delay`)."""
    ranks = {delay.rank for delay in delays}
    factor = max((delay.factor for delay in delays), default=1.0)
    if factor > 1 and (None in ranks or len(ranks) > 1):
        raise ValueError(
            f"delay: factor must slow one named rank, and no other be slowed, for method {row.name}, whose ranks wait "
            f"for each other within passes (got factor={factor:g}): name it, as in rank=1,factor=3, or give seconds"
        )


def _workers(options: Options, default: Decoupled | Coupled) -> Decoupled | Coupled:
    if isinstance(default, Coupled):
        return replace(default, workers=options.workers or default.workers)
    given: dict[str, Any] = {
        "forward": options.forward_threads,
        "backward": options.backward_threads,
        "lanes": options.lanes,
    }
    return replace(default, **{name: count for name, count in given.items() if count is not None})


def _update(options: Options, default: Update) -> Update:
    if options.compensation is None:
        return default
    kinds: dict[str, Correction | None] = {
        "none": None,
        "constant": Compensation(),
        "adaptive": Compensation(adaptive=True),
        "attenuation": Attenuation(),
    }
    return replace(default, compensate=kinds[options.compensation])


def _partition(options: Options, row: Method, extent: Extent) -> Partition:
    prepass = 1.0 if options.prepass_epochs is None else options.prepass_epochs
    return Partition(
        blocks=extent.blocks,
        warm_up_batches=extent.left(prepass),
        alternate=row.partition == "all, own block in turn",
    )


def _exchange(
    options: Options, extent: Extent, meeting: str | None, seed: int, members: Members | None, *, alone: bool
) -> Exchange | None:
    """Gossip, or average as often as can be in the first half of the run, then every `period` batches, as published."""
    if meeting != "gossip":
        return Averaging(period=options.period or 8, dense_batches=extent.left(extent.epochs / 2))
    if alone:
        return None
    names = ("topology", "period", "probability", "bucket_bytes", "wire", "timeout_s")
    given: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return LayerGossip(**given, seed=seed, members=members)


def refuse_what_it_lacks(options: Options, row: Method, meeting: str | None, ranks: int) -> None:
    """Refuse options that the method would not look at.

    Args:
        options: of the run.
        row: the method's.
        meeting: how its ranks meet, see `meeting_of`.
        ranks: that train together.

    Raises:
        ValueError: naming the first.
    """
    in_step = row.exchange in ("gradients in step", "parameters in step", "buckets in step")
    decoupled = isinstance(row.workers, Decoupled)
    meets = row.workers is not None and (ranks > 1 or row.exchange is not None)
    gossips = meets and meeting == "gossip"
    fitting = {
        "forward_threads": decoupled,
        "backward_threads": decoupled,
        "lanes": decoupled,
        "workers": isinstance(row.workers, Coupled),
        "compensation": row.workers is not None,
        "prepass_epochs": row.partition is not None or row.exchange == "parameters in step",
        "exchange": row.workers is not None and ranks > 1,
        "period": row.exchange == "parameters in step" or meets,
        **dict.fromkeys(("topology", "probability", "bucket_bytes", "wire", "timeout_s"), gossips),
        "comm_hook": row.exchange == "gradients in step",
    }
    for name, fits in fitting.items():
        if getattr(options, name) is not None and not fits:
            raise ValueError(f"{name} must not be given for method {row.name}, which has none: see asyncprop methods")
    if ranks > 1 and row.workers is None and not in_step:
        raise ValueError(f"ranks must be 1 for method {row.name} (got {ranks}): ddp is its like on several")
