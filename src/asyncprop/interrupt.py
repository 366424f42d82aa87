"""Interrupt: the first Ctrl-C asks a run to finish what it has begun and save; the second ends it at once."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Inside its `with` block, notes signals instead of raising; call it to hear whether one came.

    Args:
        messages: where to say that it was heard.
    """

    def __init__(self, messages: TextIO) -> None:
        self.signal: int | None = None
        self._messages = messages
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def __call__(self) -> bool:
        """Tell whether a signal came."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that the signal ended."""
        return 128 + (self.signal or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()
        print("\nfinishing the passes in flight; once more to stop at once", file=self._messages, flush=True)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
