"""Bench gpu: Async LU against SGD on one CUDA device, interleaved, medians.

Only training is timed, in its steady state: batches are on the device before, each measurement has one engine, and it
is timed from one finished batch to another.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from asyncprop import BlockUpdate, Decoupled, Engine
from asyncprop.bench.workloads import Trained, Workload, one_step
from asyncprop.devices import tensors_in
from asyncprop.runs import environment
from asyncprop.tasks import Batch

WORKLOADS = (
    Workload("resnet18-width64-batch128", "synthetic-images", width=64, batch_size=128),
    Workload("resnet18-width8-batch32", "synthetic-images", width=8, batch_size=32),
    Workload("lstm", "synthetic-text"),
    Workload("transformer", "synthetic-characters"),
    Workload("mlp", "synthetic-vectors"),
)
ROUNDS = 5
BATCHES = 40
WARM_BATCHES = 8
"""Batches before each measurement that are not timed, beside one for each lane."""


@dataclass(frozen=True)
class Measured:
    """Seconds per batch, and the most memory that was allocated on the device meanwhile; 0 on the CPU."""

    batch_s: float
    peak_bytes: int


Measure = Callable[[Trained, Iterator[Batch], torch.device], Measured]
"""Trains, on batches without end that are on the device, and measures that."""


def bench_gpu(
    messages: TextIO, device: torch.device | None = None, workloads: tuple[Workload, ...] = WORKLOADS
) -> dict[str, Any]:
    """Measure every workload by SGD, Async LU and Async BU.

    Args:
        messages: where progress is told.
        device: what to measure; the CUDA device by default. (On the CPU it measures the same code; tests do.)
        workloads: what to train.

    Raises:
        ValueError: if there is no CUDA device, and no other was given.
    """
    if device is None:
        if not torch.cuda.is_available():
            raise ValueError("bench gpu needs a CUDA device (torch finds none): use asyncprop bench engine")
        device = torch.device("cuda")
    rows = []
    for workload in workloads:
        print(f"{workload.name} ...", file=messages, flush=True)
        rows += _rows(workload, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "rows": rows, "environment": environment()}


def _rows(workload: Workload, device: torch.device) -> list[dict[str, Any]]:
    methods: dict[str, Measure] = {
        "sgd": _sgd,
        "async-lu 1F2B": _async(Decoupled(1, 2), "layer"),
        "async-lu 2F2B": _async(Decoupled(2, 2), "layer"),
        "async-bu 2F2B": _async(Decoupled(2, 2), BlockUpdate()),
    }
    batches = _batches_on(workload, device)
    measured: dict[str, list[Measured]] = {name: [] for name in methods}
    for _ in range(ROUNDS):
        for name, measure in methods.items():
            _free_what_is_left(device)
            measured[name].append(measure(_on(workload, device), itertools.cycle(batches), device))
    median = {name: statistics.median(one.batch_s for one in all_) for name, all_ in measured.items()}
    return [
        {
            "name": workload.name,
            "method": name,
            "seconds_per_batch": median[name],
            "speed_up": median["sgd"] / median[name],
            "peak_memory_bytes": max(one.peak_bytes for one in measured[name]),
        }
        for name in methods
    ]


def _batches_on(workload: Workload, device: torch.device) -> list[Batch]:
    """Return the workload's distinct batches, on the device."""
    distinct = itertools.islice(workload.batches(), workload.distinct)
    return [tuple(tensor.to(device) for tensor in tensors_in(batch)) for batch in distinct]


def _on(workload: Workload, device: torch.device) -> Trained:
    """Return what is trained, on the device."""
    made = workload.make()
    model = made.model.to(device)
    return Trained(model, type(made.optimizer)(model.parameters(), **made.optimizer.defaults), made.loss)


def _sgd(trained: Trained, batches: Iterator[Batch], device: torch.device) -> Measured:
    for _ in range(WARM_BATCHES):
        one_step(trained, next(batches))
    _reset_peak(device)
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(BATCHES):
        one_step(trained, next(batches))
    _synchronize(device)
    return Measured((time.perf_counter() - start) / BATCHES, _peak_bytes(device))


def _async(workers: Decoupled, update: Any) -> Measure:
    """Return what measures an engine, over whole bursts: lanes that run abreast finish their batches together.

    Nothing is synchronised: a Step is handed out once the device has finished it, and a caller that waits for more
    than that finds Steps finished which it did not time.
    """

    def measure(trained: Trained, batches: Iterator[Batch], device: torch.device) -> Measured:
        with Engine(trained.model, trained.optimizer, trained.loss, workers=workers, update=update) as engine:
            lanes = engine.statistics().lanes
            count = math.ceil(BATCHES / lanes) * lanes
            steps: Any = engine.run(batches)
            for _ in range(WARM_BATCHES + lanes):
                next(steps)
            _reset_peak(device)
            start = time.perf_counter()
            for _ in range(count):
                next(steps)
            seconds = time.perf_counter() - start
            peak = _peak_bytes(device)
            steps.close()
        return Measured(seconds / count, peak)

    return measure


def _free_what_is_left(device: torch.device) -> None:
    """Free what earlier measurements have left, so that each counts its own memory alone; nothing may be in flight.

    That is their models, and the workspaces of cuBLAS: one for each pair of a thread's handle and a stream.
    """
    gc.collect()
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if device.type == "cuda" and clear:
        torch.cuda.synchronize(device)
        clear()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
