"""VirtualTime: a clock by which real threads take turns as if each took the time that it is told to.

One thread runs at a time, and holds the token. Each has a clock of its own. A thread that is told to let time pass, or
that waits for another, hands the token to the thread whose clock is least (of several, to the one made first); a thread
that is woken goes on no earlier than whoever woke it. So everything happens in the order of virtual time, and twice the
same way.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

from asyncprop.clock import Clock
from asyncprop.engine.update import Stopping


class StandstillError(RuntimeError):
    """All threads wait for each other: virtual time does not pass any more."""


class Process:
    """One thread in virtual time.

    Attributes:
        now_s: its clock.
        due_s: how long what it does now takes; its clock is set forward when it is asked for the token next.
        worked_s: what it has computed, without `due_s`.
        place: where it computes, as its rank has it; -1 before it does.
    """

    def __init__(self, name: str, order: int, now_s: float) -> None:
        self.name, self.order, self.now_s = name, order, now_s
        self.due_s = self.worked_s = 0.0
        self.place = -1
        self.ended = False
        self.awaited: list[Process] = []
        self.wake = threading.Lock()
        self.wake.acquire()

    def __lt__(self, other: Process) -> bool:
        return (self.now_s, self.order) < (other.now_s, other.order)


class VirtualTime(Clock):
    """The clock. The thread that makes it is its first, and has the token; threads that it makes are the others.

    Attributes:
        events: how often a thread was asked to let time pass.
    """

    def __init__(self) -> None:
        self.events = 0
        self._local = threading.local()
        self._made = 0
        self._processes: set[Process] = set()
        self._ready: list[Process] = []
        self._stopped = False
        self._stands_still = False
        self._local.process = self._make("caller", 0.0)

    # ---- time

    @property
    def process(self) -> Process:
        """The calling thread's."""
        process: Process = self._local.process
        return process

    def now(self) -> float:
        """Return the calling thread's virtual seconds."""
        process = self.process
        return process.now_s + process.due_s

    def worked(self) -> float:
        """Return the virtual seconds that the calling thread has computed."""
        process = self.process
        return process.worked_s + process.due_s

    def sleep(self, seconds: float, stopping: threading.Event) -> None:
        """Let so much time pass, after what is due."""
        self.settle()
        self.until(self.process.now_s + seconds)

    def settle(self) -> None:
        """Let what the calling thread does now take its time."""
        process = self.process
        process.worked_s += process.due_s
        due, process.due_s = process.due_s, 0.0
        self.until(process.now_s + due)

    def until(self, instant: float) -> None:
        """Let time pass until `instant`, and everybody go first whose clock is behind."""
        self.events += 1
        process = self.process
        process.now_s = max(process.now_s, instant)
        self.check()
        if self._ready and self._ready[0] < process:
            following = heapq.heapreplace(self._ready, process)
            following.wake.release()
            self._wait_for_token(process)

    # ---- threads

    def thread(self, target: Callable[..., Any], args: tuple[Any, ...], name: str) -> threading.Thread:
        """Make a thread whose clock starts when it is started."""
        return _Thread(self, target, args, name)

    def condition(self) -> threading.Condition:
        """Make a condition that threads of this clock wait for."""
        return _Condition(self)

    def lock(self) -> AbstractContextManager[Any]:
        """Make a lock that threads of this clock wait for."""
        return _Lock(self)

    def stop(self) -> None:
        """Let all threads run at once, raising `Stopping` when they wait, now and later: something has failed.

        Any thread may call it.
        """
        self._stopped = True
        for process in tuple(self._processes):
            with suppress(RuntimeError):  # released by another thread at this instant
                if process.wake.locked():
                    process.wake.release()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    def check(self) -> None:
        """Raise if it was stopped."""
        if self._stands_still:
            raise StandstillError("virtual time stands still: all threads wait for each other")
        if self._stopped:
            raise Stopping

    # ---- for the threads, conditions and locks of this file

    def _make(self, name: str, now_s: float) -> Process:
        self._made += 1
        process = Process(name, self._made, now_s)
        self._processes.add(process)
        return process

    def begin(self, name: str) -> Process:
        """Make a process that is ready at the caller's time."""
        process = self._make(name, self.now())
        heapq.heappush(self._ready, process)
        return process

    def enter(self, process: Process) -> None:
        """Be the thread of `process`: wait for the token."""
        self._local.process = process
        self._wait_for_token(process)

    def leave(self, process: Process) -> None:
        """End the calling thread's process: wake who waits for that, and hand on the token."""
        process.ended = True
        self._processes.discard(process)
        for waiting in process.awaited:
            self.ready(waiting)
        process.awaited.clear()
        if not self._stopped:
            self._hand_on()

    def park(self) -> None:
        """Hand on the token, and wait until another thread makes this one `ready`."""
        self.check()
        process = self.process
        assert not process.due_s, "what is due is settled before a thread waits"
        self._hand_on()
        self._wait_for_token(process)

    def ready(self, process: Process) -> None:
        """Let a thread that waits go on, no earlier than now."""
        process.now_s = max(process.now_s, self.now())
        heapq.heappush(self._ready, process)

    def _hand_on(self) -> None:
        if self._ready:
            heapq.heappop(self._ready).wake.release()
        else:
            self._stands_still = True
            self.stop()

    def _wait_for_token(self, process: Process) -> None:
        try:
            process.wake.acquire()
        except BaseException:  # Ctrl-C, in the main thread
            self.stop()
            raise
        self.check()


class _Thread(threading.Thread):
    """A thread that runs only while it has the token."""

    def __init__(self, time: VirtualTime, target: Callable[..., Any], args: tuple[Any, ...], name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._time, self._call, self._arguments = time, target, args
        self._process: Process | None = None

    def start(self) -> None:
        self._process = self._time.begin(self.name)
        super().start()

    def run(self) -> None:
        process = self._process
        assert process
        try:
            self._time.enter(process)
            self._call(*self._arguments)
        except Stopping:
            pass
        finally:
            self._time.leave(process)

    def join(self, timeout: float | None = None) -> None:
        process = self._process
        if process and not process.ended and not self._time.stopped:
            process.awaited.append(self._time.process)
            with suppress(Stopping, StandstillError):
                self._time.park()
        super().join(timeout)


class _Condition(threading.Condition):
    """A condition whose waiting threads hand on the token. Its lock is free whenever a thread waits for the token."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time
        self._parked: list[Process] = []

    def wait(self, timeout: float | None = None) -> bool:
        self._time.check()
        self._parked.append(self._time.process)
        saved = self._release_save()  # type: ignore[attr-defined]
        try:
            with suppress(Stopping, StandstillError):  # whoever waits looks first whether that was what it waited for
                self._time.park()
        finally:
            self._acquire_restore(saved)  # type: ignore[attr-defined]
        return True

    def notify(self, n: int = 1) -> None:
        woken, self._parked = self._parked[:n], self._parked[n:]
        for process in woken:
            self._time.ready(process)

    def notify_all(self) -> None:
        self.notify(len(self._parked))


class _Lock:
    """A lock that goes to whoever has waited longest."""

    def __init__(self, time: VirtualTime) -> None:
        self._changed = _Condition(time)
        self._is_held = False

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_held)
            self._is_held = True

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._is_held = False
            self._changed.notify()
