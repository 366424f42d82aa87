"""Tune: the grid of options that a comparison tries for every method alike."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from asyncprop.config import TrainConfig

Grid = dict[str, list[str]]
"""Values to try, by option."""


def parse_grid(text: str) -> Grid:
    """Read a grid as the command has it: `lr=0.05,0.1:momentum=0.5,0.9`.

    Raises:
        ValueError: if an option is unknown, or there is no value to try.
    """
    grid: Grid = {}
    for part in text.split(":"):
        option, equals, values = (piece.strip() for piece in part.partition("="))
        name = option.replace("-", "_")
        if not equals or not values or name not in TrainConfig.model_fields or name in ("task", "method", "seed"):
            raise ValueError(f"tune must be like lr=0.05,0.1:momentum=0.5,0.9, with options of train (got {part})")
        grid[name] = [value.strip() for value in values.split(",")]
    return grid


def points(grid: Grid, fixed: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield all combinations of the grid's options that are not `fixed`; nothing if all are."""
    free = {option: values for option, values in grid.items() if option not in fixed}
    if free:
        for values in product(*free.values()):
            yield dict(zip(free, values, strict=True))
