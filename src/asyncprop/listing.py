"""Listing: the tables of tasks, methods and data sets, as the command prints them."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from asyncprop.methods import METHODS, Method
from asyncprop.report.tables import print_table
from asyncprop.tasks import SOURCES, TASKS
from asyncprop.tasks.fetch import cache_folder, is_cached


def print_tasks(stream: TextIO, data_dir: Path | None) -> None:
    """Print the table of tasks."""
    rows = [
        [task.name, task.summary, str(task.recipe.epochs), f"{task.target:g}", task.status(data_dir)]
        for task in TASKS.values()
    ]
    print_table(stream, ["task", "what", "epochs", "target", "data"], rows)


def print_methods(stream: TextIO) -> None:
    """Print the table of methods: a column for each axis."""
    rows = [[method.name, *_axes(method), method.summary] for method in METHODS.values()]
    print_table(stream, ["method", "workers", "update", "exchange", "what"], rows)


def print_data(stream: TextIO) -> None:
    """Print the table of data sets."""
    rows = []
    for source in SOURCES.values():
        here = cache_folder() / source.name if is_cached(source.name, cache_folder()) else "not fetched"
        where = "in its package" if source.client is None else str(here)
        rows.append([source.name, source.summary, source.licence, where])
    rows += [
        [name, "not fetched: give its folder", "its own", "--data-dir"]
        for name in sorted({t.dataset for t in TASKS.values()} - {*SOURCES, "synthetic"})
    ]
    print_table(stream, ["data", "what", "licence", "where"], rows)


def _axes(method: Method) -> list[str]:
    workers = f"{method.workers.forward} forward, {method.workers.backward} backward" if method.workers else "one loop"
    return [workers, method.update or "block, in turn", "none"]
