"""Planning: measures a model on this machine, predicts what each choice of workers would do, and advises one."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncprop.devices import available_cores, device_of
from asyncprop.engine import Coupled, Decoupled
from asyncprop.engine.layers import find_layers
from asyncprop.engine.passes import LossFn
from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.measure import measure_costs, optimizer_like
from asyncprop.simulate.pace import Machine
from asyncprop.simulate.predict import predict

MARGIN = 0.02
"""Differences of throughput that are not worth staleness."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to train, and what it is predicted to do; of the plain loop, what it was measured to do.

    Attributes:
        workers: of the engine, with layer updates; None for the plain loop.
        seconds_per_batch: of the whole machine.
        staleness: mean of an update.
        bound: what keeps it from being faster.
        memory_bytes: activations and gradients at once.
    """

    workers: Coupled | Decoupled | None
    seconds_per_batch: float
    staleness: float
    bound: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What was measured, and what follows.

    Attributes:
        layers: names.
        costs: of the layers, with all cores busy.
        alone: with one pass at a time.
        activations_bytes, gradients_bytes: of one pass.
        choices: from the fastest to the slowest.
        advice: the least stale of those that are as fast as the fastest, within MARGIN.
    """

    layers: tuple[str, ...]
    costs: LayerCosts
    alone: LayerCosts
    activations_bytes: int
    gradients_bytes: int
    choices: tuple[Choice, ...]
    advice: Choice

    @property
    def workers(self) -> Coupled | Decoupled:
        """The advised workers for an Engine: the best asynchronous choice, whether or not a plain loop is better."""
        chosen = _best([choice for choice in self.choices if choice.workers is not None]).workers
        assert chosen
        return chosen


def plan(
    model: nn.Module,
    loss_fn: LossFn,
    batch: Any,
    optimizer: Optimizer | None = None,
    *,
    passes: int = 24,
    cores: int | None = None,
) -> Plan:
    """Measure forward and backward passes and updates by layer, and predict each choice of workers.

    Takes about 4 × `passes` training steps. Neither model nor optimizer is changed. For models on the CPU.

    Args:
        model, loss_fn, optimizer: as for `asyncprop.Engine`; SGD with momentum if no optimizer is given.
        batch: as training has it; or a list of batches.
        passes: that are timed for each measurement; raise it on a busy machine.
        cores: to use. Default: those that this process may use.

    Raises:
        ValueError: if the model is not on the CPU.
    """
    device = device_of(list(model.parameters()))
    if device.passes_at_once is None:
        raise ValueError("model must be on the CPU to be planned for: on a GPU nothing tells what it computes at once")
    if passes < 4:
        raise ValueError(f"passes must be >= 4 (got {passes})")
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    batches = batch if isinstance(batch, list) else [batch]
    count = cores or available_cores()
    alone = measure_costs(model, optimizer, loss_fn, batches, at_once=1, passes=passes)
    busy = measure_costs(model, optimizer, loss_fn, batches, at_once=count, passes=passes) if count > 1 else alone
    stepped = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    activations = activations_bytes(model, loss_fn, batches[0])
    gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    def choice(workers: Coupled | Decoupled) -> Choice:
        lanes = workers.lanes_on(count)
        costs = alone if min(lanes, count) == 1 else busy
        found = predict(costs, replace(workers, intraop_threads=1), [Machine(slots=count)])
        bytes_ = lanes * activations + gradients
        return Choice(workers, found.seconds_per_batch, found.staleness, _bound(workers, costs, count), bytes_)

    choices = [choice(workers) for workers in _candidates(count)]
    sgd_s = _time_sgd(model, optimizer, loss_fn, batches, passes)
    bound = f"{count} intra-op threads"
    choices.append(Choice(None, sgd_s, 0.0, bound, activations + gradients))
    choices.sort(key=lambda one: one.seconds_per_batch)
    layers = tuple(layer.name for layer in find_layers(model, stepped))
    return Plan(layers, busy, alone, activations, gradients, tuple(choices), _best(choices))


def _best(choices: Sequence[Choice]) -> Choice:
    limit = min(choice.seconds_per_batch for choice in choices) * (1 + MARGIN)
    fast = [choice for choice in choices if choice.seconds_per_batch <= limit]
    return min(fast, key=lambda choice: (choice.staleness, choice.workers is not None, choice.seconds_per_batch))


def _candidates(cores: int) -> Iterator[Coupled | Decoupled]:
    for forward, backward in ((1, 1), (1, 2), (2, 2)):
        for lanes in range(1 if forward + backward == 2 else 2, min(forward + backward, cores + 1) + 1):
            yield Decoupled(forward, backward, lanes=lanes)
    for workers in sorted({1, cores}):
        yield Coupled(workers)


def _bound(workers: Coupled | Decoupled, costs: LayerCosts, cores: int) -> str:
    """Say what binds: passes a second are the least of forward/T, backward/(βT), lanes/((1+β)T) and cores/((1+β)T)."""
    forward_s = sum(costs.forward_s)
    backward_s = costs.backward_forward_ratio * forward_s
    whole = forward_s + backward_s
    lanes = workers.lanes_on(cores)
    rates = {"cores": cores / whole, "lanes": lanes / whole}
    if isinstance(workers, Decoupled):
        rates |= {"forward threads": workers.forward / forward_s, "backward threads": workers.backward / backward_s}
    return min(rates, key=lambda name: rates[name])


def _time_sgd(model: nn.Module, optimizer: Optimizer, loss_fn: LossFn, batches: Sequence[Any], passes: int) -> float:
    """Return the median time of a step of the plain loop, with the caller's intra-op threads."""
    with torch.random.fork_rng():
        own = copy.deepcopy(model)
        steps = optimizer_like(optimizer, model, own)
        took = []
        for number in range(passes + passes // 4):
            start = time.perf_counter()
            steps.zero_grad()
            loss: Any = loss_fn(own, batches[number % len(batches)])
            loss.backward()
            steps.step()
            took.append(time.perf_counter() - start)
    return median(took[passes // 4 :])


def activations_bytes(model: nn.Module, loss_fn: LossFn, batch: Any) -> int:
    """Return the bytes that a forward pass keeps for its backward pass: storages that are not the parameters'."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_fn(model, batch)
    del loss
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return sum(kept.values())
