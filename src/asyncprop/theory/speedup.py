"""Speed-up: how much faster than sequential training F forward and K backward threads are, and what limits them.

Source: Sec. 3.3. All times are in units of one forward pass, T, so that a backward pass takes `beta`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from asyncprop.theory.version import Version, check_version

Bound = Literal["forward threads", "backward threads", "lanes", "devices"]


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """The speed-up `value`, and the `bound` that holds it there: more of that thing makes training faster."""

    value: float
    bound: Bound


def speed_up(
    beta: float,
    F: int = 1,
    K: int = 2,
    *,
    L: int | None = None,
    D: float | None = None,
    u: float = 1.0,
    version: Version = "corrected",
) -> SpeedUp:
    """Return the speed-up of an endless training.

    As printed it is 1 + beta, whatever K: a backward thread is always free. Corrected, a steady state does
    min(F/T, K/(beta T), L/((1+beta) T)) passes a second: exactly that, if all passes take equally long, as these are
    the circuits of the timed event graph (a forward thread's next pass waits for its last; a backward thread's
    likewise; a lane's next pass waits for both). Devices bound it by D/u.

    Args:
        beta: backward time / forward time, > 0.
        F, K: forward and backward threads.
        L: lanes; None for as many as are wanted. Fewer than (1 + beta) min(F, K/beta) bind.
        D: devices; None for one to each thread. With fewer than speed-up × u the devices bind.
        u: the fraction of a device that sequential training keeps busy; below 1 where it waits for launches or data.
        version: `"as printed"` takes no notice of F, K, L, D and u.

    Raises:
        ValueError: for an argument out of range.
    """
    check_version(version)
    _check(beta, F, K, L)
    if D is not None and D <= 0:
        raise ValueError(f"D must be > 0 (got {D})")
    if not 0 < u <= 1:
        raise ValueError(f"u must be > 0 and <= 1 (got {u})")
    if version == "as printed":
        return SpeedUp(1 + beta, "forward threads")
    bounds: dict[Bound, float] = {"forward threads": (1 + beta) * F, "backward threads": (1 + beta) * K / beta}
    if L is not None:
        bounds["lanes"] = float(L)
    if D is not None:
        bounds["devices"] = D / u
    bound = min(bounds, key=lambda name: bounds[name])
    return SpeedUp(bounds[bound], bound)


def makespan(b: int, beta: float, F: int = 1, K: int = 2, *, version: Version = "corrected") -> float:
    """Return how long `b` batches take, in forward times, with lanes and devices enough.

    As printed it is b + beta, which is exact for F = 1 and K >= beta. Corrected: batch i (from 0) has its loss at
    floor(i/F) + 1, and a backward thread takes batch i when it has done batch i - K; so the last one ends at the
    maximum, over the j batches that one thread did before it, of floor((b-1-jK)/F) + 1 + (j+1) beta. That grows, or
    falls, by beta F - K with every F steps of j, so F values at one end of the range decide.

    Sequential training takes (1 + beta) b.
    """
    check_version(version)
    _check(beta, F, K, None)
    if b < 1:
        raise ValueError(f"b must be >= 1 (got {b})")
    if version == "as printed":
        return b + beta
    last = (b - 1) // K
    candidates = range(max(0, last - F + 1), last + 1) if beta * F >= K else range(min(F, last + 1))
    return max((b - 1 - j * K) // F + 1 + (j + 1) * beta for j in candidates)


def _check(beta: float, F: int, K: int, L: int | None) -> None:
    if beta <= 0:
        raise ValueError(f"beta must be > 0 (got {beta})")
    for name, count in {"F": F, "K": K, "L": L}.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be >= 1 (got {count})")
