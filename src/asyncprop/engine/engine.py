r"""Engine: trains the user's model by asynchronous backpropagation (paper, Sec. 3, Alg. 1).

One forward and two backward passes at once, three lanes; F3 is the forward pass of batch 3, b3.2 its backward pass
through layer 2, and ! the moment at which that layer is stepped:

    forward     |(1)F0 |(2)F1 |F2    |F3...       waits while every lane carries a pass (back-pressure)
                        \      \      \
    backward     (3)    |b0.2!  b0.1!  b0.0! |b2.2!  b2.1! ...      (4) step a layer, (5) its version += 1
    backward                   |b1.2!  b1.1!  b1.0! |b3.2! ...
                                                    \
    the caller                                       (6) Step 0, Step 1, ... in the order of finishing

    (1) Feed.take, Passes.forward   (2) Roles.forward_done    (3) Passes.backward
    (4) Stepper._write              (5) Versions.landed       (6) Feed.finish, Engine.run

"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Literal, Self

from torch import nn
from torch.optim import Optimizer

from asyncprop.clock import SYSTEM
from asyncprop.delay import Delay, Delays, current_rank, refuse_nobody
from asyncprop.devices import Device, device_of
from asyncprop.engine.auto import check_auto, choose_workers, look_ahead, numbers_of
from asyncprop.engine.axes import update_of, workers_of
from asyncprop.engine.checks import check_graph, check_loss_fn, check_model, check_optimizer, check_turn, compiled_parts
from asyncprop.engine.compiled import Warmer
from asyncprop.engine.exchange import Exchange, Replica
from asyncprop.engine.feed import Feed
from asyncprop.engine.lanes import Lanes
from asyncprop.engine.partition import Partition
from asyncprop.engine.passes import LossFn, OnNonFinite, Passes
from asyncprop.engine.snapshot import Snapshot, take_snapshot
from asyncprop.engine.turn import Turn
from asyncprop.engine.update import Update
from asyncprop.engine.workers import GRACE_S, Crew, Decoupled, Workers, intraop_threads
from asyncprop.recorder import Recorder
from asyncprop.trace import Statistics, Step

RUN_AHEAD = 16
"""Batches that free running may finish, beyond those in flight, before the caller's loop has seen them."""


class Engine:
    """Train `model` by asynchronous backpropagation, inside a `with` block.

    Args:
        model: any module that `copy.deepcopy` can copy, on one device. Passes run in copies of it over its storage
            (lanes), so between runs it is the trained model. Attributes that are no tensors are not shared.
        optimizer: any optimizer that steps from `.grad` with state per parameter. Each layer is stepped by it alone,
            with its present hyper-parameters: schedulers on it work as ever.
        loss_fn: `loss_fn(model, batch)` returns a scalar tensor, computed by the module that it is handed.
            Put autocast inside it. Called by several threads at once.
        workers: `Decoupled(forward, backward, lanes)` or `Coupled(workers)`; a string is short for its default.
            `Decoupled("auto")` lets a plan on the first batches choose.
        update: `LayerUpdate(...)` or `BlockUpdate(...)`; `"layer"` or `"block"` for short.
        partition: which layers each lane writes, and when; None for all of them, always.
        exchange: how this replica meets those of other ranks; None for never.
        delays: who is slowed, to learn what a slow machine or link would do; nobody by default.
        turn: `"free"` lets every thread go on as it can. `"lockstep"` trains one batch at a time on the caller's own
            thread, takes the next only when the caller asks for the next Step, and equals the plain PyTorch loop bit
            for bit. A `Turn` object decides the order of reads and writes: `Ordered`, `Replay`, `Pace` (virtual time).
        on_nonfinite: `"raise"` ends training at a loss that is not finite; `"skip"` drops that batch, which its Step
            tells. On CUDA `"skip"` makes each backward pass wait for its loss.
        trace: notes what each thread does, layer by layer; None for nothing.
        telemetry: whether versions and staleness are noted (about 1 µs per layer and pass).
        device: the face of the device; by default found from the model's parameters.

    Raises:
        ValueError: if something given cannot work; the line says what to do instead.

    Example:
        >>> with Engine(model, optimizer, lambda model, batch: loss(model(batch[0]), batch[1])) as engine:
        ...     for step in engine.run(loader):
        ...         print(step.loss, step.staleness)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        workers: Workers | str = "decoupled",
        update: Update | str = "layer",
        partition: Partition | None = None,
        exchange: Exchange | None = None,
        delays: Sequence[Delay] = (),
        turn: Literal["free", "lockstep"] | Turn = "free",
        on_nonfinite: OnNonFinite = "raise",
        trace: Recorder | None = None,
        telemetry: bool = True,
        device: Device | None = None,
    ) -> None:
        check_model(model)
        check_optimizer(optimizer, model)
        check_loss_fn(loss_fn)
        self._model, self._optimizer, self._loss_fn = model, optimizer, loss_fn
        self._workers = workers_of(workers)
        self._update = update_of(update)
        if isinstance(turn, str) and turn not in ("free", "lockstep"):
            raise ValueError(f"turn must be 'free', 'lockstep' or a Turn (got {turn!r})")
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite must be 'raise' or 'skip' (got {on_nonfinite!r})")
        self._lockstep = turn == "lockstep"
        self._turn = None if isinstance(turn, str) else turn
        self._clock = self._turn.clock if self._turn else SYSTEM
        self._recorder = trace
        self._device = device or device_of(list(model.parameters()))
        check_turn(self._turn, exchange, self._device)
        self._is_auto = isinstance(self._workers, Decoupled) and self._workers.auto and not self._lockstep
        self._awaits_plan = self._is_auto
        if self._is_auto:
            check_auto(model, self._update, partition, self._turn, self._device)
        lane_count = 1 if self._lockstep else self._workers.lanes_on(self._device.passes_at_once)
        self._passes = Passes(
            loss_fn,
            self._device,
            accumulate=self._update.accumulate,
            on_nonfinite=on_nonfinite,
            notes_reads=telemetry or self._update.compensate is not None or self._turn is not None or trace is not None,
            check_graph=lambda losses: check_graph(losses, model),
            clock=self._clock,
        )
        self._stopping = threading.Event()
        self._lanes = Lanes(
            model,
            optimizer,
            self._update,
            lane_count,
            self._device,
            partition=partition,
            exchange=exchange,
            telemetry=telemetry,
            turn=self._turn,
            recorder=trace,
            clock=self._clock,
            stopping=self._stopping,
        )
        self.exchange = self._exchange = exchange
        refuse_nobody(delays, workers=None if self._is_auto else 1 if self._lockstep else self._workers.threads)
        self._delays = Delays(delays, current_rank(), self._stopping, self._clock)
        self._warmer = Warmer(self._passes, self._lanes.lanes) if compiled_parts(model) else None
        self._feed = Feed(self._prepare_batch, self._clock)
        self._crew: Crew | None = None
        self._entered = self._running = False

    # ---- the block

    def __enter__(self) -> Self:
        if self._entered:
            raise RuntimeError("an engine can be entered once: make another")
        self._entered = True
        layers = self._lanes.layers
        if self._exchange:
            self._exchange.open(Replica(self._model, self._optimizer, layers, self._device, self._fail))
        if self._recorder:
            self._recorder.open(tuple(layer.name for layer in layers), self._clock.now)
        if not self._awaits_plan:
            self._start_crew()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """End all threads. Passes in flight are finished; what was submitted is finished too, unless on an error."""
        try:
            if kind is not None:
                self._feed.cancel_submitted()
            if not self._feed.failure:
                self._feed.leave()
            if self._exchange and kind is None and not self._feed.failure:
                self._exchange.settle()
            self._feed.close()
        except BaseException as interrupt:  # a second Ctrl-C while passes in flight are being finished
            self._fail(interrupt)
            raise
        finally:
            self._close()
        failure = self._feed.failure
        if failure is not None and kind is None:
            raise failure

    # ---- training

    def run(self, loader: Iterable[Any]) -> Iterator[Step]:
        """Train on every batch of `loader`, and yield a Step as each finishes.

        In free running training goes on while the caller's loop body runs (up to RUN_AHEAD batches ahead of it); in
        lockstep it does not. When the iterator ends, all is drained, and the model and the optimizer are ordinary
        objects. Leaving the loop early finishes the batches that were taken; no batch is left half used.

        Raises:
            RuntimeError: outside of the `with` block, or while another `run` is not finished.
            BaseException: the first error of any thread, with its own traceback.
        """
        self._check_open()
        if self._running:
            raise RuntimeError("run() is already reading a loader: exhaust or close its iterator first")
        self._running = True
        try:
            self._feed.hold()
            if self._awaits_plan:
                first, loader = look_ahead(loader)
                if not first:
                    return
                self._choose_workers(first)
            self._lanes.refresh()
            self._device.hand_over()
            self._feed.start(iter(loader), lead=1 if self._lockstep else self._lanes.count + RUN_AHEAD)
            while (step := self._next_step()) is not None:
                yield step
                self._feed.allow_one_more()
        finally:
            self._running = False
            self._feed.leave()

    def submit(self, batch: Any) -> Future[Step]:
        """Train on one batch; the future gives its Step, or raises what ended the engine.

        Waits while as many batches wait as there are lanes. A future that is cancelled before its batch is taken
        drops the batch.
        """
        self._check_open()
        if self._running:
            raise RuntimeError("run() is reading a loader: exhaust or close its iterator before submit()")
        if self._awaits_plan:
            self._choose_workers([batch])
        if self._feed.idle:
            self._lanes.refresh()
        self._device.hand_over()
        future = self._feed.submit(batch, room=self._lanes.count)
        if self._crew and self._crew.inline:
            self._crew.train_inline()
        return future

    def drain(self) -> None:
        """Wait until every batch taken so far is finished; model and optimizer are then ordinary objects.

        Inside a `run` loop the loader rests until the loop asks for its next Step.
        """
        self._check_open()
        self._feed.hold()

    def settle(self) -> None:
        """Drain, and let the replicas of all ranks agree: afterwards their models are equal to the bit.

        Every rank must call it; all wait for each other. Without an exchange it only drains. Leaving the `with` block
        settles, too.
        """
        self.drain()
        if self._exchange:
            self._exchange.settle()
            if self._feed.failure:
                raise self._feed.failure

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs beyond model and optimizer: lanes' private state, what was measured.

        Empty unless the update has private state or compensation, there is a partition, or a plan has chosen the
        workers. Call it when drained.
        """
        chosen = self._workers if self._is_auto and not self._awaits_plan else None
        numbers = {"workers": numbers_of(chosen)} if isinstance(chosen, Decoupled) else {}
        return {**self._lanes.state_dict(), **numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict` of an engine made alike; before the first batch."""
        rest = dict(state)
        if (numbers := rest.pop("workers", None)) and self._awaits_plan:
            self._use(Decoupled(**numbers))
        self._lanes.load_state_dict(rest)

    def snapshot(self) -> Snapshot:
        """Copy the model's `state_dict` at an instant when no update is half done.

        Training goes on: forward passes run as ever, and backward passes wait while those under way end and the
        values are copied. Buffers that forward passes write (running statistics) are copied as they stand. So is what
        an exchange writes: a merge or an average of ranks may be half done, layer by layer.

        Raises:
            ValueError: with `Ordered` or `Replay`: a pass would wait for this, holding what one under way waits for.
            BaseException: what ended the engine, if anything did by the time the copy is made.
        """
        if self._turn and self._turn.watches_all:
            raise ValueError(
                f"snapshot must not be taken with turn {type(self._turn).__name__}, in which passes that wait hold "
                "layers: drain() and copy model.state_dict()"
            )
        snapshot = take_snapshot(self._model, self._lanes, self._passes.gate, self._device)
        if self._feed.failure:  # set before the gate is stopped, so a copy of an update half done is not returned
            raise self._feed.failure
        return snapshot

    def statistics(self) -> Statistics:
        """Return counts, staleness per layer, queue depth, and each thread's time, as of now."""
        crew, tally = self._crew, self._feed.tally
        return Statistics(
            batches=tally.batches,
            samples=tally.samples,
            skipped=tally.skipped,
            in_flight=self._feed.in_flight,
            lanes=self._lanes.count,
            layers=tuple(layer.name for layer in self._lanes.layers),
            versions=tuple(self._lanes.versions.all()),
            staleness=tuple(self._lanes.versions.mean_staleness()),
            mean_queue_depth=tally.queue_depth / max(1, tally.batches),
            max_queue_depth=tally.max_queue_depth,
            threads=tuple(watch.read() for watch in crew.watches) if crew else (),
            exchange=self.exchange.statistics() if self.exchange else {},
        )

    # ---- inside

    def _check_open(self) -> None:
        if self._feed.failure:
            raise RuntimeError("the engine was ended by an error: make another") from self._feed.failure
        if not self._entered or self._stopping.is_set():
            raise RuntimeError("the engine runs inside its with block only: with Engine(...) as engine: ...")

    def _choose_workers(self, batches: list[Any]) -> None:
        self._use(choose_workers(self._model, self._optimizer, self._loss_fn, batches, self._update))

    def _use(self, workers: Decoupled) -> None:
        """Go on with the workers that a plan has chosen."""
        self._workers, self._awaits_plan = workers, False
        self._lanes.resize(workers.lanes_on(self._device.passes_at_once))
        if self._entered:
            self._start_crew()

    def _start_crew(self) -> None:
        intraop = intraop_threads(self._workers, self._lanes.count, lockstep=self._lockstep)
        self._crew = Crew(
            self._workers, self._feed, self._passes, self._lanes, self._delays, self._clock, self._turn,
            self._recorder, intraop, self._lockstep, self._finished, self._fail,
        )  # fmt: skip
        self._crew.start()

    def _next_step(self) -> Step | None:
        try:
            if self._crew and self._crew.inline:
                self._feed.go_on()
                self._crew.train_inline()
            return self._feed.next_step()
        except BaseException as error:
            if error is self._feed.failure:
                self._close()
            raise

    def _prepare_batch(self, batch: Any) -> None:
        self._lanes.cut_blocks(self._passes.losses, batch)
        if self._warmer:
            self._warmer.prepare(batch, self._feed)

    def _finished(self) -> None:
        if self._exchange:
            self._exchange.finished()

    def _fail(self, error: BaseException) -> None:
        """Stop all threads: they leave their passes at the next layer, and whatever they wait for raises."""
        self._stopping.set()
        self._feed.fail(error)
        self._lanes.free.close(discard=True)
        self._passes.gate.stop()
        if self._turn:
            self._turn.stop()
        if self._crew:
            self._crew.stop()

    def _close(self) -> None:
        failure = self._feed.failure
        crew = self._crew
        if crew and (left := crew.join(GRACE_S if failure else None)):
            note = f"still inside the user's code, and ending with it: {', '.join(left)}"
            if failure is not None:
                failure.add_note(note)
        self._stopping.set()
        if self._exchange:
            self._exchange.close()
        self._lanes.close()
