"""Bench fleets: time to target of methods on more and more virtual devices, with and without a straggler among them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time
from typing import Any, TextIO

import torch

from asyncprop.config import SimulateConfig, resolve
from asyncprop.engine import NonFiniteError
from asyncprop.methods import METHODS
from asyncprop.methods.compare import parse_variants
from asyncprop.methods.session import Session
from asyncprop.methods.train import Observer, train
from asyncprop.runs import Run, create_run, environment, write_json
from asyncprop.simulate.session import SimulatedSession
from asyncprop.trace import Step

DEVICES = (3, 8, 32, 128, 256)
METHOD_NAMES = "ddp,lapsgd,async-lu,async-lu:compensation=attenuation,layup"
GRID = ((0.1, 0.9), (0.02, 0.9), (0.1, 0.0), (0.02, 0.0))
"""Learning rate and momentum, by falling lr / (1 - momentum): every method takes its best on each number of devices."""
SEEDS = 3
"""Of the best point: the others have the first seed only."""
STRAGGLER_S = 0.151
"""By which each step of the straggler takes longer: ten passes of the costs."""
TASK: dict[str, Any] = {
    "task": "digits", "batch_size": 4, "train_samples": 1024, "epochs": 25, "costs": "a100-resnet18", "target": 0.85,
}  # fmt: skip
"""256 batches an epoch, so that loops in step have none left over, with three devices one. The epochs are the least."""
LEAST_STEPS = 64
"""Of each device: where there are many, an epoch is few steps of each, and there are more epochs."""


@dataclass(frozen=True)
class Point:
    """One run; `method` is as `asyncprop compare` has it: `NAME`, or `NAME:OPTION=VALUE:...`."""

    method: str
    devices: int
    straggler: bool
    lr: float
    momentum: float
    seed: int

    def config(self) -> SimulateConfig:
        """How it is run: the straggler is a rank, or a worker where there is one replica."""
        (options,) = parse_variants(self.method).values()
        who = "rank" if METHODS[options["method"]].exchange else "worker"
        delay = f"{who}=0,seconds={STRAGGLER_S}" if self.straggler else None
        return resolve(SimulateConfig, {
            **TASK, "epochs": self._epochs(), **options, "devices": self.devices, "lr": self.lr,
            "momentum": self.momentum, "seed": self.seed, "delay": delay, "stop_at_target": True,
        }, None)  # fmt: skip

    def _epochs(self) -> int:
        return max(int(TASK["epochs"]), math.ceil(LEAST_STEPS * self.devices / _batches_per_epoch()))


class Unwatched(Observer):
    """Nobody is told."""

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


def bench_fleets(devices: str | None, methods: str | None, file: Path | None, messages: TextIO) -> dict[str, Any]:
    """Make the runs that are not made yet: by every point of GRID, and by the best of them with SEEDS and a straggler.

    Args:
        devices: how many, separated by commas; None for DEVICES.
        methods: as `asyncprop compare` has them; None for METHOD_NAMES.
        file: where results are kept after every run; those that are there are not made again.
        messages: where progress is told.

    Raises:
        ValueError: if a number or a row of methods is none, there are more devices than batches for ranks in step, or
            the file keeps runs of another task or straggler.
    """
    counts = _numbers(devices) if devices else DEVICES
    variants = parse_variants(methods or METHOD_NAMES)
    names = list(variants)
    _refuse_more_devices_than_batches(max(counts), [options["method"] for options in variants.values()])
    for name in names:
        Point(name, 1, False, 0.1, 0.0, 0).config()  # refuses wrong options before any run
    found = _kept(file)
    torch.set_num_threads(1)
    for point in _points(counts, names, found["runs"]):
        if _of(found["runs"], point) is None:
            row = {**asdict(point), **_run(point)}
            print(_told(row), file=messages, flush=True)
            found["runs"].append(row)
            found |= {**_setting(), "environment": environment()}
            if file:
                write_json(file, found)
    return found


def best_of(runs: list[dict[str, Any]], method: str, devices: int) -> dict[str, Any] | None:
    """Return a method's best run, first seed, no straggler: the first to the target, or else the most accurate.

    One that diverged is the best only where all did.
    """
    wanted = (method, devices, False, 0)
    ours = [run for run in runs if (run["method"], run["devices"], run["straggler"], run["seed"]) == wanted]
    return min(ours, key=lambda run: (_seconds(run), run["diverged"], -run["best_metric"]), default=None)


def _setting() -> dict[str, Any]:
    return {"task": TASK, "least_steps": LEAST_STEPS, "straggler_s": STRAGGLER_S}


def _kept(file: Path | None) -> dict[str, Any]:
    """Return what a file keeps of earlier calls; no runs, if it is new."""
    if file is None or not file.is_file():
        return {"runs": []}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        found["runs"]
        wrong = [name for name, value in _setting().items() if found.get(name) != value]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"json must be a new file, or one that bench fleets has written ({file}: {error})") from None
    if wrong:
        raise ValueError(f"json must keep runs of the same fleets ({file} differs in {', '.join(wrong)}): take another")
    return dict(found)


def _refuse_more_devices_than_batches(most: int, methods: list[str]) -> None:
    batches = _batches_per_epoch()
    in_step = [name for name in methods if METHODS[name].workers is None and METHODS[name].exchange]
    if in_step and most > batches:
        raise ValueError(
            f"devices must be at most the batches of an epoch, {batches}, for method {in_step[0]}, whose ranks take "
            f"one each in turn (got {most})"
        )


def _batches_per_epoch() -> int:
    return int(TASK["train_samples"] // TASK["batch_size"])


def _points(devices: tuple[int, ...], methods: list[str], runs: list[dict[str, Any]]) -> Iterator[Point]:
    for count in devices:
        for method in methods:
            before = None
            for lr, momentum in GRID:
                point = Point(method, count, False, lr, momentum, 0)
                yield point
                run = _of(runs, point)
                assert run
                if before and _seconds(run) >= before:
                    break  # smaller steps have begun to be slower
                before = run["time_to_target_s"]
            best = best_of(runs, method, count)
            assert best
            for straggler in (False, True):
                for seed in range(SEEDS):
                    yield Point(method, count, straggler, best["lr"], best["momentum"], seed)


def _seconds(run: dict[str, Any]) -> float:
    return float(run["time_to_target_s"] or math.inf)


def _of(runs: list[dict[str, Any]], point: Point) -> dict[str, Any] | None:
    wanted = asdict(point)
    return next((run for run in runs if all(run[name] == value for name, value in wanted.items())), None)


def _run(point: Point) -> dict[str, Any]:
    """Train until the target is reached, or to the end, and return what that took."""
    began = process_time()
    session = SimulatedSession(point.config())
    position, diverged = session.position, False
    with tempfile.TemporaryDirectory() as folder, create_run(Path(folder) / "run", point.config()) as run:
        try:
            train(session, run, Unwatched())
        except NonFiniteError:
            diverged = True
    return {
        "diverged": diverged,
        "time_to_target_s": position.time_to_target_s,
        "epochs_to_target": position.epochs_to_target,
        "best_metric": position.best_metric,
        "mean_staleness": position.staleness / max(1, position.steps),
        "steps": position.steps,
        "events": session.describe()["events"],
        "computing_s": process_time() - began,
    }


def _told(row: dict[str, Any]) -> str:
    time = f"{row['time_to_target_s']:.2f} s" if row["time_to_target_s"] else "not reached"
    straggler = ", a straggler" if row["straggler"] else ""
    who = f"{row['method']}, {row['devices']} devices{straggler}, seed {row['seed']}"
    best, computing = f"best {row['best_metric']:.3f}", f"{row['computing_s']:.1f} s of computing"
    return f"{who}, lr {row['lr']:g}, momentum {row['momentum']:g}: {time}, {best} ({computing})"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(number) for number in text.split(","))
    except ValueError:
        counts = (0,)
    if min(counts) < 1:
        raise ValueError(f"devices must be numbers >= 1, separated by commas (got {text})")
    return counts
