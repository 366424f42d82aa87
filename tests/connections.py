"""Connections: cuts the TCP connections between two processes, as a network that resets them does. Linux; no root.

The kernel hands out a copy of another process's socket (pidfd_getfd, Linux 5.6); shutting that down ends the connection
for both sides. What is opened again is cut again, for as long as is asked.
"""

import contextlib
import ctypes
import os
import socket
import time
from pathlib import Path

PIDFD_GETFD = 438
ESTABLISHED = "01"
LOOK_EVERY_S = 0.02

Ends = tuple[str, str]
"""Local and remote address, as the kernel writes them."""


def interrupt(one: int, other: int, seconds: float) -> int:
    """Let no connection between two processes live for so many seconds; return how many were cut."""
    end, cut = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        cut += sever(one, other)
        time.sleep(LOOK_EVERY_S)
    return cut


def sever(one: int, other: int) -> int:
    """Cut the connections that are now between two processes; return how many there were. The dead have none."""
    cut = 0
    theirs = connections(other)
    for (local, remote), number in connections(one).items():
        if (remote, local) in theirs:
            with contextlib.suppress(OSError), _copied(one, number) as copy:
                copy.shutdown(socket.SHUT_RDWR)
                cut += 1
    return cut


def connections(pid: int) -> dict[Ends, int]:
    """Return the file descriptors of a process's TCP connections, by their two ends."""
    inodes: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # it has just been closed
                target = os.readlink(entry)
                if target.startswith("socket:["):
                    inodes[target[8:-1]] = int(entry.name)
    found: dict[Ends, int] = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
                _, local, remote, state, *_, inode = line.split()[:10]
                if state == ESTABLISHED and inode in inodes:
                    found[local, remote] = inodes[inode]
    return found


def _copied(pid: int, number: int) -> socket.socket:
    """Return a copy of another process's socket."""
    process = os.pidfd_open(pid)
    try:
        copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, number, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
    finally:
        os.close(process)
    return socket.socket(fileno=copy)
