"""SDE: Eq. 5 to 12 beside simulations of what they describe; nothing is trained here."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from asyncprop.bench.theory.rows import Row
from asyncprop.theory import (
    VERSIONS,
    Version,
    amplitude,
    diffusion,
    drift,
    euler_maruyama,
    fokker_planck_residual,
    log_density,
    log_density_slope,
)

ETA, SGD, STALE = 0.1, 1.0, 0.8
PATHS, STEPS = 4000, 400
POINTS = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)


def sde_rows() -> list[Row]:
    """Return all rows."""
    return [*_diffusions(), *_residuals(), *_slopes(), *_moments()]


def gradient(theta: Tensor) -> Tensor:
    """Of the loss theta²/2 + theta⁴/4 of each entry."""
    return theta + theta**3


def curvature(theta: Tensor) -> Tensor:
    """Second derivative of it."""
    return 1 + 3 * theta**2


def _diffusion(theta: Tensor, version: Version) -> Tensor:
    return diffusion(curvature(theta)[..., None, None], ETA, SGD, STALE, version=version).squeeze(-1)


def _diffusions() -> Iterator[Row]:
    """Yield the staleness part of D beside half the variance of learning_rate H xi (Eq. 4), by drawing xi."""
    hessian = torch.tensor([[2.0, -1.5], [-1.5, 1.5]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    xi = torch.randn(1_000_000, 2, generator=generator, dtype=torch.float64)
    drawn = (xi @ hessian).var(0) / 2
    values = {version: diffusion(hessian, 1.0, 0.0, 1.0, version=version) for version in VERSIONS}
    for k in range(2):
        yield Row(
            section="diffusion",
            quantity=f"D_{k + 1} of staleness, in η²σ_STALE²",
            case="H = [[2, -1.5], [-1.5, 1.5]]",
            equation="Eq. 6",
            as_printed=float(values["as printed"][k]),
            corrected=float(values["corrected"][k]),
            twin=float(drawn[k]),
            twin_is="a million drawn ξ",
        )


def _density(theta: Tensor, version: Version) -> Tensor:
    """Return h of Eq. 7 at one point, through the integral of mu/D from 0 (differentiable)."""
    nodes, weights = _gauss_legendre(24)
    at = theta[0] * (nodes + 1) / 2
    integral = (drift(gradient(at), ETA) / _diffusion(at, version) * weights).sum() * theta[0] / 2
    return integral - _diffusion(theta, version)[0].log()


def _residuals() -> Iterator[Row]:
    """Yield the largest residual of Eq. 7's density in the Fokker-Planck equation of either amplitude of Eq. 5."""
    residuals = {
        version: max(
            abs(
                float(
                    fokker_planck_residual(
                        lambda theta: _density(theta, "corrected"),
                        lambda theta: drift(gradient(theta), ETA),
                        lambda theta, v=version: amplitude(_diffusion(theta, "corrected"), version=v).square(),  # type: ignore[misc]  # defaults of a lambda are not inferred
                        point[None],
                    )
                )
            )
            for point in POINTS
        )
        for version in VERSIONS
    }
    yield Row(
        section="stationary density",
        quantity="largest dp/dt ÷ p of Eq. 7's density under Eq. 5",
        case="loss θ²/2 + θ⁴/4, θ from -1.5 to 1.5",
        equation="Eq. 5, 7, 8",
        as_printed=residuals["as printed"],
        corrected=residuals["corrected"],
        twin=0.0,
        twin_is="stationary",
    )


def _slopes() -> Iterator[Row]:
    """Yield Eq. 12 beside the slope of Eq. 7's density, taken numerically, with the D of the same version."""
    theta = torch.tensor([1.0], dtype=torch.float64)
    third = 6 * theta
    for inserted in VERSIONS:
        step = 1e-5
        slope = (_density(theta + step, inserted) - _density(theta - step, inserted)) / (2 * step)
        found = {
            v: float(log_density_slope(gradient(theta), curvature(theta), third, ETA, SGD, STALE, version=v))
            for v in VERSIONS
        }
        yield Row(
            section="stationary density",
            quantity="slope of h at θ = 1",
            case=f"Eq. 6 {inserted} inserted",
            equation="Eq. 11, 12",
            as_printed=found["as printed"],
            corrected=found["corrected"] if inserted == "corrected" else None,
            twin=float(slope),
            twin_is="Eq. 7, differentiated",
        )


def _moments() -> Iterator[Row]:
    """Yield the mean square of theta, of Eq. 7's density and of paths of Eq. 5, with the same D."""
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64)
    start = torch.zeros(PATHS, 1, dtype=torch.float64)
    for used in VERSIONS:
        p = log_density(grid, drift(gradient(grid), ETA), _diffusion(grid[:, None], used).squeeze(-1)).exp()
        ends = {
            version: euler_maruyama(
                start,
                lambda theta: drift(gradient(theta), ETA),
                lambda theta, u=used, v=version: amplitude(_diffusion(theta, u), version=v),  # type: ignore[misc]  # defaults of a lambda are not inferred
                steps=STEPS,
                dt=0.25,
                generator=torch.Generator().manual_seed(0),
            )
            for version in VERSIONS
        }
        yield Row(
            section="stationary density",
            quantity="mean θ², paths of Eq. 5",
            case=f"loss θ²/2 + θ⁴/4, D of Eq. 6 {used}",
            equation="Eq. 5, 7",
            as_printed=float(ends["as printed"].square().mean()),
            corrected=float(ends["corrected"].square().mean()),
            twin=float(torch.trapezoid(grid**2 * p, grid)),
            twin_is="Eq. 7's density",
        )


def _gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights on [-1, 1], by the eigenvalues of the Legendre polynomials' Jacobi matrix."""
    n = torch.arange(1, count, dtype=torch.float64)
    beside = n / (4 * n**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return values, 2 * vectors[0].square()
