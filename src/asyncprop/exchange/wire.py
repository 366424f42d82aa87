"""Wire: how chunks become messages, and messages chunks again. Whatever does not fit the model is refused whole.

A message is a header of ten 64-bit numbers (see `Header`); one of chunks goes on with the table of their indices, 64
bits each, and their parts' values, all aligned to 16 bytes.
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
from asyncprop.exchange.chunks import ALIGNMENT, LEAST_BYTES, Part, bytes_of, cut_layer
from asyncprop.exchange.pair import FAIR_SHARE

PROTOCOL = 4
"""Raise it whenever what is sent, or what is done about it, changes: ranks of different protocols refuse each other."""

Values = Sequence[tuple[Part, Tensor]]
"""Parts of parameters, and what a message has of them."""

WireType = Literal["exact", "bf16"]
MAGIC = 0x6173796E6370726F  # "asyncpro"
HEADER_BYTES = 80


class Garbage(ValueError):  # noqa: N818
    """A message that is none of this training's."""


class Kind(IntEnum):
    """What a message says."""

    HELLO = 1  # a link is open; `sequence` is the last message of yours that I have merged
    CHUNKS = 2  # merge these: a question
    MERGED = 3  # your message `sequence` is merged: add these; without chunks, it was too late for that


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
    chunks: int = 0
    digest: int = 0
    length_bytes: int = HEADER_BYTES


WEIGHT_AT = 1 + [field.name for field in fields(Header)].index("weight")
CHUNKS_OF = {Kind.HELLO: (0, 0), Kind.CHUNKS: (1, 1 << 31), Kind.MERGED: (0, 1 << 31)}
"""How many chunks a message of each kind has: the least, and the most."""
assert 8 * (1 + len(fields(Header))) == HEADER_BYTES


class Wire:
    """The layout of one model's chunks in messages.

    Args:
        parameters: the model's, by name.
        layers: what is stepped together; each is a chunk, or several if it has more than `bucket_bytes` and 64 KiB.
        wire: `"exact"` sends values as they are; `"bf16"` sends 32-bit floats as bfloat16: half of the bytes, and
            every merge brings in a relative error of up to 0.4 % of what came.
        bucket_bytes: a message has no more bytes of values, but for one chunk that has.

    Attributes:
        chunks: of each layer, the indices of its chunks.
        count: of all chunks.
        identity: all that ranks must have in common to understand each other's messages.
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
        self._bucket_bytes = bucket_bytes
        own = {name: parameters[name] for layer in layers for name in layer.parameters}
        dtypes = {name: _sent_dtype(value.dtype, wire) for name, value in own.items()}
        cut = [
            cut_layer({name: own[name] for name in layer.parameters}, dtypes, max(bucket_bytes, LEAST_BYTES))
            for layer in layers
        ]
        self._chunks = [chunk for chunks in cut for chunk in chunks]
        self._bytes = [bytes_of(chunk) for chunk in self._chunks]
        self.count = len(self._chunks)
        numbers = itertools.count()
        self.chunks = [[next(numbers) for _ in chunks] for chunks in cut]
        self.identity: dict[str, Any] = {
            "protocol": PROTOCOL,
            "wire": wire,
            "bucket_bytes": bucket_bytes,
            "layers": [layer.name for layer in layers],
            "parameters": [[name, list(value.shape), str(dtypes[name])] for name, value in own.items()],
        }
        self.digest = zlib.crc32(json.dumps(self.identity).encode())
        most = min(max(bucket_bytes, *self._bytes, 0), sum(self._bytes))
        self.message_bytes = HEADER_BYTES + _table_bytes(self.count) + most

    def bytes_of(self, chunk: int) -> int:
        """Return how long a chunk's values are in a message."""
        return self._bytes[chunk]

    def fill(self, chunks: Sequence[int]) -> int:
        """Return how many of these chunks, from the first on, travel in one message: one at least."""
        bytes_ = list(itertools.accumulate(self._bytes[chunk] for chunk in chunks))
        return max(1, bisect.bisect_right(bytes_, self._bucket_bytes))

    def write(self, buffer: Tensor, header: Header, chunks: Sequence[int] = ()) -> Tensor:
        """Write a message's header and table into `buffer` (bytes), and return the part of it that is the message."""
        length = self._length_bytes(chunks)
        head = buffer[:HEADER_BYTES].view(torch.int64)
        given = replace(header, chunks=len(chunks), digest=self.digest, length_bytes=length)
        head.copy_(torch.tensor([MAGIC, *map(int, astuple(given))]))
        head[WEIGHT_AT : WEIGHT_AT + 1].view(torch.float64).fill_(header.weight)
        if chunks:
            buffer[HEADER_BYTES : HEADER_BYTES + 8 * len(chunks)].view(torch.int64).copy_(torch.tensor(chunks))
        return buffer[:length]

    def values(self, message: Tensor, chunks: Sequence[int]) -> Values:
        """Return a message's parts, and views of their values in it."""
        start = HEADER_BYTES + _table_bytes(len(chunks))
        found = []
        for part in itertools.chain.from_iterable(self._chunks[chunk] for chunk in chunks):
            values = message[start : start + part.value_bytes].view(part.dtype).view(part.shape)
            found.append((part, values))
            start += part.bytes
        return found

    def read(self, buffer: Tensor, sender: int) -> tuple[Header, list[int]]:
        """Return the header of a message, and its chunks, checked.

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
        least, most = CHUNKS_OF[Kind(header.kind)]
        if not least <= header.chunks <= min(most, self.count):
            raise Garbage(f"{header.chunks} chunks in a message of kind {header.kind}")
        chunks: list[int] = buffer[HEADER_BYTES : HEADER_BYTES + 8 * header.chunks].view(torch.int64).tolist()
        if len(set(chunks)) < len(chunks) or not all(0 <= chunk < self.count for chunk in chunks):
            raise Garbage("a table of chunks that this model has not")
        if header.kind == Kind.CHUNKS and not (0 < weight <= FAIR_SHARE and 0 <= header.besides < 1 << 31):
            raise Garbage(f"a question with weight {weight} and {header.besides} others out")
        expected = self._length_bytes(chunks)
        if header.length_bytes != expected or expected > buffer.numel():
            raise Garbage(f"{header.length_bytes} bytes instead of {expected}")
        return header, chunks

    def _length_bytes(self, chunks: Sequence[int]) -> int:
        return HEADER_BYTES + _table_bytes(len(chunks)) + sum(self._bytes[chunk] for chunk in chunks)


def check_finite(values: Values) -> None:
    """Raise Garbage if any value is not a finite number: one NaN would spread to every rank."""
    for part, tensor in values:
        wide = torch.promote_types(tensor.dtype, torch.float32)  # 16 bits would overflow
        if tensor.is_floating_point() and not math.isfinite(tensor.sum(dtype=wide).item()):
            raise Garbage(f"values of {part.name} that are not finite")


def _sent_dtype(dtype: torch.dtype, wire: WireType) -> torch.dtype:
    return torch.bfloat16 if wire == "bf16" and dtype == torch.float32 else dtype


def _table_bytes(chunks: int) -> int:
    return -(-8 * chunks // ALIGNMENT) * ALIGNMENT
