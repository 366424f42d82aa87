"""Group: the process group in which those that meet add up, torch's own over gloo, kept while all of them have it."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, ReduceOp, Store  # type: ignore[attr-defined]

from asyncprop.exchange.link import CONNECT_S
from asyncprop.exchange.members import Members

SLOWEST_BYTES_PER_S = 1e6
"""A slower link than this is taken for one that hangs."""


class GroupBroken(ConnectionError):  # noqa: N818
    """A member has died, or hangs, or cannot be reached."""


class Group:
    """A group of all that took part in the members' last `gather`. With this rank alone it does nothing.

    Args:
        members: who they are.
        store: to connect by.

    Attributes:
        key: what all that are in the group call it; empty where there is none.
    """

    def __init__(self, members: Members, store: Store) -> None:
        self.key = ""
        self._members = members
        self._store = store.clone()  # type: ignore[attr-defined]  # connecting waits in it: it must be nobody else's
        self._group: Any = None
        self._among: tuple[int, ...] = ()

    def forget(self) -> None:
        """Leave the group: its connections end, and whoever waits in it for this rank raises."""
        self._group, self._among, self.key = None, (), ""

    def connect(self, keys: Collection[str], numbers: int) -> None:
        """Be in a group of those that are here now, the last one if all of them are in it still.

        A member that dies is noticed at once by those that are connected to it. One that hangs is waited for: in a
        collective as long as its silence is borne, and as the slowest link may take for so many numbers.

        Args:
            keys: each member's `key`.
            numbers: at most so many are added up at once.

        Raises:
            GroupBroken: if one of them cannot be reached.
        """
        among = self._members.among
        if among == self._among and len(set(keys)) == 1:
            return
        self.forget()
        if len(among) > 1:
            key = f"meeting/{self._members.turn}"
            self._group = self._make(key, among, self._members.timeout_s + 8 * numbers / SLOWEST_BYTES_PER_S)
            self._among, self.key = among, key

    def _make(self, key: str, among: tuple[int, ...], timeout_s: float) -> Any:
        store, place = PrefixStore(key, self._store), among.index(self._members.rank)
        patience = timedelta(seconds=max(CONNECT_S, self._members.timeout_s))
        try:
            group = ProcessGroupGloo(store, place, len(among), patience)
        except RuntimeError as error:
            raise _broken(error) from error
        group._set_default_timeout(timedelta(seconds=timeout_s))
        return group

    def reduce(self, tensor: Tensor, operation: ReduceOp.RedOpType = ReduceOp.SUM) -> None:
        """Replace a tensor on the CPU by the sum of all members', or what else the operation says.

        Raises:
            GroupBroken: if a member dies, or hangs: on all that are left, sooner or later.
        """
        if self._group is None:
            return
        try:
            self._group.allreduce([tensor], operation).wait()
        except RuntimeError as error:
            raise _broken(error) from error


def _broken(error: RuntimeError) -> GroupBroken:
    return GroupBroken(str(error).partition("\n")[0])
