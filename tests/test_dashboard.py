"""Dashboard and loggers: what a running trainer shows, and what a tracker is told."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from asyncprop.config import TrainConfig
from asyncprop.dashboard import BAR, Dashboard, against_limit, recent_staleness
from asyncprop.loggers import STEPS, Logged, tensorboard_observer
from asyncprop.methods.session import Session
from asyncprop.methods.train import train
from asyncprop.progress import All, Quiet
from asyncprop.runs import create_run
from asyncprop.trace import Statistics, ThreadTime


def seen(worked_s: float, versions: tuple[int, ...], staleness: tuple[float, ...]) -> Statistics:
    layers = tuple(f"layer{n}" for n in range(len(versions)))
    threads = (ThreadTime("thread-0", worked_s, 0.0), ThreadTime("thread-1", 0.0, worked_s))
    return Statistics(0, 0, 0, 1, 2, layers, versions, staleness, 0.5, 1, threads)


def drawn(dashboard: Dashboard, width: int = 80, limit: float | None = None) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width).print(dashboard.draw(width, limit))
    return stream.getvalue().splitlines()


def test_threads_are_shown_by_what_they_did_lately() -> None:
    dashboard = Dashboard()
    dashboard.add(seen(10.0, (1, 1), (0.0, 0.0)), now_s=100.0)
    assert "".join(drawn(dashboard)).strip() == ""
    dashboard.add(seen(10.5, (3, 3), (0.0, 2.0)), now_s=101.0)
    first, second, queue, strip = drawn(dashboard)
    assert first.count("█") == BAR // 2
    assert "50% inside passes" in first
    assert second.count("█") == 0
    assert "1 of 2 lanes in flight, 0.50 passes wait in the mean" in queue
    assert "first layer  █ last; █ = 3.00" in strip  # the second layer's two updates were 3 stale in the mean


def test_throughput_stands_against_the_limit() -> None:
    dashboard = Dashboard()
    for second, samples in ((0.0, 0), (1.0, 300)):
        dashboard.add(replace(seen(0.0, (1, 1), (0.0, 0.0)), samples=samples), now_s=second)
    (line,) = [line for line in drawn(dashboard, limit=1200.0) if "machine" in line]
    assert line.count("█") == BAR // 4
    assert "300 samples/s, 25% of an estimated limit of 1,200" in line
    assert not [line for line in drawn(dashboard) if "machine" in line]
    assert against_limit(1234.5, None) == "1,234 samples/s"


def test_what_is_long_ago_is_forgotten() -> None:
    dashboard = Dashboard()
    for second in range(10):
        dashboard.add(seen(5.0 * (second < 5), (1, 1), (0.0, 0.0)), now_s=float(second))
    assert " 0% inside passes" in drawn(dashboard)[0]


def test_many_layers_share_cells() -> None:
    dashboard = Dashboard()
    dashboard.add(seen(0.0, (0,) * 200, (0.0,) * 200), now_s=0.0)
    dashboard.add(seen(0.0, (1,) * 200, (1.0,) * 200), now_s=1.0)
    assert all(len(line) <= 80 for line in drawn(dashboard))
    assert drawn(dashboard)[-1].count("█") >= 40


def test_staleness_of_layers_without_an_update_is_unknown() -> None:
    before, now = seen(0.0, (2, 5), (1.0, 1.0)), seen(0.0, (4, 5), (2.0, 1.0))
    assert recent_staleness(before, now) == [3.0, None]
    dashboard = Dashboard()
    for moment in (0.0, 1.0):
        dashboard.add(before, now_s=moment)
    assert "no layer has been stepped lately" in drawn(dashboard)[-1]


class Noted:
    """A tracker in a few lines."""

    def __init__(self) -> None:
        self.numbers: list[tuple[int, dict[str, float]]] = []
        self.shapes: list[tuple[int, str, int]] = []
        self.closed = False

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.numbers.append((step, values))

    def histogram(self, step: int, name: str, values: Any) -> None:
        self.shapes.append((step, name, len(values)))

    def close(self) -> None:
        self.closed = True


def train_told(folder: Path, observer: Any, **options: Any) -> None:
    config = TrainConfig(task="digits", epochs=2, train_samples=640, test_samples=50, **options)
    with create_run(folder, config) as run:
        train(Session(config), run, observer)
    observer.close()


def test_a_tracker_is_told_means_of_steps_and_every_epoch(tmp_path: Path) -> None:
    noted = Noted()
    train_told(tmp_path / "run", All(Quiet(), Logged(lambda run: noted)), turn="lockstep")
    steps = [(step, values) for step, values in noted.numbers if "train/loss" in values]
    epochs = [(step, values) for step, values in noted.numbers if "test/accuracy" in values]
    assert [step for step, _ in steps] == [10, 20, 30, 40]  # 2 epochs of 20 batches
    assert STEPS == 10
    assert [step for step, _ in epochs] == [20, 40]
    assert steps[0][1]["train/loss"] > steps[-1][1]["train/loss"] > 0
    assert noted.shapes == [(20, "staleness/layers", 3), (40, "staleness/layers", 3)]
    assert noted.closed


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_told(tmp_path / "run", tensorboard_observer())
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "test/accuracy", "staleness/mean", "memory/peak_bytes"} <= set(events.Tags()["scalars"])
    assert events.Tags()["histograms"] == ["staleness/layers"]
    assert [event.step for event in events.Scalars("test/accuracy")] == [20, 40]
