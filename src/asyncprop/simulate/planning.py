"""Planning: measures a model on this machine, predicts what each choice of workers would do, and advises one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from asyncprop.devices import available_cores, device_of
from asyncprop.engine import Coupled, Decoupled, LayerUpdate
from asyncprop.engine.checks import compiled_parts
from asyncprop.engine.lanes import trainable
from asyncprop.engine.layers import find_layers
from asyncprop.engine.passes import LossFn
from asyncprop.engine.update import Update
from asyncprop.simulate.choices import Choice, best, bound, candidates, finalists_of
from asyncprop.simulate.costs import LayerCosts
from asyncprop.simulate.ddp import Make
from asyncprop.simulate.measure import measure_costs
from asyncprop.simulate.pace import Machine
from asyncprop.simulate.predict import predict
from asyncprop.simulate.trial import time_choices


@dataclass(frozen=True, slots=True)
class Plan:
    """What was measured, and what follows.

    Attributes:
        layers: names.
        costs: of the layers, with all cores busy.
        alone: with one pass at a time.
        activations_bytes, gradients_bytes: of one pass.
        choices: those that may be the best, which were tried, from the fastest to the slowest; then the others, as
            they are predicted.
        advice: the least stale of those tried that are as fast as the fastest, within MARGIN.
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
        """The advised workers for an Engine: the best asynchronous choice, be a plain loop or DDP better or not."""
        chosen = _best_of(self.choices, (Coupled, Decoupled)).workers
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
    update: Update | None = None,
    make: Make | None = None,
) -> Plan:
    """Measure forward and backward passes and updates by layer, predict each choice of workers, and try the best ones.

    Takes about 10 × `passes` training steps, and twice as many where several choices are about as fast; of a copy at
    learning rate 0, so that nothing diverges. Neither model nor optimizer is changed. For models on the CPU.

    torch's DDP is considered only where `make` is given: its processes cannot be handed a model and a closure.

    Args:
        model, loss_fn, optimizer: as for `asyncprop.Engine`; SGD with momentum if no optimizer is given.
        batch: as training has it; or a list of batches.
        passes: that are timed for each measurement; raise it on a busy machine.
        cores: to use. Default: those that this process may use.
        update: of the engine that is planned for; layer updates by default.
        make: a function at the top of a module that returns model, loss_fn, a list of batches and an optimizer: each of
            DDP's processes, one per core, calls it.

    Raises:
        ValueError: if the model is not on the CPU, or is compiled.
    """
    device = device_of(list(model.parameters()))
    if device.passes_at_once is None:
        raise ValueError("model must be on the CPU to be planned for: on a GPU nothing tells what it computes at once")
    if compiled_parts(model):
        raise ValueError("model must not be compiled to be planned for: its layers cannot be timed one by one")
    if passes < 4:
        raise ValueError(f"passes must be >= 4 (got {passes})")
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    batches = batch if isinstance(batch, list) else [batch]
    update = update or LayerUpdate()
    measured = _Measured(model, optimizer, loss_fn, batches, update, passes, cores or available_cores())
    choices = [measured.choice(workers) for workers in candidates(measured.cores)]
    choices += [measured.loop(threads) for threads in sorted({1, measured.cores})]
    choices += [measured.ddp()] if make and measured.cores > 1 else []
    finalists = finalists_of(choices, measured.cores)
    others = [choice for choice in choices if choice not in finalists]
    tried = measured.timed(finalists, make)
    choices = [*_by_speed(tried), *_by_speed(others)]
    layers = tuple(layer.name for layer in find_layers(model, trainable(model, optimizer), update.layers))
    return Plan(
        layers,
        measured.costs(measured.cores),
        measured.costs(1),
        measured.activations_bytes,
        measured.gradients_bytes,
        tuple(choices),
        _best_of(choices, (Coupled, Decoupled, type(None))),
    )


def plan_decoupled(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Sequence[Any],
    optimizer: Optimizer,
    update: Update,
    passes: int,
) -> Decoupled:
    """Return the best forward and backward threads: a plan that considers nothing else, for `Decoupled("auto")`."""
    measured = _Measured(model, optimizer, loss_fn, batches, update, passes, available_cores())
    choices = [measured.choice(workers) for workers in candidates(measured.cores) if isinstance(workers, Decoupled)]
    finalists = finalists_of(choices, measured.cores)
    chosen = best(measured.timed(finalists) if len(finalists) > 1 else finalists).workers
    assert isinstance(chosen, Decoupled)
    return chosen


def _by_speed(choices: Sequence[Choice]) -> list[Choice]:
    return sorted(choices, key=lambda one: one.seconds_per_batch)


def _best_of(choices: Sequence[Choice], kinds: tuple[type, ...]) -> Choice:
    """Return the best of the choices of some kinds that were tried."""
    return best([choice for choice in choices if choice.measured and isinstance(choice.workers, kinds)])


class _Measured:
    """A model on this machine; each thing is measured once, when it is first asked for."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        batches: Sequence[Any],
        update: Update,
        passes: int,
        cores: int,
    ) -> None:
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._batches, self._update, self._passes = batches, update, passes
        self._costs: dict[tuple[int, int], LayerCosts] = {}
        self.cores = cores
        self.activations_bytes = activations_bytes(model, loss_fn, batches[0])
        self.gradients_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)

    def costs(self, at_once: int, intraop_threads: int = 1) -> LayerCosts:
        """Return what layers cost with so many passes at once, each on so many threads."""
        key = at_once, intraop_threads
        if key not in self._costs:
            self._costs[key] = measure_costs(
                self._model, self._optimizer, self._loss_fn, self._batches, at_once=at_once, passes=self._passes,
                update=self._update, intraop_threads=intraop_threads,
            )  # fmt: skip
        return self._costs[key]

    def choice(self, workers: Coupled | Decoupled) -> Choice:
        """Predict what these workers do."""
        threads = workers.intraop_threads or 1
        at_once = self.cores // threads
        lanes = workers.lanes_on(at_once)
        costs = self.costs(min(lanes, at_once), threads)
        alone = replace(workers, intraop_threads=1)  # the stand-in's
        found = predict(costs, alone, [Machine(slots=at_once)], by_layer=self._update.by_layer)
        bytes_ = lanes * self.activations_bytes + self.gradients_bytes
        limit = bound(workers, costs, at_once)
        return Choice(workers, found.seconds_per_batch, found.staleness, limit, bytes_, threads)

    def loop(self, intraop_threads: int) -> Choice:
        """Return the plain loop, of which its trial will tell."""
        bytes_ = self.activations_bytes + self.gradients_bytes
        return Choice(None, None, 0.0, "one pass at a time", bytes_, intraop_threads)

    def ddp(self) -> Choice:
        """Return torch's DDP, a process per core, of which its trial will tell."""
        bytes_ = self.cores * (self.activations_bytes + 2 * self.gradients_bytes)  # its buckets are as large again
        return Choice(None, None, 0.0, "the slowest process", bytes_, ranks=self.cores)

    def timed(self, finalists: list[Choice], make: Make | None = None) -> list[Choice]:
        """Return these choices with measured times; `make` is for those of several ranks."""
        seconds = time_choices(
            self._model, self._optimizer, self._loss_fn, self._batches, self._update, finalists, self._passes, make
        )
        return [replace(choice, measured_s=took) for choice, took in zip(finalists, seconds, strict=True)]


def activations_bytes(model: nn.Module, loss_fn: LossFn, batch: Any) -> int:
    """Return the bytes that a forward pass keeps for its backward pass: storages that are not the parameters'."""
    own = copy.deepcopy(model)
    known = {tensor.untyped_storage().data_ptr() for tensor in (*own.parameters(), *own.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_fn(own, batch)
    del loss
    return sum(kept.values())
