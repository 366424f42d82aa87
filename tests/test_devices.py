"""Devices: what the engine asks of one. CUDA's own part is in test_cuda.py."""

import subprocess
import sys

import pytest
import torch

import asyncprop as ap
from asyncprop import devices
from asyncprop.devices import CpuDevice, CudaDevice, available_cores, device_of, tensors_in
from asyncprop.engine.workers import intraop_threads


def test_intraop_threads_are_set_for_the_block_only() -> None:
    before = torch.get_num_threads()
    with CpuDevice().thread(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_a_model_is_on_one_known_device() -> None:
    cpu, meta = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1, device="meta"))
    assert isinstance(device_of([cpu]), CpuDevice)
    with pytest.raises(ValueError, match="one device"):
        device_of([cpu, meta])
    with pytest.raises(ValueError, match="cpu or cuda"):
        device_of([meta])
    assert CudaDevice(torch.device("cuda")).passes_at_once is None


def test_streams_are_shared_by_all_who_ask_for_one_of_a_device_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_STREAMS", {})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: (device, object()))
    first, again, other = (CudaDevice(torch.device("cuda", index)) for index in (0, 0, 1))
    assert first.stream(0) is again.stream(0) is first.stream(0)
    assert len({first.stream(0), first.stream(1), first.stream("exchange"), other.stream(0)}) == 4
    assert other.stream(0)[0] == torch.device("cuda", 1)


def test_lanes_are_bounded_by_what_the_device_computes_at_once() -> None:
    assert [ap.Decoupled(1, 2).lanes_on(cores) for cores in (1, 2, 3, 64, None)] == [1, 2, 3, 3, 3]
    assert ap.Decoupled(1, 2, lanes=7).lanes_on(2) == 7
    assert ap.Coupled(5).lanes_on(2) == 5


def test_cores_are_shared_out_over_the_passes_that_run_at_once() -> None:
    cores = available_cores()
    assert intraop_threads(ap.Decoupled(1, 2), 1, lockstep=False) == cores
    assert intraop_threads(ap.Decoupled(1, 2), 2, lockstep=False) == max(1, cores // 2)
    assert intraop_threads(ap.Coupled(cores), cores, lockstep=False) == 1
    assert intraop_threads(ap.Decoupled(intraop_threads=3), 2, lockstep=True) == 3


def test_tensors_are_found_wherever_a_batch_keeps_them() -> None:
    class Record:
        def __init__(self) -> None:
            self.inner = torch.ones(3)

    a, b = torch.ones(1), torch.ones(2)
    assert [len(t) for t in tensors_in({"x": (a, [b, None]), "y": Record()})] == [1, 2, 3]
    assert list(tensors_in("text")) == []


FAULTS = """
import ctypes, resource, sys, torch, asyncprop
torch.set_num_threads(1)
if int(sys.argv[1]):
    asyncprop.keep_freed_memory()
else:
    ctypes.CDLL(None).mallopt(-3, 1 << 17)
for _ in range(3):
    torch.ones(1 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.ones(1 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_freed_memory_is_kept() -> None:
    def faults(kept: int) -> int:
        return int(subprocess.run([sys.executable, "-c", FAULTS, str(kept)], capture_output=True, check=True).stdout)

    assert faults(1) < faults(0) / 4
