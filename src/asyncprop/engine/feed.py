"""Feed: hands batches to the threads, takes their Steps back, and knows what is in flight.

Batches come from a loader (`start`), from which whichever thread is free takes the next, or one by one (`submit`).
Each is handed out once; each comes back once, as a Step or in the failure that ended the engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from asyncprop.clock import SYSTEM, Clock
from asyncprop.engine.channel import Closed
from asyncprop.trace import Step


@dataclass(eq=False, slots=True)
class Work:
    """A batch on its way: its index in the order of taking, and, if it was submitted, the future that waits for it."""

    batch: Any
    future: Future[Step] | None = None
    index: int = -1


@dataclass(slots=True)
class Tally:
    """Counts of finished batches; `queue_depth` is the sum over them."""

    batches: int = 0
    samples: int = 0
    skipped: int = 0
    queue_depth: int = 0
    max_queue_depth: int = 0

    def count(self, step: Step) -> None:
        """Count one batch."""
        self.batches += 1
        self.samples += step.batch_size
        self.skipped += step.skipped
        self.queue_depth += step.queue_depth
        self.max_queue_depth = max(self.max_queue_depth, step.queue_depth)


class Feed:
    """The engine's face towards the caller. All waiting is on one condition; a failure wakes everybody.

    Args:
        on_batch: called with each batch that is handed out, by the thread that took it, one at a time.
        clock: of the threads.
    """

    def __init__(self, on_batch: Callable[[Any], None], clock: Clock = SYSTEM) -> None:
        self.failure: BaseException | None = None
        self.tally = Tally()
        self._on_batch = on_batch
        self._changed = clock.condition()
        self._front = clock.lock()  # held by the thread that is next to take: loaders are not thread-safe
        self._iterator: Iterator[Any] | None = None
        self._lead = 0  # batches that may be taken from the loader before the caller asks for another Step
        self._resting = False  # whether the caller wants nothing taken from the loader
        self._taking = False  # whether a thread is inside the loader
        self._submitted: deque[Work] = deque()
        self._out: set[Work] = set()
        self._taken = 0
        self._finished: deque[Step] = deque()
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Batches handed out and not yet finished."""
        return len(self._out)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight and nothing more can be taken."""
        has_loader = self._iterator is not None  # its truth may be asked of a length that it does not have
        return not (self._out or self._submitted or self._taking or has_loader)

    # ---- the caller's side

    def start(self, iterator: Iterator[Any], lead: int) -> None:
        """Let the threads take batches from `iterator`, at most `lead` ahead of the Steps that the caller has had."""
        with self._changed:
            self._finished.clear()
            self._iterator, self._lead = iterator, lead
            self._changed.notify_all()

    def next_step(self) -> Step | None:
        """Wait for the loader's next finished batch; None when there is no more. Raise the failure, if any."""
        self.go_on()
        with self._changed:
            self._changed.wait_for(lambda: self.failure or self._finished or self.idle)
            if self.failure:
                raise self.failure
            return self._finished.popleft() if self._finished else None

    def go_on(self) -> None:
        """Let the threads take from the loader again, after `hold`."""
        with self._changed:
            self._resting = False
            self._changed.notify_all()

    def allow_one_more(self) -> None:
        """Let the threads take one batch more: the caller is done with a Step."""
        with self._changed:
            self._lead += 1
            self._changed.notify_all()

    def submit(self, batch: Any, room: int) -> Future[Step]:
        """Queue one batch, after waiting until fewer than `room` wait already."""
        work = Work(batch, Future())
        assert work.future
        with self._changed:
            self._changed.wait_for(lambda: self.failure or len(self._submitted) < room)
            if self.failure:
                raise self.failure
            self._submitted.append(work)
            self._changed.notify_all()
        return work.future

    def hold(self) -> None:
        """Take no more from the loader until `next_step`, and wait until all taken or submitted is finished."""
        with self._changed:
            self._resting = True
            self._changed.wait_for(lambda: self.failure or not (self._out or self._submitted or self._taking))
            if self.failure:
                raise self.failure

    def leave(self) -> None:
        """Forget the loader and the Steps that its caller has not had, once all that was taken is finished."""
        with self._changed:
            self._iterator = None
            self._changed.wait_for(lambda: self.failure or self.idle)
            self._finished.clear()

    def cancel_submitted(self) -> None:
        """Cancel what was submitted and not yet taken."""
        with self._changed:
            waiting = list(self._submitted)
            self._submitted.clear()
            self._changed.notify_all()
        for work in waiting:
            assert work.future
            work.future.cancel()

    # ---- the threads' side

    def take(self) -> Work:
        """Wait for the next batch; raise Closed when there will be none."""
        with self._front:
            while (work := self._take_submitted() or self._take_from_loader()) is None:
                pass
            self._on_batch(work.batch)
            return work

    def take_now(self) -> Work | None:
        """Return the next batch without waiting for one; None if there is none now."""
        with self._changed:
            none = not (self._submitted or self._may_enter_loader())
        if none:
            return None
        work = self._take_submitted() or self._take_from_loader()
        if work:
            self._on_batch(work.batch)
        return work

    def wait_alone(self) -> None:
        """Wait until the batch that the calling thread has just taken is the only one in flight."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._out) <= 1)
            if self._closed:
                raise Closed

    def finish(self, work: Work, step: Step) -> None:
        """Take a finished batch back."""
        if work.future:
            work.future.set_result(step)
        with self._changed:
            self._out.discard(work)
            self.tally.count(step)
            if not work.future:
                self._finished.append(step)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End everything with `error`; only the first failure counts."""
        with self._changed:
            if self.failure:
                return
            self.failure = error
            self._closed = True
            lost = [*self._submitted, *self._out]
            self._submitted.clear()
            self._changed.notify_all()
        for work in lost:
            if work.future:
                with suppress(InvalidStateError):  # it was finished, or cancelled, at this very instant
                    work.future.set_exception(error)

    def close(self) -> None:
        """Hand out nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take_submitted(self) -> Work | None:
        """Wait until there is something to take; return it if it was submitted, None if it is the loader's turn."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._closed or self._submitted or self._may_enter_loader())
                if self._closed:
                    raise Closed
                if not self._submitted:
                    self._lead -= 1
                    self._taking = True
                    return None
                work = self._submitted.popleft()
                self._changed.notify_all()
                assert work.future
                if work.future.set_running_or_notify_cancel():
                    return self._hand_out(work)

    def _take_from_loader(self) -> Work | None:
        """Take the loader's next batch; None, and no loader any more, at its end."""
        if (iterator := self._iterator) is None:  # the caller has left the loader at this very instant
            with self._changed:
                self._taking = False
                self._changed.notify_all()
            return None
        try:
            batch = next(iterator)  # outside of the lock: a slow loader must not hold up those that finish
        except StopIteration:
            with self._changed:
                self._iterator, self._taking = None, False
                self._changed.notify_all()
            return None
        with self._changed:
            self._taking = False
            return self._hand_out(Work(batch))

    def _may_enter_loader(self) -> bool:
        return self._iterator is not None and self._lead > 0 and not self._resting

    def _hand_out(self, work: Work) -> Work:
        work.index = self._taken
        self._taken += 1
        self._out.add(work)
        return work
