"""Speed: Sec. 3.3 and 3.4 beside passes that are counted event by event, and beside real engines."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator, Sequence

from asyncprop.bench.theory.rows import Row, mean_of
from asyncprop.bench.theory.waiting import measured_block_delays, run_waiting, waiting_model
from asyncprop.bench.workloads import WORKLOADS, Workload
from asyncprop.devices import available_cores
from asyncprop.engine import BlockUpdate, Decoupled, Engine, LayerUpdate
from asyncprop.theory import (
    block_delay,
    count_staleness,
    expected_staleness,
    makespan,
    simulate_passes,
    speed_up,
    windows,
)
from asyncprop.theory.staleness import Over, Phases
from asyncprop.theory.timeline import Update
from asyncprop.trace import Step

FORWARD_S, BETA, LAYERS, BATCHES = 0.01, 2.0, 4, 60
"""Of passes that wait."""
LAYER_COUNTS = (2, 4, 8, 16)
"""Of models whose block updates are timed."""
THREADS = ((1, 1, 2), (1, 2, 3), (1, 4, 5), (2, 2, 4), (2, 4, 6), (1, 2, 2))
"""Forward threads, backward threads, lanes. The last has fewer lanes than it needs."""
COMPUTING = "resnet18-width16"
COMPUTING_BATCHES = 36
"""That are timed, or a few more: as many of each lane."""
SECTIONS = ("speed-up", "staleness")


def speed_rows(seeds: int) -> list[Row]:
    """Return all rows."""
    rows = [*_waiting_speed_ups(seeds), *_computing(seeds), *_delays(seeds), *_staleness(seeds)]
    return sorted(rows, key=lambda row: SECTIONS.index(row.section))


def _waiting_speed_ups(seeds: int) -> Iterator[Row]:
    """Yield the speed-up of finitely many batches, at the pass times that were measured in the same run."""
    for forward, backward, lanes in THREADS:
        runs = [_waiting(forward, backward, lanes) for _ in range(seeds)]
        beta = mean_of([beta for _, beta in runs])
        sequential = (1 + beta) * BATCHES
        counted = max(p.backward_end for p in simulate_passes([(1.0, beta)] * BATCHES, forward, backward, lanes))
        endless = speed_up(beta, forward, backward, L=lanes)
        whole = makespan(BATCHES, beta, forward, backward)  # has no term for lanes
        yield Row(
            section="speed-up",
            quantity=f"λ of {BATCHES} batches, a device per thread",
            case=f"{forward}F {backward}B, {lanes} lanes, β = {beta:.2f}",
            equation="Sec. 3.3",
            as_printed=sequential / makespan(BATCHES, beta, forward, backward, version="as printed"),
            corrected=endless.value if endless.bound == "lanes" else sequential / whole,
            twin=sequential / float(counted),
            twin_is="events counted",
            measured=tuple(value for value, _ in runs),
        )


def _waiting(forward: int, backward: int, lanes: int) -> tuple[float, float]:
    """Return the speed-up over the same passes one after the other, and beta."""
    workers = Decoupled(forward, backward, lanes=lanes, intraop_threads=1)
    steps, seconds = run_waiting(waiting_model(LAYERS, FORWARD_S, BETA), workers, BATCHES)
    return _speed_up_and_beta(steps, seconds)


def _speed_up_and_beta(steps: Sequence[Step], seconds: float) -> tuple[float, float]:
    forward_s, backward_s = sum(step.forward_s for step in steps), sum(step.backward_s for step in steps)
    return (forward_s + backward_s) / seconds, backward_s / forward_s


def _computing(seeds: int) -> Iterator[Row]:
    """Yield speed-up and staleness of passes that compute, on a device per core; sequential training fills one."""
    workload, devices = WORKLOADS[COMPUTING], available_cores()
    for forward, backward, lanes in ((1, 2, 3), (2, 2, devices)):
        values, betas, predicted_ages, ages = [], [], [], []
        for seed in range(seeds):
            alone, steps = _steady_state(workload, None, seed)
            beside, stale = _steady_state(workload, Decoupled(forward, backward, lanes=lanes, intraop_threads=1), seed)
            values.append(alone / beside)
            betas.append(_speed_up_and_beta(steps, alone)[1])
            predicted_ages.append(_expected_staleness(stale, 1 / beside, lanes, "layer", "random"))
            ages.append(mean_of([step.mean_staleness for step in stale]))
        beta = mean_of(betas)
        predicted = speed_up(beta, forward, backward, L=lanes, D=devices)
        yield Row(
            section="speed-up",
            quantity=f"λ, {devices} cores computing ({COMPUTING})",
            case=f"{forward}F {backward}B, {lanes} lanes, β = {beta:.2f}; bound: {predicted.bound}",
            equation="Sec. 3.3",
            as_printed=speed_up(beta, version="as printed").value,
            corrected=predicted.value,
            measured=tuple(values),
        )
        yield Row(
            section="staleness",
            quantity=f"mean staleness of layer updates, {devices} cores computing ({COMPUTING}), updates",
            case=f"{forward}F {backward}B, {lanes} lanes; random phases",
            equation="Sec. 3.4",
            corrected=mean_of(predicted_ages),
            measured=tuple(ages),
        )


def _steady_state(workload: Workload, workers: Decoupled | None, seed: int) -> tuple[float, list[Step]]:
    """Return the seconds of a batch in the steady state (without workers: of sequential training), and the Steps."""
    trained, batches = workload.make(seed), workload.batches()
    with Engine(
        trained.model,
        trained.optimizer,
        trained.loss,
        workers=workers or Decoupled(1, 1, intraop_threads=1),
        turn="free" if workers else "lockstep",
    ) as engine:
        lanes = engine.statistics().lanes
        warm, timed = 2 * lanes, math.ceil(COMPUTING_BATCHES / lanes) * lanes  # passes that began together end together
        steps, times = [], []
        for step in engine.run(next(batches) for _ in range(warm + timed + lanes)):
            steps.append(step)
            times.append(time.perf_counter())
    last = warm + timed - 1  # after it passes run with lanes empty beside them
    return (times[last] - times[warm - 1]) / timed, steps[warm : last + 1]


def _delays(seeds: int) -> Iterator[Row]:
    """Yield by how much block updates come later than layer updates, in units of a backward pass."""
    for layers in LAYER_COUNTS:
        runs = [measured_block_delays(layers, FORWARD_S, BETA, 20) for _ in range(seeds)]
        overs: tuple[Over, ...] = ("mean", "sum")
        for over in overs:
            total = tuple(
                (mean_of(delays) if over == "mean" else sum(delays)) / statistics.fmean(s.backward_s for s in steps)
                for delays, steps in runs
            )
            yield Row(
                section="staleness",
                quantity=f"τ of block updates, {over} over layers, backward passes",
                case=f"M = {layers} layers",
                equation="Sec. 3.4",
                as_printed=block_delay(layers, 1.0, over_layers=over, version="as printed"),
                corrected=block_delay(layers, 1.0, over_layers=over),
                measured=total,
            )


def _staleness(seeds: int) -> Iterator[Row]:
    """Yield the mean number of updates that land between read and write."""
    layers = 8
    for forward, backward, lanes in ((1, 2, 3), (2, 4, 6)):
        updates: tuple[Update, ...] = ("layer", "block")
        for update in updates:
            runs = [_staleness_run(forward, backward, lanes, layers, update) for _ in range(seeds)]
            yield Row(
                section="staleness",
                quantity=f"mean staleness of {update} updates, updates",
                case=f"{forward}F {backward}B, {lanes} lanes, M = {layers}; even phases",
                equation="Sec. 3.4",
                corrected=mean_of([predicted for _, predicted, _ in runs]),
                twin=mean_of([counted for _, _, counted in runs]),
                twin_is="events counted",
                measured=tuple(measured for measured, _, _ in runs),
            )


def _staleness_run(forward: int, backward: int, lanes: int, layers: int, update: Update) -> tuple[float, float, float]:
    """Return measured staleness, what windows and rate of the run predict, and what is counted for its pass times."""
    workers = Decoupled(forward, backward, lanes=lanes, intraop_threads=1)
    steps, seconds = run_waiting(
        waiting_model(layers, FORWARD_S, BETA), workers, BATCHES, LayerUpdate() if update == "layer" else BlockUpdate()
    )
    inner = sorted(steps, key=lambda step: step.index)[lanes:-lanes]
    predicted = _expected_staleness(inner, len(steps) / seconds, lanes, update, "even")
    passes = simulate_passes(
        [(step.forward_s, step.backward_s) for step in sorted(steps, key=lambda s: s.index)], forward, backward, lanes
    )
    counted = count_staleness(passes, layers, update)[lanes:-lanes]
    measured = mean_of([step.mean_staleness for step in inner])
    return measured, predicted, mean_of([mean_of(counts) for counts in counted])


def _expected_staleness(steps: Sequence[Step], rate: float, lanes: int, update: Update, phases: Phases) -> float:
    """Return the mean over the layers, by the times of passes and the rate that were measured."""
    layers = len(steps[0].staleness)
    forward_s = statistics.fmean(step.forward_s for step in steps)
    backward_s = statistics.fmean(step.backward_s for step in steps)
    wait_s = statistics.fmean(step.waited_s for step in steps)
    spans = windows(layers, backward_s / forward_s, forward_s, wait=wait_s, update=update)
    return mean_of([expected_staleness(span, rate, lanes, phases=phases) for span in spans])
