"""Stationary: where the parameters of an endless training are found, as a density and as a covariance.

Source: Sec. 5 and App. B, Eq. 7 to 12. With the D of Eq. 6, Eq. 7 to 11 hold for dtheta = mu dt + √(2D) dW, in one
dimension, or in several if D is the same for all and constant (otherwise no density has the slopes of Eq. 11).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from asyncprop.theory.sde import amplitude
from asyncprop.theory.version import Version, check_version

Equation = Literal["Eq. 5", "Eq. 7", "Eq. 12", "Sec. 5"]


def log_density(grid: Tensor, mu: Tensor, D: Tensor) -> Tensor:
    """Return ln p* = h on a grid (Eq. 7, one dimension): the integral of mu/D, less ln |D|, normalised.

    Args:
        grid: points of shape (n,), increasing and wide enough to hold the density.
        mu, D: drift and diffusion there.
    """
    slope = mu / D
    integral = torch.cumulative_trapezoid(slope, grid)
    h = torch.cat([grid.new_zeros(1), integral]) - D.abs().log()
    h = h - h.max()
    return h - torch.trapezoid(h.exp(), grid).log()


def log_density_slope(
    gradient: Tensor,
    curvature: Tensor,
    third: Tensor,
    eta: float,
    sigma_sgd: float,
    sigma_stale: float,
    *,
    version: Version = "corrected",
) -> Tensor:
    """Return the derivative of h in one dimension, with the drift and the diffusion of Eq. 6 written out (Eq. 12).

    As printed: -(gradient + sigma_stale² third) / (eta (sigma_sgd² + sigma_stale² curvature)). That is not what
    inserting the printed Eq. 6 into Eq. 11 gives: the gradient lacks a factor 2, the third derivative has 1/eta too
    many. Corrected, with Eq. 6 corrected:
    -(2/eta gradient + 2 sigma_stale² curvature third) / (sigma_sgd² + sigma_stale² curvature²).

    Args:
        gradient, curvature, third: first three derivatives of the loss.
        eta: learning rate.
        sigma_sgd, sigma_stale: see `diffusion`.
        version: which reading.
    """
    check_version(version)
    if version == "as printed":
        return -(gradient + sigma_stale**2 * third) / (eta * (sigma_sgd**2 + sigma_stale**2 * curvature))
    pull = 2 / eta * gradient + 2 * sigma_stale**2 * curvature * third
    return -pull / (sigma_sgd**2 + sigma_stale**2 * curvature**2)


def fokker_planck_residual(
    log_density: Callable[[Tensor], Tensor],
    drift: Callable[[Tensor], Tensor],
    variance: Callable[[Tensor], Tensor],
    theta: Tensor,
) -> Tensor:
    """Return (dp/dt) / p at `theta`, for dtheta = drift dt + √variance dW (Itô); 0 where the density is stationary.

    That is the sum over k of -d(drift_k p)/dtheta_k + 1/2 d²(variance_k p)/dtheta_k². Eq. 8 has D in place of
    variance/2: it belongs to √(2D) dW. Eq. 5, which has √D dW, would need half of its last term. Eq. 9 and 10 insert
    the density of Eq. 7, and claim that this is 0 then.

    Args:
        log_density: of a point of shape (k,), a scalar; an additive constant does not matter.
        drift, variance: of a point of shape (k,), in that shape.
        theta: one point, of shape (k,).
    """
    with torch.enable_grad():
        at = theta.detach().clone().requires_grad_()
        total = at.new_zeros(())
        slope = _gradient(log_density(at), at)
        mu, v = drift(at), variance(at)
        for k in range(len(at)):
            slope_k, v_slope = slope[k], _gradient(v[k], at)[k]
            mu_slope, slope_slope = _gradient(mu[k], at)[k], _gradient(slope_k, at)[k]
            v_curvature = _gradient(v_slope, at)[k]
            flow = mu_slope + mu[k] * slope_k
            spread = v_curvature + 2 * v_slope * slope_k + v[k] * (slope_slope + slope_k**2)
            total = total - flow + spread / 2
    return total.detach()


def quadratic_variance(
    a: float,
    eta: float,
    sigma_sgd: float,
    sigma_stale: float = 0.0,
    *,
    equation: Equation = "Eq. 7",
    version: Version = "corrected",
) -> float:
    """Return the stationary variance of a parameter whose loss is a theta²/2 (an Ornstein-Uhlenbeck process).

    Corrected, all equations agree: eta (sigma_sgd² + a² sigma_stale²) / (2a). As printed they don't, even without
    staleness: Eq. 5 (and 2) give half of that, Eq. 12 twice, and p* ∝ exp(-L/eta) of Sec. 5 gives eta/a, whatever the
    noise.

    Args:
        a: curvature.
        eta: learning rate.
        sigma_sgd, sigma_stale: see `diffusion`.
        equation: which of the paper's equations is to give it.
        version: which reading.
    """
    check_version(version)
    if version == "corrected":
        return eta * (sigma_sgd**2 + a**2 * sigma_stale**2) / (2 * a)
    if equation == "Sec. 5":
        return eta / a
    return {"Eq. 5": 0.25, "Eq. 7": 0.5, "Eq. 12": 1.0}[equation] * eta * (sigma_sgd**2 + a * sigma_stale**2) / a


def stationary_covariance(hessian: Tensor, D: Tensor, eta: float, *, version: Version = "corrected") -> Tensor:
    """Return the stationary covariance of Eq. 5 on a quadratic loss: S with H S + S H = (amplitude of dW)²/eta.

    Args:
        hessian: symmetric, positive definite, of shape (k, k).
        D: diffusion, constant: of shape (k,), or (k, k) for noise that is correlated between parameters.
        eta: learning rate.
        version: of Eq. 5: √D or √(2D).
    """
    check_version(version)
    per_update = (
        amplitude(D, version=version).square().diag() if D.ndim == 1 else D if version == "as printed" else 2 * D
    )
    curvatures, basis = torch.linalg.eigh(hessian)
    inner: Tensor = basis.T @ per_update @ basis / (eta * (curvatures[:, None] + curvatures[None, :]))
    covariance: Tensor = basis @ inner @ basis.T
    return covariance


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(value, at, create_graph=True, allow_unused=True)
    return torch.zeros_like(at) if found is None else found
