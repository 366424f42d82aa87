"""Plans: costs are read off traces as made by hand, predictions are exact where they can be, and advice is honest."""

import io
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, repeat
from statistics import fmean, stdev

import pytest
import torch

import asyncprop as ap
from asyncprop.engine import Coupled, Decoupled, LayerUpdate
from asyncprop.simulate import Machine, advice, planning, read_costs, trial
from asyncprop.simulate.choices import Choice, best, candidates, finalists_of, label
from asyncprop.simulate.costs import KINDS, LayerCosts, write_costs
from asyncprop.simulate.ddp import Ddp
from asyncprop.simulate.measure import costs_of, optimizer_like
from asyncprop.simulate.planning import Plan, activations_bytes, plan
from asyncprop.simulate.predict import Prediction, predict
from asyncprop.testing import TINY, cross_entropy, same_state
from asyncprop.trace import Event, Trace


def a_pass(batch: int, start: float, slow: float = 1.0) -> list[Event]:
    """Forward 1 + 2, backward 4 + 3, updates 0.5 each, from the last layer to the first; all times `slow`."""

    def event(kind, at, to, layer=-1, detail=""):
        return Event(kind, start + slow * at, start + slow * to, 0, batch=batch, layer=layer, detail=detail)

    return [
        event("forward", 0, 3), event("read", 0, 0, 0), event("read", 1, 1, 1), event("read", 2, 2, 1, "again"),
        event("backward", 3, 11), event("ready", 7, 7, 1), event("write", 7, 7.5, 1), event("ready", 10.5, 10.5, 0),
        event("write", 10.5, 11, 0),
    ]  # fmt: skip


def test_costs_are_read_off_a_trace() -> None:
    """Five passes with 1 s between; the fifth takes twice as long, and does not count."""
    starts = [0.0, 12.0, 24.0, 36.0, 48.0]
    events = [event for batch, start in enumerate(starts) for event in a_pass(batch, start, 2.0 if batch == 4 else 1.0)]
    costs = costs_of(Trace(("0", "1"), ("worker-0",), sorted(events, key=lambda event: event.start_s)))
    assert costs.forward_s == pytest.approx((1.0 + 1.0, 2.0))
    assert costs.backward_s == pytest.approx((3.0, 4.0))
    assert costs.update_s == pytest.approx((0.5, 0.5))
    assert costs.launch_s == pytest.approx(1.0)  # in forward_s of the first layer
    assert costs.backward_forward_ratio == pytest.approx(2.0)


def test_variation_is_that_of_whole_passes() -> None:
    events = [event for batch, slow in enumerate((1.0, 1.25, 1.5, 9.0)) for event in a_pass(batch, 100.0 * batch, slow)]
    costs = costs_of(Trace(("0", "1"), ("worker-0",), events))
    between = fmean([100 - 1.25 * 11, 100 - 1.5 * 11])  # the longest gap, after the first, does not count
    whole = [slow * 11.0 + between for slow in (1.0, 1.25, 1.5, 9.0)]
    assert costs.variation == pytest.approx(stdev(whole) / fmean(whole))


COSTS = LayerCosts((1.0, 2.0), (4.0, 2.0), (0.0, 0.0), (0.0, 0.0))
VARIED = replace(COSTS, variation=0.25)


@pytest.mark.parametrize(
    ("workers", "slots", "seconds"),
    [
        (Coupled(1), 1, 9.0),
        (Coupled(2), 2, 4.5),
        (Coupled(2), 1, 9.0),
        (Coupled(3), 3, 3.0),  # passes end three at a time
        (Coupled(12), 12, 0.75),
        (Decoupled(1, 2, lanes=3), 3, 3.0),  # backward threads bind: 6 / 2
        (Decoupled(1, 1, lanes=2), 2, 6.0),
        (Decoupled(2, 2, lanes=2), 2, 4.5),  # lanes bind: 9 / 2
    ],
)
def test_predictions_are_exact_where_a_bound_binds(workers, slots: int, seconds: float) -> None:
    assert predict(COSTS, workers, [Machine(slots=slots)]).seconds_per_batch == pytest.approx(seconds, rel=1e-6)


def test_block_updates_are_staler_than_layer_updates() -> None:
    workers, machines = Decoupled(1, 2, lanes=3), lambda: [Machine(slots=3)]
    layer, block = (predict(COSTS, workers, machines(), by_layer=by_layer).staleness for by_layer in (True, False))
    assert 0 < layer < block
    assert predict(COSTS, Coupled(1), machines()).staleness == 0


def test_costs_are_written_as_they_are_read(tmp_path) -> None:
    write_costs(tmp_path / "costs.toml", 'a "name"', "here", ["stem.0", "0"], VARIED)
    costs = read_costs(str(tmp_path / "costs.toml"))
    assert costs.name == 'a "name"'
    assert costs.of(["stem.0", "0"]) == VARIED
    assert costs.of(["0"]).forward_s == (2.0,)
    with pytest.raises(ValueError, match=r"costs must be of this model \(a \"name\" has none for its layer '1'\)"):
        costs.of(["1"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("forward_s = 1", r"backward_s must be a number > 0 .*the whole has 0.0"),
        ("forward_s = 'a'\nbackward_s = 1", "forward_s must be a number > 0"),
        ("[layers.a]\nforward_s = 1\nbackward_s = 1\nupdate_s = -1", "update_s must be a number >= 0"),
        ("forward_s = inf\nbackward_s = 1", "forward_s must be a number > 0"),
        ("forward_s = nan\nbackward_s = 1", "forward_s must be a number > 0"),
        ("[layers.a]\nforward_s = 1\nbackward_s = nan", "backward_s must be a number >= 0"),
        ("forward_s =", "costs must be TOML"),
        ("forward_s = 1\nbackward_s = 1\nvariation = 2", "variation must be a number from 0 to 1"),
    ],
)
def test_what_are_no_costs_is_refused(tmp_path, content: str, message: str) -> None:
    path = tmp_path / "costs.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_costs(str(path))


@pytest.mark.parametrize(("given", "missing"), [("forward_s", "backward_s"), ("backward_s", "forward_s")])
def test_passes_that_take_no_time_are_refused(tmp_path, given: str, missing: str) -> None:
    """One layer may take none; all together, or those that a model has, may not."""
    path = tmp_path / "costs.toml"
    path.write_text(f"[layers.a]\n{given} = 1\n[layers.b]\n{given} = 1\n{missing} = 1")
    assert read_costs(str(path)).of(["a", "b"]).backward_forward_ratio in (0.5, 2.0)
    with pytest.raises(ValueError, match=f"costs: {missing} must be > 0 of one layer at least .costs has 0 of all."):
        read_costs(str(path)).of(["a"])


def test_the_papers_costs_ship() -> None:
    costs = read_costs("a100-resnet18").of([str(layer) for layer in range(41)])
    assert sum(costs.forward_s) == pytest.approx(0.0049)
    assert sum(costs.backward_s) == pytest.approx(0.0102)
    assert len(costs.forward_s) == len(costs.transfer_s) == 41
    assert sum(read_costs("a100-resnet50").of(["all"]).backward_s) == pytest.approx(0.0299)


def choice(seconds: float, staleness: float, workers=None) -> Choice:
    return Choice(workers, seconds, staleness, "", 0)


def test_what_may_be_fastest_is_tried() -> None:
    slow, fast, wide = choice(1.2, 0.0, Coupled(1)), choice(1.0, 0.5, Coupled(2)), choice(0.9, 0.9, Coupled(3))
    near, loop = choice(1.1, 0.4, Decoupled(1, 1, lanes=2)), choice(3.0, 0.0)
    assert finalists_of([slow, fast, wide, near, loop], cores=2) == [loop, fast, near]


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
def test_candidates_fill_the_cores_or_run_one_pass(cores: int) -> None:
    for workers in candidates(cores):
        passes = workers.lanes_on(cores)
        assert passes == 1 or 0 <= passes - cores // (workers.intraop_threads or 0) <= 1
        assert label(workers, 2).endswith("2 intra-op threads each")


def test_advice_is_the_least_stale_of_the_fast() -> None:
    sgd, two, three = choice(1.0, 0.0), choice(0.7, 0.5, Coupled(2)), choice(0.69, 1.0, Coupled(3))
    assert best([sgd, two, three]) is two
    assert best([choice(0.7, 0.0), two, three]).workers is None
    assert best([sgd, choice(1.0, 0.0, Coupled(1))]) is sgd


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_a_plan_measures_and_leaves_everything_as_it_was(name: str) -> None:
    tiny = TINY[name]
    model = tiny.seeded_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    found = plan(model, cross_entropy, tiny.batches(2), optimizer, passes=6, cores=2)
    assert same_state(before, model.state_dict())
    assert torch.equal(random, torch.get_rng_state())  # the stand-in's weights are drawn aside, too
    assert not optimizer.state
    assert all(getattr(found.costs, kind)[0] > 0 for kind in KINDS[:3])
    assert {type(choice.workers) for choice in found.choices} == {type(None), Decoupled, Coupled}
    assert found.advice in found.choices
    assert found.advice.measured
    assert {choice.ranks for choice in found.choices} == {1}  # no process of DDP can be handed this loss
    assert all(choice.predicted_s for choice in found.choices if choice.workers)
    assert sum(choice.workers is None and choice.measured for choice in found.choices) == 2
    assert found.workers.lanes_on(2) >= 1
    with ap.Engine(model, optimizer, cross_entropy, workers=found.workers) as engine:
        assert len(list(engine.run(tiny.batches(2)))) == 2


def test_planning_does_not_diverge_whatever_the_learning_rate() -> None:
    """One step of this size makes every later loss infinite."""

    def square(model, batch):
        return model(batch[0]).square().mean()

    tiny = TINY["mlp"]
    model = tiny.seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    assert plan(model, square, tiny.batches(2), optimizer, passes=4, cores=2).advice.measured
    assert planning.plan_decoupled(model, square, tiny.batches(2), optimizer, LayerUpdate(), 4)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_a_copied_optimizer_is_at_rest(lr) -> None:
    model, own = TINY["mlp"].seeded_model(), TINY["mlp"].seeded_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    (group,) = optimizer_like(optimizer, model, own).param_groups
    assert group["params"] == list(own.parameters())
    assert type(group["lr"]) is type(lr)
    assert group["lr"] == 0
    assert getattr(group["lr"], "dtype", None) == getattr(lr, "dtype", None)
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize(("second_s", "chosen"), [(2.0, (1, 2)), (1.1, (2, 2))])
def test_auto_never_takes_more_lanes_than_cores(monkeypatch, second_s: float, chosen: tuple[int, int]) -> None:
    """Three lanes on two cores are predicted to be the fastest. One choice of two lanes is left, or two are tried."""

    def foretell(costs, workers, machines, by_layer) -> Prediction:
        seconds = {(1, 2, 2): 1.0, (2, 2, 2): second_s}.get((workers.forward, workers.backward, workers.lanes), 3.0)
        return Prediction(0.5 if workers.lanes == 3 else seconds, 0.0)

    def time_them(model, optimizer, loss_fn, batches, update, choices, passes, make) -> list[float]:
        assert len(choices) == 2
        return [1.0 if choice.workers.forward == 2 else 2.0 for choice in choices]

    monkeypatch.setattr(planning, "available_cores", lambda: 2)
    monkeypatch.setattr(planning, "measure_costs", lambda *given, **options: COSTS)
    monkeypatch.setattr(planning, "predict", foretell)
    monkeypatch.setattr(planning, "time_choices", time_them)
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = planning.plan_decoupled(model, cross_entropy, TINY["mlp"].batches(1), optimizer, LayerUpdate(), 4)
    assert (found.forward, found.backward, found.lanes) == (*chosen, 2)


def test_choices_that_may_be_the_fastest_are_timed_three_times_as_often(monkeypatch) -> None:
    """The first slices of the middle one are lucky: more slices show that it is slower than the first."""
    calls: list[str] = []
    seconds = {"a": repeat(1.0), "b": chain(repeat(0.95, trial.ROUNDS), repeat(1.2)), "c": repeat(1.5)}

    def slice_of(trainer, choice: Choice, batches, least: int) -> float:
        calls.append(choice.bound)
        return next(seconds[choice.bound])

    monkeypatch.setattr(trial, "_slice", slice_of)
    model = TINY["mlp"].seeded_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    choices = [replace(choice(1.0, 0.0, None), bound=name) for name in seconds]
    found = trial.time_choices(model, optimizer, cross_entropy, TINY["mlp"].batches(1), LayerUpdate(), choices, 6)
    assert found == [1.0, 1.2, 1.5]
    assert Counter(calls) == {"a": 3 * trial.ROUNDS, "b": 3 * trial.ROUNDS, "c": trial.ROUNDS}
    assert calls[: 2 * 3] == ["a", "b", "c", "b", "c", "a"]  # whoever is first changes


def test_ddp_is_tried_in_turn_with_the_others(monkeypatch) -> None:
    """By processes that are there before anything is timed."""
    calls: list[str] = []

    class Fake:
        def __init__(self, make, ranks: int) -> None:
            calls.append(f"{make} {ranks}")

        def __enter__(self) -> "Fake":
            return self

        def __exit__(self, *_: object) -> None:
            calls.append("ended")

        def slice(self, least: int, least_s: float) -> float:
            calls.append(f"ddp {least}")
            return 0.5

    def slice_of(trainer, choice: Choice, batches, least: int) -> float:
        calls.append(f"loop {least}")
        return 1.0

    monkeypatch.setattr(trial, "Ddp", Fake)
    monkeypatch.setattr(trial, "_slice", slice_of)
    model = TINY["mlp"].seeded_model()
    given = model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, TINY["mlp"].batches(1), LayerUpdate()
    choices = [choice(1.0, 0.0), replace(choice(1.0, 0.0), ranks=3)]
    assert trial.time_choices(*given, choices, 6 * trial.ROUNDS, "make") == [1.0, 0.5]
    assert calls[:6] == ["make 3", "ddp 1", "loop 6", "ddp 6", "ddp 6", "loop 6"]
    assert calls[-1] == "ended"


def test_ddp_trains_in_processes_of_its_own() -> None:
    with Ddp(partial(advice.make_task, "digits", 8, 16, None), 2) as ddp:
        assert ddp.slice(2, 0.0) > 0
        assert ddp.slice(1, 1e-3) > 0
    with Ddp(partial(advice.make_task, "no-such-task", None, None, None), 1) as ddp:
        with pytest.raises(RuntimeError, match="torch DDP: ValueError: task must be one of"):
            ddp.slice(1, 0.0)
        with pytest.raises(RuntimeError, match="torch DDP: a process has ended"):
            ddp.slice(1, 0.0)


def told(*choices: Choice) -> str:
    stream = io.StringIO()
    advice.print_plan(
        Plan(("0", "1"), COSTS, COSTS, 0, 0, choices, best([one for one in choices if one.measured])), stream
    )
    return " ".join(stream.getvalue().split())


def test_ddp_is_advised_where_it_is_the_fastest_and_what_it_changes_is_told() -> None:
    ddp = Choice(None, None, 0.0, "the slowest process", 0, ranks=2, measured_s=0.9)
    loop = Choice(None, None, 0.0, "one pass at a time", 0, 2, measured_s=1.0)
    two = Choice(Coupled(2), 0.8, 0.5, "cores", 0, measured_s=1.1)
    text = told(ddp, loop, two)
    assert "Advice: torch DDP, 2 processes (--method ddp --ranks 2). Nothing is faster by more than 2 %" in text
    assert "But each process has a batch a step: 2 times the batch size" in text
    assert "800.00 │ 1100.00" in text  # what was predicted of a choice is told beside its time
    assert "– │ 900.00" in text
    assert "Advice: SGD, 2 intra-op threads (--method sgd)." in told(replace(ddp, measured_s=0.99), loop, two)
    assert "Advice: 2 coupled workers (asyncprop.Coupled(2) in a program)." in told(
        replace(two, measured_s=0.8), ddp, loop
    )


def test_the_options_of_advised_threads_are_told_and_why_one_lane_may_be_enough() -> None:
    two = Choice(Decoupled(1, 2, lanes=2), 0.9, 0.5, "cores", 0, measured_s=1.0)
    one = Choice(Decoupled(1, 1, lanes=1), 0.9, 0.0, "cores", 0, measured_s=0.9)
    untried = Choice(Coupled(3), 0.5, 0.0, "cores", 0)
    text = told(two, untried)
    assert (
        "Advice: 1 forward, 2 backward threads, 2 lanes (--forward-threads 1 --backward-threads 2 --lanes 2)." in text
    )
    assert "not tried" in text
    assert "1 forward, 1 backward thread, 1 lane (--" in told(one, two)
    assert "each layer is stepped as soon as its gradient is there" in told(one, two)


def test_what_all_cores_busy_would_take_is_told_as_of_traced_passes(monkeypatch) -> None:
    """9 s of passes on two cores; a choice that was tried, without tracing, may be faster."""
    monkeypatch.setattr(advice, "available_cores", lambda: 2)
    tried = replace(choice(4.2, 0.5, Coupled(2)), measured_s=4.0)
    stream = io.StringIO()
    advice.print_plan(Plan(("0", "1"), COSTS, COSTS, 0, 0, (tried,), tried), stream)
    assert "By traced passes, all cores busy would take about 4500.00 ms per batch." in stream.getvalue()
    assert "4000.00" in stream.getvalue()


def test_activations_are_counted_once() -> None:
    """Linear keeps its input (4 x 5 floats); Tanh and the next Linear keep one and the same output (4 x 7)."""
    tiny = TINY["mlp"]
    kept = activations_bytes(tiny.seeded_model(), lambda model, batch: model(batch[0]).sum(), tiny.batches(1)[0])
    assert kept == 4 * (4 * 5 + 4 * 7)


def test_a_plan_is_refused_where_it_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="passes must be >= 4"):
        plan(TINY["mlp"].seeded_model(), cross_entropy, TINY["mlp"].batches(1), passes=1)
