"""Layers: which parameters are stepped together."""

import pytest
import torch
from torch import nn

from asyncprop.engine.layers import find_layers
from asyncprop.tasks.models import resnet18
from asyncprop.testing import TINY


def layers(model: nn.Module, by="module", frozen=()) -> list[tuple[str, tuple[str, ...]]]:
    names = [name for name, _ in model.named_parameters() if name not in frozen]
    return [(layer.name, layer.parameters) for layer in find_layers(model, names, by)]


MODEL = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 1))


def test_by_module_a_layer_is_what_one_module_owns_with_the_norm_that_follows() -> None:
    assert layers(MODEL) == [
        ("0", ("0.weight", "0.bias")),
        ("1.0", ("1.0.weight", "1.0.bias", "1.1.weight", "1.1.bias")),
        ("2", ("2.weight", "2.bias")),
    ]
    assert find_layers(MODEL, dict(MODEL.named_parameters()))[1].modules == ("1.0", "1.1")


def test_a_norm_is_a_layer_of_its_own_where_the_module_before_it_is_frozen_or_there_is_none() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.LayerNorm(2))
    assert [name for name, _ in layers(model)] == ["0", "1", "3"]
    assert [name for name, _ in layers(model, frozen=("3.weight", "3.bias"))] == ["0", "1", "4"]


def test_a_vector_of_a_block_is_not_of_the_block_before() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    block.scale = nn.Parameter(torch.ones(2))
    assert [name for name, _ in layers(nn.Sequential(nn.Linear(2, 2), block))] == ["0", "1", "1.0", "1.1"]


def test_a_resnet_18_has_as_many_layers_as_matrices() -> None:
    assert len(layers(resnet18(10, width=2))) == 21


def test_by_parameter_each_is_its_own() -> None:
    assert [members for _, members in layers(MODEL, "parameter")] == [(name,) for name, _ in MODEL.named_parameters()]


def test_by_prefix_the_longest_wins_and_the_rest_goes_by_module() -> None:
    assert layers(MODEL, ["1", "1.1"]) == [
        ("0", ("0.weight", "0.bias")),
        ("1", ("1.0.weight", "1.0.bias")),
        ("1.1", ("1.1.weight", "1.1.bias")),
        ("2", ("2.weight", "2.bias")),
    ]


def test_a_norm_does_not_join_a_module_that_a_prefix_covers() -> None:
    assert [name for name, _ in layers(MODEL, ["1.0"])] == ["0", "1.0", "1.1", "2"]


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
