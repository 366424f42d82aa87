"""The measurements of theory run, small; what they measure is checked in the other files. No time is depended on."""

import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from asyncprop.bench.theory import gradients, lost, network, sde, speed, variance, waiting
from asyncprop.bench.theory.rows import Row
from asyncprop.bench.workloads import Workload
from asyncprop.engine import BlockUpdate, Decoupled

SMALL = Workload("small", "synthetic-vectors", width=4, batch_size=8)


def set_all(monkeypatch: pytest.MonkeyPatch, module: object, **values: object) -> None:
    for name, value in values.items():
        monkeypatch.setattr(module, name, value)


def test_simulations_agree_with_the_corrected_formulas() -> None:
    rows = [row.to_json() for row in sde.sde_rows()]
    assert {row["equation"] for row in rows} == {"Eq. 6", "Eq. 5, 7, 8", "Eq. 11, 12", "Eq. 5, 7"}
    for row in rows:
        if row["error_corrected"] is not None:
            assert abs(row["error_corrected"]) < 0.03
        if row["error_as_printed"] is not None:
            assert abs(row["error_as_printed"]) > 0.3


def test_speed_and_staleness_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, speed, FORWARD_S=2e-4, BATCHES=16, COMPUTING_BATCHES=8, THREADS=((1, 2, 3), (1, 2, 2)),
            LAYER_COUNTS=(2,), COMPUTING="small", WORKLOADS={"small": SMALL})  # fmt: skip
    rows = speed.speed_rows(1)
    assert [row.section for row in rows] == ["speed-up"] * 4 + ["staleness"] * 8
    assert all(len(row.measured) == 1 and min(row.measured) >= 0 for row in rows)


class Bursts:
    """An engine of three lanes, whose passes end together, each burst 3 s after the one before, and the last 1 s."""

    now = 0.0

    def __init__(self, *trained: object, **options: object) -> None: ...

    def __enter__(self) -> "Bursts":
        return self

    def __exit__(self, *_: object) -> None: ...

    def statistics(self) -> SimpleNamespace:
        return SimpleNamespace(lanes=3)

    def run(self, batches: Iterator[object]) -> Iterator[int]:
        count = len(list(batches))
        for number in range(count):
            Bursts.now += (number % 3 == 0) * (1.0 if number >= count - 3 else 3.0)
            yield number


@pytest.mark.parametrize("batches", [8, 9, 10])
def test_the_steady_state_is_whole_bursts(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(perf_counter=lambda: Bursts.now)
    set_all(monkeypatch, speed, Engine=Bursts, time=clock, COMPUTING_BATCHES=batches)
    seconds, steps = speed._steady_state(SMALL, Decoupled(1, 2, lanes=3), 0)
    assert seconds == 1.0
    assert len(steps) == -(-batches // 3) * 3


def test_variance_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, variance, UPDATES=40, SKIP=10, SEQUENTIAL=((0.1, 8),), CONSTANT=((1.0, 2),), WORKERS=(2,),
            NETWORK=((0.02, 16, 2),))  # fmt: skip
    rows = variance.variance_rows(1, io.StringIO())
    assert [row.equation for row in rows] == ["Eq. 5", "Eq. 7", "Eq. 12", "Sec. 5", "Eq. 7", "Eq. 7", *["Eq. 5, 6"] * 2]
    assert all(row.twin and row.as_printed and row.corrected and row.measured[0] > 0 for row in rows)


def test_the_small_network_is_at_its_optimum() -> None:
    place = network.find_place()
    model = place.model()
    network.penalised(model, place.data).backward()  # type: ignore[no-untyped-call]
    assert all(float(parameter.grad.abs().max()) < 1e-5 for parameter in model.parameters())  # type: ignore[union-attr]
    assert bool((torch.linalg.eigvalsh(place.hessian) > 0).all())
    assert float(place.noise.trace()) > 0


@pytest.mark.parametrize("part", [gradients.bias_rows, lost.lost_rows])
def test_rows_of_bias_and_of_lost_updates(part: Callable[[int], list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, gradients, UPDATES=60, EPOCHS=2, COSTLY="small", COSTLY_BATCHES=24,
            WORKLOADS={"small": SMALL})  # fmt: skip
    set_all(monkeypatch, lost, WORKLOADS={"mlp": SMALL}, BATCHES=4, WIDE=8, WIDE_BATCHES=4)
    rows = part(1)
    assert {row.section for row in rows} <= {"gradient bias", "lost updates"}
    assert all(len(row.measured) == 1 for row in rows)


def test_waits_of_gradients_under_block_updates_are_measured() -> None:
    """The gradient of a layer nearer the output is ready earlier, and waits longer."""
    delays, steps = waiting.measured_block_delays(3, 1e-4, 2.0, 4)
    assert delays == sorted(delays)
    assert len(steps) == 4
    model = waiting.waiting_model(2, 0.0, 2.0)
    steps, seconds = waiting.run_waiting(model, Decoupled(1, 1, lanes=1), 3, BlockUpdate())
    assert [step.index for step in steps] == [0, 1, 2]
    assert seconds > 0
