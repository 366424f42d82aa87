"""Regressions, each with its cause."""

from __future__ import annotations

from typing import Any

import torch

from asyncprop.engine.optimizer import OptimizerView
from asyncprop.testing import TINY


def test_a_scheduler_that_steps_during_a_step_is_not_taken_for_the_optimizer_writing_its_groups() -> None:
    # Cause: what the optimizer left in its group was compared with the user's group after the step, not before it, so
    # a learning rate set by the caller's thread in between ended training.
    model = TINY["mlp"].seeded_model()

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            user.param_groups[0]["lr"] = 0.25  # as another thread might, just now
            super().step(closure)

    user = Slow(model.parameters(), lr=0.5)
    leaves = [(parameter, parameter) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    OptimizerView(user, leaves[:2], whole=False).step()
    assert user.param_groups[0]["lr"] == 0.25
