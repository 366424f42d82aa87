"""Unit: layers that are stepped together; what all lanes share of them, and what each lane has of its own."""

from __future__ import annotations

import json
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from asyncprop.devices import Device, Mark, Stream
from asyncprop.engine.lane import Lane
from asyncprop.engine.layers import Layer
from asyncprop.engine.optimizer import OptimizerView, States
from asyncprop.engine.turn import Given
from asyncprop.engine.update import Update

PLAIN = (float, int, bool, tuple)
"""Types of hyper-parameters that a trace can hold; a tuple has numbers in it (such as Adam's betas)."""


class Unit:
    """What all lanes share of the layers that are stepped together: the lock, which parameters have state, and
    the running means of squared gradients, by name, that compensation may need.
    """

    def __init__(
        self, layers: Sequence[Layer], update: Update, mean_squares: dict[str, torch.Tensor], *, at_once: bool
    ) -> None:
        self.layers = tuple(layers)
        self.update = update
        self.at_once = at_once
        self.lock = threading.Lock()
        self.stateless = {name for layer in layers for name in layer.parameters}
        self.mean_squares = mean_squares
        self._stepped: Mark | None = None  # where the last step ends on the device, if steps are locked
        self._noted: list[dict[str, Any]] = []
        self._seen: list[Any] = []

    def must_lock(self, names_with_gradient: Sequence[str]) -> bool:
        """Tell whether this step must be alone: asked for, or some parameter's state is yet to be made."""
        return self.update.write == "locked" or self._lacks_state(names_with_gradient)

    @contextmanager
    def alone(self, device: Device, stream: Stream, names: Sequence[str]) -> Iterator[None]:
        """Step `names` in the `with` block as nobody else does, neither on the host nor on the device.

        Guarantees: a locked step begins on the device when the one before it has ended there. State that was made is
        there, for every stream, before anybody can step without the lock.
        """
        with self.lock:
            if self._stepped is not None:
                device.wait(stream, self._stepped)
            yield
            if self.update.write == "locked":
                self._stepped = device.mark()
            if self._lacks_state(names):
                device.finish(stream)
                self.stateless.difference_update(names)

    def mean_square(self, name: str, like: torch.Tensor, device: Device, stream: Stream) -> torch.Tensor:
        """Return the running mean of squared gradients of a parameter, which all lanes share (see Compensation)."""
        if name not in self.mean_squares:
            with self.lock:
                if name not in self.mean_squares:
                    zeros = torch.zeros_like(like)
                    device.finish(stream)  # other streams see it from here on
                    self.mean_squares[name] = zeros
        return self.mean_squares[name]

    def _lacks_state(self, names: Sequence[str]) -> bool:
        return bool(self.stateless) and any(name in self.stateless for name in names)

    def note_if_new(self, given: Given) -> str:
        """Return the hyper-parameters of a step as text, or nothing if they are those of the step before.

        Guarantees: with turn=Ordered(), which lets one pass in at a time, the notes are whole. The race otherwise: two
        passes may note a change twice, or in the other order, in a trace that cannot be replayed anyway.
        """
        seen = [value for group in given for value in group.values()]
        if len(seen) == len(self._seen) and all(map(operator.is_, seen, self._seen)):
            return ""  # the very same objects: most often so, and soon told
        self._seen = seen
        plain = [{k: v for k, v in group.items() if type(v) in PLAIN} for group in given]
        if plain == self._noted:
            return ""
        self._noted = plain
        return json.dumps(plain)


def units_of(
    layers: Sequence[Layer], update: Update, mean_squares: dict[str, torch.Tensor], *, in_turn: bool
) -> list[Unit]:
    """Return one unit per layer for LayerUpdate, one for all layers for BlockUpdate.

    Where passes run in turn, nobody can tell a layer that is stepped at once from one that is stepped when the pass
    ends (but by a norm that is clipped layer by layer), and one call of the optimizer costs less than one per layer.
    """
    if update.by_layer and not (in_turn and update.max_norm is None):
        return [Unit([layer], update, mean_squares, at_once=True) for layer in layers]
    return [Unit(layers, update, mean_squares, at_once=False)]


class LaneUnit:
    """A unit in one lane: its leaves, the optimizer's view of them, and the hooks that tell of their gradients.

    Every leaf has a hook until it is known which one's gradient comes last; then that leaf alone, as each call into
    Python costs a small network time. If another order comes up later, the unit is stepped when the pass ends.
    """

    def __init__(
        self, lane: Lane, unit: Unit, model: nn.Module, optimizer: Optimizer, states: States, *, whole: bool
    ) -> None:
        self.unit = unit
        self.names = [name for layer in unit.layers for name in layer.parameters]
        self.leaves = [lane.leaves[name] for name in self.names]
        parameters = dict(model.named_parameters())
        pairs = [(parameters[name], lane.leaves[name]) for name in self.names]
        self.view = OptimizerView(optimizer, pairs, states, whole=whole)
        self._handles: list[tuple[nn.Parameter, RemovableHandle]] = []
        self._of_losses_before: list[torch.Tensor | None] = []

    def listen(self, arrived: Callable[[torch.Tensor], None]) -> None:
        """Call `arrived` with each leaf whose gradient has come."""
        self._handles = [
            (leaf, leaf.register_post_accumulate_grad_hook(arrived))  # type: ignore[no-untyped-call]
            for leaf in self.leaves
        ]

    def listen_to(self, last: torch.Tensor) -> None:
        """Listen to this leaf alone from now on."""
        if len(self._handles) > 1:
            self._remove([handle for leaf, handle in self._handles if leaf is not last])
            self._handles = [(leaf, handle) for leaf, handle in self._handles if leaf is last]

    def close(self) -> None:
        """Take the hooks off."""
        self._remove([handle for _, handle in self._handles])
        self._handles.clear()

    @property
    def is_complete(self) -> bool:
        """Whether the gradient of every leaf has come."""
        return all(leaf.grad is not None for leaf in self.leaves)

    def set_aside(self) -> None:
        """Put away the gradients of the losses before the last, so that it can be told when the last loss's come."""
        self._of_losses_before = [leaf.grad for leaf in self.leaves]
        for leaf in self.leaves:
            leaf.grad = None

    def put_back(self) -> None:
        """Add what was set aside."""
        for leaf, before in zip(self.leaves, self._of_losses_before, strict=False):
            if before is not None:
                leaf.grad = before if leaf.grad is None else leaf.grad.add_(before)
        self._of_losses_before = []

    def _remove(self, handles: Sequence[RemovableHandle]) -> None:
        for handle in handles:
            handle.remove()
