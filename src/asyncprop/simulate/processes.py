"""Processes: what is timed apart from this process, by some that live as long as a block and are idle until asked."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Answer = Callable[[Any], float]
"""What a process does when it is asked for something."""
Prepare = Callable[[int, int, Path], Answer]
"""Called once in each process, with its rank, how many ranks there are, and a file by which they may meet."""


class Processes:
    """Processes that live as long as their `with` block, idle but while `ask` waits for their answers.

    Args:
        prepare: what each does; it is pickled, so it and what it holds must be importable.
        ranks: how many.
        name: by which a failure is told.
    """

    def __init__(self, prepare: Prepare, ranks: int, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = name
        self._folder = tempfile.TemporaryDirectory(prefix="asyncprop-")
        meet = Path(self._folder.name) / "meet"
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_live, args=(prepare, rank, ranks, meet, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def ask(self, asked: Any) -> list[float]:
        """Let every process answer this at once; return the answers in the order of ranks.

        Raises:
            RuntimeError: if one fails, or ends.
        """
        for pipe in self._pipes:
            with suppress(OSError):  # one that has failed has said why, and hears no more
                pipe.send(asked)
        try:
            answers: list[Any] = [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError):
            raise RuntimeError(f"{self._name}: a process has ended") from None
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(f"{self._name}: {answer}")
        return answers


def _live(prepare: Prepare, rank: int, ranks: int, meet: Path, pipe: Connection) -> None:
    try:
        answer = prepare(rank, ranks, meet)
        while True:
            pipe.send(answer(pipe.recv()))
    except EOFError:
        pass  # whoever asked is through
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
