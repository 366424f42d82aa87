"""Run: the folder of one run: its configuration and environment, a line per step and epoch, result, checkpoint."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from asyncprop.config import TrainConfig, read_toml, resolve, to_toml

log = logging.getLogger("asyncprop")


class Run:
    """An open run folder.

    Args:
        path: of the folder.
        config: what is run.
        steps, epochs: how far the run has come; they count on as lines are added.
        lines: how many lines of `steps.jsonl` and `epochs.jsonl` count; what a killed run wrote after its last
            checkpoint is cut off. None for one for each step and epoch; there are fewer in a folder that was made by
            `take_over`. They count on, too.
    """

    def __init__(
        self, path: Path, config: TrainConfig, *, steps: int = 0, epochs: int = 0, lines: Sequence[int] | None = None
    ) -> None:
        self.path, self.config = path, config
        self.steps, self.epochs = steps, epochs
        self.lines = list(lines or (steps, epochs))
        self._step_lines = _reopen(path / "steps.jsonl", self.lines[0])
        self._epoch_lines = _reopen(path / "epochs.jsonl", self.lines[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def checkpoint(self) -> Path:
        """The folder of the last good checkpoint."""
        return self.path / "checkpoint"

    @property
    def trace(self) -> Path:
        """The file of what each thread did, if that was asked for."""
        return self.path / "trace.jsonl"

    def add_step(self, row: dict[str, Any]) -> None:
        """Append a line to `steps.jsonl`."""
        self._step_lines.write(json.dumps(row) + "\n")
        self.steps = row["step"] + 1
        self.lines[0] += 1

    def add_epoch(self, row: dict[str, Any]) -> None:
        """Append a line to `epochs.jsonl`."""
        self._epoch_lines.write(json.dumps(row) + "\n")
        self.epochs = row["epoch"]
        self.lines[1] += 1

    def flush(self) -> None:
        """Bring all lines to the disk: a checkpoint that counts them comes next."""
        for file in (self._step_lines, self._epoch_lines):
            file.flush()
            os.fsync(file.fileno())

    def finish(self, result: dict[str, Any]) -> None:
        """Write `result.json`."""
        self.flush()
        write_json(self.path / "result.json", result)

    def close(self) -> None:
        """Close the files."""
        self._step_lines.close()
        self._epoch_lines.close()


def create_run(path: Path | None, config: TrainConfig) -> Run:
    """Make a run folder: `path`, which must be new or empty, or one under `runs/` named by time, task and method.

    Raises:
        ValueError: if it is not, or cannot be made.
    """
    path = path or _new_path(config)
    with writing(path):
        return _create(path, config)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Refuse a folder that was given as `out` if it cannot be made, or written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"out must be a folder that can be made and written ({out}: {error.strerror})") from None


def _new_path(config: TrainConfig) -> Path:
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.task}-{config.method}-{config.seed}"
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def _create(path: Path, config: TrainConfig) -> Run:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        way_out = f"choose another, or asyncprop train --resume {path}" if _is_resumable(path) else "choose another"
        raise ValueError(f"out must be a new or empty folder ({path} is not): {way_out}")
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    write_json(path / "environment.json", environment())
    return Run(path, config)


def _is_resumable(path: Path) -> bool:
    try:
        read_config(path)
    except ValueError:
        return False
    return (path / "checkpoint").is_dir()


def open_run(path: Path) -> Run:
    """Open the folder of a run that is to go on from its checkpoint."""
    config = read_config(path)
    try:
        position = json.loads((path / "checkpoint" / "position.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"resume must be a run with a checkpoint ({path} has none yet): start the run anew") from None
    epochs = len(position["history"])
    return Run(path, config, steps=position["steps"], epochs=epochs, lines=position.get("lines"))


def take_over(path: Path, config: TrainConfig) -> Run:
    """Open the folder of a run whose first rank has died, on the rank that is the first from now on.

    Without a checkpoint, as that rank died when it wrote the first, nothing in it counts. On a machine that does not
    have the folder one of that name is made, or where that may not be, one under `runs/`: it holds the lines from here
    on, and can be resumed like any other.
    """
    try:
        if not path.exists():
            return _create(path, config)
        return open_run(path) if (path / "checkpoint").exists() else Run(path, config)
    except OSError as error:
        run = create_run(None, config)
        log.warning("%s cannot be written here (%s): going on in %s", path, error.strerror, run.path)
        return run


def read_config(path: Path) -> TrainConfig:
    """Return the configuration of the run in a folder."""
    file = path / "config.toml"
    if not file.is_file():
        raise ValueError(f"resume must be the folder of a run ({path} has no config.toml)")
    if "devices" in read_toml(file):
        raise ValueError(f"{path} is a simulation, which can be neither resumed nor replayed: simulate it again")
    return resolve(TrainConfig, {}, file)


def read_result(path: Path) -> dict[str, Any] | None:
    """Return what a finished run found; None if it is not finished."""
    try:
        content: dict[str, Any] = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def read_environment(path: Path) -> dict[str, Any]:
    """Return what `environment()` said as the run in a folder was begun."""
    try:
        return dict(json.loads((path / "environment.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a run whose files are whole ({error}): remove it") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file aside and rename it, so that it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


def environment() -> dict[str, Any]:
    """Return versions, hardware, commit and command: what goes with every number."""
    return {
        "asyncprop": _version("asyncprop"),
        "torch": _version("torch"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "commit": _commit(),
        "command": " ".join(["asyncprop", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def machines(environments: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the versions and hardware of some environments, each that is different once."""
    found: list[dict[str, Any]] = []
    for one in environments:
        machine = {key: value for key, value in one.items() if key not in ("command", "started")}
        if machine not in found:
            found.append(machine)
    return found


def as_one(machines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one entry for several machines: values in which they differ are listed, as in `commit: a, b`."""
    found: dict[str, Any] = {}
    for key in dict.fromkeys(key for machine in machines for key in machine):
        values = list(dict.fromkeys(machine.get(key) for machine in machines))
        found[key] = values[0] if len(values) == 1 else ", ".join(map(str, values))
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _reopen(path: Path, lines: int) -> TextIO:
    """Open a file of lines for appending after its first `lines`.

    They are copied: whoever has the old file open still, as a rank that hung while it wrote, has it alone.
    """
    if path.exists():
        with path.open("rb") as file:
            for number in range(lines):
                if not file.readline().endswith(b"\n"):
                    raise ValueError(f"{path} must have {lines} whole lines (it has {number}): the run is damaged")
            end = file.tell()
        aside = path.with_name(f".{path.name}.{os.getpid()}")
        shutil.copyfile(path, aside)
        with aside.open("r+b") as copy:
            copy.truncate(end)
            os.fsync(copy.fileno())
        aside.replace(path)
    return path.open("a", encoding="utf-8")
