"""GossipTally: what an exchange has sent and merged, and how far apart the ranks were."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class GossipTally:
    """Counts since the exchange was opened. Its threads write under their lock; reading needs none.

    Attributes:
        messages_sent, bytes_sent: with layers in them.
        messages_merged, bytes_merged: of other ranks.
        superseded: updates of layers that never travelled on their own, as a newer value went instead.
        late: messages that came after the ranks had met, and were dropped: the meeting had settled them.
        lost: questions that were forgotten, as a link broke before they arrived, or the ranks met before the answer.
        undone: answers that were taken back, as the ranks met before they had been added.
        refused: neighbours that were cut off.
        age_s: mean seconds from the copying of layers to the adding of the answer: there and back.
        distance: between this rank's parameters and the mean of all, relative to the mean's norm, when the ranks last
            met.
        weight: the sum of all ranks' weights when they last met, as a share of what it was after they had met before:
            1, but for what ranks took with them that died, were left out, or had values that are not finite.
    """

    def __init__(self) -> None:
        self.messages_sent = self.bytes_sent = self.messages_merged = self.bytes_merged = 0
        self.superseded = self.late = self.lost = self.undone = self.refused = 0
        self.distance = 0.0
        self.weight = 1.0
        self._age_s = 0.0
        self._delivered = 0

    @property
    def age_s(self) -> float:
        """See above; 0.0 before the first message has arrived."""
        return self._age_s / max(1, self._delivered)

    def sent(self, length_bytes: int) -> None:
        """Count a message of this rank's."""
        self.messages_sent += 1
        self.bytes_sent += length_bytes

    def merged(self, length_bytes: int) -> None:
        """Count a message of another's."""
        self.messages_merged += 1
        self.bytes_merged += length_bytes

    def delivered(self, seconds: float) -> None:
        """Note how long a question took to be answered."""
        self._age_s += seconds
        self._delivered += 1

    def note_distance(self, parameters: Mapping[str, Tensor], means: Mapping[str, Tensor]) -> None:
        """Note the distance from the mean; `means` may hold more than parameters."""
        square = apart = 0.0
        for name, parameter in parameters.items():
            if name in means:
                pairs = zip(pieces_of(parameter.detach()), pieces_of(means[name]), strict=True)
                for mine, mean in ((mine.cpu().double(), mean.double()) for mine, mean in pairs):
                    apart += float((mine - mean).square().sum())
                    square += float(mean.square().sum())
        self.distance = (apart / square) ** 0.5 if square else 0.0

    def read(self) -> dict[str, float]:
        """Return all of it, by name."""
        names = ("messages_sent", "bytes_sent", "messages_merged", "bytes_merged", "superseded", "late", "lost",
                 "undone", "refused", "age_s", "distance", "weight")  # fmt: skip
        return {name: getattr(self, name) for name in names}


def pieces_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a tensor's numbers, so few at a time that what is made of them is small."""
    pieces: tuple[Tensor, ...] = tensor.reshape(-1).split(1 << 16)  # type: ignore[no-untyped-call]
    return pieces
