"""Lockstep equals the plain PyTorch loop bit for bit: every model × every optimizer × both updates × both workers."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import asyncprop as ap
from asyncprop.testing import TINY, cross_entropy, plain_loop, same_state, twins

STEPS = 20
SCHEDULE = (1.0, 0.5, 2.0, 0.25)

# Every optimizer of torch.optim that steps without a closure. LBFGS needs one; SparseAdam and Muon have tests below.
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-fused": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, fused=True),
    "sgd-foreach": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
    "adam-fused": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.5),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.05),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.01),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.05),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.5, centered=True),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.01),
}
# torch's fused SGD fails in a plain loop, too, where only some parameters of a group have their momentum yet.
TORCH_FAILS = {("conditional", "sgd-fused")}
WORKERS = {"decoupled": ap.Decoupled(forward=1, backward=1), "coupled": ap.Coupled(workers=1)}


def test_every_torch_optimizer_is_in_the_matrix() -> None:
    known = {
        name.lower()
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    assert known - {"optimizer", "lbfgs", "sparseadam", "muon"} == {name.split("-")[0] for name in OPTIMIZERS}


def two_groups(model: nn.Module) -> list[dict[str, object]]:
    """Biases and norms without weight decay, the rest with: the split that most recipes make."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def assert_lockstep_equals_plain_loop(model, batches, make, workers, update, loss_fn=cross_entropy) -> None:
    ours, theirs = twins(model)
    our_optimizer, their_optimizer = make(ours), make(theirs)
    our_scheduler = LambdaLR(our_optimizer, lambda step: SCHEDULE[step % len(SCHEDULE)])
    their_scheduler = LambdaLR(their_optimizer, lambda step: SCHEDULE[step % len(SCHEDULE)])
    losses = []
    with ap.Engine(ours, our_optimizer, loss_fn, workers=workers, update=update, turn="lockstep") as engine:
        for step in engine.run(batches):
            losses.append(step.loss)
            our_scheduler.step()
        assert engine.statistics().mean_staleness == 0.0
    assert losses == plain_loop(theirs, their_optimizer, batches, loss_fn, their_scheduler)
    assert same_state(ours.state_dict(), theirs.state_dict())
    assert same_state(our_optimizer.state_dict(), their_optimizer.state_dict())


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("update", ["layer", "block"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("task", TINY)
def test_lockstep_equals_plain_loop(task: str, optimizer: str, update: str, workers: str) -> None:
    tiny = TINY[task]
    make = lambda model: OPTIMIZERS[optimizer](two_groups(model))  # noqa: E731
    model, batches = tiny.seeded_model(), tiny.batches(STEPS)
    if (task, optimizer) in TORCH_FAILS:
        with pytest.raises(TypeError, match="got NoneType"):
            plain_loop(model, make(model), batches)
        return
    assert_lockstep_equals_plain_loop(model, batches, make, WORKERS[workers], update)


@pytest.mark.parametrize("update", ["layer", "block"])
def test_sparse_gradients(update: str) -> None:
    model = nn.Sequential(nn.Embedding(11, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3)).requires_grad_(True)
    model[2].requires_grad_(False)
    batches = [(torch.randint(11, (4, 2)), torch.randint(3, (4,))) for _ in range(STEPS)]
    assert_lockstep_equals_plain_loop(
        model, batches, lambda m: torch.optim.SparseAdam(m[0].parameters(), lr=0.05), ap.Decoupled(1, 1), update
    )


@pytest.mark.parametrize("update", ["layer", "block"])
def test_muon_on_matrices_alone(update: str) -> None:
    tiny = TINY["mlp"]
    assert_lockstep_equals_plain_loop(
        tiny.seeded_model(),
        tiny.batches(STEPS),
        lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.05),
        ap.Decoupled(1, 1),
        update,
    )


@pytest.mark.parametrize("layers", ["parameter", ["embed", "encoder.self_attn"]])
def test_any_partition_into_layers(layers) -> None:
    tiny = TINY["transformer"]
    assert_lockstep_equals_plain_loop(
        tiny.seeded_model(),
        tiny.batches(STEPS),
        lambda model: OPTIMIZERS["adamw"](two_groups(model)),
        ap.Decoupled(1, 2),
        ap.LayerUpdate(layers=layers, write="locked"),
    )


@pytest.mark.parametrize("update", [ap.LayerUpdate(accumulate=2), ap.BlockUpdate(accumulate=2)])
def test_two_losses_of_one_graph(update) -> None:
    tiny = TINY["conditional"]

    def losses(model: nn.Module, batch):
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]), 0.1 * logits.square().mean()

    def sum_of_losses(model: nn.Module, batch):
        return sum(losses(model, batch))

    ours, theirs = twins(tiny.seeded_model())
    batches = tiny.batches(STEPS)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.05)
    with ap.Engine(ours, optimizer, losses, update=update, turn="lockstep") as engine:
        reported = [step.loss for step in engine.run(batches)]
    expected = plain_loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.05), batches, sum_of_losses)
    assert reported == pytest.approx(expected)
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(our, their, atol=1e-6)


def test_autocast_inside_the_loss() -> None:
    tiny = TINY["mlp"]

    def in_bfloat16(model: nn.Module, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[0])
        assert logits.dtype is torch.bfloat16
        return nn.functional.cross_entropy(logits.float(), batch[1])

    assert_lockstep_equals_plain_loop(
        tiny.seeded_model(),
        tiny.batches(STEPS),
        lambda model: OPTIMIZERS["sgd-momentum"](two_groups(model)),
        ap.Decoupled(1, 1),
        "layer",
        in_bfloat16,
    )


@pytest.mark.parametrize("update", ["layer", "block"])
@pytest.mark.parametrize("workers", [ap.Decoupled(1, 1, lanes=1, intraop_threads=1), ap.Coupled(1, intraop_threads=1)])
@pytest.mark.parametrize("task", TINY)
def test_threads_with_one_lane_equal_the_plain_loop(task: str, workers, update: str) -> None:
    # Lockstep has no threads; here there are, but one lane lets one batch in at a time.
    ours, theirs = twins(TINY[task].seeded_model())
    batches = TINY[task].batches(STEPS)
    make = lambda model: torch.optim.SGD(two_groups(model), lr=0.05, momentum=0.9)  # noqa: E731
    optimizer = make(ours)
    with ap.Engine(ours, optimizer, cross_entropy, workers=workers, update=update) as engine:
        losses = [step.loss for step in engine.run(batches)]
    their_optimizer = make(theirs)
    assert losses == plain_loop(theirs, their_optimizer, batches)
    assert same_state(ours.state_dict(), theirs.state_dict())
    assert same_state(optimizer.state_dict(), their_optimizer.state_dict())
