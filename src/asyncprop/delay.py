"""Delay: slows chosen workers or ranks, as a slow machine or link would. Delays are waits, drawn from a seed."""

from __future__ import annotations

import math
import os
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from asyncprop.clock import SYSTEM, Clock


@dataclass(frozen=True, slots=True)
class Delay:
    """Who is slowed, and by how much.

    Args:
        rank: the rank that is slowed; None for every rank. Where ranks may join (gossip) it may be one that is to come.
        worker: the worker of it whose own passes wait (of decoupled workers: the thread); None slows the machine: no
            pass of the rank begins while it waits, and waits add up.
        seconds: that each step takes longer, waited between its forward and its backward pass.
        factor: by which passes take longer (2 doubles them), waited after each pass. Real ranks in step wait for each
            other within their passes, and would wait so much longer for that, too: there it must slow one named rank
            and no other be slowed, as that rank comes last and waits for nobody.
        every: only each so many-th step waits `seconds` (a pause now and then).
        distribution: `"constant"`, or `"exponential"` with mean `seconds`.
        seed: fixes the drawn seconds, by rank and step.
        steps_before: steps of the rank before the first that is counted here, in a run that goes on: `every` and the
            drawn seconds go on with them.
    """

    rank: int | None = None
    worker: int | None = None
    seconds: float = 0.0
    factor: float = 1.0
    every: int = 1
    distribution: Literal["constant", "exponential"] = "constant"
    seed: int = 0
    steps_before: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "worker"):
            if (number := getattr(self, name)) is not None and number < 0:
                raise ValueError(f"delay: {name} must be >= 0 (got {number})")
        if not 0 <= self.seconds < math.inf:
            raise ValueError(f"delay: seconds must be a number >= 0 (got {self.seconds})")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"delay: factor must be a number >= 1 (got {self.factor})")
        if self.every < 1:
            raise ValueError(f"delay: every must be >= 1 (got {self.every})")
        if self.distribution not in ("constant", "exponential"):
            raise ValueError(f"delay: distribution must be constant or exponential (got {self.distribution})")

    def seconds_of(self, step: int, rank: int) -> float:
        """Return what a step waits, but for `factor`."""
        step += self.steps_before
        if (step + 1) % self.every:
            return 0.0
        if self.distribution == "constant" or not self.seconds:
            return self.seconds
        return random.Random(f"{self.seed} {rank} {self.worker} {step}").expovariate(1 / self.seconds)


def parse_delays(text: str | None) -> tuple[Delay, ...]:
    """Read delays as the command has them: `rank=1,seconds=0.5`; several are separated by semicolons. None is none.

    Raises:
        ValueError: with the rule that is broken.
    """
    return () if text is None else tuple(_parse(part) for part in text.split(";"))


def _parse(text: str) -> Delay:
    kinds = {"rank": int, "worker": int, "seconds": float, "factor": float, "every": int, "distribution": str,
             "seed": int}  # fmt: skip
    values = {}
    for assignment in text.split(","):
        name, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals or name not in kinds:
            raise ValueError(f"delay must be like rank=1,seconds=0.5 with options {', '.join(kinds)} (got {text})")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise ValueError(f"delay: {name} must be a number (got {value})") from None
    delay = Delay(**values)
    if not {"seconds", "factor"} & values.keys():
        raise ValueError(f"delay must give seconds or factor, by which it slows (got {text})")
    return delay


def refuse_nobody(delays: Sequence[Delay], *, ranks: int | None = None, workers: int | None = None) -> None:
    """Refuse a delay of a rank or worker that there is not, which would slow nobody.

    Args:
        delays: of all ranks, which have as many workers each.
        ranks, workers: how many there are, numbered from 0; None if that is not known.

    Raises:
        ValueError: naming the first.
    """
    for delay in delays:
        for name, count in (("rank", ranks), ("worker", workers)):
            number = getattr(delay, name)
            if count is not None and number is not None and number >= count:
                raise ValueError(
                    f"delay: {name} must be < {count}, the number of {name}s, which count from 0 (got {number})"
                )


def on_rank(delays: Sequence[Delay], rank: int) -> tuple[Delay, ...]:
    """Return the delays of one rank, as those of a process that knows of no ranks; ranks draw differently."""
    ours = (delay for delay in delays if delay.rank in (None, rank))
    return tuple(replace(delay, rank=None, seed=delay.seed + 1_000_003 * rank) for delay in ours)


def current_rank() -> int:
    """Return the number of this process among those that torch's launcher started; 0 if it was not."""
    return int(os.environ.get("RANK", "0"))


class Delays:
    """The delays of one rank's trainer, at work.

    Args:
        delays: of all ranks; those of others are left out.
        rank: whose trainer this is.
        stopping: ends all waits.
        clock: by which is waited.
    """

    def __init__(
        self, delays: Sequence[Delay], rank: int, stopping: threading.Event | None = None, clock: Clock = SYSTEM
    ) -> None:
        self._delays = [delay for delay in delays if delay.rank in (None, rank)]
        self._rank = rank
        self._stopping = stopping or threading.Event()
        self._clock = clock
        self._lock = threading.Lock()
        self._machine_until = 0.0

    def __bool__(self) -> bool:
        return bool(self._delays)

    def before_pass(self) -> None:
        """Wait until the machine is through with its waits."""
        self._wait_until(self._machine_until)

    def after_forward(self, worker: int, step: int, took_s: float) -> None:
        """Wait as long as the step is slowed; `took_s` is what its forward pass took."""
        self._wait(worker, took_s, lambda delay: delay.seconds_of(step, self._rank))

    def after_backward(self, worker: int, took_s: float) -> None:
        """Wait as long as a pass that took `took_s` is slowed."""
        self._wait(worker, took_s, lambda delay: 0.0)

    def _wait(self, worker: int, took_s: float, seconds: Callable[[Delay], float]) -> None:
        for delay in self._delays:
            if delay.worker not in (None, worker):
                continue
            extra = seconds(delay) + (delay.factor - 1) * took_s
            if extra <= 0:
                continue
            if delay.worker is not None:
                self._wait_until(self._clock.now() + extra)
                continue
            with self._lock:
                self._machine_until = max(self._machine_until, self._clock.now()) + extra
            self.before_pass()

    def _wait_until(self, end: float) -> None:
        left = end - self._clock.now()
        if left > 0:
            self._clock.sleep(left, self._stopping)
