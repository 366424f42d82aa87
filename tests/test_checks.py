"""Checks: what cannot work is refused when the engine is made, in one line with the way out."""

import pytest
import torch
from torch import nn

import asyncprop as ap
from asyncprop.testing import TINY, cross_entropy


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def mlp() -> nn.Module:
    return TINY["mlp"].seeded_model()


def in_place_compiled() -> nn.Module:
    model = mlp()
    model[0].compile(backend="eager")
    return model


def hooked() -> nn.Module:
    model = mlp()
    model[0].weight.register_post_accumulate_grad_hook(lambda leaf: None)
    return model


MODELS = {
    "no module": (lambda: "model", "model must be a torch.nn.Module"),
    "data parallel": (lambda: nn.DataParallel(mlp()), "pass the inner model"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "run one forward pass"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "materialise it before"),
    "scripted": (lambda: torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), "pass the Python module"),
    "compiled in place": (in_place_compiled, r"torch.compile\(model\)"),
    "hooked": (hooked, "post-accumulate-grad hooks"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_copied_over_their_storage(name: str) -> None:
    make, message = MODELS[name]
    model = make()
    optimizer = sgd(model if isinstance(model, nn.Module) and name != "lazy" else mlp())
    with pytest.raises(ValueError, match=message):
        ap.Engine(model, optimizer, cross_entropy)


OPTIMIZERS = {
    "closure": (lambda m: torch.optim.LBFGS(m.parameters()), "without a closure"),
    "no optimizer": (lambda m: "sgd", "must be a torch.optim.Optimizer"),
    "another model's": (lambda m: sgd(mlp()), "not the model's"),
    "all frozen": (lambda m: sgd(m.requires_grad_(False)), "all are frozen"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_cannot_step_layers(name: str) -> None:
    make, message = OPTIMIZERS[name]
    model = mlp()
    with pytest.raises(ValueError, match=message):
        ap.Engine(model, make(model), cross_entropy)


scaler = torch.amp.GradScaler("cpu")


def scaled(model, batch):
    return scaler.scale(cross_entropy(model, batch))


LOSSES = {
    "not callable": ("loss", "must be callable"),
    "one argument": (lambda batch: batch, "must be callable as"),
    "ignores the lane": (lambda model, batch: batch.sum(), "is never read"),
    "scaled": (scaled, "must not scale its loss"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_cannot_work(name: str) -> None:
    loss_fn, message = LOSSES[name]
    model = mlp()
    with pytest.raises(ValueError, match=message):
        ap.Engine(model, sgd(model), loss_fn)


def test_a_loss_of_the_users_own_model_is_found_at_the_first_batch() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="the engine's own model"):
        with ap.Engine(model, sgd(model), lambda m, batch: cross_entropy(m and model, batch)) as engine:
            list(engine.run(TINY["mlp"].batches(3)))


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda m, batch: m(batch[0]), "scalar tensor"),
        (lambda m, batch: m(batch[0]).sum().item(), "scalar tensor"),
        (lambda m, batch: m(batch[0]).detach().sum(), "requires no gradient"),
        (lambda m, batch: [m(batch[0]).sum(), m(batch[0]).sum()], "set accumulate=2"),
    ],
)
def test_what_a_loss_must_be(loss_fn, message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message), ap.Engine(model, sgd(model), loss_fn) as engine:
        list(engine.run(TINY["mlp"].batches(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "many"}, "workers must be one of"),
        ({"update": "half"}, "update must be one of"),
        ({"turn": "mine"}, "turn must be"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be"),
    ],
)
def test_unknown_names_list_the_known_ones(options, message: str) -> None:
    model = mlp()
    with pytest.raises(ValueError, match=message):
        ap.Engine(model, sgd(model), cross_entropy, **options)


@pytest.mark.parametrize("make", [
    lambda: ap.Decoupled(forward=0), lambda: ap.Decoupled(backward=0), lambda: ap.Decoupled(lanes=0),
    lambda: ap.Decoupled(intraop_threads=0), lambda: ap.Coupled(0),
])  # fmt: skip
def test_fewer_than_one_of_anything(make) -> None:
    with pytest.raises(ValueError, match=r"must be >= 1 \(got 0\)"):
        make()
