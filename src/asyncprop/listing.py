"""Listing: the tables of tasks, methods and data sets, as the command prints them."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from asyncprop.engine import Coupled
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
    print_table(stream, ["method", "workers", "update", "partition", "exchange", "what"], rows)


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
    return [_workers(method), _update(method), method.partition or "all", method.exchange or "–"]


def _workers(method: Method) -> str:
    if method.workers is None:
        return "one loop"
    if isinstance(method.workers, Coupled):
        return f"{method.workers.workers} coupled"
    return f"{method.workers.forward} forward, {method.workers.backward} backward"


def _update(method: Method) -> str:
    if method.update is None:
        return "block, in turn"
    extras: list[str] = [method.update.state] if method.update.state != "shared" else []
    extras += ["compensated"] if method.update.compensate else []
    return ", ".join(["layer" if method.update.by_layer else "block", *extras])
