"""Theory: the paper's formulas, each as printed and corrected, and exact counts to hold them against.

The paper's symbols are allowed in this package, and nowhere else:

    T             time of one forward pass                beta          time of a backward pass / T
    F, K          forward and backward threads            L             lanes: passes in flight at most (ours)
    D, u          devices; the fraction of one that       b             batches
                  sequential training keeps busy (ours)   lambda        speed-up over sequential training
    M, m          layers; one layer, from the input, 1..M tau           delay: a time, or a number of updates
    theta         parameters                              eta           learning rate
    L(theta)      the loss; its first, second, third      mu, D_k       drift, diffusion (Eq. 6)
                  derivatives: gradient, H, third         sigma_sgd     standard deviation of a gradient's noise
    C             covariance of a gradient's noise        sigma_stale   standard deviation of what parameters differ by
    p*, h         stationary density, its logarithm                     between a pass's read and its write
    G, alpha      largest gradient norm; smoothness (largest curvature) of the loss

`version="as printed"` gives a formula as the paper has it, `"corrected"` what its own premises lead to; docs/theory.md
tells which of them agrees with measurements. Everything here needs torch alone: engines are trained in `bench/theory`.
"""

from asyncprop.theory.bias import Comparison, Probe, bias_bound, compare
from asyncprop.theory.delayed import delayed_covariance, regression_noise
from asyncprop.theory.lost_updates import UpdateCounter
from asyncprop.theory.sde import amplitude, diffusion, drift, euler_maruyama
from asyncprop.theory.speedup import SpeedUp, makespan, speed_up
from asyncprop.theory.staleness import block_delay, block_delays, expected_staleness, windows
from asyncprop.theory.stationary import (
    fokker_planck_residual,
    log_density,
    log_density_slope,
    quadratic_variance,
    stationary_covariance,
)
from asyncprop.theory.timeline import PassTimes, count_staleness, simulate_passes
from asyncprop.theory.version import VERSIONS, Version

__all__ = [
    "VERSIONS",
    "Comparison",
    "PassTimes",
    "Probe",
    "SpeedUp",
    "UpdateCounter",
    "Version",
    "amplitude",
    "bias_bound",
    "block_delay",
    "block_delays",
    "compare",
    "count_staleness",
    "delayed_covariance",
    "diffusion",
    "drift",
    "euler_maruyama",
    "expected_staleness",
    "fokker_planck_residual",
    "log_density",
    "log_density_slope",
    "makespan",
    "quadratic_variance",
    "regression_noise",
    "simulate_passes",
    "speed_up",
    "stationary_covariance",
    "windows",
]
