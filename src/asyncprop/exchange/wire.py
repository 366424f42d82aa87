"""Wire: how layers become messages, and messages layers again. Whatever does not fit the model is refused whole.

A message is a header of ten 64-bit numbers (see `Header`); one of layers goes on with the table of their indices, 64
bits each, and the values of these layers' parameters in the model's order, all aligned to 16 bytes.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from enum import IntEnum
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from asyncprop.engine.layers import Layer
from asyncprop.exchange.pair import FAIR_SHARE

PROTOCOL = 3
"""Raise it whenever what is sent, or what is done about it, changes: ranks of different protocols refuse each other."""

Values = Sequence[tuple[str, Tensor]]
"""Parameters' names, and what a message has of them."""

WireType = Literal["exact", "bf16"]
MAGIC = 0x6173796E6370726F  # "asyncpro"
HEADER_BYTES, ALIGNMENT = 80, 16


class Garbage(ValueError):  # noqa: N818
    """A message that is none of this training's."""


class Kind(IntEnum):
    """What a message says."""

    HELLO = 1  # a link is open; `sequence` is the last message of yours that I have merged
    LAYERS = 2  # merge these: a question
    MERGED = 3  # your message `sequence` is merged: add these; without layers, it was too late for that


@dataclass(frozen=True, slots=True)
class Header:
    """What every message begins with: who says what, of which training, in which meeting's time.

    Of a question, `weight` is the sender's, and `besides` the questions it has out to others.
    """

    kind: int
    sender: int
    sequence: int
    round: int
    weight: float = 0.0
    besides: int = 0
    layers: int = 0
    digest: int = 0
    length_bytes: int = HEADER_BYTES


WEIGHT_AT = 1 + [field.name for field in fields(Header)].index("weight")
LAYERS_OF = {Kind.HELLO: (0, 0), Kind.LAYERS: (1, 1 << 31), Kind.MERGED: (0, 1 << 31)}
"""How many layers a message of each kind has: the least, and the most."""
assert 8 * (1 + len(fields(Header))) == HEADER_BYTES


class Wire:
    """The layout of one model's layers in messages.

    Args:
        parameters: the model's, by name.
        layers: what is sent and merged together.
        wire: `"exact"` sends values as they are; `"bf16"` sends 32-bit floats as bfloat16: half of the bytes, and
            every merge brings in a relative error of up to 0.4 % of what came.
        bucket_bytes: a message has no more bytes of values; a layer that is larger travels alone.

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
        most = min(max(bucket_bytes, largest), sum(self._bytes))
        self.message_bytes = HEADER_BYTES + _table_bytes(len(layers)) + most

    def bytes_of(self, layer: int) -> int:
        """Return how long a layer's values are in a message."""
        return self._bytes[layer]

    def fill(self, layers: Sequence[int]) -> int:
        """Return how many of these layers, from the first on, travel in one message: one at least."""
        bytes_ = list(itertools.accumulate(self._bytes[layer] for layer in layers))
        return max(1, bisect.bisect_right(bytes_, self._bucket_bytes))

    def write(self, buffer: Tensor, header: Header, layers: Sequence[int] = ()) -> Tensor:
        """Write a message's header and table into `buffer` (bytes), and return the part of it that is the message."""
        length = HEADER_BYTES + _table_bytes(len(layers)) + sum(self._bytes[layer] for layer in layers)
        head = buffer[:HEADER_BYTES].view(torch.int64)
        given = replace(header, layers=len(layers), digest=self.digest, length_bytes=length)
        head.copy_(torch.tensor([MAGIC, *map(int, astuple(given))]))
        head[WEIGHT_AT : WEIGHT_AT + 1].view(torch.float64).fill_(header.weight)
        if layers:
            buffer[HEADER_BYTES : HEADER_BYTES + 8 * len(layers)].view(torch.int64).copy_(torch.tensor(layers))
        return buffer[:length]

    def values(self, message: Tensor, layers: Sequence[int]) -> list[list[tuple[str, Tensor]]]:
        """Return, for each of a message's layers, its parameters' names and views of their values in the message."""
        start = HEADER_BYTES + _table_bytes(len(layers))
        found = []
        for layer in layers:
            views = []
            for part in self._parts[layer]:
                end = start + part.numel * part.dtype.itemsize
                views.append((part.name, message[start:end].view(part.dtype).view(part.shape)))
                start += part.bytes
            found.append(views)
        return found

    def read(self, buffer: Tensor, sender: int) -> tuple[Header, list[int]]:
        """Return the header of a message, and its layers, checked.

        Raises:
            Garbage: if anything about it is not as this model's ranks write it.
        """
        head = buffer[:HEADER_BYTES].view(torch.int64)
        magic, *numbers = head.tolist()
        weight = head[WEIGHT_AT : WEIGHT_AT + 1].view(torch.float64).item()
        header = replace(Header(*numbers), weight=weight)
        if magic != MAGIC or header.kind not in list(Kind) or header.sender != sender:
            raise Garbage("not a message of asyncprop's")
        if header.digest != self.digest:
            raise Garbage("another model's layers, or another protocol")
        least, most = LAYERS_OF[Kind(header.kind)]
        if not least <= header.layers <= min(most, len(self._parts)):
            raise Garbage(f"{header.layers} layers in a message of kind {header.kind}")
        layers: list[int] = buffer[HEADER_BYTES : HEADER_BYTES + 8 * header.layers].view(torch.int64).tolist()
        if len(set(layers)) < len(layers) or not all(0 <= layer < len(self._parts) for layer in layers):
            raise Garbage("a table of layers that this model has not")
        if header.kind == Kind.LAYERS and not (0 < weight <= FAIR_SHARE and 0 <= header.besides < 1 << 31):
            raise Garbage(f"a question with weight {weight} and {header.besides} others out")
        expected = HEADER_BYTES + _table_bytes(len(layers)) + sum(self._bytes[layer] for layer in layers)
        if header.length_bytes != expected or expected > buffer.numel():
            raise Garbage(f"{header.length_bytes} bytes instead of {expected}")
        return header, layers


def check_finite(values: Values) -> None:
    """Raise Garbage if any value is not a finite number: one NaN would spread to every rank."""
    for name, tensor in values:
        wide = torch.promote_types(tensor.dtype, torch.float32)  # 16 bits would overflow
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=wide).item()):
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


def _table_bytes(layers: int) -> int:
    return -(-8 * layers // ALIGNMENT) * ALIGNMENT
