"""Axes: words that are short for the default of an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asyncprop.engine.update import BlockUpdate, LayerUpdate, Update
from asyncprop.engine.workers import Coupled, Decoupled, Workers


def workers_of(given: Workers | str) -> Workers:
    """Return the workers that a word, or an object, stands for."""
    workers: Workers = _choose("workers", given, {"decoupled": Decoupled, "coupled": Coupled})
    return workers


def update_of(given: Update | str) -> Update:
    """Return the update that a word, or an object, stands for."""
    update: Update = _choose("update", given, {"layer": LayerUpdate, "block": BlockUpdate})
    return update


def _choose(axis: str, given: Any, known: dict[str, Callable[[], Any]]) -> Any:
    if not isinstance(given, str):
        return given
    if given not in known:
        raise ValueError(f"{axis} must be one of {', '.join(known)} or an object of that kind (got {given!r})")
    return known[given]()
