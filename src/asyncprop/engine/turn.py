"""Turn: who may go next. Free running and lockstep ask nobody; a Turn is asked at each moment of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

from torch import nn

from asyncprop.clock import SYSTEM, Clock
from asyncprop.engine.layers import Layer

Moment = Literal[
    "forward", "read", "read again", "handover", "backward", "read back", "through", "ready", "write", "done"
]
"""What a pass is about to do.

`forward`: begin. `read`: call a module of a layer for the first time; `read again`: call another, or one that has
buffers and no layer (then the layer is -1). `handover`: end its forward pass. `backward`: begin its backward pass.
`read back`: use a layer there. `through`: pass a layer by on the way to those that it writes. `ready`: have a layer's
whole gradient. `write`: step a layer, or several, named by the first. `done`: free its lane.
"""

Given = Sequence[dict[str, Any]]
"""Hyper-parameters of the param groups that a step is made with."""

NOTHING: AbstractContextManager[None] = nullcontext()


class Turn:
    """Lets everybody go on; subclasses make them wait. Its methods are called by the threads that run passes.

    Attributes:
        clock: of the engine's threads.
        watches_all: whether it is to be asked at `read again` and `read back`, too, and told by `left`, so as to order
            every read and write. Refused on a GPU: moments are those of the host, at which work is only queued there.
    """

    clock: Clock = SYSTEM
    watches_all = False

    def open(self, model: nn.Module, layers: tuple[Layer, ...], *, by_layer: bool) -> None:
        """Learn what is trained, and whether layers are written one by one; called again when the user has changed it.

        Nothing is in flight.
        """

    def at(self, batch: int, moment: Moment, layer: int) -> AbstractContextManager[None]:
        """Wait until `batch` may go on at `layer` (both count from 0); the moment has passed when the block ends."""
        return NOTHING

    def left(self, batch: int, layer: int) -> None:
        """Note that a module of a layer has returned."""

    def lane(self, batch: int, free: int) -> int:
        """Return the lane that is to carry `batch`; one that is free is given."""
        return free

    def given(self, batch: int, layer: int) -> Given | None:
        """Return the hyper-parameters for a step; None for those that hold."""
        return None

    def stop(self) -> None:
        """Raise in every thread that waits, now and later: the engine is being stopped."""
