"""Group: the process group in which those that meet add up, torch's own over gloo."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, ReduceOp, Store  # type: ignore[attr-defined]

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
    """

    def __init__(self, members: Members, store: Store) -> None:
        self._members = members
        self._store = store.clone()  # type: ignore[attr-defined]  # connecting waits in it: it must be nobody else's
        self._group: Any = None
        self._among: tuple[int, ...] = ()

    def forget(self) -> None:
        """Leave the group."""
        self._group, self._among = None, ()

    def connect(self, numbers: int) -> None:
        """Be in a group of those that are here now, the last one if they are the same.

        A member that dies in a collective is noticed at once, by its connections. Only one that hangs is waited for: as
        long as its silence is borne, and as the slowest link may take for so many numbers.

        Raises:
            GroupBroken: if one of them cannot be reached.
        """
        among = self._members.among
        if among == self._among:
            return
        self._among, self._group = among, None
        if len(among) > 1:
            store = PrefixStore(f"meeting/{self._members.turn}", self._store)
            timeout = timedelta(seconds=self._members.timeout_s + 8 * numbers / SLOWEST_BYTES_PER_S)
            try:
                self._group = ProcessGroupGloo(store, among.index(self._members.rank), len(among), timeout)
            except RuntimeError as error:
                raise _broken(error) from error

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
