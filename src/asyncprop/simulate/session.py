"""SimulatedSession: a run in virtual time. The training loop is that of all runs, with another trainer and clock."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from torch import nn
from torch.optim import Optimizer

from asyncprop.config import SimulateConfig, TrainConfig
from asyncprop.delay import Delays, on_rank, parse_delays, refuse_nobody
from asyncprop.engine import Coupled, Decoupled
from asyncprop.engine.lanes import trainable
from asyncprop.engine.layers import Layer, find_layers
from asyncprop.engine.partition import BackwardTimes, cut
from asyncprop.methods import Method, get_method, meeting_of
from asyncprop.methods.fitting import refuse_what_is_not_modelled, replicas
from asyncprop.methods.repeat import NEVER_S
from asyncprop.methods.session import Session, Turns
from asyncprop.methods.trainer import Extent, Trainer, open_trainer, refuse_what_it_lacks
from asyncprop.recorder import Recorder
from asyncprop.simulate.costs import LayerCosts, read_costs
from asyncprop.simulate.fleet import Fleet, Member, Settles
from asyncprop.simulate.gossip import Gossip
from asyncprop.simulate.groups import Averages, Group
from asyncprop.simulate.in_step import Buckets, Gradients, InStep, Parameters
from asyncprop.simulate.loop import VirtualLoop
from asyncprop.simulate.pace import THROUGH, Machine, Pace, SimulatedDevice
from asyncprop.simulate.virtual_time import VirtualTime


class SimulatedSession(Session):
    """A run whose time is virtual. The thread that makes it is the one that must train.

    Args:
        config: what is trained, on which devices; `ranks` are replicas in this process.

    Raises:
        ValueError: if the configuration does not fit the task or the method.
    """

    def __init__(self, config: SimulateConfig) -> None:
        if config.turn != "free":
            raise ValueError(f"turn must be left out of a simulation, which is ordered anyway (got {config.turn})")
        refuse_what_is_not_modelled(config)
        self.simulated = config
        self._begun_s = perf_counter()
        self.clock = self._time = VirtualTime()
        costs = read_costs(config.costs)
        self._costs = costs if config.variation is None else replace(costs, variation=config.variation)
        self._machines = _machines(config)
        super().__init__(config.model_copy(update={"checkpoint_every": NEVER_S}))

    def warm_up(self) -> None:
        """Do nothing: what takes time the first time takes no virtual time."""

    def measure_limit(self) -> None:
        """Do nothing: this machine's limit says nothing of virtual time."""

    def describe(self) -> dict[str, Any]:
        """Return what was simulated, how often time passed for a thread, and how long that took in real time."""
        return {
            "time": "virtual",
            "costs": self._costs.name,
            "variation": self._costs.variation,
            "devices": self.simulated.devices,
            "speeds": [machine.speed for machine in self._machines],
            "replicas": self._ranks,
            "events": self._time.events,
            "real_s": perf_counter() - self._begun_s,
        }

    def _open_trainer(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        turn: Turns,
        trace: Recorder | None = None,
        *,
        alone: bool = False,
    ) -> Trainer:
        row = get_method(self.config.method)
        layers = find_layers(model, trainable(model, optimizer))
        costs = self._costs.of([layer.name for layer in layers])
        self._ranks = ranks = replicas(self.simulated, row)
        if ranks > 1 and not any(costs.transfer_s):
            self.remark = (
                f"links are free, so replicas meet in no time: set transfer_s, which is 0 of all layers, in the costs "
                f"{self._costs.name}"
            )
        refuse_what_it_lacks(self.config, row, meeting_of(row.name, self.config.exchange), ranks)
        if row.workers is None and ranks > self.batches_per_epoch:
            raise ValueError(
                f"devices must be at most the batches of an epoch, {self.batches_per_epoch}, for method {row.name}, "
                f"whose ranks take one each in turn (got {ranks}): lower the batch size"
            )
        trainers = _Trainers(self, row, layers, costs, ranks)
        if ranks == 1:
            return trainers.trainer(0, model, optimizer, self._machines, trace)
        per_rank = len(self._machines) // ranks
        members = []
        for rank in range(ranks):
            own = model if rank == 0 else copy.deepcopy(model)
            steps = optimizer if rank == 0 else self._optimizer_of(own)
            machines = self._machines[rank * per_rank : (rank + 1) * per_rank]
            notes = trace.of_rank(rank) if trace and rank else trace
            members.append(Member(trainers.trainer(rank, own, steps, machines, notes), steps))
        return Fleet(self._time, members, trainers.meeting, in_step=row.workers is None)


class _Trainers:
    """Makes the trainers of all ranks of one method."""

    def __init__(
        self, session: SimulatedSession, row: Method, layers: tuple[Layer, ...], costs: LayerCosts, ranks: int
    ) -> None:
        self._session, self._row, self._layers, self._costs, self._ranks = session, row, layers, costs, ranks
        self._time = session._time
        self._extent = Extent(session.batches_per_epoch, session.epochs, ranks)
        self._group = self._make_group() if row.workers and ranks > 1 else None
        self._in_step = self._make_in_step()

    @property
    def meeting(self) -> Settles:
        """How the ranks meet."""
        return self._group or self._in_step

    def trainer(
        self, rank: int, model: nn.Module, optimizer: Optimizer, machines: Sequence[Machine], trace: Recorder | None
    ) -> Trainer:
        """Return the trainer of one rank; they are made in the order of ranks."""
        session, config, time = self._session, self._session.config, self._time
        if self._row.workers is None:
            given = parse_delays(config.delay)
            refuse_nobody(given, ranks=self._ranks, workers=1)
            delays = on_rank([replace(delay, seed=delay.seed + config.seed) for delay in given], rank)
            return VirtualLoop(
                model, optimizer, session.loss, time=time, costs=self._costs, speed=machines[0].speed,
                delays=Delays(delays, 0, clock=time), trace=trace, meeting=self._in_step, seed=_seed(config, rank),
            )  # fmt: skip
        options, workers = _with_workers(session.simulated, self._row, self._costs, machines)
        return open_trainer(
            options,
            config.method,
            model,
            optimizer,
            session.loss,
            extent=replace(self._extent, blocks=self._blocks(workers)),
            turn=Pace(time, session._costs, machines, seed=_seed(config, rank)),
            trace=trace,
            seed=config.seed,
            rank=rank,
            device=SimulatedDevice(time, machines),
            exchange=self._group.side(rank) if self._group else None,
        )

    def _make_group(self) -> Group:
        time, costs, ranks, config = self._time, self._costs, self._ranks, self._session.config
        if meeting_of(config.method, config.exchange) != "gossip":
            return Averages(time, costs, ranks, config.period or 8, self._extent.batches(self._extent.epochs / 2))
        names = ("topology", "period", "probability")
        given: dict[str, Any] = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
        return Gossip(time, costs, ranks, **given, seed=config.seed)

    def _make_in_step(self) -> InStep:
        time, costs, ranks, config = self._time, self._costs, self._ranks, self._session.config
        if ranks == 1 or self._row.exchange is None:
            return InStep(time, costs, ranks)
        if self._row.exchange == "parameters in step":
            warm_up = self._extent.batches(config.prepass_epochs or 0)
            return Parameters(time, costs, ranks, period=config.period or 8, warm_up=warm_up)
        return (Buckets if self._row.exchange == "buckets in step" else Gradients)(time, costs, ranks)

    def _blocks(self, workers: int) -> tuple[tuple[str, ...], ...] | None:
        """Cut the layers into the workers' blocks by their costs, if the method has blocks."""
        if not self._row.partition or workers == 1:
            return None
        backward = self._costs.backward_s
        places = range(len(backward))
        alone = tuple(backward[place] + THROUGH * sum(backward[place + 1 :]) for place in places)
        return cut(BackwardTimes(alone, tuple(sum(backward[place:]) for place in places)), self._layers, workers)


def _seed(config: TrainConfig, rank: int) -> int:
    return config.seed + 1_000_003 * rank


def _machines(config: SimulateConfig) -> list[Machine]:
    try:
        given = [float(speed) for speed in (config.speeds or "1").split(",")]
    except ValueError:
        raise ValueError(f"speeds must be numbers, separated by commas (got {config.speeds})") from None
    if len(given) > config.devices:
        raise ValueError(f"speeds must be at most as many as the devices, {config.devices} (got {len(given)})")
    speeds = given + given[-1:] * (config.devices - len(given))
    return [Machine(speed, config.cores) for speed in speeds]


def _with_workers(
    config: SimulateConfig, row: Method, costs: LayerCosts, machines: Sequence[Machine]
) -> tuple[SimulateConfig, int]:
    """Let there be as many workers as the rank's machines compute at once, unless told otherwise; return their number.

    Of forward and backward threads: in the proportion of what the passes cost. Of coupled workers, if the machines
    compute one operation at a time: the method's own number, as Hogwild by one worker would be the plain loop.
    """
    slots = sum(machine.slots for machine in machines)
    given: dict[str, int] = {}
    if isinstance(row.workers, Coupled):
        workers = config.workers or (slots if slots > 1 else row.workers.workers)
        given["workers"] = workers
    else:
        assert isinstance(row.workers, Decoupled)
        if config.forward_threads == "auto":
            raise ValueError("forward_threads must be a number in a simulation: a plan measures this machine")
        forward = config.forward_threads or max(1, round(slots / (1 + costs.backward_forward_ratio)))
        backward = config.backward_threads or max(1, slots - forward)
        given |= {"forward_threads": forward, "backward_threads": backward}
        workers = config.lanes or min(forward + backward, slots)
    return config.model_copy(update=given), workers
