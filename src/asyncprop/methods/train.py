"""Train: the one training loop of all methods. Epochs of batches, evaluation, checkpoints, and the result."""

from __future__ import annotations

import copy
import itertools
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asyncprop.checkpoint import Position, load_checkpoint, save_checkpoint
from asyncprop.config import TrainConfig
from asyncprop.methods import Trainer, get_method, open_trainer
from asyncprop.runs import Run
from asyncprop.tasks import Batch, Batches, Split, Task, get_task
from asyncprop.trace import Step


class Observer(Protocol):
    """Who is told of a run as it goes on."""

    def on_start(self, session: Session, run: Run) -> None:
        """Tell that training starts, or goes on."""

    def on_step(self, session: Session, step: Step) -> None:
        """Tell of a finished batch."""

    def on_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """Tell of a finished epoch; `row` is its line of `epochs.jsonl`."""

    def close(self) -> None:
        """Tell that there is nothing more to tell."""


class Interrupted(Exception):  # noqa: N818 (asked for, not an error)
    """The run was asked to stop; all that was taken is finished, and a checkpoint is written."""


class Session:
    """A run under way: the objects that are trained, and how far they have come.

    Args:
        config: what is trained, and how.
        checkpoint: folder of a checkpoint to go on from; None starts anew.

    Raises:
        ValueError: if the configuration does not fit the task or the method, or the checkpoint not the model.
    """

    def __init__(self, config: TrainConfig, checkpoint: Path | None = None) -> None:
        self.config = config
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
        torch.manual_seed(config.seed)
        self.model: nn.Module = self.task.build(width=config.width, seed=config.seed).to(self.device)
        self.optimizer: Optimizer = self.task.optimizer(
            self.model, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self._shares = [group["lr"] / self.optimizer.param_groups[0]["lr"] for group in self.optimizer.param_groups]
        self.trainer = self._open_trainer(self.model, self.optimizer)
        self.position = load_checkpoint(checkpoint, self.model, self.optimizer) if checkpoint else Position()
        self.batches_per_epoch = len(self._batches(0, 0))
        self.samples_per_epoch = self.batches_per_epoch * self.batch_size

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the task's loss, of a batch that is brought to the model's device."""
        return self.task.loss(model, tuple(tensor.to(self.device, non_blocking=True) for tensor in batch))

    def warm_up(self) -> None:
        """Train a copy of the model on batches of an epoch that never comes: first batches are slow, and not timed."""
        config = self.config
        batches = itertools.islice(self._batches(self.epochs, 0), config.warm_up_batches)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            model = copy.deepcopy(self.model)
            optimizer = self.task.optimizer(model, lr=config.lr)
            with self._open_trainer(model, optimizer) as trainer:
                for _ in trainer.run(batches):
                    pass

    def _open_trainer(self, model: nn.Module, optimizer: Optimizer) -> Trainer:
        config = self.config
        return open_trainer(
            config.method,
            model,
            optimizer,
            self.loss,
            lockstep=config.turn == "lockstep",
            forward_threads=config.forward_threads,
            backward_threads=config.backward_threads,
            lanes=config.lanes,
        )

    def set_lr(self) -> float:
        """Set the learning rate that is due after the samples consumed so far, and return it."""
        lr = self.task.recipe.lr_at(
            self.position.samples, samples_per_epoch=self.samples_per_epoch, epochs=self.epochs, lr=self.config.lr
        )
        for group, share in zip(self.optimizer.param_groups, self._shares, strict=True):
            group["lr"] = lr * share
        return lr

    def next_batches(self) -> Iterator[Batch]:
        """Yield what is left of the present epoch."""
        return iter(self._batches(self.position.epoch, self.position.batch))

    def save(self, run: Run) -> None:
        """Write a checkpoint of this very position; nothing may be in flight."""
        self.position.peak_memory_bytes = max(self.position.peak_memory_bytes, peak_memory_bytes())
        run.flush()
        save_checkpoint(run.checkpoint, self.model, self.optimizer, self.position)

    def _batches(self, epoch: int, start: int) -> Batches:
        return Batches(
            self.split.train,
            self.batch_size,
            seed=self.config.seed,
            epoch=epoch,
            start=start,
            workers=self.task.workers,
        )


def train(session: Session, run: Run, observer: Observer, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Train to the end, and return the content of `result.json`.

    Args:
        session: where to start from.
        run: the folder that everything is written to.
        observer: who is told.
        stop: asked after each batch is taken; once it says yes, what was taken is finished and saved.

    Raises:
        Interrupted: if `stop` said yes.
    """
    position, patience = session.position, session.task.recipe.early_stopping_epochs
    observer.on_start(session, run)
    if not position.steps:
        session.save(run)  # from here on, a kill leaves something to resume
    session.warm_up()
    with session.trainer as trainer:
        while position.epoch < session.epochs and not _is_stale(position, patience):
            _train_epoch(session, run, trainer, observer, stop)
            _close_epoch(session, run, observer)
    result = _result(session)
    run.finish(result)
    return result


def _train_epoch(session: Session, run: Run, trainer: Trainer, observer: Observer, stop: Callable[[], bool]) -> None:
    """Train what is left of the epoch, in segments; between them all is drained and a checkpoint is written."""
    batches = session.next_batches()
    while session.position.batch < session.batches_per_epoch:
        _train_segment(session, run, trainer, _until_due(batches, session.config.checkpoint_every, stop), observer)
        if stop():
            session.save(run)
            raise Interrupted
        if session.position.batch < session.batches_per_epoch:
            session.save(run)


def _until_due(batches: Iterator[Batch], seconds: float, stop: Callable[[], bool]) -> Iterator[Batch]:
    end = time.monotonic() + seconds
    for batch in batches:
        yield batch
        if stop() or time.monotonic() >= end:
            return


def _train_segment(session: Session, run: Run, trainer: Trainer, batches: Iterator[Batch], observer: Observer) -> None:
    position = session.position
    before, start = position.train_s, time.perf_counter()
    lr = session.set_lr()
    for step in trainer.run(batches):
        position.batch += 1
        position.steps += 1
        position.samples += step.batch_size
        position.staleness += step.mean_staleness
        position.loss += step.loss
        position.train_s = before + time.perf_counter() - start
        run.add_step(
            {
                "step": position.steps - 1,
                "epoch": position.epoch,
                "loss": step.loss,
                "batch_size": step.batch_size,
                "staleness": round(step.mean_staleness, 4),
                "lr": lr,
                "train_s": round(position.train_s, 6),
            }
        )
        lr = session.set_lr()
        observer.on_step(session, step)
    position.train_s = before + time.perf_counter() - start


def _close_epoch(session: Session, run: Run, observer: Observer) -> None:
    position = session.position
    score = session.task.evaluate(session.model, session.split.test)
    train_loss = position.loss / session.batches_per_epoch
    position.epoch, position.batch, position.loss = position.epoch + 1, 0, 0.0
    if score.metric > position.best_metric:
        position.best_metric, position.best_epoch = score.metric, position.epoch
    if score.metric >= session.target and position.epochs_to_target is None:
        position.epochs_to_target, position.time_to_target_s = position.epoch, position.train_s
    row = {
        "epoch": position.epoch,
        "train_loss": train_loss,
        "test_loss": score.loss,
        "test_metric": score.metric,
        "train_s": position.train_s,
        "samples": position.samples,
        "samples_per_s": position.samples / position.train_s,
        "mean_staleness": position.staleness / position.steps,
    }
    position.history.append(row)
    run.add_epoch(row)
    session.save(run)
    observer.on_epoch(session, row)


def _is_stale(position: Position, patience: int | None) -> bool:
    return patience is not None and position.epoch - position.best_epoch >= patience


def _result(session: Session) -> dict[str, Any]:
    position, config = session.position, session.config
    return {
        "task": config.task,
        "method": config.method,
        "seed": config.seed,
        "metric": session.task.metric,
        "epochs": position.epoch,
        "best_metric": position.best_metric,
        "best_epoch": position.best_epoch,
        "final_metric": position.history[-1]["test_metric"],
        "target": session.target,
        "epochs_to_target": position.epochs_to_target,
        "time_to_target_s": position.time_to_target_s,
        "train_s": position.train_s,
        "samples": position.samples,
        "samples_per_s": position.samples / position.train_s,
        "mean_staleness": position.staleness / position.steps,
        "peak_memory_bytes": max(position.peak_memory_bytes, peak_memory_bytes()),
        "history": position.history,
    }


def peak_memory_bytes() -> int:
    """Return the most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device(name: str) -> torch.device:
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device must be one that this machine has (got {name}): use --device cpu")
    return torch.device(name)
