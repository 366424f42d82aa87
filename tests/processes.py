"""Processes: running `asyncprop train`s as tests see them: read line by line, ended for certain, found by rank."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0
TRAIN = (sys.executable, "-m", "asyncprop", "train")


class Command:
    """A running `asyncprop train`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []

    def read_until(self, wanted: Callable[[str], bool]) -> str:
        """Read until such a line comes, and return it."""
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if wanted(line):
                return line
        raise AssertionError("".join(self.lines))

    def read_epochs(self, count: int) -> None:
        """Read the lines of so many epochs."""
        for _ in range(count):
            self.read_until(lambda line: line.startswith("epoch "))

    def read_until_trained_by(self, out: Path, rank: int) -> None:
        """Read until a rank has trained on a batch from now on."""
        steps = out / "steps.jsonl"
        start = steps.stat().st_size

        def has_trained() -> bool:
            with steps.open() as file:
                file.seek(start)
                return f'"rank": {rank},' in file.read()

        self.read_until(lambda line: line.startswith("epoch ") and has_trained())

    def read_to_the_end(self) -> int:
        """Read what is left, and return the exit code."""
        assert self.process.stderr
        self.lines += self.process.stderr
        return self.process.wait()

    def stop(self) -> int:
        """Ask it to end, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.read_to_the_end()

    def pid_of(self, rank: int) -> int:
        """Return the process of a rank."""
        for pid in children(self.process.pid):
            with contextlib.suppress(OSError):  # it has just ended
                if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    return pid
        raise AssertionError(f"no rank {rank}")


@contextmanager
def command(
    *arguments: str,
    prefix: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[Command]:
    """Run `asyncprop train ARGUMENTS`. What hangs is killed: its ranks end when the store that it holds is gone."""
    process = subprocess.Popen(
        [*prefix, *TRAIN, *arguments],
        env={**os.environ, **(environment or {})}, stderr=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    watchdog = threading.Timer(patience_s, process.kill)
    watchdog.start()
    try:
        with process:
            yield Command(process)
            process.kill()
    finally:
        watchdog.cancel()


def place(rank: int, ranks: int, store: str) -> dict[str, str]:
    """Return the environment of one rank among others, as a launcher sets it.

    Args:
        rank: its number.
        ranks: how many there are.
        store: HOST:PORT of the store.
    """
    host, port = store.rsplit(":", 1)
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": host, "MASTER_PORT": port}


def children(parent: int) -> list[int]:
    """Return the processes that a process has started and that run."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, its_parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            if int(its_parent) == parent and state != "Z":
                found.append(int(folder.name))
    return sorted(found)


def rows(out: Path, name: str = "steps") -> list[dict[str, Any]]:
    """Return the lines of a run's file."""
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
