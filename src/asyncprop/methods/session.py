"""Session: a run under way, on one rank: the objects that are trained, and how far they have come."""

from __future__ import annotations

import copy
import itertools
import os
import resource
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from asyncprop.checkpoint import Position, load_checkpoint, rank_state, save_checkpoint
from asyncprop.clock import SYSTEM, Clock
from asyncprop.config import TrainConfig
from asyncprop.devices import CpuDevice, available_cores
from asyncprop.engine import Engine, Turn
from asyncprop.exchange import LayerGossip, World
from asyncprop.methods import get_method
from asyncprop.methods.journal import Journal
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.methods.shares import Claims, Rounds, Share
from asyncprop.methods.trainer import Extent, Trainer, open_trainer
from asyncprop.recorder import Recorder
from asyncprop.replay import Ordered, Replay
from asyncprop.tasks import Batch, Batches, Split, Task, get_task
from asyncprop.trace import Trace

Turns = Literal["free", "lockstep"] | Turn
LIMIT_BATCHES = 3
"""Batches by which one core's throughput is measured; the fastest counts."""


class Session:
    """A run under way: the objects that are trained, and how far they have come.

    Args:
        config: what is trained, and how.
        checkpoint: folder of a checkpoint to go on from; None starts anew.
        world: the ranks that train together; this process alone by default.
        replay: the trace of a run with this configuration, that is to be trained again; None trains anew.

    Raises:
        ValueError: if the configuration does not fit the task or the method, or the checkpoint not the model.
    """

    clock: Clock = SYSTEM
    """By which training is timed."""
    limit_samples_per_s: float | None = None
    """What this machine could give with all cores busy, where that is known (see `measure_limit`)."""
    remark = ""
    """What is to be known of the run, in one line, if there is such a thing."""

    def __init__(
        self,
        config: TrainConfig,
        checkpoint: Path | None = None,
        world: World | None = None,
        replay: Trace | None = None,
    ) -> None:
        self.config = config
        self._replay = replay
        self.world = world or World()
        self.task: Task = get_task(config.task)
        get_method(config.method)
        self.device = _device(config.device)
        self.split: Split = self.task.load(
            data_dir=config.data_dir, train_samples=config.train_samples, test_samples=config.test_samples
        )
        recipe = self.task.recipe
        self.epochs = config.epochs or recipe.epochs
        self.batch_size = config.batch_size or recipe.batch_size
        self.target = config.target or self.task.target
        torch.manual_seed(config.seed + 1_000_003 * self.world.rank)  # ranks draw their own dropout
        self.model: nn.Module = self.task.build(width=config.width, seed=config.seed).to(self.device)
        self.optimizer = self._optimizer_of(self.model)
        self._shares = [group["lr"] / self.optimizer.param_groups[0]["lr"] for group in self.optimizer.param_groups]
        self.batches_per_epoch = len(self._batches(0, 0))
        self.samples_per_epoch = self.batches_per_epoch * self.batch_size
        self.position = Position()
        trainer_state: dict[str, Any] = {}
        if checkpoint:
            self.position, trainer_state = load_checkpoint(checkpoint, self.model, self.optimizer, rank=self.world.rank)
        self.recorder = Recorder(rank=self.world.rank) if config.trace or config.turn == "ordered" else None
        self.trainer = self._open_trainer(self.model, self.optimizer, self._turn(), self.recorder)
        self.trainer.load_state_dict(trainer_state)
        self._shares_opened = 0
        self._begun: dict[str, Any] | None = None  # what a rank that joins must know of the present segment
        self._name = "" if self.world.is_joining else self.world.gather(uuid.uuid4().hex)[0]
        if self.world.members:
            self.world.members.offers["session"] = lambda: self._begun

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the task's loss, of a batch that is brought to the model's device."""
        return self.task.loss(model, tuple(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def join(self) -> None:
        """Take over the training as it stands from a live rank, if this one has yet to join, or was left out.

        Raises:
            LeftOut: if nobody is training any more.
        """
        members = self.world.members
        assert members
        exchange = self.trainer.exchange if isinstance(self.trainer, Engine) else None
        gossip = exchange if isinstance(exchange, LayerGossip) and not members.joins else None
        if gossip:
            gossip.leave()
        given = members.ask()
        begun = given["session"]
        vars(self.position).update(copy.deepcopy(begun["position"]))
        self._name, self._shares_opened = begun["name"], begun["shares_opened"] - 1
        if gossip:
            gossip.rejoin(given["replica"])
        else:  # phases and delays are counted from the run's start, which is known only now
            chosen = self.trainer.state_dict()
            self.trainer = self._open_trainer(self.model, self.optimizer, self._turn(), self.recorder)
            self.trainer.load_state_dict(chosen)

    def start_over(self) -> None:
        """Be a rank that has yet to join: the others went on without this one before it had trained."""
        assert self.world.members
        self.world.members.joins = True

    def warm_up(self) -> None:
        """Train a copy of the model on batches of an epoch that never comes: first batches are slow, and not timed."""
        config = self.config
        batches = list(itertools.islice(self._batches(self.epochs, 0), config.warm_up_batches))
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            model = copy.deepcopy(self.model)
            optimizer = self._optimizer_of(model)
            turn: Turns = "lockstep" if config.turn == "lockstep" else "free"
            trainer = self._open_trainer(model, optimizer, turn, alone=True)
            trainer.load_state_dict(self._chosen(self.trainer))
            with trainer:
                for _ in trainer.run(batches):
                    pass
        self._take_over(trainer)

    def measure_limit(self) -> None:
        """Estimate what the machine can give: what one core does alone in the plain loop, times the cores.

        An estimate, as cores that all work share caches and memory. Unknown on a GPU, and without batches to warm up.
        """
        batches = list(itertools.islice(self._batches(self.epochs, 0), min(LIMIT_BATCHES, self.config.warm_up_batches)))
        if not batches or self.device.type != "cpu":
            return
        with torch.random.fork_rng(devices=[]), CpuDevice().thread(1):
            model = copy.deepcopy(self.model)
            steps = list(SequentialLoop(model, self._optimizer_of(model), self.loss).run(batches))
        seconds = min(step.forward_s + step.backward_s for step in steps)
        self.limit_samples_per_s = self.world.size * available_cores() * self.batch_size / seconds

    def _optimizer_of(self, model: nn.Module) -> Optimizer:
        config = self.config
        return self.task.optimizer(model, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def _take_over(self, warmed_up: Trainer) -> None:
        """Let the trainer use the blocks and the workers that the warm-up chose, if it has none of its own."""
        state, chosen = self.trainer.state_dict(), warmed_up.state_dict()
        if new := {name: chosen[name] for name in ("blocks", "workers") if chosen.get(name) and not state.get(name)}:
            self.trainer.load_state_dict({**state, **new})

    @staticmethod
    def _chosen(trainer: Trainer) -> dict[str, Any]:
        return {name: value for name, value in trainer.state_dict().items() if name == "workers"}

    def _turn(self) -> Turns:
        if self._replay:
            return Replay(self._replay)
        return Ordered() if self.config.turn == "ordered" else self.config.turn

    def _open_trainer(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        turn: Turns,
        trace: Recorder | None = None,
        *,
        alone: bool = False,
    ) -> Trainer:
        config = self.config
        done = self.position.steps // self.world.size
        return open_trainer(
            config,
            config.method,
            model,
            optimizer,
            self.loss,
            extent=Extent(self.batches_per_epoch, self.epochs, self.world.size, done=done),
            turn=turn,
            trace=trace,
            seed=config.seed,
            members=self.world.members,
            alone=alone,
        )

    def open_share(self) -> Share:
        """Return this rank's share of what is left of the present epoch."""
        self._shares_opened += 1
        name = f"{self._name}-{self._shares_opened}"
        start, count = self.position.batch, self.batches_per_epoch
        position = copy.deepcopy(vars(self.position))
        self._begun = {"name": self._name, "shares_opened": self._shares_opened, "position": position}
        in_step = self.world.size > 1 and get_method(self.config.method).workers is None
        if in_step and self.batches_per_epoch < self.world.size:
            raise ValueError(
                f"ranks must be at most the batches of an epoch, {self.batches_per_epoch} (got {self.world.size})"
            )
        if in_step:
            return Rounds(_store(name), start, count, self.world)
        return Claims(self.world.counter(name), start, count)

    def close_share(self) -> None:
        """Note that the segment ends: who joins now waits for the next."""
        self._begun = None

    def describe(self) -> dict[str, Any]:
        """Return what the result is to say beyond what every result says."""
        return {}

    def set_lr(self, others: int = 0) -> float:
        """Set the learning rate that is due after the samples consumed so far, and return it.

        Args:
            others: batches that other ranks have taken since the ranks last met.
        """
        lr = self.task.recipe.lr_at(
            self.position.samples + others * self.batch_size,
            samples_per_epoch=self.samples_per_epoch,
            epochs=self.epochs,
            lr=self.config.lr,
        )
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = lr * share
        return lr

    def next_batches(self, share: Share) -> Iterator[Batch]:
        """Yield the batches of a share."""
        return iter(self._batches(self.position.epoch, self.position.batch, share))

    def save(self, journal: Journal) -> None:
        """Write a checkpoint of this very position, with every rank's state; nothing may be in flight.

        All ranks call it, and none returns, or forgets the lines, before it is written: if the first rank dies at it,
        or hangs, the next one writes.
        """
        peak = sum(self.world.gather(peak_memory_bytes()))
        self.position.peak_memory_bytes = max(self.position.peak_memory_bytes, peak)
        states = self.world.gather(rank_state(self.optimizer, self.trainer.state_dict()))
        while not any(self.world.gather(self._write(journal, states))):
            pass
        journal.forget()

    def _write(self, journal: Journal, states: Sequence[dict[str, Any]]) -> bool:
        """Write lines and checkpoint, if this rank is the first; tell whether they are on the disk."""
        if (run := journal.write()) is None:
            return False
        self.position.lines = list(run.lines)
        save_checkpoint(run.checkpoint, self.model, list(states), self.position)
        return True

    def _batches(self, epoch: int, start: int, share: Share | None = None) -> Batches:
        return Batches(
            self.split.train,
            self.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            start=start,
            numbers=share,
            workers=self.task.workers,
        )


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _store(name: str) -> Any:
    """Return a store that all ranks of torch.distributed share, for what is called `name` alone."""
    default = distributed.distributed_c10d._get_default_store()
    return distributed.PrefixStore(f"asyncprop/{name}", default)  # type: ignore[attr-defined]


def _device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has (got {name}): use --device cpu")
    if name == "cuda":  # one GPU per rank of this machine
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)
