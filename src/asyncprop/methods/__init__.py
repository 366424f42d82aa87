"""The table of axes: what separates any two methods is a row here, and nothing else in the code knows their names.

workers     who computes: one loop, coupled workers, or forward and backward threads
update      when gradients land: each layer at once, or the block at the end of the pass
exchange    how replicas meet: not at all
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, Protocol, Self

from torch import nn
from torch.optim import Optimizer

from asyncprop.engine import Decoupled, Engine
from asyncprop.engine.passes import LossFn
from asyncprop.methods.sgd import SequentialLoop
from asyncprop.trace import Statistics, Step


class Trainer(Protocol):
    """What every method is: a context manager that trains on batches and reports each."""

    def __enter__(self) -> Self:
        """Start."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End; nothing of the trainer is left."""

    def run(self, loader: Iterable[Any]) -> Iterator[Step]:
        """Train on every batch of `loader` and yield its Step."""

    def statistics(self) -> Statistics:
        """Return counts and times so far."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row. `workers` is None for the one plain loop; `update` is `"layer"`, `"block"`, or None in turn with it."""

    name: str
    summary: str
    workers: Decoupled | None
    update: Literal["layer", "block"] | None
    exchange: None = None


_ROWS = (
    Method("sgd", "the plain PyTorch loop, in turn, all cores in each operation", None, None),
    Method("async-lu", "forward and backward threads, each layer stepped at once", Decoupled(), "layer"),
    Method("async-bu", "forward and backward threads, all layers stepped at the end of a pass", Decoupled(), "block"),
)
METHODS: dict[str, Method] = {method.name: method for method in _ROWS}


def get_method(name: str) -> Method:
    """Return the method called `name`; a ValueError lists the known ones."""
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)} (got {name!r})")
    return METHODS[name]


def open_trainer(
    name: str,
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    *,
    lockstep: bool = False,
    forward_threads: int | None = None,
    backward_threads: int | None = None,
    lanes: int | None = None,
    telemetry: bool = True,
) -> Trainer:
    """Make the trainer of a method.

    Args:
        name: a name in METHODS.
        model, optimizer, loss_fn: as for `asyncprop.Engine`.
        lockstep: one batch at a time, equal to the plain loop bit for bit; `sgd` always is.
        forward_threads, backward_threads, lanes: override the method's `Decoupled`; None keeps its default.
        telemetry: whether staleness is noted.

    Raises:
        ValueError: if the method is unknown, or has no such threads.
    """
    method = get_method(name)
    given = {"forward_threads": forward_threads, "backward_threads": backward_threads, "lanes": lanes}
    asked = {option: count for option, count in given.items() if count is not None}
    if method.workers is None or method.update is None:
        if asked:
            raise ValueError(f"method {name} has one loop, and no {' or '.join(asked)} to set: choose an async one")
        return SequentialLoop(model, optimizer, loss_fn)
    return Engine(
        model,
        optimizer,
        loss_fn,
        workers=replace(method.workers, **{option.removesuffix("_threads"): count for option, count in asked.items()}),
        update=method.update,
        turn="lockstep" if lockstep else "free",
        telemetry=telemetry,
    )
