"""Turns that force a constant delay on an engine's real threads, or none, and note what parameters do meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from asyncprop.engine.turn import Moment, Turn

LossFn = Callable[[nn.Module, Any], Tensor]


class Watch(Turn):
    """A Turn that orders nothing, and notes where the parameters are at each update.

    Made for models of which one layer, `watched`, is read and written in turn with nothing else of interest.

    Args:
        parameters: the user's, whose storage the lanes share.
        skip: updates of the beginning that are not counted.
        watched: the layer at whose updates the parameters are noted.

    Attributes:
        positions: the parameters after each update, flat.
        deviations: the square of what each entry moved by between a pass's read of the watched layer and its write.
        delays: how many passes were so many updates old.
    """

    def __init__(self, parameters: Sequence[Tensor], *, skip: int, watched: int = 0) -> None:
        self._parameters, self._skip, self._watched = list(parameters), skip, watched
        self._changed = threading.Condition()
        self._stopped = False
        self._read: dict[int, tuple[Tensor, int]] = {}
        self._passed = self._writes = 0
        self.positions: list[Tensor] = []
        self.deviations: list[Tensor] = []
        self.delays: Counter[int] = Counter()

    @contextmanager
    def at(self, batch: int, moment: Moment, layer: int) -> Iterator[None]:
        """Note the parameters when a pass has read, before it writes, and when it has written."""
        if layer != self._watched or moment not in ("read", "write"):
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._may(batch, moment))
            if moment == "write":
                self._note_write(batch)
        yield
        with self._changed:
            if moment == "read":
                self._read[batch] = (self._flat(), self._writes)
            else:
                self._writes += 1
                if self._writes > self._skip:
                    self.positions.append(self._flat())
            self._changed.notify_all()

    def watching(self, loss_fn: LossFn) -> LossFn:
        """Return `loss_fn`, which also tells this Turn that a forward pass has ended.

        The engine's "read" comes just before a layer's module is called; only when its forward pass has ended has it
        certainly read what it was to read.
        """

        def watched(model: nn.Module, batch: Any) -> Tensor:
            loss = loss_fn(model, batch)
            with self._changed:
                self._passed += 1
                self._changed.notify_all()
            return loss

        return watched

    def stop(self) -> None:
        """Let everybody go."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def covariance(self, about: Tensor | None = None) -> Tensor:
        """Return the covariance of the parameters, about a point or their mean."""
        positions = torch.stack(self.positions).double()
        away = positions - (positions.mean(0) if about is None else about)
        return away.T @ away / len(away)

    @property
    def sigma_stale(self) -> float:
        """Root mean square of the deviations, over entries and passes."""
        return float(torch.stack(self.deviations).double().mean().sqrt())

    @property
    def delay_probabilities(self) -> list[float]:
        """Share of the passes that were 0, 1, 2, ... updates old."""
        total = sum(self.delays.values())
        return [self.delays[delay] / total for delay in range(max(self.delays) + 1)]

    def _may(self, batch: int, moment: Moment) -> bool:
        return True

    def _note_write(self, batch: int) -> None:
        then, writes = self._read.pop(batch)
        if self._writes >= self._skip:
            self.deviations.append((self._flat() - then).square())
            self.delays[self._writes - writes] += 1

    def _flat(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self._parameters])


class ConstantDelay(Watch):
    """A Turn under which every update is exactly `delay` updates old, but for the first ones.

    Batch n reads when update n - delay - 1 has landed, and update n - delay waits until its forward pass has ended. It
    needs `watching`, delay + 1 coupled workers, and a model of one layer.

    Args:
        parameters, skip: as for `Watch`.
        delay: in updates.
        batches: how many there are in all.
    """

    def __init__(self, parameters: Sequence[Tensor], *, skip: int, delay: int, batches: int) -> None:
        super().__init__(parameters, skip=skip)
        self._delay, self._batches = delay, batches

    def _may(self, batch: int, moment: Moment) -> bool:
        if moment == "read":
            return self._writes >= batch - self._delay
        return self._writes == batch and self._passed >= min(batch + self._delay + 1, self._batches)
