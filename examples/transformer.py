"""A Hugging Face transformer, made from its configuration and trained on a toy language: pip install transformers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import asyncprop as ap


def main(batches: int = 60) -> tuple[float, float]:
    """Train a tiny GPT-2 to count modulo 16; return the mean losses of the first and the last ten batches."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=16, n_positions=16, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)  # its input and output embeddings are tied: a layer like any other
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    starts = torch.randint(16, (batches, 16, 1))
    loader = [(start + torch.arange(16)) % 16 for start in starts]

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    with ap.Engine(model, optimizer, loss_fn) as engine:
        losses = [step.loss for step in engine.run(loader)]
    return sum(losses[:10]) / 10, sum(losses[-10:]) / 10


if __name__ == "__main__":
    print("loss of the first and the last ten batches: {:.3f} {:.3f}".format(*main()))
