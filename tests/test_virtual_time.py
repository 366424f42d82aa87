"""Virtual time: the clock's order by hand, the engine's speed-up as the paper's formula has it, and every method."""

import io
import json
import math
import threading
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, stdev

import pytest
import torch
from torch import nn

import asyncprop as ap
from asyncprop.config import SimulateConfig
from asyncprop.delay import Delay, on_rank
from asyncprop.engine.layers import find_layers
from asyncprop.engine.update import Stopping
from asyncprop.methods import METHODS
from asyncprop.methods.train import train
from asyncprop.progress import Lines, Quiet
from asyncprop.runs import create_run
from asyncprop.simulate import Costs, Machine, Pace, SimulatedDevice, StandstillError, VirtualTime
from asyncprop.simulate.costs import Draws
from asyncprop.simulate.session import SimulatedSession
from asyncprop.testing import TINY, cross_entropy, same_state

NEVER = threading.Event()


def passes(forward_s: float, backward_s: float, update_s: float = 0.0) -> Costs:
    whole = {"forward_s": forward_s, "backward_s": backward_s, "update_s": update_s, "transfer_s": 0.0}
    return Costs("tiny", "", whole, {})


def run_all(time: VirtualTime, *targets) -> None:
    threads = [time.thread(target, (), f"asyncprop-{number}") for number, target in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- the clock


def test_threads_go_on_in_the_order_of_their_clocks() -> None:
    time, log = VirtualTime(), []

    def sleeper(name, *naps):
        def sleep():
            for nap in naps:
                time.sleep(nap, NEVER)
                log.append((name, time.now()))

        return sleep

    run_all(time, sleeper("a", 3, 3), sleeper("b", 2, 2, 2), sleeper("c", 6))
    # Of two at the same time, the one made first goes first.
    assert log == [("b", 2), ("a", 3), ("b", 4), ("a", 6), ("b", 6), ("c", 6)]
    assert time.now() == 6


def test_who_is_woken_goes_on_no_earlier_than_who_woke_it() -> None:
    time, log, things = VirtualTime(), [], []
    changed = time.condition()

    def consumer():
        with changed:
            changed.wait_for(lambda: things)
        log.append(("woken", time.now()))
        time.sleep(1, NEVER)

    def producer():
        time.sleep(5, NEVER)
        with changed:
            things.append(1)
            changed.notify()
        log.append(("went on", time.now()))

    run_all(time, consumer, producer)
    assert log == [("went on", 5), ("woken", 5)]  # who wakes another goes on until time passes
    assert time.now() == 6


def test_a_lock_goes_to_whoever_waits_longest() -> None:
    time, log = VirtualTime(), []
    lock = time.lock()

    def hold(first):
        def held():
            time.sleep(first, NEVER)
            with lock:
                log.append((first, time.now()))
                time.sleep(10, NEVER)

        return held

    run_all(time, hold(3), hold(1), hold(2))
    assert log == [(1, 1), (2, 11), (3, 21)]


def test_threads_that_all_wait_are_told() -> None:
    time, seen = VirtualTime(), []
    changed = time.condition()

    def wait():
        try:
            with changed:
                changed.wait_for(lambda: False)
        except StandstillError as error:
            seen.append(str(error))

    run_all(time, wait, wait)
    assert seen == ["virtual time stands still: all threads wait for each other"] * 2


def test_stopping_ends_all_waits() -> None:
    time, seen = VirtualTime(), []
    changed = time.condition()

    def wait():
        try:
            with changed:
                changed.wait_for(lambda: False)
        except Stopping:
            seen.append("stopped")

    def fail():
        time.sleep(1, NEVER)
        time.stop()
        with pytest.raises(Stopping):
            time.sleep(1, NEVER)

    run_all(time, wait, fail)
    assert seen == ["stopped"]


def test_a_machine_computes_so_much_at_once() -> None:
    machine = Machine(speed=2.0, slots=2)
    assert [machine.start(0.0, 4.0) for _ in range(3)] == [(0.0, 2.0), (0.0, 2.0), (2.0, 2.0)]
    assert machine.start(3.0, 2.0) == (3.0, 1.0)
    assert [machine.start(3.0, cost) for cost in (0.0, 6.0, 0.0)] == [(3.0, 0.0), (4.0, 3.0), (3.0, 0.0)]


@pytest.mark.parametrize("speed", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_speed_is_refused(speed: float) -> None:
    with pytest.raises(ValueError, match=rf"speeds must be > 0 and finite \(got {speed}\)"):
        Machine(speed)


# ---- the engine under it


def simulate(batches, costs, machines, workers, update="layer", name="mlp", delays=(), trace=None):
    """Train in virtual time; return (index, loss, staleness, virtual time) of each Step, and the model's state."""
    model, time = TINY[name].seeded_model(), VirtualTime()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = {"turn": Pace(time, costs, machines), "device": SimulatedDevice(time, machines), "trace": trace}
    with ap.Engine(model, optimizer, cross_entropy, workers=workers, update=update, delays=delays, **options) as engine:
        steps = [
            (step.index, step.loss, step.staleness, time.now()) for step in engine.run(TINY[name].batches(batches))
        ]
    return steps, model.state_dict()


@pytest.mark.parametrize(
    ("forward", "backward", "update"),
    [(1, 1, "layer"), (1, 2, "layer"), (1, 3, "layer"), (2, 4, "layer"), (1, 2, "block"), (3, 5, "block")],
)
def test_the_speed_up_is_the_formulas(forward: int, backward: int, update: str) -> None:
    """Paper, Sec. 3.3, and its general form: passes a second are the least of forward/T and backward/(βT)."""
    beta, batches, threads = 2, 60, forward + backward
    workers = ap.Decoupled(forward, backward, lanes=2 * threads, intraop_threads=1)
    steps, _ = simulate(batches, passes(1.0, beta), [Machine() for _ in range(threads)], workers, update)
    rate = min(forward, backward / beta)
    # The last batch ends one pass after the rate would have it, and the first of each kind starts with a whole one.
    assert batches / rate <= steps[-1][3] <= batches / rate + 1 + 2 * beta
    if (forward, backward) == (1, 2):
        assert steps[-1][3] == batches + beta  # b (1 + β) / (b + β), as printed


def test_one_worker_takes_what_the_plain_loop_takes_and_trains_as_it() -> None:
    costs = passes(0.25, 0.5, 0.125)
    steps, state = simulate(5, costs, [Machine()], ap.Coupled(1))
    assert [at for *_, at in steps] == [0.875 * n for n in range(1, 6)]
    assert all(staleness == (0, 0) for _, _, staleness, _ in steps)
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    assert [loss for _, loss, *_ in steps] == ap.testing.plain_loop(model, optimizer, TINY["mlp"].batches(5))
    assert same_state(state, model.state_dict())


def test_staleness_of_two_coupled_workers_is_as_derived_by_hand() -> None:
    """Both read all before either writes. At 3 the first writes layer 0, ends, and reads it again, as it goes first."""
    steps, _ = simulate(6, passes(1.0, 2.0), [Machine(), Machine()], ap.Coupled(2))
    assert [staleness for _, _, staleness, _ in steps] == [(0, 0), (1, 1), *[(1, 0), (1, 1)] * 2]
    # A machine of half the speed: its pass takes from 0 to 6, the other's two from 0 to 6, both writing in between.
    slow, _ = simulate(3, passes(1.0, 2.0), [Machine(), Machine(0.5)], ap.Coupled(2))
    assert [(index, at) for index, _, _, at in slow] == [(0, 3.0), (2, 6.0), (1, 6.0)]
    assert {index: staleness for index, _, staleness, _ in slow}[1] == (2, 1)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("workers", [ap.Decoupled(2, 3, lanes=4), ap.Coupled(3)])
def test_two_runs_are_equal_to_the_bit(name: str, workers) -> None:
    recorders = [ap.Recorder(), ap.Recorder()]
    runs = [
        simulate(12, passes(1.0, 2.1, 0.1), [Machine(), Machine(0.7)], workers, name=name, trace=r) for r in recorders
    ]
    assert same_state(list(runs[0]), list(runs[1]))
    assert recorders[0].trace() == recorders[1].trace()
    assert any(max(staleness) > 0 for _, _, staleness, _ in runs[0][0])


def test_what_costs_nothing_waits_for_no_device() -> None:
    """Layers of 1/3 s, whose sum is no exact number; others keep the device busy when the pass is handed over."""
    time, machine = VirtualTime(), Machine()
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3)))
    pace = Pace(time, passes(1.0, 2.0), [machine])
    pace.open(model, find_layers(model, [name for name, _ in model.named_parameters()]), by_layer=True)
    pace.at(0, "forward", -1)
    for layer in range(3):
        with pace.at(0, "read", layer):
            pass
    machine.start(1.0, 100.0)
    pace.at(0, "handover", -1)
    assert time.now() == pytest.approx(1.0)
    pace.at(0, "write", 0)
    assert time.now() == pytest.approx(1.0)
    pace.at(0, "ready", 0)
    assert time.now() == pytest.approx(101.0 + 2 / 3)


def test_a_layer_that_is_not_called_is_paid_for_at_the_end() -> None:
    """Each batch calls but some of the layers, and one is never called: a forward pass takes all of its cost."""
    recorder = ap.Recorder()
    simulate(4, passes(1.0, 2.0), [Machine()], ap.Coupled(1), name="conditional", trace=recorder)
    forward = [event.end_s - event.start_s for event in recorder.trace().events if event.kind == "forward"]
    assert forward == pytest.approx([1.0] * 4)


def test_a_trace_has_virtual_times() -> None:
    recorder = ap.Recorder()
    simulate(1, passes(2.0, 4.0), [Machine()], ap.Coupled(1), trace=recorder)
    seen = [(event.kind, event.layer, event.start_s, event.end_s) for event in recorder.trace().events]
    assert sorted(seen, key=lambda event: (event[2], -event[1], event[0])) == [
        ("read", 0, 0.0, 0.0),
        ("forward", -1, 0.0, 2.0),
        ("read", 1, 1.0, 1.0),
        ("backward", -1, 2.0, 6.0),
        ("ready", 1, 4.0, 4.0),
        ("write", 1, 4.0, 4.0),
        ("ready", 0, 6.0, 6.0),
        ("write", 0, 6.0, 6.0),
    ]


def test_delays_are_virtual() -> None:
    """Two passes of 3 s; the second step waits 100 s between its forward and its backward pass."""
    steps, _ = simulate(2, passes(1.0, 2.0), [Machine()], ap.Coupled(1), delays=[Delay(seconds=100.0, every=2)])
    assert [at for *_, at in steps] == [3.0, 106.0]
    slow, _ = simulate(2, passes(1.0, 2.0), [Machine()], ap.Coupled(1), delays=[Delay(worker=0, factor=3.0)])
    assert [at for *_, at in slow] == [9.0, 18.0]


def test_the_delays_of_a_rank_are_its_own() -> None:
    delays = (Delay(rank=1, seconds=2.0), Delay(seconds=1.0, distribution="exponential"))
    assert [delay.seconds for delay in on_rank(delays, 0)] == [1.0]
    assert [delay.rank for delay in on_rank(delays, 1)] == [None, None]
    assert on_rank(delays, 0)[0].seconds_of(0, 0) != on_rank(delays, 1)[1].seconds_of(0, 0)


def test_a_failure_in_a_worker_reaches_the_caller() -> None:
    time, machines = VirtualTime(), [Machine(), Machine()]
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss_fn(model, batch):
        if batch[0][0, 0] > 1e6:
            raise OverflowError("the third batch")
        return cross_entropy(model, batch)

    batches = TINY["mlp"].batches(6)
    batches[2][0][0, 0] = 1e7
    options = {"turn": Pace(time, passes(1.0, 2.0), machines), "device": SimulatedDevice(time, machines)}
    with pytest.raises(OverflowError, match="the third batch"):
        with ap.Engine(model, optimizer, loss_fn, workers=ap.Coupled(2), **options) as engine:
            list(engine.run(batches))


def test_the_work_grows_linearly_in_the_events() -> None:
    """Each of n workers trains on 4 batches of 2 layers: a pass lets time pass as often, however many there are."""
    counts = {}
    for workers in (4, 16, 64):
        time, machines = VirtualTime(), [Machine() for _ in range(workers)]
        model = TINY["mlp"].seeded_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        options = {"turn": Pace(time, passes(1.0, 2.0), machines), "device": SimulatedDevice(time, machines)}
        with ap.Engine(model, optimizer, cross_entropy, workers=ap.Coupled(workers), **options) as engine:
            assert len(list(engine.run(TINY["mlp"].batches(4 * workers)))) == 4 * workers
        counts[workers] = time.events / (4 * workers)
    assert len(set(counts.values())) == 1


def test_passes_vary_as_drawn_from_the_seed_and_in_the_mean_as_the_costs_say() -> None:
    """One worker, so that each step takes its own pass; twice the same, with another seed otherwise."""
    costs = replace(passes(1.0, 2.0), variation=0.2)
    took = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        time, machine = VirtualTime(), [Machine()]
        model = nn.Linear(1, 1)
        turn, device = Pace(time, costs, machine, seed=seed), SimulatedDevice(time, machine)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with ap.Engine(model, optimizer, lambda m, x: m(x).sum(), workers=ap.Coupled(1), turn=turn, device=device) as e:
            ends = [0.0] + [time.now() for _ in e.run([torch.zeros(1, 1)] * 400)]
        took[name] = [end - start for start, end in pairwise(ends)]
    assert took["a"] == took["b"] != took["c"]
    assert took["a"] == pytest.approx([3.0 * Draws(0.2, 0).of(batch) for batch in range(400)])
    assert fmean(took["a"]) == pytest.approx(3.0, rel=0.03)
    assert stdev(took["a"]) == pytest.approx(0.6, rel=0.15)
    assert Draws(0.0, 0).of(7) == 1.0


# ---- the command's side


def session_of(method: str, tmp_path, **options):
    given = {"epochs": 1, "train_samples": 288, "test_samples": 50, "costs": "a100-resnet18", **options}
    config = SimulateConfig(task="digits", method=method, **given)
    session = SimulatedSession(config)
    with create_run(tmp_path, config) as run:
        result = train(session, run, Quiet())
    return session, result


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_simulated_and_twice_the_same(method: str, tmp_path) -> None:
    runs = [session_of(method, tmp_path / name, delay="worker=0,factor=2") for name in ("a", "b")]
    assert runs[0][1]["history"] == runs[1][1]["history"]
    assert same_state(runs[0][0].model.state_dict(), runs[1][0].model.state_dict())
    result = runs[0][1]
    assert (result["time"], result["samples"], result["costs"]) == ("virtual", 288, "a100-resnet18")
    assert math.isfinite(result["train_s"])
    assert len((tmp_path / "a" / "steps.jsonl").read_text().splitlines()) == 9


def test_seconds_of_the_methods_are_as_derived_by_hand(tmp_path) -> None:
    """9 batches of 15.1 ms, alone or in 3 rounds of 3; in step, the first layer's transfer is waited for."""
    alone = session_of("sgd", tmp_path / "sgd")[1]["train_s"]
    assert alone == pytest.approx(9 * 0.0151)
    layers, transfer = 3, 0.00045 * 4 / 3
    in_step = session_of("ddp", tmp_path / "ddp")[1]
    assert in_step["samples"] == 9 * 32
    assert in_step["train_s"] == pytest.approx(3 * (0.0151 + transfer / layers))


def test_a_factor_does_not_multiply_what_ddp_waits_for(tmp_path) -> None:
    """4 rounds of two: the slow rank takes three times 30.2 ms for each, and a third of a transfer is waited for."""
    _, result = session_of("ddp", tmp_path / "ddp", train_samples=256, devices=2, speeds="1,0.5", delay="factor=3")
    assert result["train_s"] == pytest.approx(4 * (3 * 0.0302 + 0.00045 / 3))


def test_the_ranks_of_ddp_stay_equal_to_the_bit(tmp_path) -> None:
    session, _ = session_of("ddp", tmp_path / "ddp")
    models = [member.trainer._model for member in session.trainer._members]
    assert len(models) == 3
    assert all(same_state(models[0].state_dict(), other.state_dict()) for other in models[1:])


def test_gossip_settles_equal(tmp_path) -> None:
    session, _ = session_of("layup", tmp_path / "layup", devices=4)
    group = session.trainer._meeting
    assert group.merges > 0
    models = [replica.model for replica in group.replicas]
    assert all(same_state(models[0].state_dict(), other.state_dict()) for other in models[1:])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("layup", {"topology": "exponential", "period": 2}),
        ("layup", {"probability": 0.5}),
        ("async-lu", {"ranks": 3, "exchange": "gossip"}),
        ("lapsgd", {"period": 2}),
        ("post-local-sgd", {"period": 2, "prepass_epochs": 0.5}),
        ("decent-dp", {}),
    ],
)
def test_options_of_meetings_reach_virtual_time(method: str, options, tmp_path) -> None:
    """They train as they are told to: otherwise than without, and ending equal."""
    session, result = session_of(method, tmp_path / "with", train_samples=1280, **options)
    models = (
        [member.trainer.model for member in session.trainer._members]
        if METHODS[method].workers is None
        else [replica.model for replica in session.trainer._meeting.replicas]
    )
    assert len(models) == 3
    assert all(same_state(models[0].state_dict(), other.state_dict()) for other in models[1:])
    if options:
        _, plain = session_of(method, tmp_path / "without", train_samples=1280)
        assert plain["history"] != result["history"]


@pytest.mark.parametrize(
    ("method", "transfer_s", "says"),
    [("ddp", 0.0, True), ("layup", 0.0, True), ("ddp", 0.1, False), ("async-lu", 0.0, False)],
)
def test_a_run_says_that_links_are_free(method: str, transfer_s: float, says: bool, tmp_path) -> None:
    """As they are by the costs that a plan measures; a replica alone has no links."""
    costs, said = tmp_path / "here.toml", io.StringIO()
    costs.write_text(f"forward_s = 1.0\nbackward_s = 1.0\ntransfer_s = {transfer_s}\n")
    config = SimulateConfig(task="digits", method=method, train_samples=320, costs=str(costs))
    with create_run(tmp_path / "run", config) as run:
        Lines(said).on_start(SimulatedSession(config), run)
    remark = [
        "links are free, so replicas meet in no time: set transfer_s, which is 0 of all layers, in the costs here"
    ]
    assert said.getvalue().splitlines()[1:] == (remark if says else [])


def rows_of(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_threads_of_a_fleet_are_told_by_rank_in_every_epoch(tmp_path) -> None:
    """Epochs of 3 rounds: passes of 15.1 ms wait for those of 30.2 ms on the slow device, and all for the transfer."""
    session_of("ddp", tmp_path / "ddp", epochs=2, speeds="1,1,0.5")
    epochs = rows_of(tmp_path / "ddp" / "epochs.jsonl")
    assert len(epochs) == 2
    transfer = 0.00045 * 4 / 3 / 3  # of one layer: what the backward pass does not hide
    for row in epochs:
        assert [thread["name"] for thread in row["threads"]] == ["rank 0 loop", "rank 1 loop", "rank 2 loop"]
        worked = [thread["worked_s"] for thread in row["threads"]]
        waited = [thread["waited_s"] for thread in row["threads"]]
        assert worked == pytest.approx([3 * 0.0151] * 2 + [3 * 0.0302], abs=2e-6)
        assert waited == pytest.approx([3 * (0.0151 + transfer)] * 2 + [3 * transfer], abs=2e-6)
        assert set(row["updates"].values()) == {9}


def test_updates_and_staleness_of_a_fleet_are_those_of_all_its_replicas(tmp_path) -> None:
    session, _ = session_of("async-lu", tmp_path / "fleet", epochs=2, ranks=2, devices=4, speeds="1,1,0.5")
    steps = rows_of(tmp_path / "fleet" / "steps.jsonl")
    for epoch, row in enumerate(rows_of(tmp_path / "fleet" / "epochs.jsonl")):
        assert list(row["updates"].values()) == [9, 9, 9]
        ages = [step["staleness"] for step in steps if step["epoch"] == epoch]
        assert fmean(row["staleness_by_layer"].values()) == pytest.approx(fmean(ages), abs=1e-3)
    statistics = session.trainer.statistics()
    assert statistics.versions == (18, 18, 18)
    assert statistics.mean_staleness > 0
    assert statistics.mean_staleness == pytest.approx(fmean(step["staleness"] for step in steps), abs=1e-3)
    each = [member.trainer.statistics() for member in session.trainer._members]
    assert each[0].versions != each[1].versions  # the fast replica takes more batches


def test_a_slow_device_holds_up_ddp_and_not_layup(tmp_path) -> None:
    rates = {}
    for method in ("ddp", "layup"):
        for speeds in ("1", "0.25,1,1"):
            _, result = session_of(method, tmp_path / f"{method}{speeds}", speeds=speeds, train_samples=1280)
            rates[method, speeds] = result["samples_per_s"]
    assert rates["ddp", "0.25,1,1"] < 0.3 * rates["ddp", "1"]
    assert rates["layup", "0.25,1,1"] > 0.6 * rates["layup", "1"]


@pytest.mark.parametrize(
    ("options", "lanes"),
    [
        ({"method": "hogwild"}, 3),
        ({"method": "hogwild", "devices": 1, "cores": 4}, 4),
        ({"method": "hogwild", "devices": 1}, 2),  # one would be the plain loop
        ({"method": "dc-asgd", "ranks": 3}, 3 * 2),
        ({"method": "passm", "ranks": 3, "workers": 1}, 3),
        ({"method": "lapsgd"}, 3),
        ({"method": "lapsgd", "cores": 2}, 3 * 2),
        ({"method": "async-lu"}, 3),
        ({"method": "layup"}, 3),
    ],
)
def test_workers_are_as_many_as_devices_compute_at_once(options, lanes: int) -> None:
    session = SimulatedSession(SimulateConfig(task="digits", train_samples=320, **options))
    assert session.trainer.statistics().lanes == lanes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "ddp", "devices": 11}, "devices must be at most the batches of an epoch, 10"),
        ({"method": "layup", "wire": "bf16"}, "wire must be left out of a simulation"),
        ({"method": "ddp", "comm_hook": "fp16"}, "comm_hook must be left out of a simulation"),
        ({"method": "sgd", "checkpoint_every": 5.0}, "checkpoint_every must be left out of a simulation"),
        ({"method": "sgd", "warm_up_batches": 0}, "warm_up_batches must be left out of a simulation"),
        ({"method": "sgd", "device": "cuda"}, "device must be left out of a simulation"),
        ({"method": "sgd", "forward_threads": 2}, "forward_threads must not be given for method sgd"),
        ({"method": "ddp", "topology": "ring"}, "topology must not be given for method ddp"),
        ({"method": "decent-dp", "period": 2}, "period must not be given for method decent-dp"),
        ({"method": "sgd", "ranks": 3}, "ranks must be 1 for method sgd"),
        ({"method": "ddp", "ranks": 2}, "devices must be a multiple of ranks"),
        ({"method": "sgd", "speeds": "fast"}, "speeds must be numbers"),
        ({"method": "sgd", "speeds": "1,inf"}, "speeds must be > 0 and finite"),
        ({"method": "sgd", "speeds": "1,1,1,1"}, "speeds must be at most as many as the devices"),
        ({"method": "sgd", "costs": "none"}, "costs must be a readable file, or one of a100-resnet18, a100-resnet50"),
        ({"method": "sgd", "turn": "lockstep"}, "turn must be left out of a simulation"),
        ({"method": "lapsgd", "forward_threads": 2}, "forward_threads must not be given"),
    ],
)
def test_what_cannot_be_simulated_is_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedSession(SimulateConfig(task="digits", train_samples=320, **options))


@pytest.mark.parametrize(("method", "ranks"), [("async-lu", {0}), ("layup", {0, 1, 2})])
def test_results_say_that_time_is_virtual(method: str, ranks: set[int], tmp_path) -> None:
    session_of(method, tmp_path / "run", trace=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["time"] == "virtual"
    trace = ap.Trace.load(tmp_path / "run" / "trace.jsonl")
    assert {event.kind for event in trace.events} == {"forward", "backward", "read", "ready", "write"}
    assert {event.rank for event in trace.events} == ranks
    assert len(trace.layers) == 3
