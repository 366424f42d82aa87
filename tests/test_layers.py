"""Layers: which parameters are stepped together."""

import pytest
from torch import nn

from asyncprop.engine.layers import find_layers
from asyncprop.testing import TINY


def layers(model: nn.Module, by="module", frozen=()) -> list[tuple[str, tuple[str, ...]]]:
    names = [name for name, _ in model.named_parameters() if name not in frozen]
    return [(layer.name, layer.parameters) for layer in find_layers(model, names, by)]


MODEL = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1))


def test_by_module_a_layer_is_what_one_module_owns() -> None:
    assert layers(MODEL) == [
        ("0", ("0.weight", "0.bias")),
        ("1.0", ("1.0.weight", "1.0.bias")),
        ("1.1", ("1.1.weight", "1.1.bias")),
        ("2", ("2.weight", "2.bias")),
    ]


def test_by_parameter_each_is_its_own() -> None:
    assert [members for _, members in layers(MODEL, "parameter")] == [(name,) for name, _ in MODEL.named_parameters()]


def test_by_prefix_the_longest_wins_and_the_rest_goes_by_module() -> None:
    assert layers(MODEL, ["1", "1.1"]) == [
        ("0", ("0.weight", "0.bias")),
        ("1", ("1.0.weight", "1.0.bias")),
        ("1.1", ("1.1.weight", "1.1.bias")),
        ("2", ("2.weight", "2.bias")),
    ]


def test_frozen_parameters_are_in_no_layer() -> None:
    assert layers(MODEL, frozen=("0.weight", "0.bias", "2.bias"))[0][0] == "1.0"
    assert layers(MODEL, frozen=("2.bias",))[-1] == ("2", ("2.weight",))


def test_a_tied_parameter_is_in_one_layer_and_read_by_all_its_modules() -> None:
    model = TINY["transformer"].model()
    found = find_layers(model, [name for name, _ in model.named_parameters()])
    tied = [layer for layer in found if "embed.weight" in layer.parameters]
    assert [layer.modules for layer in tied] == [("embed", "head")]
    assert not [layer for layer in found if layer.name == "head"]


@pytest.mark.parametrize(("by", "message"), [("bloc", "layers must be"), (["9"], "got '9'")])
def test_what_is_no_choice_of_layers(by, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers(MODEL, by)
