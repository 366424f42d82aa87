"""Network: two ranks in network namespaces of their own, joined by a slow link that is interrupted and heals.

Needs root, iproute2, and a kernel with veth and tbf: `pytest -m network`. (Delay and loss need netem, which the kernels
that this was run on did not have.)
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from processes import Command, command, place, rows

pytestmark = pytest.mark.network
RATE = "20mbit"
PATIENCE_S = 150.0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two namespaces: name, interface, address of each."""
    both = [(f"asyncprop-{os.getpid()}-{side}", f"ap{side}", f"10.77.0.{side + 1}") for side in range(2)]
    try:
        for name, *_ in both:
            ip("netns", "add", name)
        (first, one, _), (second, two, _) = both
        ip("link", "add", one, "netns", first, "type", "veth", "peer", "name", two, "netns", second)
        for name, interface, address in both:
            ip("-n", name, "addr", "add", f"{address}/24", "dev", interface)
            ip("-n", name, "link", "set", interface, "up")
            ip("-n", name, "link", "set", "lo", "up")
            limit = ["tbf", "rate", RATE, "burst", "32kbit", "latency", "400ms"]
            command = ["ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", interface, "root", *limit]
            subprocess.run(command, check=True, capture_output=True)
        yield both
    finally:
        for name, *_ in both:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def rank(host: tuple[str, str, str], number: int, store: str, out: Path) -> AbstractContextManager[Command]:
    name, interface, _ = host
    return command(
        "digits", "--method", "layup", "--timeout-s", "3", "--epochs", "100000", "--batch-size", "8", "--out", str(out),
        prefix=("ip", "netns", "exec", name), patience_s=PATIENCE_S,
        environment={**place(number, 2, f"{store}:29500"), "GLOO_SOCKET_IFNAME": interface},
    )  # fmt: skip


def test_an_interrupted_link_heals(tmp_path: Path, hosts: list[tuple[str, str, str]]) -> None:
    out, (first, second) = tmp_path / "run", hosts
    with rank(first, 0, first[2], out) as a, rank(second, 1, first[2], out) as b:
        a.read_epochs(2)
        assert {row["rank"] for row in rows(out)} == {0, 1}
        ip("-n", first[0], "link", "set", first[1], "down")
        a.read_until(lambda line: "rank 0: rank 1 was not heard of for 3 s: going on without it" in line)
        a.read_epochs(2)
        ip("-n", first[0], "link", "set", first[1], "up")
        a.read_until_trained_by(out, 1)
        for process in (b, a):
            process.process.send_signal(signal.SIGTERM)
        assert a.process.wait() == b.process.wait() == 128 + signal.SIGTERM
    assert json.loads((out / "checkpoint" / "position.json").read_text())["steps"] == len(rows(out))
