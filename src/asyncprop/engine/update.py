"""Update: when a gradient lands. LayerUpdate steps each layer the instant its gradient is ready; BlockUpdate steps
all of them when the backward pass ends (paper, Sec. 3.2 and 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from asyncprop.engine.compensation import Correction

Write = Literal["lock-free", "locked"]
State = Literal["shared", "private"]


class NonFiniteError(ArithmeticError):
    """A loss or a gradient norm is not a finite number."""


class Stopping(Exception):  # noqa: N818 (not an error: the engine is being stopped)
    """Raised inside a pass to end it early, because another thread has failed."""


@dataclass(frozen=True, slots=True)
class LayerUpdate:
    """Step each layer the instant the backward pass has its whole gradient (Async LU, paper Alg. 1).

    Args:
        layers: what is stepped together: `"module"`, `"parameter"`, or module-name prefixes (see `find_layers`).
        write: `"lock-free"` lets passes write a layer at the same time, so an update can be lost in part;
            `"locked"` takes one lock per layer: no lost update, at the price of waiting.
        max_norm: clip the gradient that is stepped together (here: of a layer) to this 2-norm; None for no clipping.
        accumulate: how many losses `loss_fn` returns for a batch. Their gradients are summed into one step, which
            happens in the last loss's backward pass.
        state: whose the optimizer's state is. `"shared"`: all lanes read and write the one state of the user's
            optimizer. `"private"`: each lane has its own momentum, as published code of LAPSGD has it; the first
            lane's is the user's, the others' are in `Engine.state_dict()`.
        compensate: corrects gradients for what changed since their layer was read; None for no correction.
    """

    layers: str | Sequence[str] = "module"
    write: Write = "lock-free"
    max_norm: float | None = None
    accumulate: int = 1
    state: State = "shared"
    compensate: Correction | None = None
    by_layer = True

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """Step all layers together when the backward pass ends (Async BU, Hogwild!).

    Args are those of `LayerUpdate`; `layers` only says by what staleness is told, `max_norm` is of the whole
    gradient, and `"locked"` takes one lock for all.
    """

    layers: str | Sequence[str] = "module"
    write: Write = "lock-free"
    max_norm: float | None = None
    accumulate: int = 1
    state: State = "shared"
    compensate: Correction | None = None
    by_layer = False

    def __post_init__(self) -> None:
        _check(self)


Update = LayerUpdate | BlockUpdate


def _check(update: Update) -> None:
    if update.write not in ("lock-free", "locked"):
        raise ValueError(f"write must be 'lock-free' or 'locked' (got {update.write!r})")
    if update.state not in ("shared", "private"):
        raise ValueError(f"state must be 'shared' or 'private' (got {update.state!r})")
    if update.max_norm is not None and not 0 < update.max_norm < math.inf:
        raise ValueError(f"max_norm must be a positive number (got {update.max_norm}): leave it out for no clipping")
    if update.accumulate < 1:
        raise ValueError(f"accumulate must be >= 1 (got {update.accumulate}): it is the number of losses per batch")
