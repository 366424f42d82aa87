"""Train: the one training loop of all methods. Epochs of batches, evaluation, checkpoints, and the result."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from asyncprop.exchange import LeftOut
from asyncprop.methods import telemetry
from asyncprop.methods.journal import Journal
from asyncprop.methods.meeting import Meeting
from asyncprop.methods.session import Session, peak_memory_bytes
from asyncprop.methods.shares import Share
from asyncprop.methods.telemetry import Telemetry
from asyncprop.methods.trainer import Trainer
from asyncprop.runs import Run
from asyncprop.tasks import Batch
from asyncprop.trace import Step

log = logging.getLogger("asyncprop")


class Observer(Protocol):
    """Who is told of a run as it goes on."""

    def on_start(self, session: Session, run: Run) -> None:
        """Tell that training starts, or goes on."""

    def on_join(self, session: Session) -> None:
        """Tell that this rank has taken over the training as it stands from others."""

    def on_step(self, session: Session, step: Step) -> None:
        """Tell of a finished batch."""

    def on_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """Tell of a finished epoch; `row` is its line of `epochs.jsonl`."""

    def close(self) -> None:
        """Tell that there is nothing more to tell."""


class Interrupted(Exception):  # noqa: N818 (asked for, not an error)
    """The run was asked to stop; all that was taken is finished, and a checkpoint is written."""


class Left(Interrupted):
    """A guest was asked to stop, and leaves, as all have met: what it did is in the others' model."""


def train(
    session: Session,
    run: Run | None,
    observer: Observer,
    stop: Callable[[], bool] = lambda: False,
    take_over: Callable[[], Run] | None = None,
) -> dict[str, Any]:
    """Train to the end, and return the content of `result.json`.

    Args:
        session: where to start from.
        run: the folder that everything is written to; None on all ranks but the first.
        observer: who is told.
        stop: asked after each batch is taken; once it says yes, what was taken is finished and saved.
        take_over: opens the folder on a rank that becomes the first, as those before it have died.

    Raises:
        Interrupted: if `stop` said yes.
        Left: if it did so on a guest (see `World`) alone, and others go on.
        LeftOut: if the others took this rank for dead, and have finished.
    """
    position = session.position
    if run:
        observer.on_start(session, run)
    journal = Journal(session.world, run, take_over)
    if not position.steps and not session.world.is_joining:
        _save_start(session, journal)
    session.warm_up()
    session.measure_limit()
    with _traced(session, journal), _entered(session, journal, observer) as trainer:
        while not _is_over(session):
            try:
                before = trainer.statistics()
                _train_epoch(session, journal, trainer, observer, stop)
                noted = telemetry.between(
                    before, trainer.statistics(), rank=session.world.rank, peak_memory_bytes=peak_memory_bytes()
                )
                _close_epoch(session, journal, observer, telemetry.merge(session.world.gather(noted)))
            except LeftOut:  # the others went on without this rank: it takes over what they have done since
                journal.leave()
                _join(session, observer)
        exchanged = trainer.statistics().exchange
    result = _result(session, exchanged)
    _finish(session, journal, result)
    return result


def _save_start(session: Session, journal: Journal) -> None:
    """Write a checkpoint of the start: from here on, a kill leaves something to resume."""
    try:
        session.save(journal)
    except LeftOut:
        _start_over(session, journal)


@contextmanager
def _entered(session: Session, journal: Journal, observer: Observer) -> Iterator[Trainer]:
    """Enter the trainer; a rank that joins, when it has what the others train: also if it was left out as it began."""
    with ExitStack() as stack:
        trainer: Trainer | None = None
        while trainer is None:
            if session.world.is_joining:
                _join(session, observer)
            try:
                trainer = stack.enter_context(session.trainer)
            except LeftOut:
                _start_over(session, journal)
        yield trainer


def _join(session: Session, observer: Observer) -> None:
    session.join()
    observer.on_join(session)


def _start_over(session: Session, journal: Journal) -> None:
    journal.leave()
    session.start_over()


@contextmanager
def _traced(session: Session, journal: Journal) -> Iterator[None]:
    """Save the trace when training ends, however it ends: what led to a failure is what one wants to see."""
    try:
        yield
    except BaseException as error:
        try:
            _save_trace(session, journal.run)
        except Exception as another:  # a full disk must not hide why training ended
            error.add_note(f"the trace could not be saved: {another}")
        raise
    _save_trace(session, journal.run)


def _save_trace(session: Session, run: Run | None) -> None:
    if run and session.recorder:
        session.recorder.trace().save(run.trace)


def _train_epoch(
    session: Session, journal: Journal, trainer: Trainer, observer: Observer, stop: Callable[[], bool]
) -> None:
    """Train what is left of the epoch, in segments; between them all is drained and a checkpoint is written."""
    while session.position.batch < session.batches_per_epoch:
        _train_segment(session, journal, trainer, observer, stop)
        _end_if_asked(session, journal, is_asked=stop())
        if session.position.batch < session.batches_per_epoch:
            session.save(journal)


def _end_if_asked(session: Session, journal: Journal, *, is_asked: bool) -> None:
    """End the run if a rank was asked to; a guest that was leaves it alone, unless nobody else would be left.

    Guarantees: nothing is lost with a guest. All have just met, and are equal; and the others train, and gossip, only
    after a next `gather`, for which they wait until it has said goodbye, with its exchange closed.
    """
    world = session.world
    wishes = dict(world.gather((world.rank, is_asked and ("leave" if world.is_guest else "stop"))))
    if "stop" in wishes.values() or all(wishes.values()):
        session.save(journal)
        raise Interrupted
    if is_asked:
        raise Left
    for rank in (rank for rank, wish in wishes.items() if wish):
        log.warning("rank %d: rank %d leaves: going on without it", world.rank, rank)


def _train_segment(
    session: Session, journal: Journal, trainer: Trainer, observer: Observer, stop: Callable[[], bool]
) -> None:
    """Train on a share of the epoch's batches, until all of them are used, a checkpoint is due, or `stop` says so."""
    position, share, meeting = session.position, session.open_share(), Meeting(session.position)
    seconds = session.config.checkpoint_every if session.world.is_first else math.inf
    batches = _until_due(session.next_batches(share), share, seconds, stop)
    before, now = position.train_s, session.clock.now
    start = now()
    lr = session.set_lr()
    for step in trainer.run(batches):
        position.add(step)
        position.train_s = before + now() - start
        row = {
            "step": position.steps - 1,
            "epoch": position.epoch,
            "rank": session.world.rank,
            "loss": step.loss,
            "batch_size": step.batch_size,
            "staleness": round(step.mean_staleness, 4),
            "queue_depth": step.queue_depth,
            "forward_s": round(step.forward_s, 6),
            "backward_s": round(step.backward_s, 6),
            "waited_s": round(step.waited_s, 6),
            "lr": lr,
            "train_s": round(position.train_s, 6),
        }
        if session.recorder:
            row["batch"] = step.index  # as its events have it
        if session.world.size > 1:
            meeting.rows.append(row)
        elif journal.run:
            journal.run.add_step(row)
        lr = session.set_lr(share.others)
        observer.on_step(session, step)
    session.close_share()
    trainer.settle()
    position.train_s = before + now() - start
    position.batch = session.batches_per_epoch if share.ended is None else share.ended
    if session.world.size > 1:
        meeting.merge(session, share, journal)


def _until_due(batches: Iterator[Batch], share: Share, seconds: float, stop: Callable[[], bool]) -> Iterator[Batch]:
    """Yield the share's batches, and end the share when so many seconds have passed, or `stop` says so."""
    end = time.monotonic() + seconds
    is_ended = False
    for batch in batches:
        yield batch
        if not is_ended and (stop() or time.monotonic() >= end):
            is_ended = True
            share.stop()


def _close_epoch(session: Session, journal: Journal, observer: Observer, noted: Telemetry) -> None:
    position = session.position
    score = None
    while score is None:  # again, if the first rank dies at it
        own = session.task.evaluate(session.model, session.split.test) if session.world.is_first else None
        score = next((given for given in session.world.gather(own) if given is not None), None)
    train_loss = position.loss / max(1, position.epoch_steps)
    position.close_epoch(score.metric)
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
    if exchanged := session.trainer.statistics().exchange:
        row["exchange"] = exchanged
    position.history.append(row)
    journal.add_epoch({**row, **noted})
    session.save(journal)
    if journal.run:
        observer.on_epoch(session, {**row, **noted})


def _finish(session: Session, journal: Journal, result: dict[str, Any]) -> None:
    """Write the result. If the first rank dies at it, the next one writes; so all wait until it is on the disk."""
    is_written = False
    while not is_written:
        if run := journal.write():
            run.finish(result)
        is_written = any(session.world.gather(run is not None))


def _is_over(session: Session) -> bool:
    position, patience = session.position, session.task.recipe.early_stopping_epochs
    is_stale = patience is not None and position.epoch - position.best_epoch >= patience
    is_enough = session.config.stop_at_target and position.epochs_to_target is not None
    return position.epoch >= session.epochs or is_stale or is_enough


def _result(session: Session, exchanged: dict[str, float]) -> dict[str, Any]:
    position, config, members = session.position, session.config, session.world.members
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
        "limit_samples_per_s": session.limit_samples_per_s,
        "mean_staleness": position.staleness / position.steps,
        "ranks": len(members.among) if members else session.world.size,
        "ranks_lost": sorted(members.lost) if members else [],
        "ranks_joined": sum(rank >= members.size for rank in members.among) if members else 0,
        "exchange": exchanged,
        "peak_memory_bytes": position.peak_memory_bytes,
        **session.describe(),
        "history": position.history,
    }
