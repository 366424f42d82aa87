"""Proxy: a network of a test's own between ranks on loopback: slow, narrow, interrupted, as the test says. No root.

Ranks meet in torch's store, and tell each other there at which port they listen. Each has a door of its own to the
store, which puts a relay's port in the place of another rank's. So all that ranks say to each other goes through here.

Of two gloo sides that with the lesser address listens, and the other connects; so a relay's must be less than that of
the rank that is told of it if it leads to a lower rank, and greater if to a higher one.
"""

import asyncio
import re
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Literal, Self

HOST = "127.0.0.1"
LOWER, HIGHER = b"\x00\x00\x00\x00", b"\x7f\x00\x00\x02"
"""Addresses of this host, too: less and greater than `HOST`."""

LISTENER = re.compile(rb"(?<=\x02\x00)(..)\x7f\x00\x00\x01(?=\x00{8})", re.DOTALL)
"""Port and host in gloo's address of a listener, a sockaddr_in."""

State = Literal["open", "silent", "cut"]
"""`silent` keeps what is said until it is open again, as where packets are lost; `cut` resets all connections."""

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Relay:
    """Passes on what comes to a port of its own to another port, and what comes back.

    Args:
        network: of which it is part.
        port: where to.
        state: at first.
    """

    def __init__(self, network: "Network", port: int, state: State = "open") -> None:
        self.port = 0
        self._network, self._target = network, port
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._speaks = asyncio.Event()
        self._server: asyncio.Server | None = None
        self.become(state)

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "0.0.0.0", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def become(self, state: State) -> None:
        """Change the state; in the network's own thread."""
        self._state = state
        if state == "silent":
            self._speaks.clear()
        else:
            self._speaks.set()
        if state == "cut":
            for writer in self._open:
                writer.transport.abort()

    async def stop(self) -> None:
        assert self._server
        self._server.close()
        self.become("cut")
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def heard(self, data: bytes) -> bytes:
        """Return what is passed on of what comes to this port."""
        return data

    async def answered(self, data: bytes) -> bytes:
        """Return what is passed on of what comes back."""
        return data

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        if self._state == "cut":
            writer.transport.abort()
            self._network.was_refused.set()
            return
        try:
            their_reader, their_writer = await asyncio.open_connection(HOST, self._target)
        except OSError:
            writer.transport.abort()
            return
        self._open.add(their_writer)
        there, back = (
            self._pass_on(reader, their_writer, self.heard),
            self._pass_on(their_reader, writer, self.answered),
        )
        for way in (there, back):
            task = asyncio.create_task(way)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], Any]
    ) -> None:
        """Pass on one way, each piece when it has come through: it waits for those before it, and travels."""
        network, free, under_way = self._network, 0.0, asyncio.Queue[tuple[float, bytes]](maxsize=64)
        arrives = asyncio.create_task(self._deliver(under_way, writer))
        try:
            while data := await reader.read(network.piece_bytes):
                data = await change(data)
                free = max(free, network.loop.time()) + len(data) / network.bytes_per_s
                await under_way.put((free + network.latency_s, data))
        except OSError:
            pass
        finally:
            await under_way.put((0.0, b""))
            await arrives

    async def _deliver(self, under_way: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(max(0.0, due - self._network.loop.time()))
            await self._speaks.wait()
            if not data:
                writer.close()
                return
            if not writer.is_closing():
                writer.write(data)


class Door(Relay):
    """A relay to the store, for one rank."""

    def __init__(self, network: "Network", port: int, rank: int) -> None:
        super().__init__(network, port)
        self.rank = rank

    async def heard(self, data: bytes) -> bytes:
        """Note at which ports this rank listens."""
        self._network.owners |= {int.from_bytes(port, "big"): self.rank for port in LISTENER.findall(data)}
        return data

    async def answered(self, data: bytes) -> bytes:
        """Put relays in the place of the ports at which others listen."""
        told: dict[bytes, bytes] = {}
        for port in set(LISTENER.findall(data)):
            if (other := self._network.owners[int.from_bytes(port, "big")]) != self.rank:
                relay = await self._network.relay_to(int.from_bytes(port, "big"))
                told[port] = relay.port.to_bytes(2, "big") + (LOWER if other < self.rank else HIGHER)
        return LISTENER.sub(lambda found: told.get(found[1], found[0]), data)


class Network:
    """All doors and relays, in a thread of its own, between `with` and its end.

    Args:
        store: port of the store.

    Attributes:
        latency_s: seconds that each piece travels, one way.
        bytes_per_s: that go through each connection, each way.
        owners: the rank that listens, or listened, at a port.
        was_refused: set when a rank has tried to connect to another in vain, since `links` was last called.
    """

    piece_bytes = 8192

    def __init__(self, store: int) -> None:
        self.latency_s, self.bytes_per_s = 0.0, float("inf")
        self.loop = asyncio.new_event_loop()
        self.was_refused = threading.Event()
        self.owners: dict[int, int] = {}
        self._store = store
        self._doors: list[Door] = []
        self._relays: dict[int, Relay] = {}
        self._links: State = "open"
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._do(self._stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def door(self, rank: int) -> Door:
        """Open a way to the store, for one rank; its `port` is what the rank is given."""
        door: Door = self._do(Door(self, self._store, rank).start())
        self._doors.append(door)
        return door

    def links(self, state: State) -> None:
        """Change the state of all that is between ranks, now and from now on; ways to the store stay as they are."""
        self.was_refused.clear()
        self._do(self._change(list(self._relays.values()), state, is_for_all=True))

    def set(self, door: Door, state: State) -> None:
        """Change the state of one rank's way to the store."""
        self._do(self._change([door], state))

    async def relay_to(self, port: int) -> Relay:
        if port not in self._relays:
            self._relays[port] = await Relay(self, port, self._links).start()
        return self._relays[port]

    async def _change(self, relays: list[Any], state: State, *, is_for_all: bool = False) -> None:
        if is_for_all:
            self._links = state
        for relay in relays:
            relay.become(state)

    async def _stop(self) -> None:
        for relay in [*self._doors, *self._relays.values()]:
            await relay.stop()

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30.0)
