"""Bench gpu: Async LU against SGD on one CUDA device, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
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

Train = Callable[[int], None]
"""Trains on so many batches, and returns when the device is done."""


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
    methods: dict[str, Callable[[Trained, Iterator[Batch]], Train]] = {
        "sgd": _sgd(device),
        "async-lu 1F2B": _async(Decoupled(1, 2), "layer"),
        "async-lu 2F2B": _async(Decoupled(2, 2), "layer"),
        "async-bu 2F2B": _async(Decoupled(2, 2), BlockUpdate()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    memory = dict.fromkeys(methods, 0)
    for _ in range(ROUNDS):
        for name, make in methods.items():
            train = make(*_on(workload, device))
            train(WARM_BATCHES)
            _reset_memory(device)
            start = time.perf_counter()
            train(BATCHES)
            seconds[name].append((time.perf_counter() - start) / BATCHES)
            memory[name] = max(memory[name], _peak_memory(device))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "name": workload.name,
            "method": name,
            "seconds_per_batch": median[name],
            "speed_up": median["sgd"] / median[name],
            "peak_memory_bytes": memory[name],
        }
        for name in methods
    ]


def _on(workload: Workload, device: torch.device) -> tuple[Trained, Iterator[Batch]]:
    """Return a workload whose model and batches are on the device."""
    made = workload.make()
    model = made.model.to(device)
    optimizer = type(made.optimizer)(model.parameters(), **made.optimizer.defaults)
    batches = (tuple(tensor.to(device) for tensor in tensors_in(batch)) for batch in workload.batches())
    return Trained(model, optimizer, made.loss), batches


def _sgd(device: torch.device) -> Callable[[Trained, Iterator[Batch]], Train]:
    def make(trained: Trained, batches: Iterator[Batch]) -> Train:
        def train(count: int) -> None:
            for _ in range(count):
                one_step(trained, next(batches))
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return train

    return make


def _async(workers: Decoupled, update: Any) -> Callable[[Trained, Iterator[Batch]], Train]:
    def make(trained: Trained, batches: Iterator[Batch]) -> Train:
        def train(count: int) -> None:
            with Engine(trained.model, trained.optimizer, trained.loss, workers=workers, update=update) as engine:
                for _ in engine.run(next(batches) for _ in range(count)):
                    pass

        return train

    return make


def _reset_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
