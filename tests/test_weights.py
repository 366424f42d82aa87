"""Weights: nothing of them is lost or doubled, whatever happens to messages; and the mean stays where it was."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from asyncprop.exchange.neighbour import Neighbour
from asyncprop.exchange.weights import FAIR_SHARE, LEAST, PATIENCE, Weights, share

LAYERS = 2


class Twin:
    """Sum-weight gossip in exact fractions of one layer, as the textbook has it: the slow obvious twin."""

    def __init__(self, values: list[Fraction]) -> None:
        self.x = values
        self.w = [Fraction(1)] * len(values)

    def send(self, rank: int) -> tuple[Fraction, Fraction]:
        self.w[rank] /= 2
        return self.x[rank], self.w[rank]

    def merge(self, rank: int, x: Fraction, w: Fraction) -> None:
        self.x[rank] = (self.w[rank] * self.x[rank] + w * x) / (self.w[rank] + w)
        self.w[rank] += w


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=40))
def test_merging_is_the_textbook_s(sends: list[tuple[int, int]]) -> None:
    twin = Twin([Fraction(0), Fraction(1), Fraction(5)])
    x, ours = [0.0, 1.0, 5.0], [Weights(1) for _ in range(3)]
    for sender, receiver in sends:
        if sender == receiver:
            continue
        twin.merge(receiver, *twin.send(sender))
        value, weight = x[sender], ours[sender].give(0)
        x[receiver] += ours[receiver].take(0, weight) * (value - x[receiver])
    assert [float(w) for w in twin.w] == [weights[0] for weights in ours]
    assert all(abs(float(a) - b) < 1e-9 for a, b in zip(twin.x, x, strict=True))
    assert sum(w * v for w, v in zip(twin.w, twin.x, strict=True)) == 6  # the weighted sum, exactly


class Net:
    """Ranks with their neighbours and weights, and messages that are delivered, cut off or settled as a test says."""

    def __init__(self, size: int) -> None:
        self.weights = [Weights(LAYERS) for _ in range(size)]
        self.nodes = [
            {j: Neighbour(j, lambda n: None, 0) for j in range(size) if j != i}  # type: ignore[arg-type,return-value]
            for i in range(size)
        ]
        for node in self.nodes:
            for neighbour in node.values():
                neighbour.link = object()  # type: ignore[assignment]

    def total(self, among: tuple[int, ...] = (0, 1, 2)) -> float:
        """All weight there is: what ranks hold, and what is out and not merged by one of them."""
        held = sum(sum(self.weights[i].all()) for i in among)
        out = sum(
            sum(weight for _, weight in neighbour.out.entries)
            for i in among
            for j, neighbour in self.nodes[i].items()
            if neighbour.out and (j not in among or neighbour.out.sequence > self.nodes[j][i].merged)
        )
        return held + out

    def send(self, i: int, j: int, layer: int) -> None:
        if self.nodes[i][j].is_ready:
            self.nodes[i][j].give(self.weights[i], [layer])

    def merge(self, i: int, j: int) -> None:
        """Let j merge what is out to it from i, if it has not."""
        out, back = self.nodes[i][j].out, self.nodes[j][i]
        if out and out.sequence > back.merged:
            for layer, weight in out.entries:
                self.weights[j].take(layer, weight)
            back.merged = out.sequence

    def acknowledge(self, i: int, j: int) -> None:
        self.nodes[i][j].was_merged(self.nodes[j][i].merged)

    def relink(self, i: int, j: int) -> None:
        """Cut the link at whatever point its messages are, and open another: both say what they merged."""
        for a, b in ((i, j), (j, i)):
            self.nodes[a][b].resolve(self.weights[a], self.nodes[b][a].merged)

    def meet(self, left_out: int) -> None:
        """Settle what is out, without one of the ranks."""
        told = {i: {j: n.merged for j, n in node.items()} for i, node in enumerate(self.nodes) if i != left_out}
        for i in told:
            for j, neighbour in self.nodes[i].items():
                neighbour.resolve(self.weights[i], told[j][i] if j in told else 0)


STEPS = st.tuples(
    st.sampled_from(["send", "merge", "acknowledge", "relink"]), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1)
)


@settings(max_examples=200)
@given(st.lists(STEPS, max_size=60))
def test_weight_is_conserved_whatever_happens_to_messages_and_links(steps: list[tuple[str, int, int, int]]) -> None:
    net = Net(3)
    for step, i, j, layer in steps:
        if i == j:
            continue
        if step == "send":
            net.send(i, j, layer)
        else:
            getattr(net, step)(i, j)
        assert net.total() == 3 * LAYERS  # halves of ones: exact in floats
    expected = net.total(among=(0, 1))
    net.meet(left_out=2)
    assert all(neighbour.out is None for i in (0, 1) for neighbour in net.nodes[i].values())
    assert sum(sum(net.weights[i].all()) for i in (0, 1)) == expected


def test_a_meeting_takes_back_what_was_not_merged_and_nothing_else() -> None:
    net = Net(3)
    net.send(0, 1, 0)
    net.send(1, 0, 0)
    net.merge(0, 1)  # 1 has merged, 0 does not know it yet; 0 has not merged what 1 sent
    net.meet(left_out=2)
    assert [w[0] for w in net.weights[:2]] == [0.5, 1.5]


def test_what_a_frozen_rank_may_have_merged_is_not_taken_back_before_a_meeting() -> None:
    net = Net(2)
    net.send(0, 1, 0)
    assert not net.nodes[0][1].is_ready  # nothing more goes there
    assert net.weights[0][0] == 0.5
    assert net.nodes[0][1].resolve(net.weights[0], merged=0)
    assert net.weights[0][0] == 1.0


def test_less_than_a_fair_share_is_given_seldom() -> None:
    weights = Weights(1)
    assert weights.may_give(0, updates=1)
    weights.give(0)
    assert weights[0] < FAIR_SHARE
    assert not weights.may_give(0, updates=1)
    assert weights.may_give(0, updates=PATIENCE)
    while weights[0] >= LEAST:
        weights.give(0)
    assert not weights.may_give(0, updates=PATIENCE)


def test_somebody_may_always_send() -> None:
    # The weights' mean is 1, so not all can be below it.
    ranks = [Weights(1) for _ in range(3)]
    for turn in range(300):
        sender = next(rank for rank in range(3) if ranks[rank].may_give(0, updates=1))
        ranks[(sender + 1 + turn % 2) % 3].take(0, ranks[sender].give(0))


def test_shares_of_the_mean() -> None:
    assert [share([[1.0], [3.0]], 0, rank) for rank in range(2)] == [0.25, 0.75]
    assert [share([[0.0], [0.0]], 0, rank) for rank in range(2)] == [1.0, 0.0]
