"""Staleness: what block updates add to it in time, and how many updates a window of time amounts to.

Source: Sec. 3.4. It assumes that each of M layers takes an equal part of a pass.
"""

from __future__ import annotations

import math
from typing import Literal

from asyncprop.theory.timeline import Update
from asyncprop.theory.version import Version, check_version

Over = Literal["mean", "sum"]
Phases = Literal["random", "even"]


def block_delays(M: int, beta: float, T: float = 1.0, *, version: Version = "corrected") -> list[float]:
    """Return how long the gradient of each layer, from the input, waits for its block update.

    As printed, layer m waits beta T m/M. Corrected, beta T (m-1)/M: of the layer at the input, whose gradient comes
    last, nothing waits. (The layer whose gradient is the i-th to be ready waits beta T (M-i)/M.)
    """
    check_version(version)
    _check_layers(M)
    shift = 0 if version == "as printed" else 1
    return [beta * T * (m - shift) / M for m in range(1, M + 1)]


def block_delay(
    M: int,
    beta: float,
    T: float = 1.0,
    *,
    over_layers: Over = "mean",
    version: Version = "corrected",
) -> float:
    """Return tau, the time by which block updates come later than layer updates.

    As printed it is beta T (M-1)/2, called an average. That is the sum over the layers of their corrected delays, and
    grows with M; the mean is beta T (M-1)/(2M), and is never above half a backward pass. (The printed sum from m = 1
    to M of beta T m/M is neither: it is beta T (M+1)/2.)

    Args:
        M: layers.
        beta, T: backward time / forward time, and forward time.
        over_layers: the sum over layers, or their mean. As printed both are the same.
        version: which reading.
    """
    check_version(version)
    _check_layers(M)
    total = beta * T * (M - 1) / 2
    return total if version == "as printed" or over_layers == "sum" else total / M


def windows(M: int, beta: float, T: float = 1.0, *, wait: float = 0.0, update: Update = "layer") -> list[float]:
    """Return, for each layer from the input, the time between a pass's read of it and its write.

    Args:
        M: layers.
        beta, T: backward time / forward time, and forward time.
        wait: between the forward and the backward pass.
        update: when a layer is written: when its gradient is ready, or when the backward pass ends.
    """
    _check_layers(M)
    if update not in ("layer", "block"):
        raise ValueError(f"update must be 'layer' or 'block' (got {update!r})")
    after = [1.0 if update == "block" else (M - layer) / M for layer in range(M)]
    return [T * (M - layer) / M + wait + beta * T * after[layer] for layer in range(M)]


def expected_staleness(window: float, rate: float, L: int, *, phases: Phases = "random") -> float:
    """Return how many updates of other passes land in a window that ends with one's own update.

    Args:
        window: time between read and write, see `windows`.
        rate: passes per unit of time, of all lanes.
        L: lanes.
        phases: `"random"`: the L - 1 others are anywhere in their passes, and each lands rate/L updates a unit of time;
            so in the mean (L-1)/L × rate × window. `"even"`: one update every 1/rate, as when all passes take equally
            long and one forward thread sets the pace; so as many as fit in between, ceil(rate × window) - 1.
    """
    if phases not in ("random", "even"):
        raise ValueError(f"phases must be 'random' or 'even' (got {phases!r})")
    if phases == "random":
        return (L - 1) / L * rate * window
    return max(0, math.ceil(rate * window) - 1)


def _check_layers(M: int) -> None:
    if M < 1:
        raise ValueError(f"M must be >= 1 (got {M})")
