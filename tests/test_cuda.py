"""The device itself: what the fake one cannot show."""

import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import asyncprop as ap
from asyncprop.bench import gpu
from asyncprop.bench.workloads import Workload
from asyncprop.devices import CudaDevice
from asyncprop.testing import TINY, Sequencer, cross_entropy, plain_loop, twins
from gossip_world import at_once, world

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def on_device(count: int, task: str = "mlp") -> list[tuple[torch.Tensor, ...]]:
    return [tuple(tensor.to(DEVICE) for tensor in batch) for batch in TINY[task].batches(count)]


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.parametrize("task", TINY)
def test_lockstep_equals_the_plain_loop(task: str) -> None:
    ours, theirs = twins(TINY[task].seeded_model().to(DEVICE))
    batches = on_device(10, task)
    with ap.Engine(ours, sgd(ours), cross_entropy, turn="lockstep") as engine:
        losses = [step.loss for step in engine.run(batches)]
    assert losses == pytest.approx(plain_loop(theirs, sgd(theirs), batches), rel=1e-4)


@pytest.mark.parametrize("workers", [ap.Decoupled(1, 2), ap.Decoupled(2, 2), ap.Coupled(2)])
def test_every_batch_is_used_once_and_times_are_told(workers: ap.Decoupled | ap.Coupled) -> None:
    model = TINY["mlp"].seeded_model().to(DEVICE)
    with ap.Engine(model, sgd(model), cross_entropy, workers=workers) as engine:
        steps = list(engine.run(on_device(50)))
        assert engine.statistics().versions == (50, 50)
    assert sorted(step.index for step in steps) == list(range(50))
    assert all(step.forward_s > 0 and step.backward_s > 0 for step in steps)


def test_ranks_gossip() -> None:
    with world(2, device=CudaDevice(torch.device(DEVICE, 0)), model="resnet", period=1) as ranks:
        for rank in ranks:
            rank.set(float(rank.rank))
        ranks[1].land_all()
        ranks[1].send()
        for rank in ranks:  # each has moved to the other by half of the way
            assert torch.allclose(rank.values(), torch.tensor(0.5, device=DEVICE))
        at_once(*(rank.gossip.settle for rank in ranks))
        assert torch.equal(ranks[0].values(), ranks[1].values())
        assert torch.allclose(ranks[0].values(), torch.tensor(0.5, device=DEVICE))


def test_training_learns() -> None:
    model = TINY["resnet"].seeded_model().to(DEVICE)
    batch = on_device(1, "resnet")[0]
    with ap.Engine(model, sgd(model), cross_entropy) as engine:
        losses = [step.loss for step in engine.run([batch] * 60)]
    assert sum(losses[-10:]) < sum(losses[:10]) / 2


class Weight(torch.nn.Module):
    """The gradient of its sum over one sample is 1, whatever is read."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(size, device=DEVICE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum()


@pytest.mark.parametrize("update", [ap.LayerUpdate(write="locked"), ap.BlockUpdate(write="locked")])
def test_locked_writes_lose_no_update(update: ap.LayerUpdate | ap.BlockUpdate) -> None:
    model = Weight(1 << 22)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with ap.Engine(model, optimizer, lambda m, x: m(x), workers=ap.Coupled(4), update=update) as engine:
        list(engine.run([torch.ones(1, device=DEVICE)] * 100))
    assert torch.equal(model.weight.data, torch.full_like(model.weight.data, -100.0))


def test_state_that_one_lane_has_queued_is_there_when_another_steps() -> None:
    asked = itertools.count()

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            if next(asked) == 0:
                torch.cuda._sleep(100_000_000)  # tens of milliseconds, on the device alone
            super().step(closure)

    model = Weight(1000)
    optimizer = Slow(model.parameters(), lr=1.0, momentum=0.5)
    with ap.Engine(model, optimizer, lambda m, x: m(x), workers=ap.Coupled(2)) as engine:
        list(engine.run([torch.ones(1, device=DEVICE)] * 2))
    assert torch.equal(model.weight.data, torch.full_like(model.weight.data, -1.0 - 1.5))


def test_what_orders_everything_is_refused() -> None:
    model = TINY["mlp"].seeded_model().to(DEVICE)
    with pytest.raises(ValueError, match="turn must be 'free' or 'lockstep' on a GPU"):
        ap.Engine(model, sgd(model), cross_entropy, turn=ap.Ordered())


def submitted(engine: ap.Engine, batch: torch.Tensor) -> None:
    engine.submit(batch).result()


def run(engine: ap.Engine, batch: torch.Tensor) -> None:
    list(engine.run([batch]))


@pytest.mark.parametrize("turn", ["free", "lockstep"])
@pytest.mark.parametrize("train", [submitted, run])
def test_a_batch_that_was_queued_on_the_users_own_stream_is_waited_for(train: Any, turn: Any) -> None:
    model = Weight(1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with (
        ap.Engine(model, optimizer, lambda m, x: m(x), turn=turn) as engine,
        torch.cuda.stream(torch.cuda.Stream()),
    ):
        batch = torch.zeros(1, device=DEVICE)
        torch.cuda._sleep(100_000_000)  # tens of milliseconds
        batch += 1
        train(engine, batch)
    assert torch.equal(model.weight.data, torch.full_like(model.weight.data, -1.0))


@pytest.mark.parametrize("choice", ["raise", "skip"])
def test_losses_that_are_not_finite(choice: str) -> None:
    model = TINY["mlp"].seeded_model().to(DEVICE)
    batches = on_device(6)
    batches[3] = (batches[3][0] * float("nan"), batches[3][1])
    engine = ap.Engine(model, sgd(model), cross_entropy, on_nonfinite=choice)
    if choice == "raise":
        with pytest.raises(ap.NonFiniteError), engine:
            list(engine.run(batches))
        return
    with engine:
        skipped = [step.index for step in engine.run(batches) if step.skipped]
    assert skipped == [3]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_snapshot_is_of_one_instant() -> None:
    """Every update adds one to all weights, which take longer to copy than to tell the device to."""
    model = nn.Sequential(nn.Linear(4096, 4096, bias=False), nn.Linear(4096, 4096, bias=False)).to(DEVICE)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    loss_fn = lambda m, batch: -(m[0].weight + m[1].weight).sum() + 0 * m(batch).sum()  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [torch.ones(1, 4096, device=DEVICE)] * 60
    with ap.Engine(model, optimizer, loss_fn, workers=ap.Decoupled(2, 1, lanes=2)) as engine:  # one writes at a time
        for _ in engine.run(batches):
            snapshot = engine.snapshot()
            lowest_and_highest = {value.item() for copied in snapshot.model.values() for value in copied.aminmax()}
            assert lowest_and_highest == set(snapshot.versions.values())


@pytest.mark.parametrize(
    "make", [sgd, lambda m: torch.optim.Adam(m.parameters()), lambda m: torch.optim.Adam(m.parameters(), fused=True)]
)
def test_lanes_own_state_goes_through_a_checkpoint(make: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """It is read as checkpoints are: to the CPU."""

    def trained(model: nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> Any:
        both_in_flight = Sequencer([(0, "read", 0), (1, "read", 0), (0, "write", 0), (1, "write", 0)])
        update = ap.BlockUpdate(state="private", compensate=ap.Compensation(adaptive=True))
        with ap.Engine(
            model, optimizer, cross_entropy, workers=ap.Coupled(2), update=update, turn=both_in_flight
        ) as engine:
            engine.load_state_dict(state)
            list(engine.run(on_device(6)))
            return engine.state_dict()

    model = TINY["mlp"].seeded_model().to(DEVICE)
    optimizer = make(model)
    file = io.BytesIO()
    torch.save({"engine": trained(model, optimizer, {}), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, map_location="cpu", weights_only=True)
    optimizer = make(model)
    optimizer.load_state_dict(saved["optimizer"])
    state = trained(model, optimizer, saved["engine"])
    assert state["private"][0].keys() == dict(model.named_parameters()).keys()
    assert all(value.is_cuda for value in state["mean_squares"].values())


def test_two_hundred_engines_leave_no_memory() -> None:
    """Workspaces of cuBLAS, of which each pair of a thread's handle and a stream has one, are not the engines'."""
    model = TINY["mlp"].seeded_model().to(DEVICE)
    batches = on_device(2)
    used = []
    for _ in range(200):
        with ap.Engine(model, sgd(model), cross_entropy) as engine:
            list(engine.run(batches))
        torch._C._cuda_clearCublasWorkspaces()
        used.append(torch.cuda.memory_allocated())
    assert used[-1] <= used[10]


def test_an_engine_finds_the_memory_that_the_one_before_it_has_freed() -> None:
    model = TINY["resnet"].seeded_model().to(DEVICE)
    optimizer, batches = sgd(model), on_device(3, "resnet")
    torch.cuda.empty_cache()  # what other tests have left on all of PyTorch's streams would be found, too
    reserved = []
    for _ in range(3):
        with ap.Engine(model, optimizer, cross_entropy, turn="lockstep") as engine:
            list(engine.run(batches))
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] == reserved[2]  # the first makes the optimizer's state


def test_the_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 1, "BATCHES": 2, "WARM_BATCHES": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    made = gpu.bench_gpu(io.StringIO(), None, (Workload("small", "synthetic-vectors", width=8, batch_size=8),))
    assert all(row["peak_memory_bytes"] > 0 for row in made["rows"])


def test_what_was_measured_before_does_not_count_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ROUNDS": 1, "BATCHES": 2, "WARM_BATCHES": 1}.items():
        monkeypatch.setattr(gpu, name, value)
    small = Workload("small", "synthetic-vectors", width=8, batch_size=8)
    first, again = (gpu.bench_gpu(io.StringIO(), None, (small,))["rows"][0] for _ in range(2))
    assert first["method"] == again["method"] == "sgd"
    assert again["peak_memory_bytes"] <= first["peak_memory_bytes"]
