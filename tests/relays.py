"""A server's port through a third party."""

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def relayed(target: int, *others: int, is_pooler: bool = False, port: int = 0) -> Iterator[int]:
    """A port (0: a free one) that leads to another, with ``others`` each connection to the next of them.

    A pooler hands out a process id of its own, like PgBouncer (the message BackendKeyData).
    """
    targets = itertools.cycle((target, *others))
    listener = socket.create_server(("127.0.0.1", port))
    connections: list[socket.socket] = []

    def relay(source: socket.socket, sink: socket.socket, *, change: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                key = data.find(b"K\x00\x00\x00\x0c") if change else -1
                if key >= 0:
                    data = data[: key + 5] + b"\x00\x00\x00\x07" + data[key + 9 :]
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", next(targets)))
                connections.extend((client, server))
                threading.Thread(target=relay, args=(client, server), kwargs={"change": False}, daemon=True).start()
                threading.Thread(target=relay, args=(server, client), kwargs={"change": is_pooler}, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
        for one in connections:
            one.close()


@contextlib.contextmanager
def refusing_pooler() -> Iterator[int]:
    """A port at which a pooler refuses a connection that begins with settings, as PgBouncer does where it does not know them."""
    fields = b"SFATAL\0C08P01\0Munsupported startup parameter: options\0\0"
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                # A request for encryption is eight bytes long ("Message Formats" in the manual), and is answered with no.
                with client, contextlib.suppress(OSError):
                    while len(client.recv(65536)) == 8:
                        client.sendall(b"N")
                    client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
