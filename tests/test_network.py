"""Network: hosts that are network namespaces, joined by a slow link that is cut and heals, or that loses packets.

Needs root, iproute2, nftables, and a kernel with veth, tbf and nft's numgen: `pytest -m network`. (Latency needs netem,
which the kernels that this was run on did not have: tests/proxy.py adds it.)
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest

from processes import Command, command, place, rows

pytestmark = pytest.mark.network
RATE = "20mbit"
LOST_PERCENT = 5
PATIENCE_S = 150.0
LAYUP = ("digits", "--method", "layup", "--timeout-s", "3", "--batch-size", "8", "--lr", "0.01")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", "--max-restarts=0")


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface."""

    name: str
    interface: str
    address: str

    @property
    def inside(self) -> tuple[str, ...]:
        """What makes a command run on this host."""
        return ("ip", "netns", "exec", self.name)

    def run(self, *arguments: str, given: str | None = None) -> str:
        return run(*self.inside, *arguments, given=given)

    def set_link(self, state: str) -> None:
        run("ip", "-n", self.name, "link", "set", self.interface, state)

    def lose_packets(self, percent: int) -> None:
        """Drop so many of the packets that come in."""
        rule = f"type filter hook input priority 0\nnumgen random mod 100 < {percent} drop\n"
        self.run("nft", "-f", "-", given=f"table inet lossy {{\nchain input {{\n{rule}}}\n}}\n")

    def die(self) -> None:
        """Kill all that runs here, at once."""
        for pid in run("ip", "netns", "pids", self.name).split():
            os.kill(int(pid), signal.SIGKILL)


def run(*arguments: str, given: str | None = None) -> str:
    return subprocess.run(arguments, check=True, capture_output=True, text=True, input=given).stdout


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    first, second = (Host(f"asyncprop-{os.getpid()}-{side}", f"ap{side}", f"10.77.0.{side + 1}") for side in range(2))
    try:
        for host in (first, second):
            run("ip", "netns", "add", host.name)
        peer = ("peer", "name", second.interface, "netns", second.name)
        run("ip", "link", "add", first.interface, "netns", first.name, "type", "veth", *peer)
        for host in (first, second):
            run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.interface)
            run("ip", "-n", host.name, "link", "set", "lo", "up")
            host.set_link("up")
            limit = ("tbf", "rate", RATE, "burst", "32kbit", "latency", "400ms")
            host.run("tc", "qdisc", "add", "dev", host.interface, "root", *limit)
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


def rank(host: Host, number: int, store: str, out: Path, *options: str) -> AbstractContextManager[Command]:
    return command(
        *LAYUP, "--out", str(out), *options, prefix=host.inside, patience_s=PATIENCE_S,
        environment={**place(number, 2, f"{store}:29500"), "GLOO_SOCKET_IFNAME": host.interface},
    )  # fmt: skip


def agent(host: Host, store: Host, out: Path, *options: str) -> AbstractContextManager[Command]:
    """Run torchrun on a host, as docs/distributed.md says, and two ranks by it."""
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint={store.address}:29400", "--rdzv-id=asyncprop")
    # No name of the machine leads to its address, so both have to be said.
    named = (f"--rdzv-conf=is_host={int(host == store)}", f"--local-addr={host.address}")
    return command(
        *LAYUP, "--out", str(out), *options, patience_s=PATIENCE_S,
        prefix=(*host.inside, *TORCHRUN, *meeting, *named, "--no-python"),
        environment={"GLOO_SOCKET_IFNAME": host.interface},
    )  # fmt: skip


def test_an_interrupted_link_heals(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    out, (first, second), endless = tmp_path / "run", hosts, ("--epochs", "100000")
    with rank(first, 0, first.address, out, *endless) as a, rank(second, 1, first.address, out, *endless) as b:
        a.read_epochs(2)
        assert {row["rank"] for row in rows(out)} == {0, 1}
        first.set_link("down")
        a.read_until(lambda line: "rank 0: rank 1 was not heard of for 3 s: going on without it" in line)
        a.read_epochs(2)
        first.set_link("up")
        a.read_until_trained_by(out, 1)
        for process in (b, a):
            process.process.send_signal(signal.SIGTERM)
        assert a.process.wait() == b.process.wait() == 128 + signal.SIGTERM
    assert json.loads((out / "checkpoint" / "position.json").read_text())["steps"] == len(rows(out))


def test_lost_packets_lose_nothing(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    out, (first, second), short = tmp_path / "run", hosts, ("--epochs", "4")
    for host in hosts:
        host.lose_packets(LOST_PERCENT)
    with rank(first, 0, first.address, out, *short) as a, rank(second, 1, first.address, out, *short) as b:
        assert a.read_to_the_end() == b.read_to_the_end() == 0, "".join(a.lines + b.lines)
    assert not [line for line in a.lines + b.lines if "going on without it" in line]
    result = json.loads((out / "result.json").read_text())
    assert result["exchange"]["weight"] == pytest.approx(1.0)
    assert result["exchange"]["messages_merged"] > 0
    assert {row["rank"] for row in rows(out)} == {0, 1}


def test_a_host_of_torchrun_may_die(tmp_path: Path, hosts: tuple[Host, Host]) -> None:
    out, (first, second), endless = tmp_path / "run", hosts, ("--epochs", "100000")
    with agent(first, first, out, *endless) as a, agent(second, first, out, *endless):
        a.read_epochs(2)
        assert {row["rank"] for row in rows(out)} == {0, 1, 2, 3}
        second.die()
        a.read_until(lambda line: "was not heard of for 3 s: going on without it" in line)
        a.read_epochs(3)
        a.process.send_signal(signal.SIGTERM)
        a.read_to_the_end()
    last = rows(out)[-100:]
    assert {row["rank"] for row in last} == {0, 1}
