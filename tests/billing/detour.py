"""A way to the broker that leads nowhere until it is opened: connections made before stay dead for good."""

import socket
import threading
from contextlib import suppress
from types import TracebackType


class Detour:
    """A TCP listener on the loopback, at ``address``. Use as a context manager."""

    def __init__(self, to: str) -> None:
        host, _, port = to.split(",")[0].rpartition(":")
        self._to = (host, int(port))
        self._open = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def open(self) -> None:
        """Let the connections that are made from now on reach the broker."""
        self._open.set()

    def __enter__(self) -> "Detour":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listener, *self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._sockets.append(client)
                if self._open.is_set():
                    broker = socket.create_connection(self._to)
                    self._sockets.append(broker)
                    for source, sink in ((client, broker), (broker, client)):
                        threading.Thread(target=_carry, args=(source, sink), daemon=True).start()


def _carry(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
