"""Launch: starts several ranks of the command on this machine.

Ranks that must all live are started by torch's own elastic launcher, which ends the others if one fails. Nothing of it
goes on after a death, so ranks that may die are started here, one by one; they meet in a store that this process holds.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from asyncprop.devices import available_cores

POLL_S = 0.1
"""Seconds between two looks at the ranks."""

PATIENCE_S = 30.0
"""Seconds that the other ranks have to end once one has ended in order: by then all is written."""

SIGNALLED = 128
"""A greater exit code is that of a run that was asked to end, and has said so."""


def launch(ranks: int, arguments: Sequence[str]) -> tuple[int, str]:
    """Run `asyncprop ARGUMENTS` in so many processes, and wait for them. If one fails, the others are ended.

    Returns:
        The exit code: 0, or that of the rank that failed first, or what a shell expects of a process that was asked to
        end; and what to say of it.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a rank tells its own failure
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // ranks)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "asyncprop", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return (failure.exitcode if failure.exitcode > 0 else 1), f"rank {rank} failed first"
    except SignalException as asked:  # it was passed on, and the ranks have ended
        return SIGNALLED + asked.sigval, ""
    return 0, ""


def launch_tolerant(
    ranks: int, arguments: Sequence[str], *, replacements: int = 0, quiet: bool = False
) -> tuple[int, str]:
    """Run `asyncprop ARGUMENTS` in so many processes, and wait for them. If one dies, the others go on.

    Args:
        ranks: how many.
        arguments: of the command.
        replacements: how many ranks may be started anew for ranks that a signal has ended; they join the others.
        quiet: let those that are started anew tell nothing but the result.

    Returns:
        The exit code: 0 if any rank has finished the run; else what a shell expects of a process that was asked to end,
        or that of the last rank that failed; and what to say of it.
    """
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    from asyncprop.exchange.members import note_end
    from asyncprop.exchange.world import MEMBERS

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    cores = str(max(1, available_cores() // ranks))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
              "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}  # fmt: skip
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", cores)
    join = ["train", "--join", f"127.0.0.1:{store.port}", *(["--quiet"] if quiet else [])]
    codes = []
    with _Processes(common) as processes:
        for rank in range(ranks):
            processes.start(arguments, {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        while processes.running:
            time.sleep(POLL_S)
            for rank, code in processes.ended():
                codes.append(code)
                if rank < ranks:  # the members know one that joined by another number
                    note_end(PrefixStore(MEMBERS, store), rank, _end_of(code))
                if code >= 0 or not processes.running or processes.asked is not None or processes.is_over:
                    continue
                _say(f"rank {rank} {_end_of(code)}: the others go on")
                if processes.started < ranks + replacements:
                    processes.start(join, {"LOCAL_RANK": str(rank)})
            processes.kill_late()
    if 0 in codes:
        return 0, ""
    if processes.asked is not None:
        return SIGNALLED + processes.asked, ""
    code = codes[-1] if codes[-1] > 0 else 1
    return code, "" if code > SIGNALLED else "no rank has finished the run"


def is_rank() -> bool:
    """Tell whether this process is one of several that a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _end_of(code: int) -> str:
    """Say how a process has ended, after its name."""
    if code >= 0:
        return f"has ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # signals of the real-time range have no names
        return f"was ended by signal {-code}"


def _say(message: str) -> None:
    print(f"asyncprop: {message}", file=sys.stderr, flush=True)


def _start(arguments: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one process, in a session of its own: a Ctrl-C comes to it from here only."""
    command = [sys.executable, "-m", "asyncprop", *arguments]
    return subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)


class _Processes:
    """The ranks' processes. Inside its `with` block they decide what a Ctrl-C, or a request to end, means.

    Args:
        environment: what all of them are given beside this process's own.

    Attributes:
        running: by number, from 0 in the order in which they were started.
        started: how many were.
        asked: the signal that was passed on; None if none came.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self.started = 0
        self.asked: int | None = None
        self._over_s: float | None = None
        self._environment = environment
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def start(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        """Start one more."""
        self.running[self.started] = process = _start(arguments, {**self._environment, **environment})
        self.started += 1
        if self.asked is not None:  # that may have been before this process could be found
            process.send_signal(self.asked)

    def ended(self) -> Iterator[tuple[int, int]]:
        """Yield the number and the exit code of those that have ended since the last look."""
        for number, process in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[number]
                if self._over_s is None and (code == 0 or code > SIGNALLED):
                    self._over_s = time.monotonic()
                yield number, code

    @property
    def is_over(self) -> bool:
        """Whether one has ended in order: the run is finished, or was ended, and no other is needed."""
        return self._over_s is not None

    def kill_late(self) -> None:
        """Kill those that have not ended long after another has, as they are stopped, or hang."""
        if self._over_s is None or time.monotonic() - self._over_s < PATIENCE_S:
            return
        for number, process in self.running.items():
            _say(f"rank {number} has not ended {PATIENCE_S:g} s after another: killing it")
            process.kill()
        self.running.clear()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        for process in list(self.running.values()):
            process.send_signal(number)
