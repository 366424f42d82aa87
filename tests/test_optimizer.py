"""OptimizerView: the user's optimizer, stepping leaves instead of parameters."""

import pytest
import torch

from asyncprop.engine.optimizer import OptimizerView, copy_state
from asyncprop.testing import TINY, same_state, twins


def with_gradients(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    parameters = list(model.parameters())
    for index, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    return parameters


def leaves_of(parameters) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    pairs = []
    for parameter in parameters:
        leaf = torch.nn.Parameter(parameter.data)
        leaf.grad, parameter.grad = parameter.grad, None
        pairs.append((parameter, leaf))
    return pairs


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_parts_step_as_the_whole_does(kind) -> None:
    ours, theirs = twins(TINY["mlp"].seeded_model())
    options = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
    our_optimizer, their_optimizer = kind(ours.parameters(), **options), kind(theirs.parameters(), **options)
    for _ in range(3):
        with_gradients(theirs)
        their_optimizer.step()
        pairs = leaves_of(with_gradients(ours))
        for part in (pairs[2:], pairs[:2]):
            OptimizerView(our_optimizer, part, whole=False).step()
    assert same_state(ours.state_dict(), theirs.state_dict())
    assert same_state(our_optimizer.state_dict(), their_optimizer.state_dict())


def test_hyper_parameters_are_read_at_each_step() -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pairs = leaves_of(with_gradients(model))
    view = OptimizerView(optimizer, pairs[:1], whole=False)
    before = pairs[0][0].detach().clone()
    view.step()
    assert torch.equal(pairs[0][0], before)
    optimizer.param_groups[0]["lr"] = 0.5
    view.step()
    assert torch.allclose(pairs[0][0], before - 0.5)


def test_step_hooks_of_the_user_are_called() -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    OptimizerView(optimizer, leaves_of(with_gradients(model))[:1], whole=False).step()
    assert calls == ["post"]


class CountsInItsGroup(torch.optim.SGD):
    """Keeps state in its param group, as Prodigy does."""

    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["steps"] = self.param_groups[0].get("steps", 0) + 1


def test_state_in_param_groups_is_handed_on_by_the_whole_and_refused_for_a_part() -> None:
    model = TINY["mlp"].seeded_model()
    optimizer = CountsInItsGroup(model.parameters(), lr=0.1)
    pairs = leaves_of(with_gradients(model))
    whole = OptimizerView(optimizer, pairs, whole=True)
    whole.step()
    whole.step()
    assert optimizer.param_groups[0]["steps"] == 2
    with pytest.raises(ValueError, match="use update='block'"):
        OptimizerView(optimizer, pairs[:1], whole=False).step()


@pytest.mark.parametrize("counts_there", [False, True])
def test_saved_state_is_copied_to_where_the_parameter_is(counts_there: bool) -> None:
    parameter = torch.nn.Parameter(torch.empty(2, device="meta"))
    optimizer = torch.optim.Adam([parameter], capturable=counts_there)
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "more": [torch.ones(2), {"deep": torch.ones(2)}, 7]}
    copied = copy_state(saved, parameter, optimizer)
    assert copied["step"].device.type == ("meta" if counts_there else "cpu")
    assert copied["exp_avg"].device.type == copied["more"][0].device.type == "meta"
    assert copied["more"][1]["deep"].device.type == "meta"
    assert copied["more"][2] == 7


def test_saved_state_is_copied_where_it_is_there_already() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    saved = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "more": [torch.ones(2)]}
    copied = copy_state(saved, parameter, torch.optim.Adam([parameter]))
    assert same_state(copied, saved)
    for value in (copied["step"], copied["exp_avg"], copied["more"][0]):
        value.zero_()
    assert same_state(saved, {"step": torch.tensor(3.0), "exp_avg": torch.ones(2), "more": [torch.ones(2)]})
