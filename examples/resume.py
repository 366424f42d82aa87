"""Stop and go on: model and optimizer are ordinary objects between runs, so what you save of them is what there is."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from own_loop import loss_fn, make

import asyncprop as ap


def train(epochs: int, checkpoint: Path) -> float:
    """Train until `epochs` are done, going on from a checkpoint if there is one; return the last epoch's mean loss."""
    model, optimizer, loader = make()
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
    mean = float("nan")
    with ap.Engine(model, optimizer, loss_fn, turn="lockstep") as engine:  # reproducible, to show that nothing is lost
        for epoch in range(first, epochs):
            losses = [step.loss for step in engine.run(loader)]
            mean = sum(losses) / len(losses)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
            torch.save(state, checkpoint)
    return mean


def main() -> tuple[float, float]:
    """Train for four epochs at once, and for two and then two; return both last losses."""
    with tempfile.TemporaryDirectory() as folder:
        whole = train(4, Path(folder) / "whole.pt")
        train(2, Path(folder) / "parts.pt")
        return whole, train(4, Path(folder) / "parts.pt")


if __name__ == "__main__":
    print("loss of epoch 4, trained at once and in two parts: {:.6f} {:.6f}".format(*main()))
