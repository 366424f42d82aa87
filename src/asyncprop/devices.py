"""CPU and CUDA behind one face: streams, thread settings, timing, and the hand-over of tensors between streams.

Everything that differs between the two lives here; the engine calls the face and never asks which one it has.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

Stream = Any
"""What a lane's work is queued on: a `torch.cuda.Stream`, or None on the CPU."""
Mark = Any
"""A point in a stream's time: seconds on the CPU, a recorded `torch.cuda.Event` on CUDA."""

_NOTHING: AbstractContextManager[None] = nullcontext()
_STREAMS: dict[tuple[torch.device, int | str], Stream] = {}
"""Those of CUDA devices, by device and name; they live as long as the process."""
_STREAMS_LOCK = threading.Lock()


class Device(Protocol):
    """What the engine needs of a device. Threads call it at the same time; implementations keep no state of a pass.

    `results_are_ready` tells whether reading a loss costs nothing, as work is done when the call returns.
    """

    results_are_ready: bool

    @property
    def passes_at_once(self) -> int | None:
        """How many passes it can compute at once: more in flight only add staleness. None if unknown."""

    def thread(self, intraop_threads: int) -> AbstractContextManager[None]:
        """Set, for the `with` block, what PyTorch keeps per thread: intra-op threads, device, backward's thread."""

    def stream(self, name: int | str) -> Stream:
        """Return the stream of this name, the same one at each call: a lane's name is its index.

        All engines of a process share it, so that one finds the memory that an earlier one has freed there. Engines
        that live at the same time stay correct by it, as the work of each keeps its order, but wait for each other's.
        """

    def current_stream(self) -> Stream:
        """Return the stream that the calling thread's work is queued on now."""

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Queue the work of the `with` block on `stream`."""

    def hand_over(self) -> None:
        """Let every later `receive` wait for what this thread has queued on its current stream so far."""

    def receive(self, stream: Stream, tensors: Iterator[torch.Tensor]) -> None:
        """Let `stream` use tensors that were made on the default stream, or handed over: wait for them, and keep their
        memory until then.
        """

    def wait(self, stream: Stream, mark: Mark) -> None:
        """Let what is queued on `stream` from now on begin after `mark`, of whatever stream; the host does not wait."""

    def finish(self, stream: Stream) -> None:
        """Wait until all work of `stream` is done."""

    def buffer(self, length_bytes: int) -> torch.Tensor:
        """Make a buffer of bytes on the CPU that this device copies to and from at its full speed."""

    def mark(self) -> Mark:
        """Mark the current point in the current stream's time."""

    def seconds(self, start: Mark, end: Mark) -> float:
        """Seconds between two marks; both must lie before a `finish` of their stream."""


class CpuDevice:
    """The CPU: no streams, and work is done when the call returns."""

    results_are_ready = True

    @property
    def passes_at_once(self) -> int:
        """One per core."""
        return available_cores()

    @contextmanager
    def thread(self, intraop_threads: int) -> Iterator[None]:
        """Set the intra-op threads: PyTorch keeps the number per thread, and a new thread starts with all cores."""
        before = torch.get_num_threads()
        if before == intraop_threads:
            yield
            return
        torch.set_num_threads(intraop_threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def stream(self, name: int | str) -> Stream:
        """Return None: the CPU has no streams."""
        return None

    def current_stream(self) -> Stream:
        """Return None."""
        return None

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Do nothing."""
        return _NOTHING

    def hand_over(self) -> None:
        """Do nothing."""

    def receive(self, stream: Stream, tensors: Iterator[torch.Tensor]) -> None:
        """Do nothing."""

    def wait(self, stream: Stream, mark: Mark) -> None:
        """Do nothing."""

    def finish(self, stream: Stream) -> None:
        """Do nothing."""

    def buffer(self, length_bytes: int) -> torch.Tensor:
        """Return plain memory."""
        return torch.zeros(length_bytes, dtype=torch.uint8)

    def mark(self) -> Mark:
        """Return the clock."""
        return time.perf_counter()

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the difference."""
        return float(end - start)


class CudaDevice:
    """One CUDA device. Each lane of an engine has its own stream, which its forward and its backward pass use in turn.

    A backward op runs on the stream of its forward op, so a lane's pass is ordered by its stream alone. Lanes read and
    write the shared parameters from different streams without events between them: that race is the algorithm. A lock
    orders threads of the host, not streams: where order counts (see `Unit.alone`), it takes `wait` or `finish`, too.
    """

    results_are_ready = False
    passes_at_once: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def thread(self, intraop_threads: int) -> Iterator[None]:
        """Run this thread's backward passes on this thread: autograd's one thread per device would serialise lanes."""
        with (
            CpuDevice().thread(intraop_threads),
            torch.cuda.device(self.device),
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield

    def stream(self, name: int | str) -> Stream:
        """Return the stream of this name, made at the first call.

        PyTorch keeps freed memory, and a workspace of cuBLAS for each thread, per stream: with streams of its own each
        engine would ask the driver for memory anew, amid its first batches.
        """
        with _STREAMS_LOCK:
            key = (self.device, name)
            if key not in _STREAMS:
                _STREAMS[key] = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            return _STREAMS[key]

    def current_stream(self) -> Stream:
        """Return this thread's stream on this device, whichever device is current."""
        return torch.cuda.current_stream(self.device)

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """Make `stream` current."""
        context: AbstractContextManager[Any] = torch.cuda.stream(stream)
        return context

    def hand_over(self) -> None:
        """Order the default stream after the current one, if that is another."""
        current, default = torch.cuda.current_stream(self.device), torch.cuda.default_stream(self.device)
        if current != default:
            default.wait_stream(current)

    def receive(self, stream: Stream, tensors: Iterator[torch.Tensor]) -> None:
        """Order `stream` after the default stream, and tell the allocator that `stream` uses the tensors."""
        stream.wait_stream(torch.cuda.default_stream(self.device))
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)

    def wait(self, stream: Stream, mark: Mark) -> None:
        """Let the stream wait for the event."""
        stream.wait_event(mark)

    def finish(self, stream: Stream) -> None:
        """Wait on the host; the GIL is released meanwhile."""
        stream.synchronize()

    def buffer(self, length_bytes: int) -> torch.Tensor:
        """Return pinned memory."""
        return torch.zeros(length_bytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> Mark:
        """Record a timing event on the current stream."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        """Return the time between two recorded events."""
        return float(start.elapsed_time(end)) / 1e3


def available_cores() -> int:
    """Return the number of cores that this process may use: its share, if torch's launcher started several here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def device_of(parameters: list[torch.nn.Parameter]) -> Device:
    """Return the device that holds all `parameters`; refuse a model that spans several, or one of another kind."""
    devices = {parameter.device for parameter in parameters}
    if len(devices) != 1:
        raise ValueError(
            f"model must be on one device (got {sorted(map(str, devices))}): move it with model.to(device)"
        )
    device = devices.pop()
    if device.type == "cpu":
        return CpuDevice()
    if device.type == "cuda":
        return CudaDevice(device)
    raise ValueError(f"model must be on a cpu or cuda device (got {device}): move it with model.to('cpu')")


def keep_freed_memory(*, large_tensors: bool = False) -> bool:
    """Tell the C library to keep the memory of freed tensors, instead of giving it back to the system each batch.

    Activations are allocated and freed once a batch. With glibc's defaults each batch faults its pages in anew, with
    several threads all the more (5 to 10 % of a small ResNet's time). It is a setting of the whole process, so it is
    for programs to call, once, before their first thread: the command and the benchmarks do, for every method alike.

    Args:
        large_tensors: whether tensors of more than 64 MiB come and go with each batch (such as the workspace of an
            LSTM: 97 MiB for 64 texts of 100 tokens). They fit no thread's heap, so all threads then share one heap.
            That saves such a model 17 % of its time, and costs one of many small tensors 20 % (a narrow ResNet).

    Returns:
        Whether there was a C library that takes the settings (glibc).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, top_pad, mmap_threshold, arena_max = -1, -2, -3, -8  # M_TRIM_THRESHOLD and so on
    # The pad is more than a thread's heap can hold, so that a heap that becomes empty is kept, too.
    settings = {mmap_threshold: 1 << 30, trim_threshold: 2**31 - 1, top_pad: 128 << 20}
    if large_tensors:
        settings[arena_max] = 1
    return all(mallopt(setting, value) for setting, value in settings.items())


def tensors_in(batch: object) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch: of a tensor, or of tuples, lists and mappings of them, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors_in(value)
    elif hasattr(batch, "__dict__"):
        yield from tensors_in(vars(batch))
