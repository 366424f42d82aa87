"""Theory of times: speed-up and staleness, against passes that are counted event by event, exactly."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncprop.theory import (
    PassTimes,
    block_delay,
    block_delays,
    count_staleness,
    expected_staleness,
    makespan,
    simulate_passes,
    speed_up,
    windows,
)

threads = st.integers(1, 5)
betas = st.fractions(Fraction(1, 4), 5, max_denominator=8)


def counted(b: int, beta: Fraction, F: int, K: int, L: int | None = None) -> list[PassTimes]:
    return simulate_passes([(Fraction(1), beta)] * b, F, K, L)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), betas, threads, threads)
def test_the_makespan_is_what_is_counted(b: int, beta: Fraction, F: int, K: int) -> None:
    assert makespan(b, beta, F, K) == max(one.backward_end for one in counted(b, beta, F, K))


@settings(max_examples=40, deadline=None)
@given(betas, threads, threads, st.integers(1, 10))
def test_the_speed_up_is_what_is_counted_in_the_steady_state(beta: Fraction, F: int, K: int, L: int) -> None:
    ends = [one.backward_end for one in counted(300, beta, F, K, L)]
    rate = 240 / (ends[-1] - ends[-1 - 240])  # 240: a multiple of most numbers of threads and lanes
    assert float(rate * (1 + beta)) == pytest.approx(float(speed_up(beta, F, K, L=L).value), rel=2e-2)


@pytest.mark.parametrize(
    ("arguments", "value", "bound"),
    [
        ({"F": 1, "K": 1}, 1.5, "backward threads"),
        ({"F": 1, "K": 2}, 3.0, "forward threads"),
        ({"F": 2, "K": 2}, 3.0, "backward threads"),
        ({"F": 2, "K": 4}, 6.0, "forward threads"),
        ({"F": 2, "K": 4, "L": 3}, 3.0, "lanes"),
        ({"F": 2, "K": 4, "D": 2}, 2.0, "devices"),
        ({"F": 2, "K": 4, "D": 2, "u": 0.5}, 4.0, "devices"),
    ],
)
def test_which_bound_binds(arguments: dict[str, float], value: float, bound: str) -> None:
    found = speed_up(2.0, **arguments)  # type: ignore[arg-type]
    assert (found.value, found.bound) == (value, bound)


def test_the_printed_speed_up_holds_with_one_forward_and_enough_backward_threads_only() -> None:
    beta = Fraction(5, 2)
    assert speed_up(beta, 1, 3).value == speed_up(beta, 1, 3, version="as printed").value == 1 + beta
    assert speed_up(beta, 1, 2).value < speed_up(beta, 1, 2, version="as printed").value
    assert speed_up(beta, 2, 5).value == 2 * speed_up(beta, 2, 5, version="as printed").value
    assert makespan(50, beta, 1, 3) == makespan(50, beta, 1, 3, version="as printed")
    assert makespan(50, beta, 1, 2) > makespan(50, beta, 1, 2, version="as printed")


def test_the_paper_own_times_allow_less_than_its_formula() -> None:
    """Table 9: ResNet-18 and ResNet-50 on an A100; 2 backward threads."""
    for forward_s, backward_s, printed, corrected in ((4.9, 10.2, 3.08, 2.96), (16.6, 29.9, 2.80, 2.80)):
        beta = backward_s / forward_s
        assert speed_up(beta, 1, 2, version="as printed").value == pytest.approx(printed, abs=0.005)
        assert speed_up(beta, 1, 2).value == pytest.approx(corrected, abs=0.005)


def test_the_delay_of_block_updates_is_what_is_counted() -> None:
    M, beta, T = 7, Fraction(9, 4), Fraction(1)
    ready = [beta * (M - layer) / M for layer in range(M)]  # after the backward pass began, from the input
    counted_delays = [beta - time for time in ready]
    assert block_delays(M, beta, T) == counted_delays
    assert block_delay(M, beta, T, over_layers="sum") == sum(counted_delays)
    assert block_delay(M, beta, T) == sum(counted_delays) / M


def test_the_printed_delay_is_the_sum_and_its_terms_sum_to_yet_another_number() -> None:
    M, beta, T = 8, 2.0, 0.5
    for over in ("mean", "sum"):
        assert block_delay(M, beta, T, over_layers=over, version="as printed") == beta * T * (M - 1) / 2  # type: ignore[arg-type]
    assert block_delay(M, beta, T, over_layers="sum") == block_delay(M, beta, T, version="as printed")
    assert sum(block_delays(M, beta, T, version="as printed")) == pytest.approx(beta * T * (M + 1) / 2)
    assert block_delay(10**6, beta, T) == pytest.approx(beta * T / 2, rel=1e-5)


@pytest.mark.parametrize("update", ["layer", "block"])
@pytest.mark.parametrize(("beta", "M"), [(Fraction(2), 8), (Fraction(7, 4), 5), (Fraction(3, 2), 3)])
def test_staleness_at_even_phases_is_what_is_counted(beta: Fraction, M: int, update: str) -> None:
    """One forward thread and enough backward threads: an update of each layer every T."""
    ages = count_staleness(counted(30, beta, 1, 3), M, update)[10]  # type: ignore[arg-type]
    spans = windows(M, beta, Fraction(1), wait=Fraction(0), update=update)  # type: ignore[arg-type]
    assert ages == [expected_staleness(span, Fraction(1), 4, phases="even") for span in spans]


@pytest.mark.parametrize("update", ["layer", "block"])
def test_staleness_at_random_phases_is_what_is_counted_when_passes_vary(update: str) -> None:
    """Four coupled workers (as many lanes and threads of either kind), whose passes take 0.5 to 1.5 of the mean."""
    draw, beta, M, L = random.Random(0), 2.0, 6, 4
    costs = [(draw.uniform(0.5, 1.5), beta * draw.uniform(0.5, 1.5)) for _ in range(4000)]
    passes = simulate_passes(costs, L, L, L)
    ages = count_staleness(passes, M, update)  # type: ignore[arg-type]
    rate = len(costs) / float(max(one.backward_end for one in passes))
    mean = [sum(column) / len(column) for column in zip(*ages, strict=True)]
    spans = windows(M, beta, update=update)  # type: ignore[arg-type]
    assert mean == pytest.approx([expected_staleness(span, rate, L) for span in spans], rel=0.05)


def test_staleness_is_counted_by_hand() -> None:
    """Two passes of one layer: the second reads before the first writes, the third after."""
    passes = [PassTimes(0, 0, 1, 1, 3), PassTimes(1, 1, 2, 3, 5), PassTimes(2, 5, 6, 6, 8)]
    assert count_staleness(passes, 1, "block") == [[0], [1], [0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: speed_up(0.0), "beta must be > 0"),
        (lambda: speed_up(2.0, 0), "F must be >= 1"),
        (lambda: speed_up(2.0, D=0), "D must be > 0"),
        (lambda: speed_up(2.0, u=1.5), "u must be > 0 and <= 1"),
        (lambda: speed_up(2.0, version="guessed"), "version must be 'as printed' or 'corrected'"),  # type: ignore[arg-type]
        (lambda: makespan(0, 2.0), "b must be >= 1"),
        (lambda: block_delay(0, 2.0), "M must be >= 1"),
        (lambda: windows(2, 2.0, update="whole"), "update must be 'layer' or 'block'"),  # type: ignore[arg-type]
        (lambda: expected_staleness(1.0, 1.0, 2, phases="odd"), "phases must be 'random' or 'even'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
