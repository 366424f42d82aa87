"""Wire: how layers become messages, and messages layers again. Whatever does not fit the model is refused whole.

A message is a header of eight 64-bit numbers (see `Header`); one of layers goes on with a table of (index, weight), 16
bytes an entry, and the values of these layers' parameters in the model's order, each aligned to 16 bytes.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from asyncprop.engine.layers import Layer

PROTOCOL = 2
"""Raise it whenever what is sent, or what is done about it, changes: ranks of different protocols refuse each other."""

WireType = Literal["exact", "bf16"]
MAGIC = 0x6173796E6370726F  # "asyncpro"
HEADER_BYTES, ENTRY_BYTES, ALIGNMENT = 64, 16, 16


class Garbage(ValueError):  # noqa: N818
    """A message that is none of this training's."""


class Kind(IntEnum):
    """What a message says."""

    HELLO = 1  # a link is open; `sequence` is the last message of yours that I have merged
    LAYERS = 2  # merge these
    MERGED = 3  # your message `sequence` is merged, or was too late for it


@dataclass(frozen=True, slots=True)
class Header:
    """What every message begins with: who says what, of which training, in which meeting's time."""

    kind: int
    sender: int
    sequence: int
    round: int
    entries: int = 0
    digest: int = 0
    length_bytes: int = HEADER_BYTES


Entry = tuple[int, float]
"""Index of a layer, and the weight that comes with it."""


class Wire:
    """The layout of one model's layers in messages.

    Args:
        parameters: the model's, by name.
        layers: what is sent and merged together.
        wire: `"exact"` sends values as they are; `"bf16"` sends 32-bit floats as bfloat16: half of the bytes, and
            every merge brings in a relative error of up to 0.4 % of what came.
        bucket_bytes: a message is full at so many bytes of values; a layer that is larger travels alone.

    Attributes:
        identity: all that ranks must have in common to understand each other.
        digest: 32 bits of it, in every header.
        message_bytes: of the longest message there can be.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], layers: Sequence[Layer], wire: WireType, bucket_bytes: int
    ) -> None:
        if wire not in get_args(WireType):
            raise ValueError(f"wire must be one of {', '.join(get_args(WireType))} (got {wire!r})")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be >= 1 (got {bucket_bytes})")
        self._parts = [[_Part(name, parameters[name], wire) for name in layer.parameters] for layer in layers]
        self._bytes = [sum(part.bytes for part in parts) for parts in self._parts]
        self._bucket_bytes = bucket_bytes
        self.identity: dict[str, Any] = {
            "protocol": PROTOCOL,
            "wire": wire,
            "layers": [layer.name for layer in layers],
            "parameters": [[part.name, list(part.shape), str(part.dtype)] for parts in self._parts for part in parts],
        }
        self.digest = zlib.crc32(json.dumps(self.identity).encode())
        largest = max(self._bytes, default=0)
        most = min(max(bucket_bytes + largest, largest), sum(self._bytes))
        self.message_bytes = HEADER_BYTES + ENTRY_BYTES * len(layers) + most

    def bytes_of(self, layer: int) -> int:
        """Return how long a layer's values are in a message."""
        return self._bytes[layer]

    def is_full(self, layers: Sequence[int]) -> bool:
        """Tell whether a message of these layers is long enough to be sent."""
        return sum(self._bytes[layer] for layer in layers) >= self._bucket_bytes

    def write(self, buffer: Tensor, header: Header, entries: Sequence[Entry] = ()) -> Tensor:
        """Write a message's header and table into `buffer` (bytes), and return the part of it that is the message."""
        values = sum(self._bytes[layer] for layer, _ in entries)
        length = HEADER_BYTES + ENTRY_BYTES * len(entries) + values
        given = (header.kind, header.sender, header.sequence, header.round, len(entries), self.digest, length)
        buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor([MAGIC, *given]))
        if entries:
            table = buffer[HEADER_BYTES : HEADER_BYTES + ENTRY_BYTES * len(entries)].view(torch.int64).view(-1, 2)
            table[:, 0] = torch.tensor([layer for layer, _ in entries])
            table[:, 1] = torch.tensor([weight for _, weight in entries], dtype=torch.float64).view(torch.int64)
        return buffer[:length]

    def values(self, message: Tensor, layers: Sequence[int]) -> list[list[tuple[str, Tensor]]]:
        """Return, for each of a message's layers, its parameters' names and views of their values in the message."""
        start = HEADER_BYTES + ENTRY_BYTES * len(layers)
        found = []
        for layer in layers:
            views = []
            for part in self._parts[layer]:
                end = start + part.numel * part.dtype.itemsize
                views.append((part.name, message[start:end].view(part.dtype).view(part.shape)))
                start += part.bytes
            found.append(views)
        return found

    def read(self, buffer: Tensor, sender: int) -> tuple[Header, list[Entry]]:
        """Return the header and the table of a message, checked.

        Raises:
            Garbage: if anything about it is not as this model's ranks write it.
        """
        magic, *fields = buffer[:HEADER_BYTES].view(torch.int64).tolist()
        header = Header(*fields)
        if magic != MAGIC or header.kind not in list(Kind) or header.sender != sender:
            raise Garbage("not a message of asyncprop's")
        if header.digest != self.digest:
            raise Garbage("another model's layers, or another protocol")
        if not 0 <= header.entries <= len(self._parts) or (header.entries > 0) != (header.kind == Kind.LAYERS):
            raise Garbage(f"{header.entries} layers in a message of kind {header.kind}")
        table = buffer[HEADER_BYTES : HEADER_BYTES + ENTRY_BYTES * header.entries].view(torch.int64).view(-1, 2)
        layers: list[int] = table[:, 0].tolist()
        weights: list[float] = table[:, 1].contiguous().view(torch.float64).tolist()
        if len(set(layers)) < len(layers) or not all(0 <= layer < len(self._parts) for layer in layers):
            raise Garbage("a table of layers that this model has not")
        if not all(0 < weight < math.inf for weight in weights):
            raise Garbage("weights that are no positive numbers")
        expected = HEADER_BYTES + ENTRY_BYTES * len(layers) + sum(self._bytes[layer] for layer in layers)
        if header.length_bytes != expected or expected > buffer.numel():
            raise Garbage(f"{header.length_bytes} bytes instead of {expected}")
        return header, list(zip(layers, weights, strict=True))


def check_finite(values: Sequence[Sequence[tuple[str, Tensor]]]) -> None:
    """Raise Garbage if any value is not a finite number: one NaN would spread to every rank."""
    for name, tensor in (pair for layer in values for pair in layer):
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=torch.float64).item()):
            raise Garbage(f"values of {name} that are not finite")


def check_identity(ours: dict[str, Any], rank: int, theirs: dict[str, Any], other: int) -> None:
    """Refuse another rank whose identity differs, with both sides named.

    Raises:
        ValueError: which says in what they differ.
    """
    for key, mine in ours.items():
        if mine == theirs.get(key):
            continue
        if not isinstance(mine, list):
            raise ValueError(
                f"{key} must be the same on all ranks (rank {rank} has {mine}, rank {other} has {theirs.get(key)})"
            )
        pairs = _pairs(mine, theirs.get(key) or [])
        here, there = next((a, b) for a, b in pairs if a != b)
        raise ValueError(
            f"model must be the same on all ranks (of its {key}, rank {rank} has {here}, rank {other} has {there})"
        )


def _pairs(mine: list[Any], theirs: list[Any]) -> list[tuple[Any, Any]]:
    length = max(len(mine), len(theirs))
    return list(zip(mine + ["none"] * (length - len(mine)), theirs + ["none"] * (length - len(theirs)), strict=True))


class _Part:
    """A parameter's place in a message."""

    def __init__(self, name: str, parameter: Tensor, wire: WireType) -> None:
        self.name, self.shape, self.numel = name, tuple(parameter.shape), parameter.numel()
        is_rounded = wire == "bf16" and parameter.dtype == torch.float32
        self.dtype = torch.bfloat16 if is_rounded else parameter.dtype
        self.bytes = -(-self.numel * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


assert 8 * (1 + len(astuple(Header(0, 0, 0, 0)))) == HEADER_BYTES
