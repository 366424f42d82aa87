"""Theory of training: bias of gradients, lost updates and delays, in real engines, under forced orders."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from asyncprop import BlockUpdate, Coupled, Decoupled, Engine, LayerUpdate
from asyncprop.bench.theory import gradients, lost, quadratic
from asyncprop.bench.theory.rows import Row
from asyncprop.report.theory import print_theory, theory_markdown
from asyncprop.testing import TINY, Sequencer, cross_entropy
from asyncprop.theory import Probe, UpdateCounter, bias_bound, compare, delayed_covariance, regression_noise
from asyncprop.theory.lost_updates import QUANTUM, total

# ---- the bound


def test_the_bound_is_the_fixed_point_of_its_own_argument() -> None:
    x = 3.0 * 0.01 * 4
    b = 0.0
    for _ in range(200):
        b = x * (2.0 + b)
    assert bias_bound(2.0, 3.0, 0.01, 4) == pytest.approx(b)
    assert bias_bound(2.0, 3.0, 0.01, 0) == 0.0
    assert bias_bound(2.0, 1.0, 1.0, 1) == math.inf


def test_the_bound_holds_and_is_reached_where_all_gradients_point_one_way() -> None:
    """Delayed descent on a theta²/2, by a small learning rate: tau steps of nearly equal length."""
    a, eta, tau, theta = 1.0, 0.001, 5, [1.0] * 6
    ratios = []
    for _ in range(50):
        old, now = theta[-1 - tau], theta[-1]
        bias, G = abs(a * old - a * now), max(abs(a * value) for value in theta)
        assert bias <= bias_bound(G, a, eta, tau)
        ratios.append(bias / bias_bound(G, a, eta, tau))
        theta.append(now - eta * a * old)
    assert max(ratios) > 0.9


def test_comparing_gradients_by_hand() -> None:
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    found = compare(one, {"a": torch.tensor([3.0, 0.0])})
    assert (found.cosine, found.norm_ratio, found.bias, found.fresh_norm) == (0.6, 5 / 3, 4.0, 3.0)
    nothing = compare({}, {"a": torch.zeros(2)})
    assert math.isnan(nothing.cosine)
    assert math.isnan(nothing.norm_ratio)


# ---- the probe


@pytest.mark.parametrize("kind", TINY)
def test_in_lockstep_the_applied_gradient_is_the_fresh_one(kind: str) -> None:
    tiny = TINY[kind]
    model = tiny.seeded_model()
    probe = Probe(model, cross_entropy, every=2)
    samples = []
    with Engine(model, torch.optim.SGD(model.parameters(), lr=0.05), probe.loss_fn, turn="lockstep") as engine:
        for _ in engine.run(tiny.batches(6)):
            samples += probe.collect()
    samples += probe.collect(drained=True)
    assert len(samples) == 3
    for sample in samples:
        assert probe.measure(sample).bias == 0.0
        assert probe.measure(sample).norm_ratio == 1.0


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Half the square of (1 + x) theta: its gradient is (1 + x)² theta."""
    return (model(1 + batch) ** 2).sum() / 2


def one_weight() -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    return model


def test_a_stale_gradient_is_told_from_a_fresh_one() -> None:
    """Batch 1's forward pass ends, batch 0 is written, and only then does batch 1's backward pass begin."""
    model = one_weight()
    probe = Probe(model, square, every=1)
    turn = Sequencer([(0, "read", 0), (1, "read", 0), (1, "passed", 0), (0, "write", 0), (1, "go on", 0)])  # type: ignore[list-item]

    def loss_fn(lane: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss = probe.loss_fn(lane, batch)
        for event in ("passed", "go on"):
            with turn.at(int(batch), event, 0):  # type: ignore[arg-type]
                pass
        return loss

    batches = [torch.tensor([[0.0]]), torch.tensor([[1.0]])]
    workers = Coupled(2, intraop_threads=1)
    with Engine(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, workers=workers, turn=turn) as engine:
        list(engine.run(batches))
    assert turn.finished
    found = {int(sample.batch): probe.measure(sample) for sample in probe.collect(drained=True)}
    assert found[0].bias == 0.0
    assert found[1].bias == pytest.approx(4 * 0.1)  # 4 × 1 was applied, 4 × 0.9 is fresh
    assert found[1].norm_ratio == pytest.approx(1 / 0.9)
    assert found[1].cosine == pytest.approx(1.0)


def test_losses_that_are_accumulated_are_watched_as_one_gradient() -> None:
    model = one_weight()
    probe = Probe(model, lambda lane, batch: [square(lane, batch), 3 * square(lane, batch)], every=1)
    update = LayerUpdate(accumulate=2)
    with Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), probe.loss_fn, turn="lockstep", update=update
    ) as engine:
        list(engine.run([torch.ones(1, 1)]))
    (sample,) = probe.collect(drained=True)
    assert float(sample.applied["weight"]) == 16.0
    assert probe.measure(sample).bias == 0.0


def test_a_free_run_is_watched_as_often_as_was_asked_for() -> None:
    tiny = TINY["mlp"]
    model = tiny.seeded_model()
    probe = Probe(model, cross_entropy, every=5)
    workers = Decoupled(2, 2, lanes=3, intraop_threads=1)
    with Engine(model, torch.optim.SGD(model.parameters(), lr=0.05), probe.loss_fn, workers=workers) as engine:
        for _ in engine.run(tiny.batches(40)):
            pass
    samples = probe.collect(drained=True)
    assert len(samples) == 8
    assert all(sample.applied.keys() == dict(model.named_parameters()).keys() for sample in samples)
    assert probe.collect(drained=True) == []
    with pytest.raises(ValueError, match="every must be >= 1"):
        Probe(model, cross_entropy, every=0)


# ---- lost updates


@pytest.mark.parametrize("update", [LayerUpdate(write="locked"), BlockUpdate(write="locked")])
def test_with_locks_nothing_is_lost(update: LayerUpdate | BlockUpdate) -> None:
    tiny = TINY["mlp"]
    model = tiny.seeded_model()
    counter = UpdateCounter(model)
    workers = Coupled(2, intraop_threads=1)
    with Engine(
        model, torch.optim.SGD(model.parameters(), lr=QUANTUM), cross_entropy, workers=workers, update=update
    ) as engine:
        list(engine.run(tiny.batches(50)))
    found = counter.count(dict.fromkeys(dict(model.named_parameters()), 50))
    assert total(list(found.values())).lost == 0
    assert total(list(found.values())).written == 50 * sum(p.numel() for p in model.parameters())
    counter.close()
    assert all(not p._backward_hooks for p in model.parameters())


def test_what_is_lost_is_counted_exactly() -> None:
    model = nn.Linear(4, 1)
    counter = UpdateCounter(model)
    with torch.no_grad():
        model.weight.sub_(10 * QUANTUM)
        model.weight[0, 0] += 3 * QUANTUM
        model.bias.sub_(10 * QUANTUM)
    found = counter.count({"weight": 10, "bias": 10})
    assert (found["weight"].written, found["weight"].lost, found["weight"].worst) == (40, 3, 0.3)
    assert total(list(found.values())).rate == 3 / 50
    assert total([]).rate == 0.0


def test_parameters_that_would_be_rounded_are_refused() -> None:
    for model in (nn.Linear(2, 1).double(), nn.Linear(2, 1)):
        with torch.no_grad():
            model.bias.fill_(9.0)
        with pytest.raises(ValueError, match="must be float32 and below 7"):
            UpdateCounter(model)


def test_lost_updates_of_an_engine_go_by_layer() -> None:
    tiny = TINY["mlp"]
    found = lost.count_lost(tiny.seeded_model(), cross_entropy, tiny.batches(20))
    assert list(found) == ["0", "2"]
    assert found["0"].written == 20 * (5 * 7 + 7)


# ---- real engines beside exact delays


def test_a_constant_delay_is_constant_and_repeats_to_the_bit() -> None:
    task = quadratic.Regression(1.0, 16, size=4)
    runs = [quadratic.run_constant_delay(task, 0.1, 3, updates=60, skip=10, seed=1) for _ in range(2)]
    assert runs[0].delay_probabilities == [0.0, 0.0, 0.0, 1.0]
    assert torch.equal(torch.stack(runs[0].positions), torch.stack(runs[1].positions))
    theta, batches = [torch.zeros(4)] * 4, list(task.batches(60, 1))
    for x, y in batches:  # the slow obvious twin
        gradient = x.T @ (x @ theta[-4] - y.squeeze(1)) / len(x)
        theta.append(theta[-1] - 0.1 * gradient)
    assert torch.allclose(runs[0].positions[-1], theta[-1], atol=1e-6)


def test_the_variance_of_a_real_delayed_run_is_the_exact_one() -> None:
    """4 engines' threads with every update 2 updates old: 24 % above no delay, within 6 % of the closed form."""
    task = quadratic.Regression(1.0, 64, size=64)
    watch = quadratic.run_constant_delay(task, 0.2, 2, updates=500, skip=100, seed=0)
    noise = regression_noise(task.hessian, 1.0, 64)
    exact, without = (float(delayed_covariance(task.hessian, noise, 0.2, p)[0, 0]) for p in ((0, 0, 1.0), (1.0,)))
    assert exact > 1.24 * without
    assert quadratic.variance(watch) == pytest.approx(exact, rel=0.06)


def test_watching_a_free_run_counts_every_update() -> None:
    task = quadratic.Regression(1.0, 16, size=4)
    watch = quadratic.run_free(task, 0.05, 2, updates=30, skip=5, seed=0)
    assert len(watch.positions) == sum(watch.delays.values()) == 25
    assert sum(watch.delay_probabilities) == pytest.approx(1.0)
    assert watch.sigma_stale >= 0.0


# ---- rows and tables

ROW = Row("speed-up", "λ", "1F 2B", "Sec. 3.3", 3.0, 2.0, 2.1, "events counted", (1.9, 2.1))


def test_errors_are_against_what_was_measured_or_else_counted() -> None:
    row = ROW.to_json()
    assert (row["measured_mean"], row["n"]) == (2.0, 2)
    assert (row["error_as_printed"], row["error_corrected"]) == (0.5, 0.0)
    assert row["error_twin"] == pytest.approx(0.05)
    bare = Row("speed-up", "λ", "1F 2B", "Sec. 3.3", 3.0, 2.0, 2.0, "events counted").to_json()
    assert (bare["error_as_printed"], bare["error_twin"], bare["measured_std"]) == (0.5, None, None)


def test_tables_say_what_is_off_by_how_much(tmp_path: Path) -> None:
    environment = dict.fromkeys(("command", "commit", "torch", "python", "cores", "processor", "started"), "x")
    figures = {"seeds": 2, "rows": [ROW.to_json()], "environment": environment}
    stream = io.StringIO()
    print_theory(figures, stream)
    for text in (stream.getvalue(), theory_markdown(figures)):
        assert all(words in text for words in ("3 (+50.0%)", "2 (+0.0%)", "2 ± 0.14", "n = 2"))
    assert json.loads(json.dumps(figures))["rows"][0]["n"] == 2


def test_bias_rows_say_when_there_is_no_bound() -> None:
    task = quadratic.Regression(1.0, 16, size=4)
    run = gradients.watch(
        task.model(), quadratic.half_square, task.batches(40, 0), 0.05, workers=2, wait_s=1e-4, every=4
    )
    assert len(run.comparisons) == 10
    rows = list(gradients._bias_of("x", [run], [1e9], 0.05 if run.oldest else 0.0))
    assert (rows[0].as_printed is None) == bool(run.oldest)
    assert rows[0].measured[0] >= 0.0
