"""SDE: asynchronous training as a stochastic differential equation, its drift, its diffusion, and paths of it.

Source: Sec. 5, Eq. 2 to 6. One unit of time is one update. Not carried over from the print: Eq. 5 leaves out the dt
after mu; the text swaps sigma_SGD and sigma_STALE once, and calls sigma_STALE a variance, where Eq. 6 squares it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from asyncprop.theory.version import Version, check_version

Field = Callable[[Tensor], Tensor]
"""A function of parameters, of shape (paths, k)."""


def drift(gradient: Tensor, eta: float) -> Tensor:
    """Return mu = -eta × gradient (Eq. 6), in the gradient's shape."""
    return -eta * gradient


def diffusion(
    hessian: Tensor,
    eta: float,
    sigma_sgd: float | Tensor,
    sigma_stale: float = 0.0,
    *,
    version: Version = "corrected",
) -> Tensor:
    """Return D_k = eta²/2 × (sigma_sgd² + sigma_stale² × s_k) (Eq. 6), of shape (..., k).

    As printed, s_k is the sum over l of the Hessian's entries H_kl. Corrected, it is the sum of their squares: the
    variance of the k-th entry of H xi (Eq. 4), where xi has independent entries. The printed sum can be negative, and
    has the wrong unit; the two agree where H is the identity.

    Args:
        hessian: of shape (..., k, k).
        eta: learning rate.
        sigma_sgd: standard deviation of a gradient's noise: one for all parameters, or of shape (k,).
        sigma_stale: standard deviation of what parameters differ by between a pass's read and its write.
        version: which reading.
    """
    check_version(version)
    rows = hessian.sum(-1) if version == "as printed" else hessian.square().sum(-1)
    return eta**2 / 2 * (sigma_sgd**2 + sigma_stale**2 * rows)


def amplitude(D: Tensor, *, version: Version = "corrected") -> Tensor:
    """Return the amplitude of dW in Eq. 5, in the shape of D.

    As printed it is √D. Corrected, √(2D): the D of Eq. 6 is half of the variance eta² sigma² that an update adds, and
    Eq. 7 to 12 take it so.

    Raises:
        ValueError: where D is negative, as Eq. 6 as printed allows.
    """
    check_version(version)
    if bool((D < 0).any()):
        raise ValueError(
            f"D must be >= 0 (got {float(D.min()):.3g}): sums of a Hessian's entries can be negative, sums of their "
            "squares (version='corrected') cannot"
        )
    return (D if version == "as printed" else 2 * D).sqrt()


def euler_maruyama(
    start: Tensor,
    drift: Field,
    amplitude: Field,
    *,
    steps: int,
    dt: float,
    generator: torch.Generator,
) -> Tensor:
    """Run paths of dtheta = mu dt + amplitude dW (Itô) in steps of `dt`, and return where they end.

    Args:
        start: of shape (paths, k).
        drift, amplitude: of parameters of that shape, in that shape. Both are evaluated at each step.
        steps: how many. The step's error in a stationary variance is of order dt × eta × curvature.
        dt: in updates; 1 is SGD's own step.
        generator: of the noise.
    """
    theta = start.clone()
    for _ in range(steps):
        noise = torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        theta = theta + drift(theta) * dt + amplitude(theta) * noise * math.sqrt(dt)
    return theta
