"""Turn: who may go next. Free running asks nobody, lockstep lets one batch in at a time, a Turn forces an order."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Literal, Protocol

Moment = Literal["read", "write"]
"""A pass reads a layer (calls its first module in the forward pass), or writes it (steps it)."""


class Turn(Protocol):
    """Decides when a pass may read or write a layer; the event has happened when the `with` block ends."""

    def at(self, batch: int, event: Moment, layer: int) -> AbstractContextManager[None]:
        """Wait until `event` of `batch` at `layer` (both counted from 0) may happen."""

    def stop(self) -> None:
        """Raise in every thread that waits, now and later: the engine is being stopped."""
