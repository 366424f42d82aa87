"""Links: two ranks on a network of the test's own that is slow, is cut, and falls silent; and cuts by the kernel."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from connections import connections, sever
from processes import Command, command, place, rows
from proxy import HOST, Network

LATENCY_S, BYTES_PER_S = 0.005, 4e6
PATIENCE_S = 60.0


def rank(number: int, port: int, out: Path) -> AbstractContextManager[Command]:
    return command(
        "digits", "--method", "layup", "--timeout-s", "5", "--epochs", "100000", "--out", str(out),
        environment={**place(number, 2, f"{HOST}:{port}"), "TORCHELASTIC_USE_AGENT_STORE": "True"},
    )  # fmt: skip


def exchanged(out: Path) -> dict[str, Any]:
    """Return what the ranks have exchanged so far."""
    found: dict[str, Any] = rows(out, "epochs")[-1]["exchange"]
    return found


def test_training_goes_on_over_slow_links_and_interrupted_ones_heal(tmp_path: Path) -> None:
    out, store = tmp_path / "run", TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    with Network(store.port) as network:
        network.latency_s, network.bytes_per_s = LATENCY_S, BYTES_PER_S
        doors = [network.door(number) for number in range(2)]
        with rank(0, doors[0].port, out) as a, rank(1, doors[1].port, out) as b:
            a.read_epochs(2)
            slow = exchanged(out)
            assert slow["messages_merged"] > 0
            assert slow["age_s"] > 2 * LATENCY_S  # all messages went this way
            assert {row["rank"] for row in rows(out)} == {0, 1}

            network.links("cut")
            assert network.was_refused.wait(PATIENCE_S), "nobody tries again"
            network.links("open")
            a.read_until(
                lambda line: line.startswith("epoch ") and exchanged(out)["messages_sent"] > slow["messages_sent"]
            )
            a.read_epochs(2)
            assert all(row["exchange"]["weight"] == pytest.approx(1) for row in rows(out, "epochs"))

            network.links("silent")
            network.set(doors[1], "silent")
            a.read_until(lambda line: "rank 0: rank 1 was not heard of for 5 s: going on without it" in line)
            a.read_epochs(2)
            network.set(doors[1], "open")
            network.links("open")
            a.read_until_trained_by(out, 1)
            a.read_epochs(2)
            assert exchanged(out)["weight"] == pytest.approx(1)
            for process in (b, a):
                process.process.send_signal(signal.SIGTERM)
            assert a.read_to_the_end() == b.read_to_the_end() == 128 + signal.SIGTERM


@pytest.fixture
def other_end() -> Iterator[tuple[socket.socket, int]]:
    """A connection to another process, and that process."""
    connect = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print(s.recv(1))"
    with socket.create_server((HOST, 0)) as listener:
        port = str(listener.getsockname()[1])
        with subprocess.Popen([sys.executable, "-c", connect, port], stdout=subprocess.PIPE) as process:
            here, _ = listener.accept()
            with here:
                yield here, process.pid
            process.kill()


def test_connections_between_two_processes_can_be_cut(other_end: tuple[socket.socket, int]) -> None:
    here, pid = other_end
    assert len(connections(pid)) == 1
    assert sever(os.getpid(), pid) == 1
    assert here.recv(1) == b""
    assert sever(os.getpid(), pid) == 0
