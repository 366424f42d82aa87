"""Your own training loop, in two versions: the plain one, and the asynchronous one, which differs in two lines."""

from __future__ import annotations

import torch
from torch import nn

import asyncprop as ap

EPOCHS = 3


def make() -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return a small model, its optimizer, and batches of points labelled by the sign of their sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    points = torch.randn(60, 32, 20)
    return model, optimizer, [(batch, (batch.sum(1) > 0).long()) for batch in points]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the loss of one batch, by the module that is handed over."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def plain() -> float:
    """Train as ever; return the mean loss of the last epoch."""
    model, optimizer, loader = make()
    for _ in range(EPOCHS):
        losses = []
        for batch in loader:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses)


def asynchronous() -> float:
    """Train asynchronously; return the mean loss of the last epoch."""
    model, optimizer, loader = make()
    with ap.Engine(model, optimizer, loss_fn) as engine:  # 1
        for _ in range(EPOCHS):
            losses = [step.loss for step in engine.run(loader)]  # 2
    return sum(losses) / len(losses)


if __name__ == "__main__":
    print(f"mean loss of epoch {EPOCHS}: plain {plain():.3f}, asynchronous {asynchronous():.3f}")
