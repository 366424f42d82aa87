"""For tests: a Sequencer that forces interleavings, tiny models of every kind, and a fake device with streams."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from asyncprop.engine.turn import Moment, Turn

Batch = tuple[Tensor, ...]


class Sequencer(Turn):
    """A Turn that makes reads and writes happen in the order of a script.

    An event of the script waits until all before it have happened; an event that is not in the script passes freely.

    Args:
        script: (batch, "read" or "write", layer) in the wanted order; indices count from 0.
        patience_s: how long an event waits before it raises, naming the event that did not come. A test that waits
            for an impossible order fails by this instead of hanging.
    """

    def __init__(self, script: Iterable[tuple[int, Moment, int]], *, patience_s: float = 30.0) -> None:
        self.script = list(script)
        if len(set(self.script)) < len(self.script):
            raise ValueError("script must name each event once")
        self._patience_s = patience_s
        self._next = 0
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def finished(self) -> bool:
        """Whether every event of the script has happened."""
        return self._next == len(self.script)

    @contextmanager
    def at(self, batch: int, event: Moment, layer: int) -> Iterator[None]:
        """Wait for the event's place in the script; the next may happen when the block ends."""
        this = (batch, event, layer)
        if this not in self.script:
            yield
            return
        place = self.script.index(this)
        with self._changed:
            came = self._changed.wait_for(lambda: self._stopped or self._next == place, self._patience_s)
            if self._stopped or not came:
                missing = self.script[self._next] if not self.finished else None
                raise TimeoutError(f"{this} waited for {missing}, which did not come")
        yield
        with self._changed:
            self._next += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Raise in every event that waits."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


# ---- tiny models, one of each kind that training treats differently


@dataclass(frozen=True)
class Tiny:
    """A model that trains in milliseconds: `model()` and `batch(generator)` are made anew at each call."""

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Batch]

    def batches(self, count: int, *, seed: int = 0) -> list[Batch]:
        """Return `count` random batches."""
        generator = torch.Generator().manual_seed(seed)
        return [self.batch(generator) for _ in range(count)]

    def seeded_model(self, seed: int = 0) -> nn.Module:
        """Return the model with weights that depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross entropy of the model's logits, of shape (batch, classes)."""
    *inputs, target = batch
    return nn.functional.cross_entropy(model(*inputs), target)


class TinyLstm(nn.Module):
    """Two LSTM layers over an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, time) to logits of shape (batch, 3)."""
        logits: Tensor = self.head(self.lstm(self.embed(tokens))[0][:, -1])
        return logits


class TinyTransformer(nn.Module):
    """One encoder layer whose output weight is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, time) to logits of shape (batch, 11) for the last position."""
        logits: Tensor = self.head(self.encoder(self.embed(tokens))[:, -1])
        return logits


class TinyConditional(nn.Module):
    """A frozen layer, a layer that is never used, and two that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(5, 6).requires_grad_(False)
        self.unused = nn.Linear(5, 6)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, 5) to logits of shape (batch, 3), by the right branch if the batch's sum is positive."""
        hidden = torch.relu(self.frozen(x))
        hidden = self.right(hidden) if float(x.sum()) > 0 else self.left(hidden) * self.scale
        logits: Tensor = self.head(torch.relu(hidden))
        return logits


def _residual() -> nn.Module:
    from asyncprop.tasks.models import resnet18

    return resnet18(classes=3, width=2, in_channels=1, stem="cifar")


def _integers(high: int, *shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randint(high, shape, generator=generator)


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator)


def _pairs(inputs: Callable[[torch.Generator], Tensor], classes: int, size: int) -> Callable[[torch.Generator], Batch]:
    return lambda generator: (inputs(generator), torch.randint(classes, (size,), generator=generator))


TINY: dict[str, Tiny] = {
    "mlp": Tiny(lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), _pairs(_normal(4, 5), 3, 4)),
    "resnet": Tiny(_residual, _pairs(_normal(4, 1, 8, 8), 3, 4)),
    "lstm": Tiny(TinyLstm, _pairs(_integers(11, 4, 6), 3, 4)),
    "transformer": Tiny(TinyTransformer, _pairs(_integers(11, 4, 6), 11, 4)),
    "conditional": Tiny(TinyConditional, _pairs(_normal(4, 5), 3, 4)),
}


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    loss_fn: Callable[[nn.Module, Batch], Tensor] = cross_entropy,
    scheduler: Any = None,
) -> list[float]:
    """Train as any PyTorch tutorial does; return the losses. The slow obvious twin of lockstep."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if scheduler:
            scheduler.step()
        losses.append(loss.item())
    return losses


def same_state(left: Any, right: Any) -> bool:
    """Tell whether two nested states (of modules, of optimizers) are equal to the bit."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same_state, left, right))
    return bool(left == right)


# ---- a device with streams, and no hardware


class FakeDevice:
    """Streams, marks and thread settings as CUDA has them, computed on the CPU, that complains of misuse.

    It raises AssertionError where CUDA would be silently wrong: a thread that was not prepared, work outside of a
    lane's stream, a batch that was not received, a loss or a time that is read before the stream is finished.

    Attributes:
        events: (thread name, call, stream) in the order of the calls.
    """

    results_are_ready = False
    passes_at_once: int | None = None

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []
        self._lock = threading.Lock()
        self._streams: dict[int | str, int] = {}
        self._local = threading.local()
        self._unfinished: set[int] = set()
        self._clock = 0

    @contextmanager
    def thread(self, intraop_threads: int) -> Iterator[None]:
        """Note that this thread may use the device."""
        torch.set_num_threads(intraop_threads)
        self._local.prepared = True
        self._note("thread", -1)
        try:
            yield
        finally:
            self._local.prepared = False

    def stream(self, name: int | str) -> int:
        """Return the number of the stream of this name: how many others were asked for before it."""
        with self._lock:
            return self._streams.setdefault(name, len(self._streams))

    def current_stream(self) -> int:
        """Return the stream that is current on this thread; -1 for that of a thread that has chosen none."""
        stream: int | None = getattr(self._local, "stream", None)
        return -1 if stream is None else stream

    @contextmanager
    def use(self, stream: int) -> Iterator[None]:
        """Make `stream` current on this thread."""
        before, self._local.stream = getattr(self._local, "stream", None), stream
        try:
            yield
        finally:
            self._local.stream = before

    def hand_over(self) -> None:
        """Note that the thread hands over."""
        self._note("hand over", -1)

    def receive(self, stream: int, tensors: Iterator[Tensor]) -> None:
        """Note that the stream now has its batch."""
        list(tensors)
        self._enqueue("receive", stream)

    def wait(self, stream: int, mark: tuple[int, int]) -> None:
        """Note that the stream waits for another's mark."""
        assert 0 < mark[1] <= self._clock, "a wait for what was never marked"
        self._enqueue("wait", stream)

    def finish(self, stream: int) -> None:
        """Finish the stream's work."""
        self._note("finish", stream)
        with self._lock:
            self._unfinished.discard(stream)

    def buffer(self, length_bytes: int) -> Tensor:
        """Return plain memory."""
        return torch.zeros(length_bytes, dtype=torch.uint8)

    def mark(self) -> tuple[int, int]:
        """Return (stream, tick of a clock that counts calls)."""
        stream = self._local.stream
        self._enqueue("mark", stream)
        with self._lock:
            self._clock += 1
            return stream, self._clock

    def seconds(self, start: tuple[int, int], end: tuple[int, int]) -> float:
        """Return the ticks between two marks of one finished stream."""
        assert start[0] == end[0], "times are measured within one stream"
        assert start[0] not in self._unfinished, "a time is read before its stream is finished"
        return float(end[1] - start[1])

    def _enqueue(self, call: str, stream: int) -> None:
        assert getattr(self._local, "prepared", False), f"{threading.current_thread().name} was not prepared"
        assert getattr(self._local, "stream", None) == stream, "work outside of its lane's stream"
        with self._lock:
            self._unfinished.add(stream)
        self._note(call, stream)

    def _note(self, call: str, stream: int) -> None:
        with self._lock:
            self.events.append((threading.current_thread().name, call, stream))


def twins(model: nn.Module, count: int = 2) -> list[nn.Module]:
    """Return independent copies of a model."""
    return [copy.deepcopy(model) for _ in range(count)]
