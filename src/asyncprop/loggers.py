"""Logger: where the numbers of a run go as it is trained: TensorBoard here, any other tracker in a file like this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from asyncprop.progress import Quiet

if TYPE_CHECKING:
    from asyncprop.methods.session import Session
    from asyncprop.methods.train import Observer
    from asyncprop.runs import Run
    from asyncprop.trace import Step

STEPS = 10
"""Steps are told in means over so many: a line for each batch is more than can be seen, and slows small batches."""


class Logger(Protocol):
    """What a tracker has to offer. `step` counts finished batches, from the start of the run, resumed or not."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Note numbers by name; a name's first part, up to a slash, is its group."""

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Note how values are distributed, as staleness over layers."""

    def close(self) -> None:
        """Note nothing any more."""


class Logged(Quiet):
    """Tells a Logger of a run: losses, staleness and times of steps; all that epochs report.

    Args:
        make: makes the Logger once the run's folder is known.
    """

    def __init__(self, make: Callable[[Run], Logger]) -> None:
        self._make = make
        self._logger: Logger | None = None
        self._steps: list[Step] = []

    def on_start(self, session: Session, run: Run) -> None:
        """Make the Logger."""
        self._logger = self._make(run)

    def on_step(self, session: Session, step: Step) -> None:
        """Tell of the last steps, once there are enough of them. A rank without a run folder tells nothing."""
        if not self._logger:
            return
        self._steps.append(step)
        if len(self._steps) < STEPS:
            return
        steps, self._steps = self._steps, []
        means = {
            "train/loss": [one.loss for one in steps],
            "staleness/mean": [one.mean_staleness for one in steps],
            "passes/forward_s": [one.forward_s for one in steps],
            "passes/backward_s": [one.backward_s for one in steps],
            "passes/queue_depth": [float(one.queue_depth) for one in steps],
        }
        values = {name: sum(numbers) / len(numbers) for name, numbers in means.items()}
        values["train/lr"] = float(session.optimizer.param_groups[0]["lr"])
        self._logger.scalars(session.position.steps, values)

    def on_epoch(self, session: Session, row: dict[str, Any]) -> None:
        """Tell of an epoch, and of the staleness of its layers."""
        if not self._logger:  # the first rank has died, and with it what it logged to
            return
        step = session.position.steps
        names = {
            "test/loss": "test_loss", f"test/{session.task.metric}": "test_metric", "train/epoch_loss": "train_loss",
            "train/samples_per_s": "samples_per_s", "memory/peak_bytes": "peak_memory_bytes",
        }  # fmt: skip
        self._logger.scalars(step, {name: float(row[key]) for name, key in names.items()})
        ages = [float(age) for age in row["staleness_by_layer"].values() if age is not None]
        if ages:
            self._logger.histogram(step, "staleness/layers", ages)

    def close(self) -> None:
        """Close the Logger."""
        if self._logger:
            self._logger.close()


class TensorBoard:
    """A Logger that writes TensorBoard's event files.

    Args:
        folder: that they are written to: `tensorboard --logdir` takes it, or any folder above it.

    Raises:
        ValueError: if tensorboard is not installed.
    """

    def __init__(self, folder: str) -> None:
        self._writer: Any = _writer_class()(folder)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Note numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        """Note how values are distributed."""
        import torch

        self._writer.add_histogram(name, torch.tensor(values), step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def tensorboard_observer() -> Observer:
    """Return the observer that writes `tensorboard/` in the run's folder; a ValueError tells if that cannot be."""
    _writer_class()
    return Logged(lambda run: TensorBoard(str(run.path / "tensorboard")))


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard must be installed for --tensorboard: pip install 'asyncprop[report]'") from None
    return SummaryWriter
