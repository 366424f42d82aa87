"""An LSTM that tells which half of its vocabulary prevails, with Adam, a scheduler, and clipping by layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import asyncprop as ap


class Classifier(nn.Module):
    """Embedding, LSTM, and a linear layer on the last state."""

    def __init__(self, vocabulary: int = 40, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape (batch, 2) for tokens of shape (batch, length)."""
        _, (state, _) = self.lstm(self.embedding(tokens))
        return self.out(state[-1])


def main(epochs: int = 3, batches: int = 40) -> list[float]:
    """Train, and return the mean loss of every epoch."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    tokens = torch.randint(40, (batches, 32, 12))
    loader = [(batch, ((batch >= 20).float().mean(1) > 0.5).long()) for batch in tokens]

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    means = []
    with ap.Engine(model, optimizer, loss_fn, update=ap.LayerUpdate(max_norm=1.0)) as engine:
        for _ in range(epochs):
            losses = [step.loss for step in engine.run(loader)]
            means.append(sum(losses) / len(losses))
            scheduler.step()
    return means


if __name__ == "__main__":
    print("mean loss by epoch:", ", ".join(f"{loss:.3f}" for loss in main()))
