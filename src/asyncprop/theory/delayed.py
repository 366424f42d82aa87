"""Delayed: the exact stationary covariance of SGD whose gradients are some updates old, on a quadratic loss.

The paper takes staleness for independent noise (Eq. 3, 4). It is not: the parameters that a pass has read are those
of some updates ago, on the way to those that it writes. Nothing is approximated here, but that delays are independent:

    theta[n+1] = theta[n] - eta (H theta[n - tau_n] + noise_n)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Noise = Tensor | Callable[[Tensor], Tensor]
"""Covariance of a gradient's noise, of shape (k, k); or a function that gives it for the parameters' covariance."""

ROUNDS = 200
"""Fixed-point rounds at most, for noise that depends on the covariance; they converge if training does."""


def delayed_covariance(hessian: Tensor, noise: Noise, eta: float, delays: Sequence[float] = (1.0,)) -> Tensor:
    """Return the covariance of theta - theta* in the long run, of shape (k, k).

    The autocovariances c(j) = E[theta[n] theta[n+j]'] obey linear (Yule-Walker) equations that close at the largest
    delay; they are solved for each pair of eigendirections of H. For curvature a and a mean delay tau it is, to first
    order in eta a, eta sigma²/(2a) × (1 + eta a (tau + 1/2)): 1 + eta a tau times what it is without delay, which the
    paper's second-order term misses.

    Args:
        hessian: symmetric, positive definite, of shape (k, k).
        noise: of one gradient.
        eta: learning rate.
        delays: the probability of each delay, 0, 1, 2, ... updates. `(1.0,)` is sequential SGD; `(0, 0, 1.0)` is a
            delay of two updates always.

    Raises:
        ValueError: if probabilities do not sum to 1, or training does not settle with this learning rate.
    """
    probability = torch.as_tensor(delays, dtype=hessian.dtype)
    if bool((probability < 0).any()) or abs(float(probability.sum()) - 1) > 1e-6:
        raise ValueError(f"delays must be probabilities that sum to 1 (got a sum of {float(probability.sum()):.6g})")
    curvatures, basis = torch.linalg.eigh(hessian)
    _check_stable(eta * float(curvatures[-1]), probability, eta)

    def solve(noise: Tensor) -> Tensor:
        found: Tensor = basis @ _solve(curvatures, basis.T @ noise @ basis, eta, probability) @ basis.T
        if bool((found.diagonal() <= 0).any()):  # delays that vary can keep the square from settling, too
            raise ValueError(f"eta must be small enough for training to settle with these delays (got {eta})")
        return found

    if not callable(noise):
        return solve(noise)
    covariance = torch.zeros_like(hessian)
    for _ in range(ROUNDS):
        before, covariance = covariance, solve(noise(covariance))
        if torch.allclose(before, covariance, rtol=1e-10):
            return covariance
    raise ValueError(f"eta must be small enough for training to settle with this noise (got {eta})")


def regression_noise(inputs: Tensor, residual_variance: float, batch_size: int) -> Callable[[Tensor], Tensor]:
    """Return the gradient's noise of linear regression on fresh batches, as a function of the parameters' covariance.

    The loss is the mean over the batch of (x · theta - y)²/2, inputs x are Gaussian with covariance `inputs` = H, and
    y = x · theta* + Gaussian noise. Then the gradient's covariance is (s² H + H P H + H tr(H P)) / batch size.

    Args:
        inputs: covariance of x, of shape (k, k).
        residual_variance: s², of y given x.
        batch_size: samples of a batch.
    """

    def noise(covariance: Tensor) -> Tensor:
        moved = inputs @ covariance
        return (residual_variance * inputs + moved @ inputs + inputs * moved.trace()) / batch_size

    return noise


def _solve(curvatures: Tensor, noise: Tensor, eta: float, probability: Tensor) -> Tensor:
    """Return E[theta_i theta_j] for all pairs of eigendirections, given the noise in that basis.

    Unknowns are c(-m) ... c(m), where c(j) = E[theta_i[n] theta_j[n+j]] and m is the largest delay. Stepping theta_j on
    gives c(j+1) = c(j) - eta a_j sum_t p_t c(j-t) for j >= 0, stepping theta_i the mirror of it, and stepping both
    0 = -eta a_j sum_t p_t c(-t) - eta a_i sum_t p_t c(t) + eta² a_i a_j c(0) + eta² noise_ij.
    """
    k, m = len(curvatures), len(probability) - 1
    size = 2 * m + 1
    steps = eta * curvatures
    i, j = steps[:, None].expand(k, k), steps[None, :].expand(k, k)
    t, p = torch.arange(m + 1), probability
    system = torch.zeros(k, k, size, size, dtype=noise.dtype)
    for lag in range(m):
        system[:, :, m + lag + 1, m + lag + 1] += 1
        system[:, :, m + lag + 1, m + lag] -= 1
        system[:, :, m - lag - 1, m - lag - 1] += 1
        system[:, :, m - lag - 1, m - lag] -= 1
        system[:, :, m + lag + 1][..., m + lag - t] += p * j[..., None]
        system[:, :, m - lag - 1][..., m - lag + t] += p * i[..., None]
    system[:, :, m][..., m - t] += p * j[..., None]
    system[:, :, m][..., m + t] += p * i[..., None]
    system[:, :, m, m] -= i * j
    right = torch.zeros(k, k, size, dtype=noise.dtype)
    right[:, :, m] = eta**2 * noise
    answer: Tensor = torch.linalg.solve(system, right.unsqueeze(-1)).squeeze(-1)[:, :, m]
    return answer


def _check_stable(step: float, probability: Tensor, eta: float) -> None:
    """Refuse a learning rate with which the mean of theta does not go to theta*: z = 1 - step × sum_t p_t z^-t."""
    m = len(probability) - 1
    companion = torch.zeros(m + 1, m + 1, dtype=probability.dtype)
    companion[0] = -step * probability
    companion[0, 0] += 1
    companion[1:, :m] += torch.eye(m, dtype=probability.dtype)
    if float(torch.linalg.eigvals(companion).abs().max()) >= 1:
        raise ValueError(f"eta must be small enough for training to settle with these delays (got {eta})")
