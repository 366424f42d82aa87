"""Told: what members said at a meeting. It is read from the store when it is asked for, as not all need all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


class Told(Mapping[int, Any]):
    """What each member said, by its number.

    Args:
        members: who took part.
        own: what is known without reading.
        read: reads what one of them said; it may raise.
    """

    def __init__(self, members: Sequence[int], own: Mapping[int, Any], read: Callable[[int], Any]) -> None:
        self._members, self._known, self._read = members, dict(own), read

    def __getitem__(self, member: int) -> Any:
        if member not in self._members:
            raise KeyError(member)
        if member not in self._known:
            self._known[member] = self._read(member)
        return self._known[member]

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[int]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


class InOrder(Sequence[Any]):
    """The same in the order of the members' numbers."""

    def __init__(self, told: Mapping[int, Any]) -> None:
        self._told, self._members = told, sorted(told)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self._told[member] for member in self._members[place]]
        return self._told[self._members[place]]

    def __len__(self) -> int:
        return len(self._members)
