"""Passes: one batch through one lane. `forward` makes a Pending of it; `backward` applies it and makes a Step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from asyncprop.clock import SYSTEM, Clock
from asyncprop.devices import Device, Mark, tensors_in
from asyncprop.engine.feed import Work
from asyncprop.engine.lane import Lane
from asyncprop.engine.stepper import Stepper
from asyncprop.engine.update import NonFiniteError
from asyncprop.trace import Step

LossFn = Callable[[nn.Module, Any], Tensor | Sequence[Tensor]]
OnNonFinite = Literal["raise", "skip"]


@dataclass(eq=False, slots=True)
class Pending:
    """What a forward pass hands over: the lane with its graph, the losses, and when it was made.

    `begun_s` is when it began, by the clock of the threads; `forward` are marks of the device.
    """

    work: Work
    lane: Lane
    losses: list[Tensor]
    forward: tuple[Mark, Mark]
    queue_depth: int = 0
    begun_s: float = 0.0


class Gate:
    """Lets backward passes through, many at a time, until it is shut; shutting waits until none is inside.

    A pass that ends by an error has left its update half done, so it counts as inside for good: whoever shuts the gate
    then waits for `stop`, which the failure brings, and must ask whether there was one.
    """

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._changed = clock.condition()
        self._inside = 0
        self._shut = False
        self._stopped = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Wait until the gate is open, and be inside for the `with` block."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._shut)
            self._inside += 1
        yield
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Keep all out for the `with` block; begin it when the last one inside has left."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._shut)
            self._shut = True
            self._changed.wait_for(lambda: self._stopped or self._inside == 0)
        try:
            yield
        finally:
            with self._changed:
                self._shut = False
                self._changed.notify_all()

    def stop(self) -> None:
        """Never make anyone wait again."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Passes:
    """What every pass needs; shared by all threads, and holding no state of any one pass."""

    def __init__(
        self,
        loss_fn: LossFn,
        device: Device,
        *,
        accumulate: int,
        on_nonfinite: OnNonFinite,
        notes_reads: bool,
        check_graph: Callable[[Sequence[Tensor]], None],
        clock: Clock = SYSTEM,
    ) -> None:
        self.device = device
        self.gate = Gate(clock)
        self._loss_fn = loss_fn
        self._accumulate = accumulate
        self._skip_nonfinite = on_nonfinite == "skip"
        self._check_before = self._skip_nonfinite or device.results_are_ready
        self._notes_reads = notes_reads
        self._check_graph = check_graph
        self._graph_is_checked = False

    def forward(self, lane: Lane, work: Work) -> Pending:
        """Compute the losses of a batch in a lane, reading whatever the parameters hold (paper, Alg. 1)."""
        device = self.device
        device.hand_over()  # a batch that the loader has made on this thread
        with device.use(lane.stream):
            device.receive(lane.stream, tensors_in(work.batch))
            if self._notes_reads:
                lane.begin(work.index)
            start = device.mark()
            losses = self.losses(lane.module, work.batch)
            lane.keep_buffers_shared()
            return Pending(work, lane, losses, (start, device.mark()))

    def backward(self, pending: Pending, stepper: Stepper) -> Step:
        """Run the backward pass of a batch on this thread, stepping its layers, and report it."""
        device, lane, work = self.device, pending.lane, pending.work
        with self.gate.inside(), device.use(lane.stream):
            start = device.mark()
            stepper.begin(work.index)
            skipped = self._check_before and not self._is_finite(work, pending.losses)
            if not skipped:
                self._apply(pending.losses, stepper)
            end = device.mark()
            device.finish(lane.stream)
            if not self._check_before:
                self._is_finite(work, pending.losses)
            loss = sum(loss.item() for loss in pending.losses)
        forward_start, forward_end = pending.forward
        return Step(
            index=work.index,
            loss=loss,
            batch_size=batch_size(work.batch),
            staleness=tuple(stepper.staleness),
            lane=lane.index,
            forward_s=device.seconds(forward_start, forward_end),
            backward_s=device.seconds(start, end),
            waited_s=device.seconds(forward_end, start),
            queue_depth=pending.queue_depth,
            skipped=skipped,
        )

    def losses(self, module: nn.Module, batch: Any) -> list[Tensor]:
        """Return the losses of a batch, as many as are accumulated."""
        result = self._loss_fn(module, batch)
        losses = list(result) if isinstance(result, list | tuple) else [cast(Tensor, result)]
        if len(losses) != self._accumulate:
            raise ValueError(
                f"loss_fn must return as many losses as the update accumulates (got {len(losses)}, "
                f"accumulate={self._accumulate}): set accumulate={len(losses)} to sum their gradients into one step"
            )
        for loss in losses:
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a scalar tensor (got {got}): return loss.mean()")
        if not self._graph_is_checked:
            self._check_graph(losses)
            self._graph_is_checked = True
        return losses

    def _is_finite(self, work: Work, losses: list[Tensor]) -> bool:
        """Wait for the losses and look at them; raise if one is not finite and that is not to be skipped."""
        bad = [value for loss in losses if not math.isfinite(value := loss.item())]
        if bad and not self._skip_nonfinite:
            raise NonFiniteError(
                f"the loss of batch {work.index} is {bad[0]}: lower the learning rate, or set on_nonfinite='skip'"
            )
        return not bad

    def _apply(self, losses: list[Tensor], stepper: Stepper) -> None:
        for loss in losses[:-1]:
            loss.backward(retain_graph=True, inputs=stepper.targets)  # type: ignore[no-untyped-call]
        stepper.begin_last_loss()  # until here the losses may share their graph
        losses[-1].backward(inputs=stepper.targets)  # type: ignore[no-untyped-call]
        stepper.finish()


def batch_size(batch: Any) -> int:
    """Return the length of the first dimension of the batch's first tensor; 1 where it has no such thing."""
    for tensor in tensors_in(batch):
        return int(tensor.shape[0]) if isinstance(tensor, torch.Tensor) and tensor.dim() else 1
    return 1
