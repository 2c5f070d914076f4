"""The way to the broker: a TCP proxy whose connections can be cut (SIGUSR1 all, SIGUSR2 every second one).

``python -m tests.chaos.proxy LISTEN TO``, two ports on the loopback. SIGSTOP makes it a network that has gone silent.
"""

import asyncio
import signal
import sys

_HOST = "127.0.0.1"


class _End(asyncio.Protocol):
    """One end of a proxied connection; what comes in goes out at the other."""

    def __init__(self, other: "_End | None" = None) -> None:
        self.transport: asyncio.Transport | None = None
        self.other = other

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.abort()


class _Client(_End):
    def __init__(self, to: int, clients: "set[_Client]") -> None:
        super().__init__()
        self._to, self._clients = to, clients
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.pause_reading()  # until there is someone to pass it on to
        self._clients.add(self)
        self._connecting = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        assert self.transport is not None
        try:
            _, self.other = await asyncio.get_running_loop().create_connection(lambda: _End(self), _HOST, self._to)
        except OSError:
            self.transport.abort()
            return
        if self.transport.is_closing():
            self.cut()
        else:
            self.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._clients.discard(self)
        super().connection_lost(error)

    def cut(self) -> None:
        for end in (self, self.other):
            if end is not None and end.transport is not None:
                end.transport.abort()


async def main(listen: int, to: int) -> None:
    loop = asyncio.get_running_loop()
    clients: set[_Client] = set()

    def cut(step: int) -> None:
        for client in list(clients)[::step]:
            client.cut()

    loop.add_signal_handler(signal.SIGUSR1, cut, 1)
    loop.add_signal_handler(signal.SIGUSR2, cut, 2)
    server = await loop.create_server(lambda: _Client(to, clients), _HOST, listen)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
