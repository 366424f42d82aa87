"""Progress: what a run tells its user. A live view on a terminal, one line per epoch elsewhere, or nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from asyncprop.dashboard import Dashboard, against_limit

if TYPE_CHECKING:
    from asyncprop.methods.session import Session
    from asyncprop.methods.train import Observer
    from asyncprop.runs import Run
    from asyncprop.trace import Step

REFRESH_S = 0.1
"""Seconds between two looks of the live view: it must not cost what a small batch costs."""
ROOM = 9
"""Lines that a terminal must have beside those for threads before they are drawn."""


def progress_on(stream: TextIO, *, quiet: bool) -> Observer:
    """Return the observer that suits `stream`."""
    if quiet:
        return Quiet()
    return Live(Console(file=stream)) if stream.isatty() else Lines(stream)


class Quiet:
    """Says nothing."""

    def on_start(self, session: Session, run: Run) -> None:
        """Say nothing."""

    def on_join(self, session: Session) -> None:
        """Say nothing."""

    def on_step(self, session: Session, step: Step) -> None:
        """Say nothing."""

    def on_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


class Lines(Quiet):
    """Writes plain lines, which suit a file or a pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def on_start(self, session: Session, run: Run) -> None:
        """Say what is trained."""
        print(headline(session, run), file=self._stream, flush=True)

    def on_join(self, session: Session) -> None:
        """Say what this rank trains now."""
        print(join_line(session), file=self._stream, flush=True)

    def on_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """Say how it stands."""
        print(epoch_line(session, row), file=self._stream, flush=True)


class All(Quiet):
    """Tells several observers."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_start(self, session: Session, run: Run) -> None:
        """Tell them that training starts."""
        for observer in self._observers:
            observer.on_start(session, run)

    def on_join(self, session: Session) -> None:
        """Tell them that this rank has joined others."""
        for observer in self._observers:
            observer.on_join(session)

    def on_step(self, session: Session, step: Step) -> None:
        """Tell them of a step."""
        for observer in self._observers:
            observer.on_step(session, step)

    def on_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """Tell them of an epoch."""
        for observer in self._observers:
            observer.on_epoch(session, row)

    def close(self) -> None:
        """Tell them that there is no more."""
        for observer in self._observers:
            observer.close()


class Live(Quiet):
    """Keeps a few lines up to date on a terminal, and leaves one line per epoch behind.

    A line for the run; below it, where the terminal is high enough, the threads, the queue, and staleness by layer.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._dashboard = Dashboard()
        self._progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=24),
            TextColumn(
                "loss {task.fields[loss]:.3f}  accuracy {task.fields[metric]}  {task.fields[rate]:,.0f} samples/s  "
                "staleness {task.fields[staleness]:.2f}"
            ),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            auto_refresh=False,
        )
        self._screen = Screen(self._progress, console=console, transient=True, auto_refresh=False)
        self._bar: Any = None
        self._metric = "–"
        self._loss = self._staleness = 0.0
        self._drawn = 0.0

    def on_start(self, session: Session, run: Run) -> None:
        """Say what is trained, and draw the line."""
        self._console.print(headline(session, run), highlight=False)
        self._bar = self._progress.add_task(
            "", total=session.epochs * session.batches_per_epoch, completed=session.position.steps,
            epoch=f"{session.position.epoch + 1}/{session.epochs}", loss=0.0, metric=self._metric, rate=0.0,
            staleness=0.0,
        )  # fmt: skip
        self._screen.start()

    def on_step(self, session: Session, step: Step) -> None:
        """Draw the line anew, ten times a second at most."""
        share = 0.1 if self._loss else 1.0
        self._loss += share * (step.loss - self._loss)
        self._staleness += share * (step.mean_staleness - self._staleness)
        if time.monotonic() - self._drawn >= REFRESH_S:
            self._drawn = time.monotonic()
            self._draw(session)

    def on_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """Leave a line above."""
        self._metric = f"{row['test_metric']:.3f}"
        self._console.print(epoch_line(session, row), highlight=False)
        self._draw(session)

    def close(self) -> None:
        """Take the live line away."""
        self._screen.stop()

    def _draw(self, session: Session) -> None:
        position = session.position
        self._progress.update(
            self._bar, completed=position.steps, epoch=f"{min(position.epoch + 1, session.epochs)}/{session.epochs}",
            loss=self._loss, metric=self._metric, rate=position.samples / max(position.train_s, 1e-9),
            staleness=self._staleness,
        )  # fmt: skip
        statistics, limit = session.trainer.statistics(), session.limit_samples_per_s
        limit = limit and limit / session.world.size  # statistics are of this rank
        self._dashboard.add(statistics)
        if self._console.height > len(statistics.threads) + ROOM:
            self._screen.update(Group(self._progress, self._dashboard.draw(self._console.width, limit)), refresh=True)
        else:
            self._screen.update(self._progress, refresh=True)


def headline(session: Session, run: Run) -> str:
    """Return what is trained, in one line; in another the session's remark, if it has one."""
    config = session.config
    parameters = sum(parameter.numel() for parameter in session.model.parameters())
    return (
        f"{config.task} by {config.method}: {session.task.summary}, {parameters:,} parameters, "
        f"{session.samples_per_epoch:,} samples in batches of {session.batch_size}, {session.epochs} epochs, "
        f"seed {config.seed} -> {run.path}" + (f"\n{session.remark}" if session.remark else "")
    )


def join_line(session: Session) -> str:
    """Return what a rank that has joined others trains with them, in one line."""
    config, epoch = session.config, session.position.epoch + 1
    return f"rank {session.world.rank} has joined: {config.task} by {config.method}, epoch {epoch}/{session.epochs}"


def epoch_line(session: Session, row: dict[str, Any]) -> str:
    """Return how a run stands after an epoch, in one line."""
    left = (session.epochs - row["epoch"]) * row["train_s"] / row["epoch"]
    return (
        f"epoch {row['epoch']}/{session.epochs}  loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
        f"{session.task.metric} {row['test_metric']:.4f}  "
        f"{against_limit(row['samples_per_s'], session.limit_samples_per_s)}  "
        f"staleness {row['mean_staleness']:.2f}  {row['train_s']:.1f} s, {left:.0f} s left"
    )


def result_line(result: dict[str, Any]) -> str:
    """Return what a finished run found, in one line."""
    reached = "not reached"
    if result["time_to_target_s"] is not None:
        reached = f"reached in {result['time_to_target_s']:.1f} s ({result['epochs_to_target']} epochs)"
    return (
        f"best {result['metric']} {result['best_metric']:.4f} (epoch {result['best_epoch']}), "
        f"target {result['target']:g} {reached}, {result['train_s']:.1f} s of training, "
        f"{result['samples_per_s']:,.0f} samples/s, staleness {result['mean_staleness']:.2f}, "
        f"peak memory {result['peak_memory_bytes'] / 2**20:,.0f} MiB"
    )
