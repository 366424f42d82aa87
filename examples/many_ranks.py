"""Several ranks, each with a replica, averaged beside the workers:

torchrun --nproc-per-node 2 examples/many_ranks.py
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from own_loop import loss_fn, make

import asyncprop as ap


def main(epochs: int = 2) -> float:
    """Train on this rank's share of the batches; return the loss of the model on which all ranks have agreed."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model, optimizer, loader = make()  # the same on every rank: the seed is fixed
    with ap.Engine(model, optimizer, loss_fn, exchange=ap.Averaging(period=4)) as engine:
        for _ in range(epochs):
            for _step in engine.run(loader[rank::ranks]):
                pass
            engine.settle()  # all ranks wait here, and their models become equal to the bit
    with torch.no_grad():
        loss = loss_fn(model, loader[0]).item()
    weights = [None] * ranks
    dist.all_gather_object(weights, [parameter.tolist() for parameter in model.parameters()])
    assert all(other == weights[0] for other in weights)
    gc.collect()  # gloo aborts now and then if what still refers to the group is freed at the interpreter's end
    dist.destroy_process_group()
    if rank == 0:
        print(f"{ranks} ranks agree; loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    main()
