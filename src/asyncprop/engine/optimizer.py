"""OptimizerView: the user's own optimizer, stepping some of a lane's leaves instead of the user's parameters."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

Leaf = tuple[nn.Parameter, nn.Parameter]
"""A parameter of the user's model, and the lane's leaf over the same storage."""


States = MutableMapping[Any, Any]
"""The state of each of the user's parameters: `optimizer.state`, or another `defaultdict(dict)` of that kind."""


class _SharedState(dict[nn.Parameter, Any]):
    """State by leaf that *is* the state by the user's parameter in `states`; made there where it is missing."""

    def __init__(self, states: States, leaves: Sequence[Leaf]) -> None:
        super().__init__({leaf: states[p] for p, leaf in leaves if p in states})
        self._states = states
        self._parameter_of = {leaf: parameter for parameter, leaf in leaves}

    def __missing__(self, leaf: nn.Parameter) -> Any:
        state = self._states[self._parameter_of[leaf]]
        super().__setitem__(leaf, state)
        return state

    def __setitem__(self, leaf: nn.Parameter, state: Any) -> None:
        self._states[self._parameter_of[leaf]] = state
        super().__setitem__(leaf, state)


class OptimizerView:
    """A shallow copy of the user's optimizer over `leaves`.

    Hyper-parameters are read from the user's param groups at each step, so schedulers keep working; the state of a
    leaf is the user's state of its parameter, so `optimizer.state_dict()` stays true.

    Args:
        optimizer: the user's; any whose state is kept per parameter.
        leaves: the parameters that this view steps, with the leaves that carry their gradients.
        states: where the state of each parameter is, if it is a lane's own; `optimizer.state` by default.
        whole: whether `leaves` are all that the optimizer steps. Only then may it keep state in its param groups
            (as Prodigy or schedule-free optimizers do): a part must not move the state of the whole.
    """

    def __init__(
        self, optimizer: Optimizer, leaves: Sequence[Leaf], states: States | None = None, *, whole: bool
    ) -> None:
        self._optimizer = optimizer
        self._whole = whole
        self._groups = _group_leaves(optimizer, leaves)
        self._view = object.__new__(type(optimizer))
        # A scheduler replaces `step` on the user's object by one bound to that object: the view must not inherit it.
        self._view.__dict__.update({k: v for k, v in vars(optimizer).items() if k != "step"})
        self._view.state = _SharedState(optimizer.state if states is None else states, leaves)  # type: ignore[assignment]
        self._view.param_groups = [{} for _ in self._groups]
        self._step: Callable[[Optimizer], Any] = type(optimizer).step
        self._bare_step = _without_wrappers(optimizer)
        self._checks_left = 2  # an optimizer that writes its groups does so at its first or second step

    @torch.no_grad()
    def step(self, others: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """Step every leaf that has a gradient, in place, with whatever hyper-parameters hold now.

        Args:
            others: hyper-parameters to use instead, for each param group that the leaves are in.

        Returns:
            What was used.
        """
        given = [dict(self._optimizer.param_groups[index]) for index, _ in self._groups]
        for group, other in zip(given, others or (), strict=False):
            group.update(other)
        for own, group, (_, leaves) in zip(self._view.param_groups, given, self._groups, strict=True):
            own.update(group)
            own["params"] = leaves
        step = self._step if _has_step_hooks(self._view) else self._bare_step
        step(self._view)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # what torch's schedulers look at
        if self._whole or self._checks_left:
            self._checks_left -= 1
            self._write_back(given)
        return given

    def _write_back(self, given: list[dict[str, Any]]) -> None:
        """Hand on what the optimizer wrote into its groups: what differs from what they were `given` for this step.

        The user's groups may have moved on meanwhile (a scheduler stepped), so they are not what to compare with.
        """
        for own, group, (index, _) in zip(self._view.param_groups, given, self._groups, strict=True):
            for key, value in own.items():
                if key == "params" or group.get(key) is value:
                    continue
                if not self._whole:
                    raise ValueError(
                        f"optimizer must keep its state per parameter to be stepped layer by layer "
                        f"({type(self._optimizer).__name__} writes {key!r} of its param group): use update='block'"
                    )
                self._optimizer.param_groups[index][key] = value


def copy_state(saved: dict[str, Any], parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Any]:
    """Copy the saved state of a parameter to where the parameter is.

    A `step` stays where it was saved, as in `Optimizer.load_state_dict`, unless the optimizer counts on the device.
    """
    group = next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), {})
    counts_there = group.get("fused") or group.get("capturable")
    return {
        name: copy.deepcopy(value) if name == "step" and not counts_there else copy_to(parameter.device, value)
        for name, value in saved.items()
    }


def copy_to(device: torch.device, value: Any) -> Any:
    """Copy a value; the tensors of it, or of dicts, lists and tuples in it, to a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, dict):
        return {key: copy_to(device, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to(device, inner) for inner in value)
    return copy.deepcopy(value)


def _group_leaves(optimizer: Optimizer, leaves: Sequence[Leaf]) -> list[tuple[int, list[nn.Parameter]]]:
    """Return (index of the user's param group, leaves in it) for each group that has any, in the user's order."""
    leaf_of = {id(parameter): leaf for parameter, leaf in leaves}
    groups = [
        (index, [leaf_of[id(parameter)] for parameter in group["params"] if id(parameter) in leaf_of])
        for index, group in enumerate(optimizer.param_groups)
    ]
    return [(index, members) for index, members in groups if members]


def _without_wrappers(optimizer: Optimizer) -> Callable[[Optimizer], Any]:
    """Return `step` without what torch wraps around its own optimizers: grad mode, hooks, and a profiler label.

    They cost more than the step of a small layer itself (55 of 90 us), and are paid once per layer here.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim") and not optimizer.defaults.get("differentiable"):
        bare: Callable[[Optimizer], Any] = inspect.unwrap(kind.step)
        return bare
    return kind.step


def _has_step_hooks(optimizer: Optimizer) -> bool:
    return bool(
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
