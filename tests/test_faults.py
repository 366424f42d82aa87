"""Faults: real processes that are killed, frozen, replaced and stopped. Every wait is for a line that must come."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 120.0


class Command:
    """A running `asyncprop train`, read line by line."""

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

    def pid_of(self, rank: int) -> int:
        """Return the process of a rank."""
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    stat = (folder / "stat").read_text().rpartition(")")[2].split()
                    environment = (folder / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if int(stat[1]) == self.process.pid and f"RANK={rank}".encode() in environment:
                    return int(folder.name)
        raise AssertionError(f"no rank {rank}")

    def stop(self) -> int:
        """Ask it to end, and return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stderr
        self.lines += self.process.stderr
        return self.process.wait()


@contextmanager
def command(*arguments: str) -> Iterator[Command]:
    process = subprocess.Popen(
        [sys.executable, "-m", "asyncprop", "train", *arguments], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    watchdog = threading.Timer(PATIENCE_S, process.kill)  # the ranks end when the store that it holds is gone
    watchdog.start()
    try:
        with process:
            yield Command(process)
            process.kill()
    finally:
        watchdog.cancel()


def rows(out: Path, name: str = "steps") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with three ranks; kill the first and let it be replaced; freeze another, and let it go on; stop."""
    out = tmp_path_factory.mktemp("faults") / "run"
    with command(
        "digits", "--method", "layup", "--ranks", "3", "--replacements", "1", "--timeout", "1", "--epochs", "100000",
        "--batch-size", "8", "--out", str(out),
    ) as train:  # fmt: skip
        train.read_epochs(1)
        os.kill(train.pid_of(0), signal.SIGKILL)
        train.read_until(lambda line: "rank 0 was ended by SIGKILL: the others go on" in line)
        train.read_until(lambda line: "rank 1: rank 0 was not heard of for 1 s: going on without it" in line)
        train.read_epochs(2)  # of another rank, which now is the first
        read_until_trained_by(train, out, 3)
        frozen = train.pid_of(2)
        os.kill(frozen, signal.SIGSTOP)
        train.read_until(lambda line: "rank 1: rank 2 was not heard of" in line)
        train.read_epochs(2)
        os.kill(frozen, signal.SIGCONT)
        read_until_trained_by(train, out, 2)
        assert train.stop() == 128 + signal.SIGTERM, "".join(train.lines)
    return out


def read_until_trained_by(train: Command, out: Path, rank: int) -> None:
    """Read until a rank has trained on a batch from now on."""
    steps = out / "steps.jsonl"
    start = steps.stat().st_size

    def has_trained() -> bool:
        with steps.open() as file:
            file.seek(start)
            return f'"rank": {rank},' in file.read()

    train.read_until(lambda line: line.startswith("epoch ") and has_trained())


def test_the_others_go_on_and_so_does_the_run_s_folder(out: Path) -> None:
    steps, epochs = rows(out), rows(out, "epochs")
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert [row["epoch"] for row in epochs] == list(range(1, len(epochs) + 1))
    assert {row["rank"] for row in steps} == {0, 1, 2, 3}
    assert epochs[-1]["test_metric"] > 0.5  # how many epochs there were is a matter of time


def test_an_epoch_uses_each_batch_once_but_for_what_a_fault_took_with_it(out: Path) -> None:
    batches = 1437 // 8
    counts: dict[int, int] = {}
    for row in rows(out):
        counts[row["epoch"]] = counts.get(row["epoch"], 0) + 1
    done = [counts[epoch] for epoch in sorted(counts)][:-1]  # the last was stopped
    assert max(done) == batches
    assert sum(count == batches for count in done) >= len(done) - 4


def test_it_goes_on_with_another_number_of_ranks(out: Path) -> None:
    before = len(rows(out))
    with command("--resume", str(out), "--ranks", "2") as train:
        train.read_epochs(2)
        assert train.stop() == 128 + signal.SIGTERM, "".join(train.lines)
    steps = rows(out)
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert {row["rank"] for row in steps[before:]} == {0, 1}
