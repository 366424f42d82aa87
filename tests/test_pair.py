"""Pair: gradients alone move the weighted sum of all values, whatever happens to questions, answers and links."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncprop.exchange.neighbour import Buffers, Given, Neighbour
from asyncprop.exchange.pair import Side, answer_share, mean_share, moved_per_answer

WEIGHTS = st.sampled_from([0.25, 0.5, 1.0])


@given(WEIGHTS, st.integers(0, 5), WEIGHTS, st.integers(0, 5))
def test_what_one_gains_the_other_loses(u: float, k: int, v: float, besides: int) -> None:
    asker, asked = Side(u, k), Side(v, besides)
    back = answer_share(asker, asked)
    there = -back * moved_per_answer(asker, asked)  # of the way from the asked to the asker
    assert u * back == pytest.approx(v * there)
    assert 0 < back < 1
    assert 0 < there < 1


@pytest.mark.parametrize(("u", "v", "mean"), [(1.0, 1.0, 0.5), (0.5, 1.0, 2 / 3)])
def test_two_that_have_nothing_else_out_meet_at_their_weighted_mean(u: float, v: float, mean: float) -> None:
    x, y = 0.0, 1.0
    answer = answer_share(Side(u), Side(v)) * (y - x)
    assert x + answer == pytest.approx(mean)
    assert y + moved_per_answer(Side(u), Side(v)) * answer == pytest.approx(mean)


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_ranks_that_all_ask_all_others_at_once_do_not_swing_past_each_other(size: int) -> None:
    """Every question and every answer is between the values that all had at first: the worst that can be late."""
    each = answer_share(Side(1.0, size - 2), Side(1.0, size - 1))
    assert 2 * (size - 1) * each <= 1


class Net:
    """Ranks of one number each, in exact fractions; messages are delivered, lost or settled as a test says."""

    def __init__(self, size: int) -> None:
        self.x = [Fraction(rank) for rank in range(size)]
        self.w = [Fraction(1)] * size
        buffers = Buffers(lambda n: torch.zeros(1, dtype=torch.uint8), 1)
        self.nodes = [{j: Neighbour(j, buffers) for j in range(size) if j != i} for i in range(size)]
        self.asked: dict[tuple[int, int], tuple[Fraction, Side]] = {}  # what a question out has in it
        self.answers: dict[tuple[int, int], Fraction] = {}  # the last that i was given by j
        for node in self.nodes:
            for neighbour in node.values():
                neighbour.link = object()  # type: ignore[assignment]

    def sum(self) -> Fraction:
        """The sum of weights times values, with the answers that have not been added yet."""
        on_their_way = sum(
            self.w_asked(i, j) * self.answers[i, j]
            for i, node in enumerate(self.nodes)
            for j in node
            if self.is_answered(i, j)
        )
        return sum((w * x for w, x in zip(self.w, self.x, strict=True)), Fraction(0)) + on_their_way

    def is_answered(self, i: int, j: int) -> bool:
        """Whether a question of i's is out that j has merged."""
        out = self.nodes[i][j].out
        return out is not None and out.sequence == self.nodes[j][i].merged

    def w_asked(self, i: int, j: int) -> Fraction:
        out = self.nodes[i][j].out
        assert out
        return Fraction(out.weight)

    def besides(self, i: int) -> int:
        return sum(neighbour.out is not None for neighbour in self.nodes[i].values())

    def learn(self, i: int, j: int) -> None:
        """Not a step between ranks: i's gradient, which the sum is told of."""
        self.x[i] += self.w[j]

    def ask(self, i: int, j: int) -> None:
        if self.nodes[i][j].is_ready:
            self.asked[i, j] = self.x[i], Side(float(self.w[i]), self.besides(i))
            self.nodes[i][j].ask([0], float(self.w[i]))

    def merge(self, i: int, j: int) -> None:
        """Let j merge what is out to it from i, if it has not."""
        out, back = self.nodes[i][j].out, self.nodes[j][i]
        if out and out.sequence > back.merged:
            value, asker = self.asked[i, j]
            asked = Side(float(self.w[j]), self.besides(j))
            answer = Fraction(answer_share(asker, asked)) * (self.x[j] - value)
            self.x[j] += Fraction(moved_per_answer(asker, asked)) * answer
            self.answers[i, j] = answer
            back.note_answer(Given(out.sequence, out.weight, [0], torch.empty(0)))

    def add(self, i: int, j: int) -> None:
        """Let i add j's answer, if it has one; or hear that a meeting had settled its question."""
        if self.nodes[i][j].out is None:
            self.nodes[i][j].acknowledge(self.nodes[i][j].sequence)
        elif self.is_answered(i, j):
            self.x[i] += self.answers[i, j] * self.w_asked(i, j) / self.w[i]
            self.nodes[i][j].acknowledge(self.nodes[i][j].sequence)
            self.nodes[i][j].was_answered()

    def relink(self, i: int, j: int) -> None:
        """Cut the link at whatever point its messages are, and open another; answers are sent again."""
        for a, b in ((i, j), (j, i)):
            self.nodes[a][b].relink(self.nodes[b][a].merged)
        for a, b in ((i, j), (j, i)):
            self.add(a, b)

    def lose(self, i: int, j: int) -> None:
        """Let j take i for dead: its receiving thread ends. A new link will show that it is not."""
        self.nodes[j][i].stop()

    def give(self, i: int, j: int) -> None:
        """Halve i's weight, as for a rank that joins: the sum is told of it."""
        self.w[i] /= 2

    def meet(self, left_out: int | None = None) -> None:
        """Settle what is out, without one of the ranks."""
        told = {i: {j: n.answered for j, n in node.items()} for i, node in enumerate(self.nodes) if i != left_out}
        for i in told:
            for j, neighbour in self.nodes[i].items():
                neighbour.settle()
                if j in told and (given := neighbour.undo(told[j][i])):
                    self.x[i] += self.answers[j, i] * Fraction(given.weight) / self.w[i]


STEPS = st.tuples(
    st.sampled_from(["ask", "merge", "add", "relink", "lose", "learn", "give"]), st.integers(0, 2), st.integers(0, 2)
)


def play(net: Net, steps: list[tuple[str, int, int]]) -> Fraction:
    """Do all steps, and return by how much gradients have moved the sum; nothing else may."""
    expected = before = net.sum()
    for step, i, j in steps:
        if i == j:
            continue
        if step == "give" and net.w[i] <= Fraction(1, 8):
            continue
        was = net.w[i] * net.x[i]
        getattr(net, step)(i, j)
        if step in ("learn", "give"):
            expected += net.w[i] * net.x[i] - was
        assert abs(net.sum() - expected) < Fraction(1, 10**12)  # shares are floats
    return expected - before


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=60))
def test_the_sum_is_conserved_whatever_happens_to_messages_and_links(steps: list[tuple[str, int, int]]) -> None:
    net = Net(3)
    moved = play(net, steps)
    net.meet()
    assert net.sum() - (0 + 1 + 2) == pytest.approx(moved)
    assert all(neighbour.out is None and neighbour.given is None for node in net.nodes for neighbour in node.values())


@given(st.lists(STEPS, max_size=60))
def test_a_rank_that_is_left_out_takes_only_what_was_exchanged(
    steps: list[tuple[str, int, int]],
) -> None:
    net = Net(3)
    play(net, steps)
    pairs = [(i, j) for i in (0, 1) for j in (0, 1) if i != j]
    on_their_way = sum(net.w_asked(i, j) * net.answers[i, j] for i, j in pairs if net.is_answered(i, j))
    before = sum(net.w[i] * net.x[i] for i in (0, 1)) + on_their_way
    net.meet(left_out=2)
    assert sum(net.w[i] * net.x[i] for i in (0, 1)) == pytest.approx(before)


def test_a_meeting_undoes_what_was_not_added_and_nothing_else() -> None:
    net = Net(2)
    net.ask(0, 1)
    net.merge(0, 1)
    assert net.x == [0, Fraction(1, 2)]  # the answer is on its way
    net.meet()
    assert net.x == [0, 1]
    net.add(0, 1)  # it comes too late
    assert net.x == [0, 1]
    net.ask(0, 1)
    net.merge(0, 1)
    net.add(0, 1)
    net.meet()
    assert net.x == [Fraction(1, 2), Fraction(1, 2)]


def test_what_is_learnt_while_a_message_travels_is_kept() -> None:
    """In push-sum the half that travels would have stayed behind: both have learnt 1, and so has the mean."""
    net = Net(2)
    net.x = [Fraction(0), Fraction(0)]
    net.ask(0, 1)
    net.x = [x + 1 for x in net.x]
    net.merge(0, 1)
    net.add(0, 1)
    assert sum(net.x) == 2


def test_one_question_at_most_is_out_to_a_neighbour() -> None:
    net = Net(2)
    net.ask(0, 1)
    assert not net.nodes[0][1].is_ready
    net.nodes[0][1].relink(merged=0)  # it was lost
    assert net.nodes[0][1].is_ready
    net.ask(0, 1)
    assert not net.nodes[0][1].relink(merged=2)  # it was merged: its answer will come again
    assert not net.nodes[0][1].is_ready


def test_buffers_are_as_many_as_are_out_at_once() -> None:
    made: list[Any] = []

    def make(length: int) -> torch.Tensor:
        made.append(length)
        return torch.zeros(length, dtype=torch.uint8)

    buffers = Buffers(make, 3)
    neighbours = [Neighbour(rank, buffers) for rank in range(3)]
    for neighbour in neighbours:
        neighbour.link = object()  # type: ignore[assignment]
        neighbour.acknowledge(neighbour.ask([0], 1.0))
        neighbour.was_answered()
    assert made == [3]
    for neighbour in neighbours:
        neighbour.ask([0], 1.0)
    assert made == [3, 3, 3]


def test_a_question_that_a_meeting_has_settled_may_still_be_leaving() -> None:
    """Nobody may write where it is, and nothing more is asked, until it has been received."""
    buffers = Buffers(lambda n: torch.zeros(n, dtype=torch.uint8), 3)
    neighbour = Neighbour(1, buffers)
    neighbour.link = object()  # type: ignore[assignment]
    number = neighbour.ask([0], 1.0)
    sent = neighbour.sent
    assert neighbour.settle()
    assert not neighbour.is_ready
    assert buffers.take() is not sent
    neighbour.acknowledge(number)  # as too late
    assert neighbour.is_ready
    assert buffers.take() is sent


def test_shares_of_the_mean() -> None:
    assert [mean_share([1.0, 3.0], rank) for rank in range(2)] == [0.25, 0.75]
    assert [mean_share([0.0, 0.0], rank) for rank in range(2)] == [1.0, 0.0]
