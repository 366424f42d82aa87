"""The engine as a user meets it: runs, futures, snapshots, and how each way of ending it ends."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import asyncprop as ap
from asyncprop.engine.passes import Gate
from asyncprop.testing import TINY, FakeDevice, cross_entropy, same_state

TINY_MLP = TINY["mlp"]


def make(model: nn.Module | None = None, loss_fn=cross_entropy, **options) -> ap.Engine:
    model = model or TINY_MLP.seeded_model()
    options.setdefault("workers", ap.Decoupled(1, 2, lanes=3))
    return ap.Engine(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss_fn, **options)


# ---- running


def test_run_reports_every_batch_once() -> None:
    batches = TINY_MLP.batches(30)
    with make() as engine:
        steps = list(engine.run(batches))
        again = list(engine.run(batches))
        statistics = engine.statistics()
    assert sorted(step.index for step in steps) == list(range(30))
    assert sorted(step.index for step in again) == list(range(30, 60))
    assert all(step.batch_size == 4 and not step.skipped and step.lane in range(3) for step in steps)
    assert all(step.forward_s > 0 and step.backward_s > 0 and step.waited_s >= 0 for step in steps)
    assert (statistics.batches, statistics.samples, statistics.in_flight) == (60, 240, 0)
    assert statistics.layers == ("0", "2")
    assert statistics.versions == (60, 60)
    assert {thread.name for thread in statistics.threads} == {"thread-0", "thread-1", "thread-2"}
    assert all(thread.worked_s > 0 and thread.waited_s >= 0 for thread in statistics.threads)


def test_staleness_is_bounded_by_the_other_lanes() -> None:
    with make(workers=ap.Decoupled(2, 2, lanes=2)) as engine:
        steps = list(engine.run(TINY_MLP.batches(50)))
    # One other lane: while a pass is in flight the other can finish many passes, but in the mean it is one each.
    mean = sum(step.mean_staleness for step in steps) / len(steps)
    assert 0.0 <= mean <= 1.0


def test_telemetry_off_leaves_staleness_out() -> None:
    with make(telemetry=False) as engine:
        steps = list(engine.run(TINY_MLP.batches(5)))
        assert engine.statistics().mean_staleness == 0.0
    assert [step.staleness for step in steps] == [()] * 5


def test_mean_staleness_of_the_statistics_is_that_of_the_steps() -> None:
    with make(TINY["conditional"].seeded_model()) as engine:
        steps = list(engine.run(TINY["conditional"].batches(40)))
        statistics = engine.statistics()
    ages = [age for step in steps for age in step.staleness if age >= 0]
    assert statistics.mean_staleness == pytest.approx(sum(ages) / len(ages))
    assert statistics.versions[0] < 40  # `scale`, which only some batches use


class Stream(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Samples without a known number of them."""

    def __iter__(self):
        for inputs, targets in TINY_MLP.batches(6):
            yield from zip(inputs, targets, strict=True)


@pytest.mark.parametrize("how", [{"workers": "decoupled"}, {"workers": "coupled"}, {"turn": "lockstep"}])
def test_a_loader_without_a_length_can_be_trained_on(how) -> None:
    with make(**how) as engine:
        steps = list(engine.run(DataLoader(Stream(), batch_size=4)))
        assert engine.statistics().in_flight == 0
        again = list(engine.run(DataLoader(Stream(), batch_size=4)))
    assert sorted(step.index for step in (*steps, *again)) == list(range(12))
    assert all(step.batch_size == 4 for step in steps)


def test_lockstep_takes_a_batch_only_when_asked() -> None:
    taken = []

    def loader():
        for index, batch in enumerate(TINY_MLP.batches(4)):
            taken.append(index)
            yield batch

    with make(turn="lockstep") as engine:
        for step in engine.run(loader()):
            assert taken == list(range(step.index + 1))


def test_leaving_a_run_early_finishes_what_was_taken() -> None:
    taken = []

    def loader():
        for batch in TINY_MLP.batches(100):
            taken.append(batch)
            yield batch

    with make() as engine:
        for step in engine.run(loader()):
            if step.index == 3:
                break
        statistics = engine.statistics()
        assert statistics.in_flight == 0
        assert statistics.batches == len(taken) < 100
        assert len(list(engine.run(TINY_MLP.batches(3)))) == 3


def test_an_exception_in_the_callers_loop_ends_the_engine_cleanly() -> None:
    with pytest.raises(KeyError, match="mine"), make() as engine:
        for _ in engine.run(TINY_MLP.batches(50)):
            raise KeyError("mine")


def test_keyboard_interrupt_finishes_passes_in_flight() -> None:
    with pytest.raises(KeyboardInterrupt), make() as engine:
        for step in engine.run(TINY_MLP.batches(50)):
            if step.index == 5:
                raise KeyboardInterrupt
    assert engine.statistics().in_flight == 0


def test_one_run_at_a_time() -> None:
    with make() as engine:
        run = engine.run(TINY_MLP.batches(5))
        next(run)
        with pytest.raises(RuntimeError, match="already reading a loader"):
            next(engine.run(TINY_MLP.batches(5)))
        with pytest.raises(RuntimeError, match="before submit"):
            engine.submit(TINY_MLP.batches(1)[0])
        run.close()


def test_only_inside_its_block() -> None:
    engine = make()
    with pytest.raises(RuntimeError, match="inside its with block"):
        list(engine.run([]))
    with engine:
        pass
    with pytest.raises(RuntimeError, match="inside its with block"):
        engine.submit(1)
    with pytest.raises(RuntimeError, match="entered once"), engine:
        pass


def test_drain_inside_a_run_rests_the_loader() -> None:
    with make() as engine:
        for step in engine.run(TINY_MLP.batches(12)):
            if step.index % 4 == 0:
                engine.drain()
                before = [parameter.clone() for parameter in engine._model.parameters()]
                assert engine.statistics().in_flight == 0
                assert same_state(before, list(engine._model.parameters()))
        assert engine.statistics().batches == 12


# ---- submitting


def test_submitted_batches_give_futures() -> None:
    with make() as engine:
        futures = [engine.submit(batch) for batch in TINY_MLP.batches(10)]
        engine.drain()
        assert sorted(future.result().index for future in futures) == list(range(10))


def test_leaving_the_block_finishes_what_was_submitted() -> None:
    with make(workers=ap.Decoupled(1, 1)) as engine:
        futures = [engine.submit(batch) for batch in TINY_MLP.batches(6)]
    assert all(future.result(timeout=0).batch_size == 4 for future in futures)


def test_an_error_reaches_every_future() -> None:
    def loss_fn(model: nn.Module, batch) -> torch.Tensor:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), make(loss_fn=lambda m, b: loss_fn(m, b)) as engine:
        future = engine.submit(TINY_MLP.batches(1)[0])
        assert isinstance(future.exception(timeout=30), OSError)
        future.result()


def test_an_error_that_no_future_was_asked_for_is_raised_at_the_end() -> None:
    def loss_fn(model: nn.Module, batch) -> torch.Tensor:
        raise OSError(f"disk {type(model).__name__}")

    with pytest.raises(OSError, match="disk Sequential"), make(loss_fn=loss_fn) as engine:
        engine.submit(TINY_MLP.batches(1)[0])


# ---- failing: wherever it happens, the caller sees it with its own traceback, and all threads are gone


class Boom(Exception):  # noqa: N818 (its name is what the tests look for)
    pass


def explode(*_: object) -> None:
    raise Boom


def failing_loader():
    yield from TINY_MLP.batches(3)
    explode()


def in_forward(model: nn.Module) -> None:
    model[0].register_forward_hook(explode)


def in_backward(model: nn.Module) -> None:
    model[0].weight.register_hook(explode)


class FailingOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        explode()


@pytest.mark.parametrize("update", ["layer", "block"])
@pytest.mark.parametrize("workers", ["decoupled", "coupled", "lockstep"])
@pytest.mark.parametrize("where", ["loader", "forward", "backward", "optimizer"])
def test_an_error_anywhere_is_raised_in_the_caller(where: str, workers: str, update: str) -> None:
    model = TINY_MLP.seeded_model()
    loader = failing_loader() if where == "loader" else TINY_MLP.batches(20)
    if where in ("forward", "backward"):
        {"forward": in_forward, "backward": in_backward}[where](model)
    kind = FailingOptimizer if where == "optimizer" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.1)
    how = {"turn": "lockstep"} if workers == "lockstep" else {"workers": workers}
    with pytest.raises(Boom) as caught, ap.Engine(model, optimizer, cross_entropy, update=update, **how) as e:
        list(e.run(loader))
    assert caught.traceback[-1].name == "explode"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncprop")]
    with pytest.raises(RuntimeError, match="ended by an error"):
        list(e.run([]))
    assert all(parameter.grad is None for parameter in model.parameters())
    model._forward_hooks.clear()
    model[0]._forward_hooks.clear()
    (model[0].weight._backward_hooks or {}).clear()
    ordinary = torch.optim.SGD(model.parameters(), lr=0.1)
    cross_entropy(model, TINY_MLP.batches(1)[0]).backward()
    ordinary.step()


def test_a_thread_stuck_in_the_users_code_does_not_hold_the_error_up() -> None:
    release = threading.Event()
    inside = threading.Event()

    def loader():
        yield TINY_MLP.batches(1)[0]
        inside.set()
        release.wait(30)

    def loss_fn(model: nn.Module, batch) -> torch.Tensor:
        inside.wait(30)
        raise Boom(type(model))

    with pytest.raises(Boom) as caught, make(loss_fn=loss_fn, workers=ap.Coupled(2)) as engine:
        list(engine.run(loader()))
    assert "still inside the user's code" in caught.value.__notes__[0]
    release.set()
    assert engine._crew.join(30) == []


@pytest.mark.parametrize("device", [None, FakeDevice()])
def test_nonfinite_loss_raises_before_it_is_applied(device) -> None:
    model = TINY_MLP.seeded_model()
    before = [parameter.clone() for parameter in model.parameters()]
    bad = (torch.full((4, 5), float("nan")), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ap.NonFiniteError, match="loss of batch 0 is nan"), make(model, device=device) as engine:
        list(engine.run([bad]))
    if device is None:
        assert same_state(before, list(model.parameters()))


@pytest.mark.parametrize("device", [None, FakeDevice()])
def test_nonfinite_loss_can_be_skipped(device) -> None:
    model = TINY_MLP.seeded_model()
    good = TINY_MLP.batches(6)
    bad = (torch.full((4, 5), float("inf")), torch.zeros(4, dtype=torch.long))
    with make(model, on_nonfinite="skip", device=device) as engine:
        steps = list(engine.run([*good[:3], bad, *good[3:]]))
        assert engine.statistics().skipped == 1
        assert engine.statistics().versions == (6, 6)
    assert [step.index for step in steps if step.skipped] == [3]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


# ---- lasting


def test_two_hundred_engines_leave_nothing_behind() -> None:
    model = TINY["transformer"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = TINY["transformer"].batches(2)
    threads = threading.active_count()
    lanes: list[weakref.ref] = []
    gc.disable()  # what is left must go by itself, without the collector's help
    try:
        for _ in range(200):
            with ap.Engine(model, optimizer, cross_entropy) as engine:
                list(engine.run(batches))
                lanes += [weakref.ref(lane) for lane in engine._lanes.lanes]
                lanes += [weakref.ref(leaf) for leaf in engine._lanes.lanes[0].leaves.values()]
    finally:
        gc.enable()
    assert threading.active_count() == threads
    assert sum(lane() is not None for lane in lanes) == 0


def test_snapshot_is_consistent_while_training_goes_on() -> None:
    """Every update adds one to both layers, so a torn snapshot would hold two different numbers."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[1].weight)
    loss_fn = lambda m, batch: -(m[0].weight + m[1].weight).sum() + 0 * m(batch).sum()  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = [torch.ones(1, 1)] * 300
    with ap.Engine(model, optimizer, loss_fn, update=ap.LayerUpdate(write="locked")) as engine:
        snapshots = [engine.snapshot() for _ in engine.run(batches)]
    for snapshot in snapshots:
        first, second = (value.item() for value in snapshot.model.values())
        assert first == second == snapshot.versions["0"] == snapshot.versions["1"]
    assert model[0].weight.item() == 300


def test_a_snapshot_is_copied_before_backward_passes_go_on() -> None:
    finished: list[tuple[int, bool]] = []

    class Looks(FakeDevice):
        def finish(self, stream: int) -> None:
            finished.append((stream, engine._passes.gate._shut))
            super().finish(stream)

    with make(device=Looks(), workers=ap.Coupled(1)) as engine:
        list(engine.run(TINY_MLP.batches(2)))
        engine.snapshot()
    *steps, copied = finished
    assert copied == (-1, True)
    assert set(steps) == {(0, False)}


class Waited(threading.Condition):
    """Tells when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.somebody_waits = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.somebody_waits.set()
        return super().wait(timeout)


def test_a_snapshot_that_waits_for_a_pass_raises_what_that_pass_fails_of() -> None:
    """The pass has written the last layer when it fails, and not the first: a copy would be torn."""
    model = TINY_MLP.seeded_model()
    taken: list[object] = []

    def take() -> None:
        try:
            taken.append(engine.snapshot())
        except Boom as error:
            taken.append(error)

    taker = threading.Thread(target=take)

    def fail_when_waited_for(gradient: torch.Tensor) -> None:
        taker.start()
        assert changed.somebody_waits.wait(30)
        explode()

    model[0].weight.register_hook(fail_when_waited_for)
    with pytest.raises(Boom) as caught, make(model) as engine:
        engine._passes.gate._changed = changed = Waited()
        list(engine.run(TINY_MLP.batches(1)))
    taker.join(30)
    assert taken == [caught.value]
    with pytest.raises(Boom):
        engine.snapshot()


def test_a_gate_that_a_pass_failed_inside_is_shut_by_no_one_before_it_is_stopped() -> None:
    events = []

    class StopsWhenWaitedFor(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            events.append("waited for")
            gate.stop()
            return True

    gate = Gate()
    gate._changed = StopsWhenWaitedFor()
    with gate.inside():
        pass
    with gate.shut():
        events.append("shut")
    with pytest.raises(Boom), gate.inside():
        explode()
    with gate.shut():
        events.append("shut again")
    assert events == ["shut", "waited for", "shut again"]


def test_the_users_changes_between_runs_are_followed() -> None:
    model = TINY_MLP.seeded_model()
    optimizer = torch.optim.SGD([{"params": model[0].parameters()}], lr=0.1, momentum=0.9)
    batches = TINY_MLP.batches(3)
    with ap.Engine(model, optimizer, cross_entropy) as engine:
        list(engine.run(batches))
        assert engine.statistics().layers == ("0",)
        head = model[2].weight.clone()
        optimizer.add_param_group({"params": list(model[2].parameters())})
        list(engine.run(batches))
        assert engine.statistics().layers == ("0", "2")
        assert not torch.equal(head, model[2].weight)
        optimizer.load_state_dict(optimizer.state_dict())
        buffer = optimizer.state[model[2].weight]["momentum_buffer"]
        before = buffer.clone()
        list(engine.run(batches))
        assert optimizer.state[model[2].weight]["momentum_buffer"] is buffer
        assert not torch.equal(before, buffer)
        model[0].requires_grad_(False)
        frozen = model[0].weight.clone()
        list(engine.run(batches))
        assert torch.equal(frozen, model[0].weight)


class FailsOnce:
    """An attribute of a model; its so many-th copy fails, and no other."""

    def __init__(self, fails: int) -> None:
        self.fails, self.copies = fails, 0

    def __deepcopy__(self, memo: dict[int, object]) -> "FailsOnce":
        self.copies += 1
        if self.copies == self.fails:
            raise RuntimeError("not now")
        return self


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_lanes_that_could_not_be_made_are_made_when_tried_again(fails: int) -> None:
    model = TINY_MLP.seeded_model()
    model.attribute = FailsOnce(fails)
    batches = TINY_MLP.batches(6)
    with make(model) as engine:
        with pytest.raises(ValueError, match="not now"):
            list(engine.run(batches))
        assert len(list(engine.run(batches))) == 6
        assert len(engine._lanes.lanes) == 3


def test_modes_are_followed_between_runs() -> None:
    model = TINY["resnet"].seeded_model()
    batches = TINY["resnet"].batches(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)  # running statistics of two batches make losses explode
    with ap.Engine(model, optimizer, cross_entropy) as engine:
        list(engine.run(batches))
        seen = int(model.bn1.num_batches_tracked)
        assert seen == 2
        model.eval()
        list(engine.run(batches))
        assert int(model.bn1.num_batches_tracked) == seen


def test_a_buffer_that_the_model_replaces_is_shared_all_the_same() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls = self.calls + 1
            return self.linear(x)

    model = Counting()
    with make(model, workers=ap.Coupled(1)) as engine:
        list(engine.run(TINY_MLP.batches(7)))
    assert model.calls.item() == 7


def test_work_goes_through_the_face_of_the_device() -> None:
    device = FakeDevice()
    with make(device=device) as engine:
        steps = list(engine.run(TINY_MLP.batches(9)))
    prepared = {thread for thread, call, _ in device.events if call == "thread"}
    assert prepared == {"asyncprop-thread-0", "asyncprop-thread-1", "asyncprop-thread-2"}
    assert {stream for _, call, stream in device.events if call == "receive"} == {0, 1, 2}
    made = 2  # each layer's optimizer state is made once, and finished before others use it
    assert sum(call == "finish" for _, call, _ in device.events) == 9 + made
    assert all(step.forward_s > 0 for step in steps)


@pytest.mark.parametrize("turn", ["free", "lockstep"])
def test_what_the_caller_has_queued_is_handed_over_before_it_is_received(turn: str) -> None:
    device, caller = FakeDevice(), threading.current_thread().name
    batches = TINY_MLP.batches(2)
    with make(device=device, turn=turn) as engine:
        for train in (lambda: engine.submit(batches[0]).result(), lambda: list(engine.run(batches[1:]))):
            device.events.clear()
            train()
            calls = [(thread, call) for thread, call, _ in device.events if call != "thread"]
            assert calls[0] == (caller, "hand over")
            assert "receive" in {call for _, call in calls}


def test_engines_use_the_streams_of_those_before() -> None:
    device = FakeDevice()
    used = []
    for _ in range(2):
        with make(device=device) as engine:
            list(engine.run(TINY_MLP.batches(9)))
        used.append({stream for _, call, stream in device.events if call == "receive"})
    assert used == [{0, 1, 2}, {0, 1, 2}]


def test_lockstep_runs_on_the_callers_thread_and_through_the_device() -> None:
    device = FakeDevice()
    seen = set()
    model = TINY_MLP.seeded_model()
    model[0].register_forward_hook(lambda *_: seen.add(threading.current_thread().name))
    with make(model, device=device, turn="lockstep") as engine:
        futures = [engine.submit(batch) for batch in TINY_MLP.batches(3)]
        steps = list(engine.run(TINY_MLP.batches(4)))
        names = [thread.name for thread in engine.statistics().threads]
    assert seen == {threading.current_thread().name}
    assert [future.result().index for future in futures] == [0, 1, 2]
    assert [step.index for step in steps] == [3, 4, 5, 6]
    assert names == ["caller"]
    made = 1  # of all layers, which are stepped together where there is one lane
    assert sum(call == "finish" for _, call, _ in device.events) == 7 + made
