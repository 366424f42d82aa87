"""Identity: all that ranks must have in common to train together. Those that differ refuse each other by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from asyncprop import __version__
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


def _pairs(mine: list[Any], theirs: list[Any]) -> list[tuple[Any, Any]]:
    length = max(len(mine), len(theirs))
    return list(zip(mine + ["none"] * (length - len(mine)), theirs + ["none"] * (length - len(theirs)), strict=True))
