"""Theory beside virtual time, to the last bit: the engine itself, its passes taking what the formulas assume.

Times are binary fractions, so that sums of them are exact; the backward pass takes a little more than a round number of
forward passes, so that no two things happen at the same instant.
"""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import asyncprop as ap
from asyncprop.simulate import Costs, Machine, Pace, SimulatedDevice, VirtualTime
from asyncprop.theory import (
    block_delay,
    block_delays,
    count_staleness,
    expected_staleness,
    makespan,
    simulate_passes,
    speed_up,
    windows,
)

LITTLE = Fraction(1, 64)


def run(batches: int, layers: int, beta: Fraction, workers: ap.Decoupled, machines=None, update="layer", trace=None):
    """Train in virtual time, a machine to each thread; return the Steps by their batches, and when each ended."""
    time = VirtualTime()
    machines = machines or [Machine() for _ in range(workers.forward + workers.backward)]
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(layers)))
    costs = Costs("", "", {"forward_s": 1.0, "backward_s": float(beta), "update_s": 0.0, "transfer_s": 0.0}, {})
    with ap.Engine(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        lambda model, batch: model(batch).sum(),
        workers=workers,
        update=update,
        turn=Pace(time, costs, machines),
        device=SimulatedDevice(time, machines),
        trace=trace,
    ) as engine:
        steps = [(step, time.now()) for step in engine.run([torch.zeros(1, 1)] * batches)]
    return sorted(steps, key=lambda pair: pair[0].index)


def threads(forward: int, backward: int, lanes: int) -> ap.Decoupled:
    return ap.Decoupled(forward, backward, lanes=lanes, intraop_threads=1)


@pytest.mark.parametrize("beta", [Fraction(1, 2), Fraction(2), Fraction(5, 2) + LITTLE])
@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (1, 2), (1, 4), (2, 3), (3, 2)])
def test_the_makespan_is_virtual_time_s(forward: int, backward: int, beta: Fraction) -> None:
    batches = 13
    steps = run(batches, 4, beta, threads(forward, backward, batches))
    assert max(at for _, at in steps) == makespan(batches, beta, forward, backward)


@pytest.mark.parametrize(
    ("forward", "backward", "lanes", "bound"),
    [
        (1, 2, 6, "backward threads"), (1, 4, 8, "forward threads"), (1, 4, 2, "lanes"), (2, 2, 4, "backward threads"),
        (2, 6, 12, "forward threads"), (2, 6, 3, "lanes"),
    ],
)  # fmt: skip
def test_the_speed_up_is_virtual_time_s_in_the_steady_state(
    forward: int, backward: int, lanes: int, bound: str
) -> None:
    beta, period = Fraction(5, 2) + LITTLE, math.lcm(forward, backward, lanes)
    ends = sorted(at for _, at in run(3 * lanes + 2 * period, 4, beta, threads(forward, backward, lanes)))
    found = speed_up(float(beta), forward, backward, L=lanes)
    rate = period / (ends[3 * lanes + period - 1] - ends[3 * lanes - 1])
    assert (rate * (1 + float(beta)), found.bound) == (pytest.approx(found.value, rel=1e-12), bound)


def test_two_devices_bind_at_twice_one_s_rate() -> None:
    beta = Fraction(2) + LITTLE
    ends = sorted(at for _, at in run(240, 4, beta, threads(2, 4, 6), [Machine(slots=2)]))
    assert 200 / (ends[220] - ends[20]) * (1 + float(beta)) == pytest.approx(
        speed_up(float(beta), 2, 4, L=6, D=2).value, rel=0.02
    )


@pytest.mark.parametrize("update", ["layer", "block"])
@pytest.mark.parametrize(("forward", "backward", "lanes"), [(1, 1, 2), (1, 2, 3), (1, 2, 6), (1, 4, 5), (1, 3, 4)])
def test_staleness_is_what_is_counted_event_by_event(forward: int, backward: int, lanes: int, update: str) -> None:
    layers, beta, batches = 4, Fraction(2) + LITTLE, 24
    steps = run(batches, layers, beta, threads(forward, backward, lanes), update=update)
    passes = simulate_passes([(Fraction(1), beta)] * batches, forward, backward, lanes)
    assert [step.staleness for step, _ in steps] == [tuple(ages) for ages in count_staleness(passes, layers, update)]


@pytest.mark.parametrize("update", ["layer", "block"])
def test_staleness_in_the_steady_state_is_the_formula_s(update: str) -> None:
    """One forward thread sets the pace, and backward threads are enough: an update every forward pass."""
    layers, beta = 8, Fraction(2) + LITTLE
    steps = run(20, layers, beta, threads(1, 3, 8), update=update)
    expected = tuple(
        expected_staleness(window, 1.0, 8, phases="even") for window in windows(layers, float(beta), update=update)
    )
    assert all(step.staleness == expected for step, _ in steps[4:-4])


def test_what_block_updates_wait_is_the_formula_s() -> None:
    layers, beta, recorder = 4, Fraction(2) + LITTLE, ap.Recorder()
    run(6, layers, beta, threads(1, 3, 4), update="block", trace=recorder)
    events = recorder.trace().events
    for batch in range(6):
        end = next(event.end_s for event in events if (event.kind, event.batch) == ("backward", batch))
        ready = {event.layer: event.start_s for event in events if (event.kind, event.batch) == ("ready", batch)}
        waits = [end - ready[layer] for layer in range(layers)]
        assert waits == block_delays(layers, float(beta))
        assert sum(waits) == block_delay(layers, float(beta), over_layers="sum")
