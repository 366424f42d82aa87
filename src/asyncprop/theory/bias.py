"""Bias: how far the gradient that an asynchronous pass applies is from the one that sequential training would.

Source: the bound is the paper's later version's (arXiv 2410.05985). `Probe` measures it in training.
"""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, Any], Any]


def bias_bound(G: float, alpha: float, eta: float, tau_max: float) -> float:
    """Return the largest bias norm, G x/(1 - x) with x = alpha eta tau_max; infinity, no bound, from x = 1 on.

    Why: parameters move by at most eta (G + |b|) an update, |b| being the bias; in tau_max updates by tau_max times
    that; and a gradient changes by at most alpha times as much: |b| <= x (G + |b|).

    Args:
        G: largest norm of a sequential gradient.
        alpha: smoothness of the loss: its largest curvature.
        eta: learning rate.
        tau_max: largest staleness, in updates.
    """
    x = alpha * eta * tau_max
    return G * x / (1 - x) if x < 1 else math.inf


@dataclass(frozen=True, slots=True)
class Comparison:
    """An applied gradient beside a fresh one: `cosine` of the angle between, `norm_ratio` applied / fresh, norm of the
    difference (`bias`), and norm of the fresh one. Where a gradient is zero, cosine and ratio are nan.
    """

    cosine: float
    norm_ratio: float
    bias: float
    fresh_norm: float


def compare(applied: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> Comparison:
    """Compare two gradients, by parameter name; a parameter that one of them lacks counts as zero there."""
    product = bias = applied_square = fresh_square = 0.0
    for name in applied.keys() | fresh.keys():
        one, other = applied.get(name), fresh.get(name)
        one = torch.zeros_like(fresh[name]) if one is None else one
        other = torch.zeros_like(applied[name]) if other is None else other
        product += float((one.double() * other.double()).sum())
        bias += float((one.double() - other.double()).square().sum())
        applied_square += float(one.double().square().sum())
        fresh_square += float(other.double().square().sum())
    applied_norm, fresh_norm = math.sqrt(applied_square), math.sqrt(fresh_square)
    both = applied_norm * fresh_norm
    return Comparison(
        cosine=max(-1.0, min(1.0, product / both)) if both else math.nan,
        norm_ratio=applied_norm / fresh_norm if fresh_norm else math.nan,
        bias=math.sqrt(bias),
        fresh_norm=fresh_norm,
    )


@dataclass(eq=False, slots=True)
class Sample:
    """One pass that is watched.

    Attributes:
        batch: what it was handed.
        parameters: as they were when its backward pass began.
        buffers: as they were when its forward pass began.
        applied: the gradient of each parameter that the pass computed.
    """

    batch: Any
    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    applied: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[Any] = field(default_factory=list)


class Probe:
    """Watches some passes of an engine, and compares their gradients with fresh ones on the same batches.

    It needs nothing of the engine but its `loss_fn`: the module that an engine hands to it is the copy of the model
    (the lane) that carries this one batch, so hooks on its parameters see this pass's gradient and no other.

        probe = Probe(model, loss_fn, every=50)
        with Engine(model, optimizer, probe.loss_fn, ...) as engine:
            for step in engine.run(loader):
                for sample in probe.collect():
                    print(probe.measure(sample))

    The fresh gradient is the one that sequential training would compute on the batch with the parameters as they are
    when the asynchronous backward pass begins: updates that land later, during it, are not counted as staleness. It is
    computed by `measure`, on the thread that calls it. Cost: for each watched pass one more forward and backward pass,
    and a copy of parameters, buffers and gradients, held until it is measured; so 1/every of training's compute, where
    passes are long beside calls of Python. A pass that is not watched pays for a lock and a count. Dropout draws other
    masks in the fresh pass: turn it off, or read its noise as bias.

    Args:
        model: the engine's model.
        loss_fn: the engine's.
        every: watch each so many-th pass.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, *, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be >= 1 (got {every})")
        self._twin = copy.deepcopy(model)
        self._loss_fn, self._every = loss_fn, every
        self._passes = itertools.count()
        self._lock = threading.Lock()
        self._open: dict[int, Sample] = {}
        self._ready: list[Sample] = []

    def loss_fn(self, model: nn.Module, batch: Any) -> Any:
        """Compute the loss, and watch this pass if it is its turn. Give it to the engine instead of yours."""
        self._end(id(model))
        if next(self._passes) % self._every:
            return self._loss_fn(model, batch)
        sample = Sample(batch, buffers=_values(dict(model.named_buffers())))
        losses = self._loss_fn(model, batch)
        first = losses[0] if isinstance(losses, list | tuple) else losses
        sample.hooks.append(first.register_hook(partial(self._backward_begins, sample, model)))
        for name, leaf in model.named_parameters():
            if leaf.requires_grad:
                sample.hooks.append(leaf.register_hook(partial(self._gradient_comes, sample, name)))  # type: ignore[no-untyped-call]
        with self._lock:
            self._open[id(model)] = sample
        return losses

    def collect(self, *, drained: bool = False) -> list[Sample]:
        """Return the watched passes that are over, and forget them.

        A pass is known to be over when its lane carries the next one; or, which you say by `drained`, if nothing is in
        flight.
        """
        for lane in list(self._open) if drained else ():
            self._end(lane)
        with self._lock:
            ready, self._ready = self._ready, []
        return ready

    def measure(self, sample: Sample) -> Comparison:
        """Compare the applied gradient with a fresh one, see above."""
        return compare(sample.applied, self.fresh_gradient(sample))

    def fresh_gradient(self, sample: Sample) -> dict[str, Tensor]:
        """Return the gradient of each parameter on the sample's batch, with the parameters that it notes."""
        with torch.no_grad():
            for name, parameter in self._twin.named_parameters():
                parameter.copy_(sample.parameters[name])
                parameter.grad = None
            for name, buffer in self._twin.named_buffers():
                buffer.copy_(sample.buffers[name])
        losses = self._loss_fn(self._twin, sample.batch)
        total = torch.stack(tuple(losses)).sum() if isinstance(losses, list | tuple) else losses
        total.backward()
        return {name: p.grad.clone() for name, p in self._twin.named_parameters() if p.grad is not None}

    def _backward_begins(self, sample: Sample, model: nn.Module, gradient: Tensor) -> None:
        """Copy the parameters.

        Guarantees: nothing; other passes may write them meanwhile. The race: one parameter may be copied before an
        update and another after it; such a mix is what any pass reads.
        """
        sample.parameters = _values(dict(model.named_parameters()))

    def _gradient_comes(self, sample: Sample, name: str, gradient: Tensor) -> None:
        known = sample.applied.get(name)
        sample.applied[name] = gradient.detach().clone() if known is None else known + gradient.detach()

    def _end(self, lane: int) -> None:
        with self._lock:
            sample = self._open.pop(lane, None)
            if sample is None:
                return
            for hook in sample.hooks:
                hook.remove()
            if sample.applied:  # a pass that was skipped has none
                self._ready.append(sample)


def _values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
