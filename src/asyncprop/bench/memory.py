"""Bench memory: the peak memory of Async LU beyond SGD's, by lanes, beside (lanes - 1) × activations + gradients.

Told beside it: a backward pass may need more than the activations that it frees (an LSTM's does). Every backward pass
that runs at the same time as another has such a workspace of its own.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TextIO

from asyncprop.bench.workloads import WORKLOADS, Workload, one_step, set_threads
from asyncprop.engine.turn import Moment, Turn
from asyncprop.runs import environment

LANES = (1, 2, 3, 4)
NAMES = ("resnet18-width16", "lstm", "transformer")
"""Workloads whose activations are much larger than their gradients: what the formula is about."""
BATCHES = 8


def bench_memory(messages: TextIO) -> dict[str, Any]:
    """Measure SGD and Async LU, each in a process of its own that gives freed memory back at once."""
    rows = []
    for name in NAMES:
        workload = WORKLOADS[name]
        print(f"{name} ...", file=messages, flush=True)
        sgd = measure_alone(workload, 0)
        for lanes in LANES:
            ours = measure_alone(workload, lanes)
            expected = (lanes - 1) * sgd["activations"] + sgd["gradients"]
            workspaces = (_backward_threads(lanes) - 1) * sgd["workspace"]
            beyond = ours["peak"] - sgd["peak"]
            rows.append(
                {
                    "name": name,
                    "lanes": lanes,
                    "beyond_sgd_bytes": beyond,
                    "expected_bytes": expected,
                    "ratio": beyond / expected,
                    "workspaces_bytes": workspaces,
                    "ratio_with_workspaces": beyond / (expected + workspaces),
                    "activations_bytes": sgd["activations"],
                    "gradients_bytes": sgd["gradients"],
                    "sgd_peak_bytes": sgd["peak"],
                }
            )
    return {"rows": rows, "environment": environment()}


class AllForwardFirst(Turn):
    """A Turn that makes as many passes as there are lanes end their forward pass before the first of them writes.

    It is the worst case: every lane then holds all its activations. Later batches go on as they can.
    """

    def __init__(self, lanes: int, last_layer: int) -> None:
        self._missing = lanes
        self._last_layer = last_layer
        self._changed = threading.Condition()

    @contextmanager
    def at(self, batch: int, event: Moment, layer: int) -> Iterator[None]:
        """Count forward passes that have come to the last layer; let nobody write before all have."""
        with self._changed:
            if event == "write":
                self._changed.wait_for(lambda: self._missing <= 0)
            elif event == "read" and layer == self._last_layer:
                self._missing -= 1
                self._changed.notify_all()
        yield

    def stop(self) -> None:
        """Hold nobody any more."""
        with self._changed:
            self._missing = 0
            self._changed.notify_all()


def measure_alone(workload: Workload, lanes: int) -> dict[str, int]:
    """Return the `peak` in bytes of Async LU with so many lanes, or of SGD for none, in a process of its own.

    Of SGD also what a pass's `activations`, `gradients` and `workspace` take.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(workload, lanes, theirs))
    process.start()
    theirs.close()
    try:
        answer: dict[str, int] = ours.recv()
    finally:
        process.join()
    return answer


def _measure(workload: Workload, lanes: int, pipe: Connection) -> None:
    """Send the process's peak, in bytes; for no lanes that of SGD, with a pass's activations and gradients."""
    give_memory_back()
    set_threads(1)
    if lanes:
        _train_async(workload, lanes)
        pipe.send({"peak": peak_bytes()})
        return
    trained, batches = workload.make(), workload.batches()
    for _ in range(BATCHES):
        one_step(trained, next(batches))
    peak = peak_bytes()
    trained.optimizer.zero_grad()
    before = _resident()
    loss = trained.loss(trained.model, next(batches))
    activations = _resident() - before
    workspace = max(0, peak - before - activations)
    del loss
    gradients = sum(p.numel() * p.element_size() for p in trained.model.parameters() if p.requires_grad)
    pipe.send({"peak": peak, "activations": activations, "gradients": gradients, "workspace": workspace})


def _train_async(workload: Workload, lanes: int) -> None:
    from asyncprop import Decoupled, Engine
    from asyncprop.engine.layers import find_layers

    trained, batches = workload.make(), workload.batches()
    names = [name for name, _ in trained.model.named_parameters()]
    turn = AllForwardFirst(lanes, len(find_layers(trained.model, names)) - 1)
    workers = Decoupled(1, _backward_threads(lanes), lanes=lanes, intraop_threads=1)
    with Engine(trained.model, trained.optimizer, trained.loss, workers=workers, turn=turn) as engine:
        for _ in engine.run(next(batches) for _ in range(BATCHES)):
            pass


def _backward_threads(lanes: int) -> int:
    return min(2, lanes)


def give_memory_back() -> None:
    """Let the C library map every tensor of 64 KiB or more by itself, so that what is resident is what is alive."""
    try:
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
    except (OSError, AttributeError) as error:
        raise ValueError("bench memory needs glibc: without it, freed memory cannot be told from used") from error


def peak_bytes() -> int:
    """Return the most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
