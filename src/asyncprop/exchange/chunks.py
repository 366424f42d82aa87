"""Chunks: what travels as one: a layer, or so many rows of one that is larger than messages are to be.

So a message, and what each neighbour costs in memory, does not grow with the model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ALIGNMENT = 16
"""Of each part in a message, in bytes."""

LEAST_BYTES = 1 << 16
"""Layers are not cut into less than this: each chunk has costs of its own."""


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter in a message. What it takes is asked for with every message, so it is computed once.

    Attributes:
        name: the parameter's.
        start, stop: rows, indices of its first dimension; None where all of it travels.
        shape: of these rows.
        dtype: in the message.
    """

    name: str
    start: int | None
    stop: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return these rows of the parameter itself: who writes to them writes to it."""
        own = parameters[self.name].data
        return own if self.start is None else own[self.start : self.stop]

    @cached_property
    def value_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def bytes(self) -> int:
        """What it takes in a message."""
        return -(-self.value_bytes // ALIGNMENT) * ALIGNMENT


Chunk = tuple[Part, ...]


def bytes_of(chunk: Iterable[Part]) -> int:
    """Return what these parts take in a message."""
    return sum(part.bytes for part in chunk)


def cut_layer(parameters: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], most_bytes: int) -> list[Chunk]:
    """Return a layer's chunks.

    Args:
        parameters: the layer's, in the model's order.
        dtypes: of each, in messages.
        most_bytes: a layer of more is cut, parameters between rows; a single row that has more travels alone.
    """
    whole = tuple(Part(name, None, None, tuple(own.shape), dtypes[name]) for name, own in parameters.items())
    if bytes_of(whole) <= most_bytes:
        return [whole]
    chunks: list[Chunk] = [()]
    for part in itertools.chain.from_iterable(_rows_of(part, most_bytes) for part in whole):
        if chunks[-1] and bytes_of(chunks[-1]) + part.bytes > most_bytes:
            chunks.append(())
        chunks[-1] += (part,)
    return chunks


def _rows_of(part: Part, most_bytes: int) -> Iterator[Part]:
    if part.bytes <= most_bytes or not part.shape:
        yield part
        return
    rows, *rest = part.shape
    row_bytes = math.prod(rest) * part.dtype.itemsize
    at_once = max(1, most_bytes // ALIGNMENT * ALIGNMENT // row_bytes)
    for start in range(0, rows, at_once):
        stop = min(rows, start + at_once)
        yield Part(part.name, start, stop, (stop - start, *rest), part.dtype)
