"""Variance: of parameters in long real runs, beside the paper's stationary density and beside delays taken exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TextIO

from asyncprop.bench.theory.network import Place, find_place, run_network
from asyncprop.bench.theory.quadratic import (
    RESIDUAL_VARIANCE,
    Regression,
    run_constant_delay,
    run_free,
    variance,
)
from asyncprop.bench.theory.rows import Row, mean_of
from asyncprop.bench.theory.turns import Watch
from asyncprop.theory import (
    VERSIONS,
    delayed_covariance,
    diffusion,
    quadratic_variance,
    regression_noise,
    stationary_covariance,
)
from asyncprop.theory.stationary import Equation

UPDATES, SKIP = 4000, 400
EQUATIONS: tuple[Equation, ...] = ("Eq. 5", "Eq. 7", "Eq. 12", "Sec. 5")
SEQUENTIAL = ((0.1, 32), (0.1, 128), (0.05, 32))
"""Learning rates and batch sizes, at curvature 1."""
CONSTANT = ((1.0, 1), (2.0, 3), (0.5, 3), (0.5, 7))
"""Curvatures and delays, at learning rate 0.1 and batch size 64."""
WORKERS = (2, 4, 8)
NETWORK = ((0.1, 16, 1), (0.1, 16, 4), (0.1, 64, 4), (0.05, 16, 4))
"""Learning rates, batch sizes and workers."""


def variance_rows(seeds: int, messages: TextIO) -> list[Row]:
    """Return all rows."""
    rows: list[Row] = []
    for part in (_sequential, _constant_delays, _free, _network):
        print(f"  {part.__name__.strip('_').replace('_', ' ')} ...", file=messages, flush=True)
        rows += part(seeds)
    return rows


def _sequential(seeds: int) -> Iterator[Row]:
    """Yield what each of the paper's equations gives without staleness."""
    for learning_rate, batch_size in SEQUENTIAL:
        task = Regression(1.0, batch_size)
        runs = [
            run_constant_delay(task, learning_rate, 0, updates=UPDATES, skip=SKIP, seed=seed) for seed in range(seeds)
        ]
        for equation in EQUATIONS:
            yield _quadratic_row(
                task, learning_rate, runs, equation, f"η = {learning_rate}, batch {batch_size}, sequential", [1.0]
            )


def _constant_delays(seeds: int) -> Iterator[Row]:
    for curvature, delay in CONSTANT:
        task = Regression(curvature, 64)
        runs = [run_constant_delay(task, 0.1, delay, updates=UPDATES, skip=SKIP, seed=seed) for seed in range(seeds)]
        case = f"η = 0.1, batch 64, curvature {curvature:g}, delay {delay} forced"
        yield _quadratic_row(task, 0.1, runs, "Eq. 7", case, [0.0] * delay + [1.0])


def _free(seeds: int) -> Iterator[Row]:
    task = Regression(1.0, 64)
    for workers in WORKERS:
        runs = [run_free(task, 0.1, workers, updates=UPDATES, skip=SKIP, seed=seed) for seed in range(seeds)]
        longest = max(len(run.delay_probabilities) for run in runs)
        padded = [run.delay_probabilities + [0.0] * (longest - len(run.delay_probabilities)) for run in runs]
        shares = [mean_of(column) for column in zip(*padded, strict=True)]
        age = sum(delay * share for delay, share in enumerate(shares))
        case = f"η = 0.1, batch 64, curvature 1, {workers} free workers, mean delay {age:.2f}"
        yield _quadratic_row(task, 0.1, runs, "Eq. 7", case, shares)


def _quadratic_row(
    task: Regression, learning_rate: float, runs: list[Watch], equation: Equation, case: str, delays: list[float]
) -> Row:
    stale = mean_of([run.sigma_stale for run in runs])
    exact = delayed_covariance(
        task.hessian, regression_noise(task.hessian, RESIDUAL_VARIANCE, task.batch_size), learning_rate, delays
    )
    note = f", σ_STALE {stale:.4f} measured" if stale else ""
    return Row(
        section="variance, linear regression",
        quantity="variance of a parameter",
        case=case + note,
        equation=equation,
        as_printed=quadratic_variance(
            task.curvature, learning_rate, task.sigma_sgd, stale, equation=equation, version="as printed"
        ),
        corrected=quadratic_variance(task.curvature, learning_rate, task.sigma_sgd, stale),
        twin=float(exact.diagonal().mean()),
        twin_is="delays taken exactly",
        measured=tuple(variance(run) for run in runs),
    )


def _network(seeds: int) -> Iterator[Row]:
    """Yield the summed variance: with Eq. 6's noise, independent between parameters, and with the noise there is."""
    place = find_place()
    for learning_rate, batch_size, workers in NETWORK:
        runs = [
            run_network(place, learning_rate, batch_size, workers, updates=UPDATES, skip=SKIP, seed=seed)
            for seed in range(seeds)
        ]
        stale = mean_of([turn.sigma_stale for turn, _ in runs])
        delays = runs[0][1]
        age = sum(delay * share for delay, share in enumerate(delays))
        case = f"η = {learning_rate}, batch {batch_size}, {workers} workers, mean delay {age:.2f}, σ_STALE {stale:.4f}"
        measured = tuple(float(turn.covariance().trace()) for turn, _ in runs)
        exact = float(delayed_covariance(place.hessian, place.noise / batch_size, learning_rate, delays).trace())
        for independent in (True, False):
            printed, corrected = _of_sde(place, learning_rate, batch_size, stale, independent=independent)
            yield Row(
                section="variance, small network",
                quantity="summed variance, noise "
                + ("independent, as in Eq. 6" if independent else "with its covariance"),
                case=case,
                equation="Eq. 5, 6",
                as_printed=printed,
                corrected=corrected,
                twin=exact,
                twin_is="delays taken exactly",
                measured=measured,
            )


def _of_sde(
    place: Place, learning_rate: float, batch_size: int, stale: float, *, independent: bool
) -> tuple[float, float]:
    """Return the trace of Eq. 5's stationary covariance, as printed and corrected."""
    noise, found = place.noise / batch_size, {}
    for version in VERSIONS:
        if independent:
            sgd = noise.diagonal().sqrt()
            spread = diffusion(place.hessian, learning_rate, sgd, stale, version=version)
        else:  # Eq. 6 has no covariances; this is what its two terms are the diagonals of
            spread = learning_rate**2 / 2 * (noise + stale**2 * place.hessian @ place.hessian)
        found[version] = float(stationary_covariance(place.hessian, spread, learning_rate, version=version).trace())
    return found["as printed"], found["corrected"]
