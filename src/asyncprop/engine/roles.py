"""Roles: which thread runs the next forward or backward pass. A pass changes threads only where it must.

At most F forward and K backward passes run at once, as if each had threads of its own. But a thread that ends a
forward pass goes on with its backward pass if one may start, and another thread takes over the forward role: waking a
thread for every hand-over costs more than a small layer does.
"""

from __future__ import annotations

from collections import deque

from asyncprop.clock import SYSTEM, Clock
from asyncprop.engine.channel import Closed
from asyncprop.engine.passes import Pending


class Roles:
    """Hands out roles, and the passes that wait for a backward role, oldest first.

    Args:
        forward, backward: passes of each kind at once.
        lanes: passes in flight at once, running or waiting.
        clock: of the threads.
    """

    def __init__(self, forward: int, backward: int, lanes: int, clock: Clock = SYSTEM) -> None:
        self._forward_free, self._backward_free, self._lanes_free = forward, backward, lanes
        self._waiting: deque[Pending] = deque()
        self._is_open = True
        self._changed = clock.condition()

    @property
    def depth(self) -> int:
        """Passes that wait for a backward role."""
        return len(self._waiting)

    def next(self) -> Pending | None:
        """Wait for a role: the backward role for the pass that is returned, or for None the forward role.

        A backward pass goes first: it ends staleness, and frees its lane. Raises Closed when there is nothing more.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._may_go_backward or self._may_go_forward or self._is_over)
            if self._may_go_backward:
                self._backward_free -= 1
                pending = self._waiting.popleft()
            elif self._may_go_forward:
                self._forward_free -= 1
                self._lanes_free -= 1
                pending = None
            else:
                raise Closed
            self._wake()
            return pending

    def forward_done(self, pending: Pending) -> bool:
        """Give the forward role back; tell whether the thread now has the backward role for the same pass.

        If not, the pass waits, and the thread asks for its `next` role.
        """
        with self._changed:
            self._forward_free += 1
            if self._backward_free and not self._waiting:
                self._backward_free -= 1
                self._wake()
                return True
            self._waiting.append(pending)
            return False

    def backward_done(self) -> None:
        """Give the backward role and the lane back; the thread then asks for its `next` role."""
        with self._changed:
            self._backward_free += 1
            self._lanes_free += 1

    def close(self) -> None:
        """Hand out no forward role any more: there are no batches. Passes that wait are still to be finished."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def stop(self) -> None:
        """Hand out nothing any more, and forget what waits."""
        with self._changed:
            self._is_open = False
            self._waiting.clear()
            self._changed.notify_all()

    @property
    def _may_go_backward(self) -> bool:
        return bool(self._waiting) and self._backward_free > 0

    @property
    def _may_go_forward(self) -> bool:
        return self._is_open and self._forward_free > 0 and self._lanes_free > 0

    @property
    def _is_over(self) -> bool:
        return not self._is_open and not self._waiting

    def _wake(self) -> None:
        """Wake one thread if there is still something for it: most often a thread takes itself what it gave back."""
        if self._is_over:
            self._changed.notify_all()
        elif self._may_go_backward or self._may_go_forward:
            self._changed.notify()
