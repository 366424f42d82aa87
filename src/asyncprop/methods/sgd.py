"""SequentialLoop: the plain PyTorch loop, with the face of a trainer. It is the baseline, and lockstep's twin."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from asyncprop.clock import SYSTEM, Clock
from asyncprop.delay import Delays
from asyncprop.engine import NonFiniteError
from asyncprop.engine.layers import find_layers
from asyncprop.engine.passes import LossFn, batch_size
from asyncprop.recorder import Recorder
from asyncprop.trace import Statistics, Step, ThreadTime


class SequentialLoop:
    """Forward, backward, step; one batch after the other on the caller's thread, with the caller's intra-op threads.

    Args:
        model, optimizer, loss_fn: as for `asyncprop.Engine`.
        delays: by which it is slowed.
        trace: notes each pass.
        clock: of the caller's thread.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        delays: Delays | None = None,
        trace: Recorder | None = None,
        clock: Clock = SYSTEM,
    ) -> None:
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._delays = delays or Delays((), 0)
        self._recorder, self._clock = trace, clock
        self._batches = self._samples = 0
        self._worked_s = 0.0
        self._born = self._clock.now()
        inner = model.module if isinstance(model, DistributedDataParallel) else model
        trained = [name for name, parameter in inner.named_parameters() if parameter.requires_grad]
        self._layers = tuple(layer.name for layer in find_layers(inner, trained))

    def __enter__(self) -> Self:
        if self._recorder:
            self._recorder.open(self.statistics().layers, self._clock.now)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._optimizer.zero_grad()

    def run(self, loader: Iterable[Any]) -> Iterator[Step]:
        """Train on every batch of `loader` and yield its Step."""
        for batch in loader:
            yield self._train_on(batch)

    def settle(self) -> None:
        """Do nothing: one rank agrees with itself."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: all state is the model's and the optimizer's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""

    def statistics(self) -> Statistics:
        """Return counts and times; every layer's version is the number of batches, and nothing is stale."""
        layers = self._layers
        life = self._clock.now() - self._born
        return Statistics(
            batches=self._batches,
            samples=self._samples,
            skipped=0,
            in_flight=0,
            lanes=1,
            layers=layers,
            versions=(self._batches,) * len(layers),
            staleness=(0.0,) * len(layers),
            mean_queue_depth=0.0,
            max_queue_depth=0,
            threads=(ThreadTime("loop", self._worked_s, life - self._worked_s),),
        )

    def _train_on(self, batch: Any) -> Step:
        start = self._clock.now()
        self._begin()
        result = self._loss_fn(self._model, batch)
        losses = list(result) if isinstance(result, list | tuple) else [cast(Tensor, result)]
        between = self._clock.now()
        self._delays.after_forward(0, self._batches, between - start)
        waited = self._clock.now() - between
        value = sum(loss.item() for loss in losses)
        if not math.isfinite(value):
            raise NonFiniteError(f"the loss of batch {self._batches} is {value}: lower the learning rate")
        for loss in losses:
            loss.backward(retain_graph=loss is not losses[-1])
        met = self._step()
        end = self._clock.now()
        if self._recorder:
            self._recorder.add("forward", start, between, 0, self._batches)
            self._recorder.add("backward", between + waited, end, 0, self._batches)
        step = Step(
            index=self._batches,
            loss=value,
            batch_size=batch_size(batch),
            forward_s=between - start,
            backward_s=end - between - waited - met,
            waited_s=waited + met,
        )
        self._delays.after_backward(0, step.backward_s)
        self._batches += 1
        self._samples += step.batch_size
        self._worked_s += end - start - waited - met
        return step

    def _begin(self) -> None:
        self._optimizer.zero_grad()

    def _step(self) -> float:
        """Step, and return the seconds of it that were waits for other ranks, where these can be told from work."""
        self._optimizer.step()
        return 0.0
