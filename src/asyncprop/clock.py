"""Clock: how threads start, wait and tell the time. This one is the machine's; virtual time is another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any


class Clock:
    """The machine's own threads and time."""

    def now(self) -> float:
        """Return seconds since some instant."""
        return time.perf_counter()

    def worked(self) -> float:
        """Return the seconds that the calling thread has computed."""
        return time.thread_time()

    def thread(self, target: Callable[..., Any], args: tuple[Any, ...], name: str) -> threading.Thread:
        """Make a thread that ends with the process."""
        return threading.Thread(target=target, args=args, name=name, daemon=True)

    def condition(self) -> threading.Condition:
        """Make a condition for such threads and the caller's."""
        return threading.Condition()

    def lock(self) -> AbstractContextManager[Any]:
        """Make a lock whose holder may wait for a condition."""
        return threading.Lock()

    def sleep(self, seconds: float, stopping: threading.Event) -> None:
        """Wait so long, or until `stopping` is set."""
        stopping.wait(seconds)


SYSTEM = Clock()
