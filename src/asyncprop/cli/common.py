"""What commands have in common: kinds of arguments, exit codes, and how they say what is wrong."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import pydantic
from cyclopts import Parameter

from asyncprop.rank import BAD_INPUT, FAILED, complain

__all__ = ["BAD_INPUT", "FAILED", "Flat", "JsonFile", "check_writable", "complain", "given_options"]

Flat = Parameter(name="*")
"""The fields of a model are options of the command."""
JsonFile = Annotated[Path | None, Parameter(name="--json", help="File to write the figures to.")]


def given_options(options: pydantic.BaseModel, task: str | None) -> dict[str, Any]:
    """Return what was given on the command line, and nothing that is a default."""
    given = {name: getattr(options, name) for name in options.model_fields_set}
    return given if task is None else {"task": task, **given}


def check_writable(*files: Path | None) -> None:
    """Refuse, before hours of work, a file that could not be written after them."""
    for file in filter(None, files):
        try:
            with file.open("ab") if file.exists() else TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise ValueError(
                f"the file to write must be in a folder that exists, and writable ({file}: {error.strerror})"
            ) from None
