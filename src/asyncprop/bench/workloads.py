"""Workloads: the networks that are timed, each with its batches. Data are synthetic: contents do not change speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from asyncprop.tasks import Batch, Batches, Task, get_task

LEARNING_RATE = 1e-5
"""So small that thousands of steps on a few batches of noise leave the weights finite: only speed is of interest."""


@dataclass(frozen=True)
class Workload:
    """A task's model at a width and batch size; `distinct` batches are made in advance and used again and again."""

    name: str
    task: str
    width: int | None = None
    batch_size: int = 64
    distinct: int = 4

    def make(self, seed: int = 0) -> Trained:
        """Return model, optimizer and loss."""
        task = get_task(self.task)
        model = task.build(width=self.width, seed=seed)
        return Trained(model, task.optimizer(model, lr=LEARNING_RATE), task.loss)

    def batches(self) -> Iterator[Batch]:
        """Yield batches without end."""
        return cycle(_made(self))


@cache
def _made(workload: Workload) -> list[Batch]:
    """Make a workload's batches, once in a process."""
    task: Task = get_task(workload.task)
    train = task.load(train_samples=workload.batch_size * workload.distinct).train
    return list(Batches(train, workload.batch_size, seed=0, epoch=0))


@dataclass(frozen=True)
class Trained:
    """What is trained."""

    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[nn.Module, Batch], Tensor]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("resnet18-width16", "synthetic-images", width=16),
        Workload("resnet18-width8", "synthetic-images", width=8, batch_size=32),
        Workload("resnet50", "synthetic-imagenet", width=8, batch_size=4),
        Workload("lstm", "synthetic-text"),
        Workload("transformer", "synthetic-characters"),
        Workload("mlp", "synthetic-vectors"),
    )
}

SHAPES = {
    workload.name: workload
    for workload in (
        Workload("mlp-width64-batch32", "synthetic-vectors", width=64, batch_size=32),
        Workload("mlp-width256-batch128", "synthetic-vectors", width=256, batch_size=128),
        Workload("mlp-width1024-batch16", "synthetic-vectors", width=1024, batch_size=16),
        Workload("resnet18-width4-batch16", "synthetic-images", width=4, batch_size=16),
        Workload("resnet18-width4-batch64", "synthetic-images", width=4, batch_size=64),
        Workload("resnet18-width8-batch32", "synthetic-images", width=8, batch_size=32),
        Workload("resnet18-width16-batch16", "synthetic-images", width=16, batch_size=16),
        Workload("lstm-width64-batch16", "synthetic-text", width=64, batch_size=16),
        Workload("lstm-width256-batch16", "synthetic-text", width=256, batch_size=16),
        Workload("transformer-width64-batch16", "synthetic-characters", width=64, batch_size=16),
        Workload("transformer-width128-batch16", "synthetic-characters", width=128, batch_size=16),
    )
}
"""Networks and batches of different shapes, from those that Python decides to those that fill the cores."""


def choose(names: str | None, among: dict[str, Workload] = WORKLOADS) -> list[Workload]:
    """Return the workloads in a list of names separated by commas; all of them for None."""
    chosen = list(among) if names is None else [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in among:
            raise ValueError(f"workloads must be some of {', '.join(among)} (got {name})")
    return [among[name] for name in chosen]


def one_step(trained: Trained, batch: Batch) -> None:
    """Train on one batch as any PyTorch loop does."""
    trained.optimizer.zero_grad()
    trained.loss(trained.model, batch).backward()  # type: ignore[no-untyped-call]  # torch does not type it
    trained.optimizer.step()


def set_threads(count: int) -> None:
    """Set the intra-op threads of this process."""
    torch.set_num_threads(count)
