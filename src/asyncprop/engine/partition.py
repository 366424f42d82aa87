"""Partition: each lane writes a block of layers of its own (PASSM+, LPPSGD; Chatterjee et al. 2022).

A partial backward pass ends at its block's first layer. So the blocks differ in cost by the way down to them, and are
cut where measured times say that the dearest block is cheapest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from asyncprop.devices import Device, tensors_in
from asyncprop.engine.layers import Layer

REPEATS = 3
"""Backward passes of which the fastest counts."""

Blocks = tuple[tuple[str, ...], ...]
"""Names of the layers that each lane writes."""


@dataclass(frozen=True, slots=True)
class Partition:
    """When a lane's backward pass is partial, and what it then writes.

    Args:
        blocks: names of the layers (of `Statistics.layers`) for each lane: every layer in exactly one. Default: cut
            by the times of backward passes, measured on the first batch.
        warm_up_batches: batches, in the order of taking, whose passes write all layers.
        alternate: whether, after the warm-up, every other pass of a lane writes all layers (LPPSGD), or none (PASSM+).
    """

    blocks: Blocks | None = None
    warm_up_batches: int = 0
    alternate: bool = False

    def __post_init__(self) -> None:
        if self.warm_up_batches < 0:
            raise ValueError(f"warm_up_batches must be >= 0 (got {self.warm_up_batches})")

    def is_partial(self, batch: int, earlier: int) -> bool:
        """Tell whether a pass writes its block only.

        Args:
            batch: its number in the order of taking.
            earlier: passes that its lane has run since the warm-up.
        """
        return batch >= self.warm_up_batches and (not self.alternate or earlier % 2 == 1)


def check_blocks(blocks: Blocks, layers: Sequence[Layer], lanes: int) -> None:
    """Refuse blocks that are not an exact disjoint cover of the layers, one block per lane."""
    if len(blocks) != lanes:
        raise ValueError(f"blocks must be as many as there are lanes (got {len(blocks)}, lanes={lanes})")
    given = [name for block in blocks for name in block]
    if sorted(given) != sorted(layer.name for layer in layers):
        wrong = sorted(set(given) ^ {layer.name for layer in layers}) or sorted(n for n in given if given.count(n) > 1)
        raise ValueError(f"blocks must name each layer exactly once (wrong: {', '.join(dict.fromkeys(wrong))})")


@dataclass(frozen=True, slots=True)
class BackwardTimes:
    """Seconds of backward passes that compute gradients for some layers only; entries go by layer, from the input.

    Attributes:
        alone: for this layer alone: the way down to it, and its own gradient.
        down_to: for this layer and all after it.
    """

    alone: tuple[float, ...]
    down_to: tuple[float, ...]

    def blocks(self) -> Callable[[int, int], float]:
        """Return what a pass that writes layers `first` to `last` takes: the way down, and their gradients."""
        beyond = [all_ - one for one, all_ in zip(self.alone, self.down_to, strict=True)]  # gradients of later layers
        for layer in reversed(range(len(beyond) - 1)):
            beyond[layer] = max(beyond[layer], beyond[layer + 1])  # more of them take longer, whatever was measured
        return lambda first, last: self.alone[first] + beyond[first] - beyond[last]


def measure_backward(
    module: nn.Module,
    losses_of: Callable[[nn.Module, Any], list[Tensor]],
    batch: Any,
    layers: Sequence[Layer],
    device: Device,
) -> BackwardTimes:
    """Time backward passes of one forward pass of `batch`; nothing is stepped.

    Args:
        module: a copy of the model that nobody else uses.
        losses_of: computes the losses of a batch.
        batch: as training has it.
        layers: of which to take times.
        device: on which the module is.
    """
    leaves = dict(module.named_parameters())
    stream = device.stream(0)  # no pass is under way, and the first lane finds the memory there afterwards
    with device.use(stream):
        device.receive(stream, tensors_in(batch))  # and wait for the copy of the module, too
        loss = torch.stack([loss.reshape(()) for loss in losses_of(module, batch)]).sum()

        def seconds(first: int, last: int) -> float:
            wanted = [leaves[name] for layer in layers[first : last + 1] for name in layer.parameters]
            took = []
            for _ in range(REPEATS):
                start = device.mark()
                torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
                end = device.mark()
                device.finish(stream)
                took.append(device.seconds(start, end))
            return min(took)

        seconds(0, len(layers) - 1)  # the first is slow
        places = range(len(layers))
        return BackwardTimes(
            tuple(seconds(place, place) for place in places), tuple(seconds(place, len(layers) - 1) for place in places)
        )


def cut(times: BackwardTimes, layers: Sequence[Layer], count: int) -> Blocks:
    """Return `count` contiguous blocks of layers, the dearest of which is as cheap as can be.

    Raises:
        ValueError: if there are fewer layers than blocks.
    """
    if count > len(layers):
        raise ValueError(f"workers must be at most {len(layers)}, the layers that there are to share (got {count})")

    seconds = times.blocks()

    @cache
    def best(first: int, blocks: int) -> tuple[float, tuple[int, ...]]:
        """Return the cost of the dearest block, and the blocks' ends, for the layers from `first` on."""
        if blocks == 1:
            return seconds(first, len(layers) - 1), (len(layers),)
        choices = []
        for end in range(first + 1, len(layers) - blocks + 2):
            rest, ends = best(end, blocks - 1)
            choices.append((max(seconds(first, end - 1), rest), (end, *ends)))
        return min(choices)

    ends = best(0, count)[1]
    starts = (0, *ends[:-1])
    return tuple(tuple(layer.name for layer in layers[a:b]) for a, b in zip(starts, ends, strict=True))
