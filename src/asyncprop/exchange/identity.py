"""Identity: all that ranks must have in common to train together. Those that differ refuse each other by name."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from asyncprop import __version__
from asyncprop.exchange.board import POLL_S
from asyncprop.exchange.members import Members
from asyncprop.exchange.wire import Wire


def identity_of(model: nn.Module, wire: Wire) -> dict[str, Any]:
    """Return what a rank says of itself: its version, its model, and how that travels."""
    return {
        "asyncprop": __version__,
        **wire.identity,
        "model": [
            [name, list(value.shape), str(value.dtype)]
            for name, value in (*model.named_parameters(), *model.named_buffers())
        ],
    }


def greet(members: Members, ours: dict[str, Any]) -> None:
    """Say what this rank is, and check what each of the others says; all that do not die before must call it.

    Raises:
        ValueError: if one differs, with both sides named.
    """
    members.board.put(_key_of(members.rank), ours)
    for member in members.among:
        if member != members.rank and (theirs := _said_by(members, member)):
            check_identity(ours, members.rank, theirs, member)


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
        what = "" if key == "model" else f"of its {key}, "
        raise ValueError(
            f"model must be the same on all ranks ({what}rank {rank} has {here}, rank {other} has {there})"
        )


def _said_by(members: Members, member: int) -> dict[str, Any] | None:
    """Wait for what another rank says of itself; None if it dies before it has said anything."""
    board, key = members.board, _key_of(member)
    while not board.has(key):
        members.check()
        if member not in members.alive:
            return None
        time.sleep(POLL_S)
    identity: dict[str, Any] = board.get(key)
    return identity


def _key_of(member: int) -> str:
    return f"identity/{member}"


def _pairs(mine: list[Any], theirs: list[Any]) -> list[tuple[Any, Any]]:
    length = max(len(mine), len(theirs))
    return list(zip(mine + ["none"] * (length - len(mine)), theirs + ["none"] * (length - len(theirs)), strict=True))
