"""Models: shapes, names and sizes."""

import pytest
import torch

from asyncprop.tasks.models import CausalTransformer, LstmClassifier, Mlp, resnet18, resnet50

# Counts of torchvision's models, as its documentation gives them.
TORCHVISION_COUNTS = {resnet18: 11_689_512, resnet50: 25_557_032}


def torchvision_names(depths: tuple[int, ...], bottleneck: bool) -> set[str]:
    """Every name of torchvision's ResNet state_dict, spelt out."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{name}" for name in norm)}
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            for conv in range(1, 4 if bottleneck else 3):
                names |= {f"{prefix}.conv{conv}.weight", *(f"{prefix}.bn{conv}.{name}" for name in norm)}
            if block == 0 and (bottleneck or stage > 1):
                names |= {f"{prefix}.downsample.0.weight", *(f"{prefix}.downsample.1.{name}" for name in norm)}
    return names


@pytest.mark.parametrize(
    ("make", "depths", "bottleneck"), [(resnet18, (2, 2, 2, 2), False), (resnet50, (3, 4, 6, 3), True)]
)
def test_resnets_have_torchvisions_names_and_sizes(make, depths, bottleneck) -> None:
    model = make(1000, stem="imagenet")
    assert set(model.state_dict()) == torchvision_names(depths, bottleneck)
    assert sum(parameter.numel() for parameter in model.parameters()) == TORCHVISION_COUNTS[make]
    state = model.state_dict()
    expansion = 4 if bottleneck else 1
    assert state["conv1.weight"].shape == (64, 3, 7, 7)
    assert state["layer4.0.downsample.0.weight"].shape == (512 * expansion, 256 * expansion, 1, 1)
    assert state["fc.weight"].shape == (1000, 512 * expansion)


@pytest.mark.parametrize("make", [resnet18, resnet50])
def test_the_small_stem_keeps_small_images(make) -> None:
    model = make(7, width=4, in_channels=1)
    assert model(torch.randn(2, 1, 12, 12)).shape == (2, 7)
    assert model.conv1.weight.shape == (4, 1, 3, 3)


def test_the_lstm_ignores_padding() -> None:
    torch.manual_seed(0)
    model = LstmClassifier(20, 3, width=5).eval()
    short, long = torch.tensor([[3, 4]]), torch.tensor([[3, 4, 0, 0, 0]])
    assert torch.allclose(model(short, torch.tensor([2])), model(long, torch.tensor([2])))
    both = model(torch.tensor([[3, 4, 0], [5, 6, 7]]), torch.tensor([2, 3]))
    assert torch.allclose(both[:1], model(short, torch.tensor([2])), atol=1e-6)


def test_the_transformer_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = CausalTransformer(11, context=6, width=8, layers=2, heads=2)
    tokens = torch.randint(11, (1, 6))
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % 11
    before, after = model(tokens), model(changed)
    assert before.shape == (1, 6, 11)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


def test_the_transformers_output_is_tied_to_its_embedding() -> None:
    model = CausalTransformer(11, context=6, width=8, layers=1, heads=2)
    shapes = [tuple(parameter.shape) for _, parameter in model.named_parameters()]
    assert shapes.count((11, 8)) == 1


def test_an_mlp_has_the_sizes_asked_for() -> None:
    model = Mlp(4, 8, 8, 3)
    assert [tuple(p.shape) for p in model.parameters() if p.dim() == 2] == [(8, 4), (8, 8), (3, 8)]
