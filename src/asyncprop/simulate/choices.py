"""Choices: the ways to train that a plan considers, what binds each, and which one is to be taken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from asyncprop.engine import Coupled, Decoupled
from asyncprop.simulate.costs import LayerCosts

MARGIN = 0.02
"""Differences of throughput that are not worth staleness."""
DOUBT = 0.15
"""By which a prediction may be off: what is predicted to be slower by more than this is not tried."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to train, and what it does.

    Attributes:
        workers: of the engine, with layer updates; None for the plain loop.
        predicted_s: seconds per batch of the whole machine, foretold; None of what is tried anyway.
        staleness: mean of an update.
        bound: what keeps it from being faster.
        memory_bytes: activations and gradients at once.
        intraop_threads: that one operation may use.
        ranks: processes; the plain loop in several is torch's DDP, each with a batch of its own a step.
        measured_s: seconds per batch of the whole machine, where it was tried.
    """

    workers: Coupled | Decoupled | None
    predicted_s: float | None
    staleness: float
    bound: str
    memory_bytes: int
    intraop_threads: int = 1
    ranks: int = 1
    measured_s: float | None = None

    @property
    def measured(self) -> bool:
        """Whether it was tried."""
        return self.measured_s is not None

    @property
    def seconds_per_batch(self) -> float:
        """As measured, or else as predicted."""
        seconds = self.predicted_s if self.measured_s is None else self.measured_s
        assert seconds is not None
        return seconds

    @property
    def label(self) -> str:
        """What it is, in words."""
        return label(self.workers, self.intraop_threads, self.ranks)


def label(workers: Coupled | Decoupled | None, intraop_threads: int, ranks: int = 1) -> str:
    """Return a choice in words."""
    if ranks > 1:
        return f"torch DDP, {ranks} processes"
    threads = _counted(intraop_threads, "intra-op thread")
    if workers is None:
        return f"SGD, {threads}"
    each = f", {threads} each" if intraop_threads > 1 else ""
    if isinstance(workers, Coupled):
        return _counted(workers.workers, "coupled worker") + each
    backward, lanes = _counted(workers.backward, "backward thread"), _counted(workers.lanes or 1, "lane")
    return f"{workers.forward} forward, {backward}, {lanes}{each}"


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def candidates(cores: int) -> Iterator[Coupled | Decoupled]:
    """Yield the workers that are considered: as many passes at once as fill the cores, and one at a time.

    Each count of intra-op threads that leaves room for two passes is tried; lanes are as many as the passes that are
    computed at once, or one more, which covers for a pass that ends early at the price of staleness.
    """
    yield Coupled(1, intraop_threads=1)
    yield Decoupled(1, 1, lanes=1, intraop_threads=1)
    threads = 1
    while (at_once := cores // threads) >= 2:
        yield Coupled(at_once, intraop_threads=threads)
        half = at_once // 2
        for forward, backward in ((half, half), (half, 2 * half), (2 * half, 2 * half)):
            for lanes in range(at_once, min(forward + backward, at_once + 1) + 1):
                yield Decoupled(forward, backward, lanes=lanes, intraop_threads=threads)
        threads *= 2


def best(choices: Sequence[Choice]) -> Choice:
    """Return the least stale of the choices that are as fast as the fastest, within MARGIN; the simpler of equals."""
    limit = min(choice.seconds_per_batch for choice in choices) * (1 + MARGIN)
    fast = [choice for choice in choices if choice.seconds_per_batch <= limit]
    return min(fast, key=lambda one: (one.staleness, one.ranks, one.workers is not None, one.seconds_per_batch))


def finalists_of(choices: Sequence[Choice], cores: int) -> list[Choice]:
    """Return the choices that are worth a trial: the plain loops and DDP, and the workers that may be the fastest.

    Not those with more lanes than the cores compute at once: what these gain by prediction, switching threads takes.
    """
    loops = [choice for choice in choices if choice.workers is None]
    fitting = [one for one in choices if one.workers and one.workers.lanes_on(cores) * one.intraop_threads <= cores]
    limit = min(choice.seconds_per_batch for choice in fitting) * (1 + DOUBT)
    return loops + [choice for choice in fitting if choice.seconds_per_batch <= limit]


def bound(workers: Coupled | Decoupled, costs: LayerCosts, at_once: int) -> str:
    """Say what binds: passes a second are the least of forward/T, backward/(βT), lanes/((1+β)T) and cores/((1+β)T).

    Args:
        workers: of the choice.
        costs: of the layers; T is the time of a forward pass, β how much longer a backward pass takes.
        at_once: passes that the cores compute at once.
    """
    forward_s = sum(costs.forward_s)
    backward_s = costs.backward_forward_ratio * forward_s
    whole = forward_s + backward_s
    rates = {"cores": at_once / whole, "lanes": workers.lanes_on(at_once) / whole}
    if isinstance(workers, Decoupled):
        rates |= {"forward threads": workers.forward / forward_s, "backward threads": workers.backward / backward_s}
    return min(rates, key=lambda name: rates[name])
