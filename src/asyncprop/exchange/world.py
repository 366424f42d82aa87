"""World: the ranks that train together, as a launcher started them. A world of one communicates with nobody."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from asyncprop.exchange.board import Board
from asyncprop.exchange.members import START_TIMEOUT_S, TIMEOUT_S, Members, holds_store
from asyncprop.exchange.told import InOrder

JOIN_TIMEOUT_S = 10.0
"""How long a rank that joins waits for the store's host, for the store, and for ranks in it, each."""

MEMBERS = "asyncprop/members"
"""Prefix of what members leave in the store."""

T = TypeVar("T")


class World:
    """All ranks, and which of them this process is.

    Inside its `with` block torch.distributed is initialised, if there are several; or, for ranks that may die, hang and
    join, the `members` are there instead, as torch's process groups end with any of their ranks.

    Args:
        tolerant: whether the ranks may die, hang and join.
        timeout_s: of silence, after which the others go on without a rank.
        joins: the address, HOST:PORT, of the store of ranks that train already, for one that joins them.

    Attributes:
        rank: this process's number, from 0.
        size: how many there were at the start.
        members: those that are alive, if the world is tolerant.
        address: then HOST:PORT of the store, where others join them.
        is_guest: whether this rank joins, and no launcher of the others has started it: it may leave them.
    """

    def __init__(self, *, tolerant: bool = False, timeout_s: float = TIMEOUT_S, joins: str | None = None) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.members: Members | None = None
        self.address = ""
        self.is_guest = joins is not None and self.size == 1
        self._tolerant, self._timeout_s, self._joins = tolerant, timeout_s, joins
        self._store: Any = None

    def __enter__(self) -> Self:
        if self._joins is not None or (self._tolerant and self.size > 1):
            self._open_members()
        elif self.size > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(backend)
            default = distributed.distributed_c10d._get_default_store()
            self._store = distributed.PrefixStore("asyncprop", default)  # type: ignore[attr-defined]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.members:
            # A refusal of what was given is an orderly end: the others are to hear of it.
            failed = kind is not None and not issubclass(kind, ValueError)
            self.members.close(failed=failed, waits=kind is None)
        elif self.size > 1 and kind is None:  # after an error the others may never come
            gc.collect()  # a DistributedDataParallel is part of a cycle, and holds the group, whose threads must end
            distributed.destroy_process_group()

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.rank == (min(self.members.among) if self.members else 0)

    @property
    def is_joining(self) -> bool:
        """Whether this rank has yet to take over the training from those that it joins."""
        return self.members is not None and self.members.joins

    def gather(self, value: Any) -> Any:
        """Return a sequence of every rank's `value`, in the order of ranks; all ranks must call it. The dead have none.

        With `members` the first rank has a list, as it may have to write it; another reads what it asks for, when it
        does: ranks' states may be as long as models, and only the first needs them all.
        """
        if self.members:
            told = InOrder(self.members.gather(value))
            return list(told) if self.is_first else told
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def _open_members(self) -> None:
        """Find the store, torch's own: the launcher holds it, or else the first rank, which then must not die."""
        self.address = self._joins or f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        is_master = self._joins is None and holds_store(self.rank)
        store = self._find_store(is_master)
        self._store = Board(PrefixStore("asyncprop/counters", store))
        rank = None if self._joins else self.rank
        self.members = Members(
            PrefixStore(MEMBERS, store), self.size, rank, timeout_s=self._timeout_s, holds_store=is_master
        )
        self.members.open()
        self.rank, self.size = self.members.rank, self.members.size
        os.environ["RANK"] = str(self.rank)  # a rank that joins is slowed, or not, as this number says

    def _find_store(self, is_master: bool) -> TCPStore:
        host, port = self.address.rsplit(":", 1)
        patience = timedelta(seconds=START_TIMEOUT_S)
        if not self._joins:
            return TCPStore(host, int(port), is_master=is_master, timeout=patience)
        try:
            store = _join_store(host, int(port))
        except (OSError, RuntimeError) as error:
            said = f"join must be where ranks train (nobody answers at {self._joins})"
            raise ValueError(f"{said}: give the address that the first rank told") from error
        store.set_timeout(patience)
        return store

    def counter(self, name: str) -> Counter:
        """Return the counter called `name`, which all ranks share."""
        return Counter(self._store, name)


def _join_store(host: str, port: int) -> TCPStore:
    """Return a connection to the store in which ranks train; one of OSError and RuntimeError says that it is not there.

    torch tries for long to connect, and says so at length; and it waits for good for a program that answers nothing.
    """
    socket.create_connection((host, port), JOIN_TIMEOUT_S).close()
    patience = timedelta(seconds=JOIN_TIMEOUT_S)
    store = _within(JOIN_TIMEOUT_S, lambda: TCPStore(host, port, is_master=False, timeout=patience))
    PrefixStore(MEMBERS, store).wait(["start"], patience)  # another program's store answers, too
    return store


def _within(seconds: float, work: Callable[[], T]) -> T:
    """Return what some work returns; a TimeoutError leaves it alone, in a thread of its own, when it takes longer."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="asyncprop-store", daemon=True).start()
    return done.result(seconds)


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
