"""Published: what the paper prints, with its place in it, read from `published.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Published:
    """One table of the paper: where it is, and its rows."""

    place: str
    rows: tuple[Row, ...]

    def row(self, **keys: str) -> Row:
        """Return the row with these entries; nothing if the paper has none."""
        return next((row for row in self.rows if all(row.get(key) == value for key, value in keys.items())), {})


@cache
def published(table: str) -> Published:
    """Return a table of the paper, `table1` to `table10`."""
    text = files("asyncprop.report").joinpath("published.toml").read_text(encoding="utf-8")
    content = tomllib.loads(text)[table]
    return Published(content["place"], tuple(content["rows"]))


def spread(values: list[float] | None, form: str) -> str:
    """Return a mean and its deviation as the paper prints them; a dash where it prints nothing."""
    if not values:
        return "–"
    return " ± ".join(format(value, form) for value in values)
