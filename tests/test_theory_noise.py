"""Theory of noise: drift, diffusion, stationary density and covariance, against closed forms, draws and long sums."""

import math

import pytest
import torch
from torch import Tensor

from asyncprop.theory import (
    VERSIONS,
    amplitude,
    delayed_covariance,
    diffusion,
    drift,
    euler_maruyama,
    fokker_planck_residual,
    log_density,
    log_density_slope,
    quadratic_variance,
    regression_noise,
    stationary_covariance,
)

ETA, SGD, STALE = 0.1, 1.0, 0.8
HESSIAN = torch.tensor([[2.0, -1.5], [-1.5, 1.5]], dtype=torch.float64)


def one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


# ---- Eq. 6 and 5


def test_the_corrected_diffusion_is_the_variance_of_perturbed_gradients_and_the_printed_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    xi = STALE * torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    noise = SGD * torch.randn(200_000, 2, generator=generator, dtype=torch.float64)
    updates = -ETA * (xi @ HESSIAN + noise)
    half = updates.var(0) / 2
    assert torch.allclose(diffusion(HESSIAN, ETA, SGD, STALE), half, rtol=0.01)
    printed = diffusion(HESSIAN, ETA, SGD, STALE, version="as printed")
    assert bool((printed < 0.7 * half).all())


def test_both_diffusions_agree_for_the_identity_and_without_staleness() -> None:
    for hessian, stale in ((torch.eye(3), STALE), (HESSIAN, 0.0)):
        found = [diffusion(hessian, ETA, SGD, stale, version=version) for version in VERSIONS]
        assert torch.equal(*found)


def test_a_negative_sum_of_the_hessian_has_no_amplitude() -> None:
    hessian = torch.tensor([[1.0, -3.0], [-3.0, 10.0]])
    D = diffusion(hessian, ETA, 0.1, 1.0, version="as printed")
    with pytest.raises(ValueError, match="D must be >= 0"):
        amplitude(D, version="as printed")
    assert bool((amplitude(diffusion(hessian, ETA, 0.1, 1.0)) > 0).all())


def test_one_step_of_sgd_has_the_corrected_amplitude() -> None:
    """SGD adds eta × noise of variance sigma²; that is amplitude² for one unit of time."""
    D = diffusion(one(1.0), ETA, SGD)
    assert float(amplitude(D).square()) == pytest.approx(ETA**2 * SGD**2)
    assert float(amplitude(D, version="as printed").square()) == pytest.approx(ETA**2 * SGD**2 / 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_paths_reach_the_closed_form_of_a_quadratic(version) -> None:  # type: ignore[no-untyped-def]
    """Euler-Maruyama is itself an autoregression, whose variance is known: amplitude² dt / (1 - (1 - eta a dt)²)."""
    a, dt = 1.5, 1.0
    size = amplitude(diffusion(one(a), ETA, SGD), version=version)
    ends = euler_maruyama(
        torch.zeros(20_000, 1, dtype=torch.float64), lambda theta: drift(a * theta, ETA), lambda theta: size,
        steps=60, dt=dt, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    exact = float(size**2 * dt / (1 - (1 - ETA * a * dt) ** 2))
    assert float(ends.var()) == pytest.approx(exact, rel=0.03)
    assert exact == pytest.approx(
        quadratic_variance(a, ETA, SGD, equation="Eq. 5", version=version) / (1 - ETA * a * dt / 2)
    )


# ---- Eq. 7 to 12


def quartic(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First three derivatives of theta²/2 + theta⁴/4."""
    return theta + theta**3, 1 + 3 * theta**2, 6 * theta


def D_of(theta: Tensor, version) -> Tensor:  # type: ignore[no-untyped-def]
    return diffusion(quartic(theta)[1][..., None, None], ETA, SGD, STALE, version=version).squeeze(-1)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_density_has_the_slope_of_equation_11(version) -> None:  # type: ignore[no-untyped-def]
    grid = torch.linspace(-3, 3, 60_001, dtype=torch.float64)
    D = D_of(grid[:, None], version).squeeze(-1)
    h = log_density(grid, drift(quartic(grid)[0], ETA), D)
    assert float(torch.trapezoid(h.exp(), grid)) == pytest.approx(1.0)
    slope = torch.gradient(h, spacing=(grid,))[0]
    by_hand = drift(quartic(grid)[0], ETA) / D - torch.gradient(D, spacing=(grid,))[0] / D
    assert torch.allclose(slope[1:-1], by_hand[1:-1], atol=1e-5)


def test_the_corrected_equation_12_is_the_slope_and_the_printed_one_fits_neither_diffusion() -> None:
    theta = torch.tensor([0.3, 1.0, -0.7], dtype=torch.float64)

    def slope_of(version) -> Tensor:  # type: ignore[no-untyped-def]
        at = theta.clone().requires_grad_()
        (of_log,) = torch.autograd.grad(D_of(at[:, None], version).log().sum(), at)
        return (drift(quartic(theta)[0], ETA) / D_of(theta[:, None], version).squeeze(-1) - of_log).detach()

    found = {v: log_density_slope(*quartic(theta), ETA, SGD, STALE, version=v) for v in VERSIONS}
    assert torch.allclose(found["corrected"], slope_of("corrected"))
    for version in VERSIONS:
        assert not torch.allclose(found["as printed"], slope_of(version), rtol=0.1)
    plain = [log_density_slope(*quartic(theta), ETA, SGD, 0.0, version=v) for v in VERSIONS]
    assert torch.allclose(2 * plain[0], plain[1])  # without staleness the printed one is half


def gaussian(variance: float):  # type: ignore[no-untyped-def]
    return lambda theta: -(theta**2).sum() / (2 * variance)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_residual_vanishes_for_the_stationary_variance_of_each_version_and_no_other(version) -> None:  # type: ignore[no-untyped-def]
    a, theta = 1.5, torch.tensor([0.2, -0.1], dtype=torch.float64)
    noise = amplitude(diffusion(a * torch.eye(2, dtype=torch.float64), ETA, SGD), version=version).square()
    for other in VERSIONS:
        variance = quadratic_variance(a, ETA, SGD, equation="Eq. 5", version=other)
        residual = fokker_planck_residual(
            gaussian(variance), lambda theta: drift(a * theta, ETA), lambda theta: noise, theta
        )
        assert (abs(float(residual)) < 1e-12) == (other == version)


def test_the_residual_sees_the_slope_of_a_diffusion_that_varies() -> None:
    """For mu = 0, the stationary density is 1 / variance (Itô)."""
    theta = torch.tensor([0.4], dtype=torch.float64)
    found = fokker_planck_residual(
        lambda theta: -(1 + theta[0] ** 2).log(), lambda theta: 0 * theta, lambda theta: 1 + theta**2, theta
    )
    assert float(found) == pytest.approx(0.0, abs=1e-12)
    flat = fokker_planck_residual(lambda theta: 0 * theta[0], lambda theta: 0 * theta, lambda t: 1 + t**2, theta)
    assert float(flat) == pytest.approx(1.0)  # half the second derivative


def test_equation_7_has_no_density_where_diffusions_differ_and_parameters_are_coupled() -> None:
    """Its slopes mu_k / D_k then have a curl: d(mu_1/D_1)/dtheta_2 is not d(mu_2/D_2)/dtheta_1."""
    theta = torch.tensor([0.3, 0.2], dtype=torch.float64)
    residuals = []
    for D in (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 2.0])):
        spread = D.double() * ETA**2 / 2
        covariance = stationary_covariance(HESSIAN, spread, ETA)
        of_equation_7 = (2 / ETA * HESSIAN / D.double()[:, None]).inverse()
        residuals.append(float((covariance - of_equation_7).abs().max()))
        exact = fokker_planck_residual(
            lambda t, c=covariance: -t @ c.inverse() @ t / 2,  # type: ignore[misc]
            lambda t: drift(HESSIAN @ t, ETA),
            lambda t, s=spread: 2 * s + 0 * t,  # type: ignore[misc]
            theta,
        )
        assert float(exact) == pytest.approx(0.0, abs=1e-10)
    assert residuals[0] < 1e-12 < residuals[1]


def test_the_papers_variances_of_one_quadratic_differ_as_printed_and_agree_corrected() -> None:
    a = 1.5
    printed = {
        e: quadratic_variance(a, ETA, SGD, equation=e, version="as printed")  # type: ignore[arg-type]
        for e in ("Eq. 5", "Eq. 7", "Eq. 12", "Sec. 5")
    }
    assert printed["Eq. 7"] == 2 * printed["Eq. 5"] == printed["Eq. 12"] / 2
    assert printed["Sec. 5"] == ETA / a
    assert printed["Eq. 7"] == pytest.approx(quadratic_variance(a, ETA, SGD))
    D = diffusion(one(a), ETA, SGD, STALE)
    assert float(stationary_covariance(one(a), D, ETA)) == pytest.approx(quadratic_variance(a, ETA, SGD, STALE))
    grid = torch.linspace(-3, 3, 20_001, dtype=torch.float64)
    p = log_density(grid, drift(a * grid, ETA), D.expand(len(grid))).exp()
    assert float(torch.trapezoid(grid**2 * p, grid)) == pytest.approx(quadratic_variance(a, ETA, SGD, STALE), rel=1e-6)


def test_the_covariance_solves_its_lyapunov_equation() -> None:
    noise = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    for version, factor in zip(VERSIONS, (1, 2), strict=True):
        S = stationary_covariance(HESSIAN, ETA**2 / 2 * noise, ETA, version=version)
        assert torch.allclose(HESSIAN @ S + S @ HESSIAN, factor * ETA * noise / 2)


# ---- delays, exactly


def test_without_delay_it_is_the_covariance_of_plain_sgd() -> None:
    noise = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    S = delayed_covariance(HESSIAN, noise, ETA)
    A = torch.eye(2, dtype=torch.float64) - ETA * HESSIAN
    assert torch.allclose(S, A @ S @ A.T + ETA**2 * noise)


def test_a_delay_of_one_update_by_hand() -> None:
    for b in (0.01, 0.1, 0.5):
        exact = (1 + b) / (b * (1 - b) * (2 + b))
        assert float(delayed_covariance(one(b), one(1.0), 1.0, (0, 1.0))) == pytest.approx(exact)


@pytest.mark.parametrize("delays", [[1.0], [0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [0.2, 0.5, 0.0, 0.3]])
def test_to_first_order_a_delay_adds_its_mean_and_a_half(delays: list[float]) -> None:
    """Variance × 2b, with b = eta a: c(tau) = (1 - b tau) c(0), and 2b c(tau) = b² c(0) + 1, so 1 + b (tau + 1/2)."""
    tau = sum(delay * share for delay, share in enumerate(delays))
    for b in (1e-2, 1e-3, 1e-4):
        excess = 2 * b * float(delayed_covariance(one(b), one(1.0), 1.0, delays)) - 1
        assert excess / b == pytest.approx(tau + 0.5, abs=10 * b)


def test_long_delays_and_small_steps_approach_the_delayed_differential_equation() -> None:
    """The variance of dx = -b x(t - tau) dt + dW is (1 + sin(b tau)) / (2 b cos(b tau)) (Küchler, Mensch 1992)."""
    b_tau, tau = 0.8, 200
    b = b_tau / tau
    found = float(delayed_covariance(one(b), one(1.0), 1.0, [0.0] * tau + [1.0]))
    assert found == pytest.approx((1 + math.sin(b_tau)) / (2 * b * math.cos(b_tau)), rel=5e-3)


def companion_covariance(hessian: Tensor, noise: Tensor, eta: float, delays: list[float]) -> Tensor:
    """The slow obvious twin: the covariance of (theta[n], ..., theta[n-m]), by repeating its recursion."""
    k, m = len(hessian), len(delays) - 1
    steps = []
    for delay in range(m + 1):
        A = torch.zeros(k * (m + 1), k * (m + 1), dtype=torch.float64)
        A[:k, :k] += torch.eye(k, dtype=torch.float64)
        A[:k, delay * k : (delay + 1) * k] -= eta * hessian
        A[k:, : k * m] = torch.eye(k * m, dtype=torch.float64)
        steps.append(A)
    X = torch.zeros_like(steps[0])
    for _ in range(3000):
        X = sum(p * A @ X @ A.T for p, A in zip(delays, steps, strict=True))
        X[:k, :k] += eta**2 * noise
    return X[:k, :k]


@pytest.mark.parametrize("delays", [[0.2, 0.5, 0.0, 0.3], [0.0, 0.0, 1.0]])
def test_random_delays_against_the_recursion_of_all_that_is_in_flight(delays: list[float]) -> None:
    noise = torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64)
    found = delayed_covariance(HESSIAN, noise, ETA, delays)
    assert torch.allclose(found, companion_covariance(HESSIAN, noise, ETA, delays), rtol=1e-6)


def test_regression_noise_is_what_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    P = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
    theta = torch.randn(40_000, 1, 2, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(P).T
    x = torch.randn(40_000, 4, 2, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(HESSIAN).T
    y = torch.randn(40_000, 4, 1, generator=generator, dtype=torch.float64)
    gradients = (x * ((x * theta).sum(-1, keepdim=True) - y)).mean(1)
    noise = gradients - theta.squeeze(1) @ HESSIAN
    assert torch.allclose(torch.cov(noise.T), regression_noise(HESSIAN, 1.0, 4)(P), rtol=0.06)


def test_noise_that_depends_on_the_covariance_is_solved_to_its_fixed_point() -> None:
    noise = regression_noise(HESSIAN, 1.0, 4)
    S = delayed_covariance(HESSIAN, noise, ETA, (0.5, 0.5))
    assert torch.allclose(S, delayed_covariance(HESSIAN, noise(S), ETA, (0.5, 0.5)))


def test_training_that_does_not_settle_is_refused() -> None:
    """A delay of tau is stable below 2 sin(pi / (2 (2 tau + 1))) only."""
    limit = 2 * math.sin(math.pi / 14)
    delayed_covariance(one(1.0), one(1.0), 0.99 * limit, (0, 0, 0, 1.0))
    with pytest.raises(ValueError, match="eta must be small enough"):
        delayed_covariance(one(1.0), one(1.0), 1.01 * limit, (0, 0, 0, 1.0))
    with pytest.raises(ValueError, match="eta must be small enough"):  # the mean settles, the square does not
        delayed_covariance(one(1.0), regression_noise(one(1.0), 1.0, 1), 0.9)
    with pytest.raises(ValueError, match="sum to 1"):
        delayed_covariance(one(1.0), one(1.0), 0.1, (0.5, 0.4))
