"""Workers: which threads run the passes. Decoupled: so many forward and backward passes; Coupled: each runs both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from asyncprop.clock import Clock
from asyncprop.delay import Delays
from asyncprop.devices import available_cores
from asyncprop.engine.channel import Closed
from asyncprop.engine.feed import Feed, Work
from asyncprop.engine.lane import Lane
from asyncprop.engine.lanes import Lanes
from asyncprop.engine.passes import Passes, Pending
from asyncprop.engine.roles import Roles
from asyncprop.engine.turn import NOTHING, Turn
from asyncprop.engine.update import Stopping
from asyncprop.recorder import Recorder
from asyncprop.trace import Kind, ThreadTime

GRACE_S = 0.8
"""How long a failed engine waits for its threads before it re-raises: one inside the user's code can't be ended."""


@dataclass(frozen=True, slots=True, init=False)
class Decoupled:
    """Forward and backward passes run on threads of their own (paper, Sec. 3.1).

    There are forward + backward threads. Which of them runs which pass is decided as passes end (see `Roles`): what
    counts is how many of each kind run at once.

    Args:
        forward: forward passes at once; or "auto": a plan that the engine makes on its first batches chooses all of
            these numbers (see `asyncprop.plan`). It takes as long as some 150 batches, on the CPU.
        backward: backward passes at once. The paper has 1 forward and 2 backward threads, since a backward
            pass takes about twice as long; 2 forward threads keep the cores busy when two passes end at once.
        lanes: passes in flight at most; bounds memory and staleness. Default: forward + backward, or as many passes
            as the device computes at once (one per core) if that is less: more only add staleness. So on one core
            there is one lane, and nothing is stale.
        intraop_threads: threads that one operation may use, per worker. Default: the cores shared out over the passes
            that can run at once. In lockstep the default is the caller's own `torch.get_num_threads()`.

    Attributes:
        auto: whether a plan is to choose; until it has, the numbers are the defaults.
    """

    forward: int
    backward: int
    lanes: int | None
    intraop_threads: int | None
    auto: bool = field(init=False)

    def __init__(
        self,
        forward: int | Literal["auto"] = 2,
        backward: int = 2,
        lanes: int | None = None,
        intraop_threads: int | None = None,
    ) -> None:
        auto = forward == "auto"
        if auto and (backward, lanes, intraop_threads) != (2, None, None):
            raise ValueError("backward, lanes and intraop_threads must be left out with forward='auto', which is all")
        if isinstance(forward, str) and not auto:
            raise ValueError(f"forward must be a number or 'auto' (got {forward!r})")
        numbers = {
            "forward": 2 if isinstance(forward, str) else forward,
            "backward": backward,
            "lanes": lanes,
            "intraop_threads": intraop_threads,
        }
        _at_least_one(**numbers)
        for name, value in {**numbers, "auto": auto}.items():
            object.__setattr__(self, name, value)

    @property
    def threads(self) -> int:
        """How many there are, of both kinds."""
        return self.forward + self.backward

    def lanes_on(self, passes_at_once: int | None) -> int:
        """Return the lanes on a device that computes so many passes at once (None: unknown)."""
        return self.lanes or min(self.threads, passes_at_once or self.threads)


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
    def threads(self) -> int:
        """How many there are."""
        return self.workers

    def lanes_on(self, passes_at_once: int | None) -> int:
        """Return the number of workers: each has a lane."""
        return self.workers


Workers = Decoupled | Coupled


def _at_least_one(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be >= 1 (got {count})")


def intraop_threads(workers: Workers, lanes: int, *, lockstep: bool) -> int:
    """Return the intra-op threads of each worker: as asked for, or the cores shared out (see `Decoupled`)."""
    if workers.intraop_threads:
        return workers.intraop_threads
    if lockstep:
        return torch.get_num_threads()
    return max(1, available_cores() // min(lanes, workers.threads))


class Watch:
    """Time that one thread has spent on passes; the rest of its life it waited."""

    def __init__(self, name: str, index: int, clock: Clock) -> None:
        self.name, self.index = name, index
        self.worked_s = 0.0
        self._clock = clock
        self._born = clock.now()
        self._life_s: float | None = None

    def stop(self) -> None:
        """End the thread's life."""
        self._life_s = self._clock.now() - self._born

    def read(self) -> ThreadTime:
        """Return the time so far."""
        life = self._life_s if self._life_s is not None else self._clock.now() - self._born
        return ThreadTime(self.name, self.worked_s, max(0.0, life - self.worked_s))


class Crew:
    """The running threads. They end when the feed is closed and what is in flight is finished, or on a failure.

    Args:
        workers: how many of which kind.
        feed: where batches come from and Steps go to.
        passes: how a pass is run.
        lanes: what passes run in.
        delays: who is slowed, and by how much.
        clock: of the threads.
        turn: who is asked before passes begin, change threads and end.
        recorder: of passes.
        intraop: threads that one operation may use.
        lockstep: whether there are no threads at all: then the caller's own runs each batch, by `train_inline`.
        on_finish: called after each batch that is finished, by the thread that finished it.
        on_error: called, once per thread at most, with what a thread died of.
    """

    def __init__(
        self,
        workers: Workers,
        feed: Feed,
        passes: Passes,
        lanes: Lanes,
        delays: Delays,
        clock: Clock,
        turn: Turn | None,
        recorder: Recorder | None,
        intraop: int,
        lockstep: bool,
        on_finish: Callable[[], None],
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._feed, self._passes, self._lanes = feed, passes, lanes
        self._clock, self._turn, self._recorder = clock, turn, recorder
        self._intraop, self._delays = intraop, delays
        self._on_finish, self._on_error = on_finish, on_error
        self.watches: list[Watch] = []
        self._threads: list[threading.Thread] = []
        self.inline = lockstep
        self._roles: Roles | None = None
        self._shares_lanes = lockstep or not isinstance(workers, Coupled)
        if lockstep:
            self.watches.append(Watch("caller", 0, clock))
        elif isinstance(workers, Coupled):
            self._add("worker", workers.threads, self._coupled)
        else:
            self._roles = Roles(workers.forward, workers.backward, lanes.count, clock)
            self._add("thread", workers.threads, self._decoupled)

    def start(self) -> None:
        """Start all threads."""
        for thread in self._threads:
            thread.start()

    def train_inline(self) -> None:
        """Take a batch, if there is one, and run both its passes on the calling thread.

        On the caller's thread, as PyTorch's intra-op threads serve the thread that used them first twice as fast as
        any other, and lockstep is to cost what the plain loop costs.
        """
        try:
            if (work := self._feed.take_now()) is None:
                return
            watch = self.watches[0]
            with self._passes.device.thread(self._intraop):
                self._finish(self._start(work, watch), watch)
        except BaseException as error:
            self._on_error(error)

    def stop(self) -> None:
        """Let no thread begin another pass."""
        if self._roles:
            self._roles.stop()

    def join(self, grace_s: float | None = None) -> list[str]:
        """Wait for all threads, or `grace_s` seconds at most; return the names of those that still run."""
        deadline = None if grace_s is None else time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _add(self, role: str, count: int, loop: Callable[[Watch], None]) -> None:
        for index in range(count):
            watch = Watch(f"{role}-{index}", index, self._clock)
            self.watches.append(watch)
            self._threads.append(self._clock.thread(self._run, (loop, watch), f"asyncprop-{watch.name}"))

    def _run(self, loop: Callable[[Watch], None], watch: Watch) -> None:
        try:
            with self._passes.device.thread(self._intraop):
                loop(watch)
        except (Closed, Stopping):
            pass
        except BaseException as error:
            self._on_error(error)
        finally:
            watch.stop()

    def _decoupled(self, watch: Watch) -> None:
        roles = self._roles
        assert roles
        while True:
            pending = roles.next()
            if pending is None:
                try:
                    work = self._feed.take()
                except Closed:
                    roles.close()
                    raise
                pending = self._start(work, watch)
                pending.queue_depth = roles.depth
                del work
                with self._turn.at(pending.work.index, "handover", -1) if self._turn else NOTHING:
                    self._record("forward", pending)
                    goes_on = roles.forward_done(pending)
                if not goes_on:
                    del pending  # the graph belongs to the thread that takes it on
                    continue
            self._finish(pending, watch)
            del pending
            roles.backward_done()

    def _coupled(self, watch: Watch) -> None:
        while True:
            work = self._feed.take()
            lane = self._lanes.lanes[watch.index]  # its own: private state and blocks belong to a worker
            pending = self._start(work, watch, lane)
            with self._turn.at(work.index, "handover", -1) if self._turn else NOTHING:
                self._record("forward", pending)
            self._finish(pending, watch)
            del lane, work, pending

    def _start(self, work: Work, watch: Watch, own: Lane | None = None) -> Pending:
        """Run the forward pass of a batch, in the thread's own lane if it has one."""
        if self._delays:
            self._delays.before_pass()
        clock = self._clock
        with self._turn.at(work.index, "forward", -1) if self._turn else NOTHING:
            lane = self._lane_for(work, own)
        start, worked = clock.now(), clock.worked()
        pending = self._passes.forward(lane, work)
        pending.begun_s = start
        watch.worked_s += clock.now() - start
        if self._delays:
            self._delays.after_forward(watch.index, work.index, clock.worked() - worked)
        return pending

    def _lane_for(self, work: Work, own: Lane | None) -> Lane:
        """Return the thread's own lane or the next free one, or else the free one that the turn chooses.

        Taken when the batch's turn has come: a thread that waited for it with a lane in hand might hold another's.
        There is always a free one, as `Roles` let no more passes begin than there are lanes.
        """
        lane = self._lanes.free.get() if own is None else own
        if not self._turn:
            return lane
        chosen = self._lanes.lanes[self._turn.lane(work.index, lane.index)]
        if own is None and chosen is not lane:
            self._lanes.free.swap(lane, chosen)
        return chosen

    def _record(self, kind: Kind, pending: Pending, start: float | None = None) -> None:
        if recorder := self._recorder:
            start = pending.begun_s if start is None else start
            recorder.add(kind, start, recorder.now(), pending.lane.index, pending.work.index)

    def _finish(self, pending: Pending, watch: Watch) -> None:
        if self._delays:
            self._delays.before_pass()
        clock, batch = self._clock, pending.work.index
        with self._turn.at(batch, "backward", -1) if self._turn else NOTHING:
            start, worked = clock.now(), clock.worked()
        step = self._passes.backward(pending, self._lanes.steppers[pending.lane.index])
        watch.worked_s += clock.now() - start
        if self._delays:
            self._delays.after_backward(watch.index, clock.worked() - worked)
        pending.losses.clear()  # frees the graph before the lane carries another
        with self._turn.at(batch, "done", -1) if self._turn else NOTHING:
            self._record("backward", pending, start)
            if self._shares_lanes:
                self._lanes.free.put(pending.lane)
        self._on_finish()
        self._feed.finish(pending.work, step)
