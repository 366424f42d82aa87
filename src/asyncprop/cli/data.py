"""`asyncprop data`, `asyncprop tasks`, `asyncprop methods`: what there is to train on, and how."""

from __future__ import annotations

import sys
from pathlib import Path

from cyclopts import App

app = App(name="data", help="The data sets of the tasks.")


@app.command(name="list")
def list_data() -> None:
    """List the data sets that can be fetched, and where they are."""
    from asyncprop.listing import print_data

    print_data(sys.stdout)


@app.command
def fetch(name: str, /) -> None:
    """Fetch a data set into the cache, checked; what is there already is kept.

    Args:
        name: Name from `asyncprop data list`.
    """
    from asyncprop.tasks.fetch import fetch as fetch_data

    print(fetch_data(name))


def tasks(*, data_dir: Path | None = None) -> None:
    """List the tasks, with what is on this machine.

    Args:
        data_dir: Folder to look for data in.
    """
    from asyncprop.listing import print_tasks

    print_tasks(sys.stdout, data_dir)


def methods() -> None:
    """List the methods, and what separates them."""
    from asyncprop.listing import print_methods

    print_methods(sys.stdout)
