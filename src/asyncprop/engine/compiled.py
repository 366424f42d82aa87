"""Warmer: compiles every lane of a torch.compile'd model before passes run at once, as compiling is not thread-safe."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from asyncprop.devices import tensors_in
from asyncprop.engine.feed import Feed, Work
from asyncprop.engine.lane import Lane
from asyncprop.engine.passes import Passes

Signature = tuple[tuple[torch.Size, torch.dtype], ...]


class Warmer:
    """Runs each lane forward and backward, alone and without stepping, for every new signature of batches."""

    def __init__(self, passes: Passes, lanes: list[Lane]) -> None:
        self._passes = passes
        self._lanes = lanes
        self._warm: WeakKeyDictionary[Lane, set[Signature]] = WeakKeyDictionary()  # lanes are made anew between runs

    def prepare(self, batch: Any, feed: Feed) -> None:
        """Compile all lanes for the shapes and dtypes of `batch`, if they are new, while no other pass runs.

        Buffers and the random state are put back afterwards, so a warmed model trains as one that was not.
        """
        signature = tuple((tensor.shape, tensor.dtype) for tensor in tensors_in(batch))
        cold = [lane for lane in self._lanes if signature not in self._warm.get(lane, ())]
        if not cold:
            return
        feed.wait_alone()
        with torch.random.fork_rng():
            for lane in cold:
                self._run(lane, batch)
        for lane in cold:
            self._warm.setdefault(lane, set()).add(signature)

    def _run(self, lane: Lane, batch: Any) -> None:
        buffers = [(buffer, buffer.detach().clone()) for buffer in lane.module.buffers()]
        pending = self._passes.forward(lane, Work(batch))
        leaves = [leaf for leaf in lane.leaves.values() if leaf.requires_grad]
        for loss in pending.losses:
            torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        for buffer, value in buffers:
            buffer.copy_(value)
