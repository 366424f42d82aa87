"""Workers: which threads run the passes. Decoupled: forward and backward threads; Coupled: each runs both."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from asyncprop.engine.channel import Channel, Closed
from asyncprop.engine.feed import Feed
from asyncprop.engine.lane import Lane
from asyncprop.engine.passes import Passes, Pending
from asyncprop.engine.update import Stepper, Stopping
from asyncprop.trace import ThreadTime

GRACE_S = 0.8
"""How long a failed engine waits for its threads before it re-raises: one inside the user's code can't be ended."""


@dataclass(frozen=True, slots=True)
class Decoupled:
    """Forward threads hand each pass over to backward threads (paper, Sec. 3.1).

    Args:
        forward: threads that run forward passes.
        backward: threads that run backward passes; the paper takes 2, since a backward pass takes about twice as long.
        lanes: passes in flight at most; bounds memory and staleness. Default: forward + backward. Fewer lanes mean
            less staleness, and idle threads where passes are uneven.
        intraop_threads: threads that one operation may use, per worker. Default: the cores shared out over the passes
            that can run at once. In lockstep the default is the caller's own `torch.get_num_threads()`.
    """

    forward: int = 1
    backward: int = 2
    lanes: int | None = None
    intraop_threads: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(
            forward=self.forward, backward=self.backward, lanes=self.lanes, intraop_threads=self.intraop_threads
        )

    @property
    def lane_count(self) -> int:
        """Passes in flight at most."""
        return self.lanes or self.forward + self.backward

    @property
    def thread_count(self) -> int:
        """Threads that compute."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class Coupled:
    """Each worker runs the forward and the backward pass of its batch, in a lane of its own (Hogwild! and its kin).

    Args:
        workers: threads, and lanes.
        intraop_threads: as for `Decoupled`.
    """

    workers: int = 2
    intraop_threads: int | None = None

    def __post_init__(self) -> None:
        _at_least_one(workers=self.workers, intraop_threads=self.intraop_threads)

    @property
    def lane_count(self) -> int:
        """Passes in flight at most."""
        return self.workers

    @property
    def thread_count(self) -> int:
        """Threads that compute."""
        return self.workers


Workers = Decoupled | Coupled


def _at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be >= 1 (got {count})")


def intraop_threads(workers: Workers, *, lockstep: bool) -> int:
    """Return the intra-op threads of each worker: as asked for, or the cores shared out (see `Decoupled`)."""
    if workers.intraop_threads:
        return workers.intraop_threads
    if lockstep:
        return torch.get_num_threads()
    return max(1, available_cores() // min(workers.lane_count, workers.thread_count))


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Clock:
    """Time that one thread has spent on passes; the rest of its life it waited."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.worked_s = 0.0
        self._born = time.perf_counter()
        self._life_s: float | None = None

    def stop(self) -> None:
        """End the thread's life."""
        self._life_s = time.perf_counter() - self._born

    def read(self) -> ThreadTime:
        """Return the time so far."""
        life = self._life_s if self._life_s is not None else time.perf_counter() - self._born
        return ThreadTime(self.name, self.worked_s, max(0.0, life - self.worked_s))


class Crew:
    """The running threads. They end when the feed is closed and what is in flight is finished, or on a failure.

    Args:
        workers: how many of which kind.
        feed: where batches come from and Steps go to.
        passes: how a pass is run.
        free: the lanes that carry no pass.
        steppers: one per lane, by its index; emptied and filled only while nothing is in flight.
        on_error: called, once per thread at most, with what a thread died of.
    """

    def __init__(
        self,
        workers: Workers,
        feed: Feed,
        passes: Passes,
        free: Channel[Lane],
        steppers: list[Stepper],
        intraop: int,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._feed, self._passes, self._free, self._steppers = feed, passes, free, steppers
        self._intraop, self._on_error = intraop, on_error
        self.pendings: Channel[Pending] = Channel(capacity=workers.lane_count)
        self.clocks: list[Clock] = []
        self._threads: list[threading.Thread] = []
        if isinstance(workers, Coupled):
            self._add("worker", workers.workers, self._coupled)
        else:
            self._forward_left = workers.forward
            self._ending = threading.Lock()
            self._add("forward", workers.forward, self._forward)
            self._add("backward", workers.backward, self._backward)

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def join(self, grace_s: float | None = None) -> list[str]:
        """Wait for all threads, or `grace_s` seconds at most; return the names of those that still run."""
        deadline = None if grace_s is None else time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _add(self, role: str, count: int, loop: Callable[[Clock], None]) -> None:
        for index in range(count):
            clock = Clock(f"{role}-{index}")
            self.clocks.append(clock)
            self._threads.append(
                threading.Thread(target=self._run, args=(loop, clock), name=f"asyncprop-{clock.name}", daemon=True)
            )

    def _run(self, loop: Callable[[Clock], None], clock: Clock) -> None:
        try:
            self._passes.device.prepare_thread(self._intraop)
            loop(clock)
        except (Closed, Stopping):
            pass
        except BaseException as error:
            self._on_error(error)
        finally:
            clock.stop()

    def _forward(self, clock: Clock) -> None:
        try:
            while True:
                work = self._feed.take()
                lane = self._free.get()  # waits while all lanes carry passes: the back-pressure
                start = time.perf_counter()
                pending = self._passes.forward(lane, work)
                clock.worked_s += time.perf_counter() - start
                pending.queue_depth = len(self.pendings)
                self.pendings.put(pending)
                del pending, lane, work  # the graph belongs to the backward thread now
        finally:
            with self._ending:
                self._forward_left -= 1
                if not self._forward_left:
                    self.pendings.close()

    def _backward(self, clock: Clock) -> None:
        while True:
            self._finish(self.pendings.get(), clock)

    def _coupled(self, clock: Clock) -> None:
        while True:
            work = self._feed.take()
            lane = self._free.get()
            start = time.perf_counter()
            pending = self._passes.forward(lane, work)
            clock.worked_s += time.perf_counter() - start
            self._finish(pending, clock)
            del pending, lane, work

    def _finish(self, pending: Pending, clock: Clock) -> None:
        start = time.perf_counter()
        step = self._passes.backward(pending, self._steppers[pending.lane.index])
        clock.worked_s += time.perf_counter() - start
        pending.losses.clear()  # frees the graph before the lane carries another
        self._free.put(pending.lane)
        self._feed.finish(pending.work, step)
