"""InStep: what loops do once they have their gradients, alone or in step with the other ranks, in virtual time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.groups import all_reduce_s, make_equal, mean, trained
from asyncprop.simulate.virtual_time import VirtualTime

if TYPE_CHECKING:
    from asyncprop.simulate.loop import VirtualLoop


class InStep:
    """Nothing but the loop's own step, as the plain loop does it: the backward pass, then all updates.

    Args:
        time: the clock.
        costs: of the layers.
        ranks: loops that meet.

    Attributes:
        loops: that have joined, in the order of ranks.
    """

    def __init__(self, time: VirtualTime, costs: LayerCosts, ranks: int) -> None:
        self.time, self.costs, self.ranks = time, costs, ranks
        self.loops: list[VirtualLoop] = []
        self._changed = time.condition()
        self._come = self._rounds = 0
        self._never = threading.Event()

    def step(self, loop: VirtualLoop) -> None:
        """Let time pass for the backward pass, whose gradients are there, and for the step, and make it."""
        loop.compute(sum(self.costs.backward_s))
        loop.update()
        loop.compute(sum(self.costs.update_s))

    def settle(self) -> None:
        """Let all models become equal, with nothing in flight."""

    def sleep(self, seconds: float) -> None:
        """Let so much time pass, whatever the device."""
        self.time.sleep(seconds, self._never)

    def meet(self, act: Callable[[], None]) -> None:
        """Wait until all ranks have come; the last acts for all, at one instant."""
        with self._changed:
            self._come += 1
            this = self._rounds
            if self._come == self.ranks:
                act()
                self._come = 0
                self._rounds += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._rounds > this)


class Gradients(InStep):
    """Averages gradients in each step, as DistributedDataParallel does.

    A layer's gradients travel from when all ranks have them, one layer after the other from the last to the first,
    while the backward passes go on: what is left of that when the passes end is waited for beside the slowest rank.
    All ranks step at one instant, as a learning rate that changes would else be old for some, and new for others.
    """

    def __init__(self, time: VirtualTime, costs: LayerCosts, ranks: int) -> None:
        super().__init__(time, costs, ranks)
        self._passes: list[tuple[float, float]] = []  # when the backward passes of this round began and ended
        self._exposed_s = 0.0

    def step(self, loop: VirtualLoop) -> None:
        """Compute, wait for all, and step with the mean of all gradients."""
        start = self.time.now()
        loop.compute(sum(self.costs.backward_s))
        self._passes.append((start, self.time.now()))
        self.meet(self._step_all)
        self.sleep(self._exposed_s)
        loop.compute(sum(self.costs.update_s))

    def settle(self) -> None:
        """Let all have the first rank's buffers: parameters have been equal after every step."""
        _copy_buffers([loop.model for loop in self.loops])

    def _step_all(self) -> None:
        self._exposed_s = exposed_s(self.costs, self._passes)
        self._passes.clear()
        _average_gradients([loop.model for loop in self.loops])
        for loop in self.loops:
            loop.update()


class Parameters(Gradients):
    """Averages gradients at first, then parameters now and then, as torch's post-local SGD does.

    What is modelled: after `warm_up` steps in step, each rank steps alone; after step number `warm_up` (from 0), and
    after every `period`-th from there, all wait for the slowest, and for one all-reduce of all parameters, which
    nothing hides. The state of the optimizer stays with each rank.

    Args:
        time, costs, ranks: as for all of them.
        period: local steps between two averages.
        warm_up: steps with averaged gradients at first.
    """

    def __init__(self, time: VirtualTime, costs: LayerCosts, ranks: int, *, period: int, warm_up: int) -> None:
        super().__init__(time, costs, ranks)
        self._period, self._warm_up = period, warm_up

    def step(self, loop: VirtualLoop) -> None:
        """Step together, or alone; average if it is time."""
        if loop.batches < self._warm_up:
            super().step(loop)
        else:
            InStep.step(self, loop)
        if loop.batches >= self._warm_up and (loop.batches - self._warm_up) % self._period == 0:
            self.meet(self._average_all)
            self.sleep(all_reduce_s(self.costs, self.ranks))

    def settle(self) -> None:
        """Average parameters and buffers."""
        self.sleep(all_reduce_s(self.costs, self.ranks))
        make_equal([loop.model for loop in self.loops])

    def _average_all(self) -> None:
        _average([trained(loop.model) for loop in self.loops])


class Buckets(InStep):
    """Mixes parameters of the step before while the backward pass goes on, as decent-dp does by its default topology.

    What is modelled: each layer is a bucket. When its gradient is there, the rank waits for the mean of what all ranks
    had of it after their last step, takes that in the place of its own, and steps it by its own gradient, which is of
    its own parameters; then its all-reduce begins as soon as all ranks are so far and the one before it is done. So a
    rank runs ahead of the slowest by one step at most. The topology is complete, where the neighbours are all ranks.

    What is not: buckets of 25 MB, in which several layers wait for the last of them; the first step, after which the
    wrapper waits, as it has no buckets before.
    """

    def __init__(self, time: VirtualTime, costs: LayerCosts, ranks: int) -> None:
        super().__init__(time, costs, ranks)
        layers = len(costs.backward_s)
        self._posts, self._mixed = [0] * layers, [0] * layers  # of the round under way; rounds whose last post is there
        self._mixed_at = [0.0] * layers
        self._link_free_at = 0.0
        self._kept: list[list[Tensor]] = []  # parameters of the ranks that are through with the round under way
        self._means: list[Tensor] | None = None  # of the round before

    def step(self, loop: VirtualLoop) -> None:
        """Take the time layer by layer; then mix and step all layers, as nothing of this pass reads them any more."""
        for layer in reversed(range(len(self.costs.backward_s))):
            loop.compute(self.costs.backward_s[layer])
            self._wait_for_means(layer, loop.batches)
            loop.compute(self.costs.update_s[layer])
            self._post(layer)
        self._mix_and_step(loop)

    def settle(self) -> None:
        """Average parameters and buffers, when all that travels has arrived."""
        self.sleep(max(0.0, self._link_free_at - self.time.now()))
        self.sleep(all_reduce_s(self.costs, self.ranks))
        make_equal([loop.model for loop in self.loops])
        self._means = None

    def _wait_for_means(self, layer: int, rounds: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._mixed[layer] >= rounds)
        self.sleep(max(0.0, self._mixed_at[layer] - self.time.now()))

    def _post(self, layer: int) -> None:
        with self._changed:
            self._posts[layer] += 1
            if self._posts[layer] == self.ranks:
                takes = self.costs.transfer_s[layer] * 2 * (self.ranks - 1) / self.ranks
                self._link_free_at = max(self._link_free_at, self.time.now()) + takes
                self._mixed_at[layer] = self._link_free_at
                self._posts[layer] = 0
                self._mixed[layer] += 1
                self._changed.notify_all()

    @torch.no_grad()
    def _mix_and_step(self, loop: VirtualLoop) -> None:
        parameters = trained(loop.model)
        if self._means:
            for parameter, value in zip(parameters, self._means, strict=True):
                parameter.copy_(value)
        loop.update()
        self._kept.append([parameter.clone() for parameter in parameters])
        if len(self._kept) == self.ranks:
            self._means = [mean(same) for same in zip(*self._kept, strict=True)]
            self._kept = []


def exposed_s(costs: LayerCosts, passes: Sequence[tuple[float, float]]) -> float:
    """Return how long the all-reduce of gradients goes on after the last backward pass has ended.

    Args:
        costs: of the layers, which share out each rank's pass.
        passes: when each rank's began and ended.
    """
    *before, whole = accumulate(costs.backward_s, initial=0.0)
    ranks, ready, done = len(passes), 0.0, 0.0
    for left, transfer in zip(reversed(before), reversed(costs.transfer_s), strict=True):
        ready = max(end - (end - start) * left / whole for start, end in passes)
        done = max(done, ready) + transfer * 2 * (ranks - 1) / ranks
    return done - ready


@torch.no_grad()
def _average(tensors_of_each: Sequence[Sequence[Tensor]]) -> None:
    for same in zip(*tensors_of_each, strict=True):
        value = mean(same)
        for tensor in same:
            tensor.copy_(value)


@torch.no_grad()
def _copy_buffers(models: Sequence[nn.Module]) -> None:
    for first, *others in zip(*(model.buffers() for model in models), strict=True):
        for buffer in others:
            buffer.copy_(first)


@torch.no_grad()
def _average_gradients(models: list[nn.Module]) -> None:
    for same in zip(*(model.parameters() for model in models), strict=True):
        gradients = [parameter.grad for parameter in same if parameter.grad is not None]
        if gradients:
            value = mean([g if g is not None else torch.zeros_like(p) for p in same for g in [p.grad]])
            for parameter in same:
                parameter.grad = value.clone()
