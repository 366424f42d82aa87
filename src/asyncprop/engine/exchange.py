"""Exchange: how replicas of a model on several devices or ranks meet. The engine knows this protocol alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from asyncprop.devices import Device
from asyncprop.engine.layers import Layer


@dataclass(frozen=True, slots=True)
class Replica:
    """What an exchange works on: the model that is trained here, and whom to tell when it fails.

    Its parameters are read and written beside the workers, who do not wait; buffers, and the state of the optimizer,
    are written only while nothing is in flight.
    """

    model: nn.Module
    optimizer: Optimizer
    layers: tuple[Layer, ...]
    device: Device
    fail: Callable[[BaseException], None]


class Exchange(Protocol):
    """One side of the exchange. `open`, `settle` and `close` are called by every rank, in the same order."""

    def open(self, replica: Replica) -> None:
        """Agree with the other ranks on the model, and begin."""

    def landed(self, layer: int) -> None:
        """Note that the layer has been stepped. Called by the workers: it must not wait."""

    def finished(self) -> None:
        """Note that a batch is finished. Called by the workers: it must not wait."""

    def settle(self) -> None:
        """Meet the other ranks while nothing is in flight; afterwards all models are equal to the bit."""

    def statistics(self) -> dict[str, float]:
        """Return counts since it was opened, by name."""

    def close(self) -> None:
        """End; after a failure, without the others."""
