"""World: the ranks that train together, as torch's launcher started them. A world of one communicates with nobody."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

import torch
from torch import distributed


class World:
    """All ranks, and which of them this process is.

    Inside its `with` block torch.distributed is initialised, if there are several.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self._store: Any = None

    def __enter__(self) -> Self:
        if self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend)
            default = distributed.distributed_c10d._get_default_store()
            self._store = distributed.PrefixStore("asyncprop", default)  # type: ignore[attr-defined]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.size > 1 and kind is None:  # after an error the others may never come
            distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value`, in the order of ranks; all ranks must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def counter(self, name: str) -> Counter:
        """Return the counter called `name`, which all ranks share."""
        return Counter(self._store, name)


class Counter:
    """A number that all ranks add to. Each sees the sum of what was added before, and its own: no two see the same."""

    def __init__(self, store: Any, name: str) -> None:
        self._store, self._name = store, name
        self._value = 0

    def add(self, amount: int) -> int:
        """Add, and return the sum."""
        if self._store is not None:
            return int(self._store.add(self._name, amount))
        self._value += amount
        return self._value
