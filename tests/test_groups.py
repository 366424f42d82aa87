"""Groups: how replicas in one process meet in virtual time, each way beside its arithmetic by hand."""

import threading
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import pytest
import torch
from torch import nn

from asyncprop.delay import Delay, Delays
from asyncprop.devices import CpuDevice
from asyncprop.engine.exchange import Replica
from asyncprop.engine.layers import find_layers
from asyncprop.simulate import VirtualTime
from asyncprop.simulate.costs import Draws, LayerCosts
from asyncprop.simulate.gossip import Gossip
from asyncprop.simulate.groups import Averages, Group
from asyncprop.simulate.in_step import Buckets, Gradients, InStep, Parameters
from asyncprop.simulate.loop import VirtualLoop
from asyncprop.testing import TINY, cross_entropy, same_state, twins

NEVER = threading.Event()
COSTS = LayerCosts((1.0,), (2.0,), (1.0,), (4.0,))  # forward, backward, update, transfer: of two ranks, an all-reduce


def models_of(*values: float) -> list[nn.Linear]:
    models = [nn.Linear(1, 1, bias=False) for _ in values]
    for value, model in zip(values, models, strict=True):
        nn.init.constant_(model.weight, value)
    return models


def weights_of(models: list[nn.Linear]) -> list[float]:
    return [model.weight.item() for model in models]


def join(group: Group, models: list[nn.Linear]) -> None:
    for rank, model in enumerate(models):
        layers = find_layers(model, ["weight"])
        group.side(rank).open(Replica(model, torch.optim.SGD(model.parameters()), layers, CpuDevice(), pytest.fail))


# ---- beside the workers


def test_averaging_lets_updates_made_meanwhile_survive() -> None:
    """θ += mean of the snaps - own snap: what was added after the snap is still there."""
    time, models = VirtualTime(), models_of(1.0, 3.0)
    group = Averages(time, COSTS, 2, period=1, dense_batches=0)
    join(group, models)
    for rank in (0, 1):
        group.side(rank).finished()
    time.sleep(1, NEVER)  # the round is under way until 4, as two ranks send everything once
    with torch.no_grad():
        models[0].weight += 10
    time.sleep(4, NEVER)
    assert weights_of(models) == [12.0, 2.0]
    assert group.rounds == 1
    group.settle()
    assert weights_of(models) == [7.0, 7.0]
    group.close()


def test_in_gossip_both_draw_near_when_a_layer_arrives_and_when_the_answer_does() -> None:
    time, models = VirtualTime(), models_of(0.0, 3.0)
    group = Gossip(time, COSTS, 2, period=1)
    join(group, models)
    group.side(0).landed(0)
    time.sleep(3, NEVER)
    with torch.no_grad():
        models[0].weight += 10  # learnt meanwhile: it is kept
    assert (weights_of(models), group.merges) == ([10.0, 3.0], 0)
    time.sleep(2, NEVER)
    assert (weights_of(models), group.merges) == ([10.0, 1.5], 1)  # the answer is on its way
    time.sleep(4, NEVER)
    assert (weights_of(models), group.merges) == ([11.5, 1.5], 1)
    for rank in (0, 1):
        group.side(rank).landed(0)
    time.sleep(1, NEVER)
    group.settle()  # both arrive, and their answers: the mean is what it was
    assert weights_of(models) == [pytest.approx(6.5)] * 2
    assert (group.merges, time.now()) == (3, 9 + 8 + 4)  # and the meeting
    group.close()


def test_ranks_that_ask_each_other_at_once_do_not_swap() -> None:
    """Each is moved a third of the way by the other's question, and a third by its answer."""
    time, models = VirtualTime(), models_of(0.0, 3.0)
    group = Gossip(time, COSTS, 2, period=1)
    join(group, models)
    for rank in (0, 1):
        group.side(rank).landed(0)
    time.sleep(9, NEVER)
    assert weights_of(models) == [pytest.approx(2.0), pytest.approx(1.0)]
    group.close()


@pytest.mark.parametrize(
    ("options", "landed", "weights"),
    [
        ({"topology": "ring", "period": 1}, [0], [1.5, 1.5, 3.0]),
        ({"topology": "exponential", "period": 1}, [1, 1], [1.75, 1.75, 2.5]),  # the third, and then the first
        ({"period": 2}, [0], [1.0, 2.0, 3.0]),
        ({"topology": "ring"}, [0, 0], [1.5, 1.5, 3.0]),
        ({"probability": 1e-9, "period": 1}, [0, 0, 1], [1.0, 2.0, 3.0]),
    ],
)
def test_gossip_has_the_options_of_the_real_one(options, landed, weights) -> None:
    time, models = VirtualTime(), models_of(1.0, 2.0, 3.0)
    group = Gossip(time, COSTS, 3, **options)
    join(group, models)
    for rank in landed:
        group.side(rank).landed(0)
        time.sleep(9, NEVER)
    assert weights_of(models) == weights
    group.close()


# ---- in step


def run_all(time: VirtualTime, targets: list[Callable[[], object]]) -> None:
    threads = [time.thread(target, (), f"asyncprop-{rank}") for rank, target in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def train(
    meeting: InStep, targets: list[float], steps: int, speeds: tuple[float, ...] = (1.0, 0.5), slow: Delay | None = None
):
    """Fit a number to a target, on each rank another, by half of the gradient; return the values and times by rank."""
    models, seen = models_of(*[0.0] * len(targets)), [[] for _ in targets]
    loops = [
        VirtualLoop(
            model, torch.optim.SGD(model.parameters(), lr=0.5), lambda m, b: (m(b[0]) - b[1]).square().sum() / 2,
            time=meeting.time, costs=COSTS, speed=speed, trace=None, meeting=meeting,
            delays=Delays((slow,) if slow else (), 0, clock=meeting.time),
        )
        for model, speed in zip(models, speeds, strict=True)
    ]  # fmt: skip

    def drive(rank: int) -> None:
        for _ in loops[rank].run([(torch.ones(1, 1), torch.full((1, 1), targets[rank]))] * steps):
            seen[rank].append((models[rank].weight.item(), meeting.time.now()))

    run_all(meeting.time, [partial(drive, rank) for rank in range(len(targets))])
    return seen, models


def train_in_step(meeting: InStep, costs: LayerCosts, speeds: tuple[float, ...], steps: int) -> None:
    """Train a model of as many layers on each rank."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in costs.forward_s))
    loops = [
        VirtualLoop(
            model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b).sum(), time=meeting.time, costs=costs,
            speed=speed, seed=rank, delays=Delays((), 0, clock=meeting.time), trace=None, meeting=meeting,
        )
        for rank, speed in enumerate(speeds)
    ]  # fmt: skip
    run_all(meeting.time, [lambda loop=loop: list(loop.run([torch.ones(1, 1)] * steps)) for loop in loops])


def test_averaged_gradients_keep_all_equal_and_wait_for_the_slowest() -> None:
    seen, _ = train(Gradients(VirtualTime(), COSTS, 2), [1.0, 3.0], 2)
    assert [value for value, _ in seen[0]] == [value for value, _ in seen[1]] == [1.0, 1.5]
    # Slow passes end at 6; the all-reduce of 4 s has one layer, and begins then. Updates of 1 and 2 s.
    assert seen[0][0][1] == 6 + 4 + 1
    assert [at for _, at in seen[1]] == [12.0, 24.0]


def test_post_local_sgd_is_its_arithmetic_by_hand() -> None:
    """Step 0 by averaged gradients; alone from then on, averaged after steps 1 and 3."""
    seen, _ = train(Parameters(VirtualTime(), COSTS, 2, period=2, warm_up=1), [1.0, 3.0], 4)
    x = [Fraction(0), Fraction(0)]
    for step in range(4):
        gradients = [value - target for value, target in zip(x, (1, 3), strict=True)]
        if step < 1:
            gradients = [sum(gradients) / Fraction(2)] * 2
        x = [value - gradient / 2 for value, gradient in zip(x, gradients, strict=True)]
        if step in (1, 3):
            x = [sum(x) / Fraction(2)] * 2
        assert [own[step][0] for own in seen] == [float(value) for value in x]
    # In step until 11 and 12; a step alone takes 4 and 8 s, and both wait for the slow one's, and 4 s for the average.
    assert [at for _, at in seen[0]] == [11.0, 24.0, 28.0, 44.0]
    assert [at for _, at in seen[1]] == [12.0, 24.0, 32.0, 44.0]


def test_decent_dp_is_its_arithmetic_by_hand() -> None:
    """Own gradient at own parameters; stepped from the mean of what all had after the step before."""
    meeting = Buckets(VirtualTime(), COSTS, 2)
    seen, models = train(meeting, [1.0, 3.0], 4)
    x = [Fraction(0), Fraction(0)]
    for step in range(4):
        gradients = [value - target for value, target in zip(x, (1, 3), strict=True)]
        start = [sum(x) / Fraction(2)] * 2 if step else x
        x = [value - gradient / 2 for value, gradient in zip(start, gradients, strict=True)]
        assert [own[step][0] for own in seen] == [float(value) for value in x]
    # Steps end after 4 and 8 s; all-reduces go from 8 to 12 and from 16 to 20: the fast rank waits for them.
    assert [at for _, at in seen[0]][:3] == [4.0, 13.0, 21.0]
    assert [at for _, at in seen[1]] == [8.0, 16.0, 24.0, 32.0]
    meeting.settle()
    assert weights_of(models) == [float(sum(x) / 2)] * 2
    assert meeting.time.now() == 32 + 4 + 4  # what travels arrives, and an average of all


@pytest.mark.parametrize(
    ("kind", "options", "first", "second"),
    [
        # The slow rank waits 4 and 12 s; they meet as its backward pass ends, and wait 4 s for the all-reduce.
        (Gradients, {}, [21.0, 49.0, 77.0], [28.0, 56.0, 84.0]),
        # As above, but both meet after the update.
        (Parameters, {"period": 1, "warm_up": 0}, [22.0, 50.0, 78.0], [28.0, 56.0, 84.0]),
        # In its third step the fast rank waits for what the slow one has posted at 36, until 40.
        (Buckets, {}, [12.0, 24.0, 47.0], [24.0, 48.0, 72.0]),
    ],
)
def test_a_factor_multiplies_work_and_no_wait_for_others(kind, options, first, second) -> None:
    """Steps of 4 and 8 s of computing, three times as long; what is waited for others stays as long as it is."""
    meeting = kind(VirtualTime(), COSTS, 2, **options)
    seen, _ = train(meeting, [1.0, 3.0], 3, slow=Delay(factor=3.0))
    assert [[at for _, at in own] for own in seen] == [first, second]
    threads = [loop.statistics().threads[0] for loop in meeting.loops]
    end = max(first[-1], second[-1])
    assert [(thread.worked_s, thread.waited_s) for thread in threads] == [(12.0, end - 12.0), (24.0, end - 24.0)]


def test_steps_tell_the_passes_from_the_wait_for_others() -> None:
    """The fast rank's passes end at 3, and the slow one's at 6; then both wait 4 s for the all-reduce."""
    meeting = Gradients(VirtualTime(), COSTS, 2)
    took: list[list[tuple[float, float, float]]] = [[], []]
    loops = [
        VirtualLoop(
            model, torch.optim.SGD(model.parameters(), lr=0.5), lambda m, b: m(b).sum(), time=meeting.time, costs=COSTS,
            speed=speed, delays=Delays((), 0, clock=meeting.time), trace=None, meeting=meeting,
        )
        for model, speed in zip(models_of(0.0, 0.0), (1.0, 0.5), strict=True)
    ]  # fmt: skip

    def drive(rank: int) -> None:
        for step in loops[rank].run([torch.ones(1, 1)]):
            took[rank].append((step.forward_s, step.backward_s, step.waited_s))

    run_all(meeting.time, [partial(drive, rank) for rank in range(2)])
    assert took == [[(1.0, 3.0, 7.0)], [(2.0, 6.0, 4.0)]]


def test_what_travels_while_passes_go_on_costs_nothing() -> None:
    """Half of an all-reduce of 4 layers hides behind the backward pass; with decent-dp, behind the whole next pass."""
    costs = LayerCosts((0.25,) * 4, (0.5,) * 4, (0.0,) * 4, (0.5,) * 4)
    ends = {}
    for kind in (InStep, Gradients, Buckets):
        meeting = kind(VirtualTime(), costs, 2)
        train_in_step(meeting, costs, (1.0, 1.0), 3)
        ends[kind] = meeting.time.now()
    assert ends == {InStep: 9.0, Gradients: 10.5, Buckets: 9.0}


@pytest.mark.parametrize(
    ("speeds", "end"),
    [
        ((1.0, 1.0), 3.0 + 2.5),  # transfers of 1 s queue for the link once the last layer is ready
        ((0.125, 0.125), 24.0 + 1.0),  # layers of 4 s hide all but the last
        ((1.0, 0.125), 24.0 + 1.0),
        ((0.5, 0.25), 12.0 + 1.0),
    ],
)
def test_what_an_all_reduce_has_left_is_beside_the_slowest_pass(speeds: tuple[float, ...], end: float) -> None:
    """Of two ranks, each parameter travels once."""
    costs = LayerCosts((0.25,) * 4, (0.5,) * 4, (0.0,) * 4, (1.0,) * 4)
    meeting = Gradients(VirtualTime(), costs, 2)
    train_in_step(meeting, costs, speeds, 1)
    assert meeting.time.now() == end


def test_what_an_all_reduce_has_left_varies_with_the_passes() -> None:
    """In each round both layers are ready last on the rank that draws the longer pass."""
    costs = LayerCosts((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (2.0, 2.0), variation=0.5)
    meeting = Gradients(VirtualTime(), costs, 2)
    train_in_step(meeting, costs, (1.0, 1.0), 6)
    draws, end = [Draws(0.5, seed) for seed in (0, 1)], 0.0
    for batch in range(6):
        longest = max(draw.of(batch) for draw in draws)
        end += max(3 * longest + 2.0, 4 * longest) + 2.0
    assert meeting.time.now() == pytest.approx(end)


def test_ranks_in_step_settle_with_the_buffers_of_the_first() -> None:
    """As DistributedDataParallel has it; each rank has seen other batches."""
    tiny, time = TINY["resnet"], VirtualTime()
    models = twins(tiny.seeded_model())
    layers = len(find_layers(models[0], [name for name, _ in models[0].named_parameters()]))
    costs = LayerCosts(*[(1.0,) * layers] * 4)
    meeting = Gradients(time, costs, 2)
    loops = [
        VirtualLoop(
            model, torch.optim.SGD(model.parameters(), lr=0.01), cross_entropy, time=time, costs=costs, speed=1.0,
            delays=Delays((), 0, clock=time), trace=None, meeting=meeting,
        )
        for model in models
    ]  # fmt: skip
    run_all(time, [lambda rank=rank: list(loops[rank].run(tiny.batches(2, seed=rank))) for rank in range(2)])
    first, second = (model.state_dict() for model in models)
    before = {name: tensor.clone() for name, tensor in first.items()}
    assert not same_state(first, second)
    meeting.settle()
    assert same_state(before, first)
    assert same_state(before, second)
