"""Lost: how many increments lock-free writes lose, layer by layer, in real training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from asyncprop.bench.theory.rows import Row
from asyncprop.bench.workloads import WORKLOADS
from asyncprop.engine import Coupled, Engine, LayerUpdate
from asyncprop.engine.layers import find_layers
from asyncprop.engine.update import Write
from asyncprop.theory import UpdateCounter
from asyncprop.theory.lost_updates import QUANTUM, LostUpdates, total

BATCHES = 100
WRITES: tuple[Write, ...] = ("lock-free", "locked")
WIDE, WIDE_BATCHES = 100_000, 3000
"""Floats of the layer that is nothing but updated, and its batches."""


def lost_rows(seeds: int) -> list[Row]:
    """Return the share of increments that are lost: of each layer, and of all with locks, which must be none."""
    free, locked = ([_mlp(seed, write) for seed in range(seeds)] for write in WRITES)
    wide = [count_lost(Wide(), _wide_loss, [torch.ones(1)] * WIDE_BATCHES)["all"] for _ in range(seeds)]
    name = f"MLP 6 × 1024, {BATCHES} batches"
    return [
        *(_row(f"{name}, layer {layer}", [run[layer] for run in free]) for layer in free[0]),
        _row(f"{name}, all layers", [total(list(run.values())) for run in free]),
        _row(f"{name}, all layers, locked", [total(list(run.values())) for run in locked]),
        _row(f"a layer of {WIDE:,} floats and nothing else, {WIDE_BATCHES:,} batches", wide),
    ]


def _mlp(seed: int, write: Write) -> dict[str, LostUpdates]:
    trained, batches = WORKLOADS["mlp"].make(seed), WORKLOADS["mlp"].batches()
    return count_lost(trained.model, trained.loss, [next(batches) for _ in range(BATCHES)], write)


def count_lost(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batches: Sequence[Any], write: Write = "lock-free"
) -> dict[str, LostUpdates]:
    """Train with 2 workers that update layer by layer, and return what was lost of each layer."""
    counter = UpdateCounter(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=QUANTUM)
    layers = find_layers(model, [name for name, p in model.named_parameters() if p.requires_grad])
    update = LayerUpdate(write=write)
    with Engine(model, optimizer, loss_fn, workers=Coupled(2, intraop_threads=1), update=update) as engine:
        for _ in engine.run(batches):
            pass
        versions = dict(zip(engine.statistics().layers, engine.statistics().versions, strict=True))
    found = counter.count({name: versions[layer.name] for layer in layers for name in layer.parameters})
    counter.close()
    return {layer.name or "all": total([found[name] for name in layer.parameters]) for layer in layers}


class Wide(nn.Module):
    """A vector, and nothing to compute with it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDE))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the entries, times x."""
        return self.weight.sum() * x


def _wide_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).mean()
    return loss


def _row(case: str, runs: Sequence[LostUpdates]) -> Row:
    worst = max(run.worst for run in runs)
    return Row(
        section="lost updates",
        quantity="share of increments lost",
        case=f"{case}, 2 workers; worst float {worst:.2%}",
        equation="Sec. 5",
        measured=tuple(run.rate for run in runs),
    )
