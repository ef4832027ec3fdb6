"""A proxy of the tests between a client and a real server, which can break what passes through it, request by request.

It speaks HTTP/1.1 on a loopback port in three ways: in the server's place (`url`), as a plain forward proxy, and as a tunnel
(CONNECT). Everything that it saw stands in `seen`. Nothing is imitated but the answers that a test asks for by `status`.
"""

import contextlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO
from urllib.parse import urlsplit

_BLOCK_BYTES = 64 << 10


@dataclass
class Request:
    """The head of a request; a `rewrite` may change it on its way."""

    method: str
    target: str
    headers: dict[str, str]
    """By lower-case names."""

    @property
    def is_part(self) -> bool:
        """Whether it carries an upload part: of S3 and GCS, or a block of Azure."""
        return self.method == "PUT" and ("uploadId=" in self.target or "comp=block&" in f"{self.target}&")

    @property
    def is_completion(self) -> bool:
        """Whether it ends a multipart upload: of S3 and GCS, or a block list of Azure."""
        return (self.method == "POST" and "uploadId=" in self.target) or (
            self.method == "PUT" and "comp=blocklist" in self.target
        )

    @property
    def is_put(self) -> bool:
        """Whether it stores an object in one piece."""
        return self.method == "PUT" and "comp=" not in self.target and "uploadId=" not in self.target


@dataclass(eq=False)
class Fault:
    """What happens to the next ``times`` requests that ``on`` matches; further fields say what."""

    on: Callable[[Request], bool] = lambda _: True
    times: int = 1
    status: int | None = None
    """Answered in the server's place, which never sees the request; ``code`` is S3's word for it."""
    code: str = "InternalError"
    cut_request_after: int | None = None
    """The connection is reset after so many bytes of the request's body."""
    cut_answer_after: int | None = None
    silent_seconds: float = 0
    """Nothing passes for so long; then it goes on."""
    lose_answer: bool = False
    """The server gets all and answers; the client sees its connection reset."""
    flip_request_at: int | None = None
    """The byte of the body that is changed."""
    flip_answer_at: int | None = None
    then: Callable[[], None] | None = None
    """Done once the request is there, before the server sees it."""
    hits: int = 0


@dataclass
class FaultProxy:
    """A running proxy; faults are added by `inject`."""

    upstream: tuple[str, int]
    rewrite: Callable[[Request], None]
    seen: list[Request] = field(default_factory=list)
    port: int = 0
    bytes_per_second: float | None = None
    """Of the whole line, both ways."""
    latency_seconds: float = 0
    _faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free_at: float = 0

    @property
    def url(self) -> str:
        """The address for a client that takes the proxy for its server."""
        return f"http://127.0.0.1:{self.port}"

    def inject(self, fault: Fault) -> Fault:
        """Switch a fault on."""
        with self._lock:
            self._faults.append(fault)
        return fault

    def heal(self) -> None:
        """No fault any longer."""
        with self._lock:
            self._faults.clear()

    def fault_for(self, request: Request) -> Fault:
        """The first fault that still has to hit such a request, else one that does nothing."""
        with self._lock:
            self.seen.append(request)
            for fault in self._faults:
                if fault.hits < fault.times and fault.on(request):
                    fault.hits += 1
                    return fault
        return Fault()

    def pass_time(self, size_bytes: int) -> None:
        """Wait as long as the line is taken by so many bytes."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size_bytes / self.bytes_per_second
            pause = self._free_at - time.monotonic()
        time.sleep(max(0.0, pause))


@contextlib.contextmanager
def fault_proxy(upstream_url: str, rewrite: Callable[[Request], None] = lambda _: None) -> Iterator[FaultProxy]:
    """A proxy before the server at ``upstream_url`` (its host and port); ``rewrite`` may change every request."""
    parts = urlsplit(upstream_url)
    assert parts.hostname is not None
    assert parts.port is not None
    proxy = FaultProxy((parts.hostname, parts.port), rewrite)

    class Handler(_Connection):
        owner = proxy

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            server.shutdown()


class _BrokenError(Exception):
    """This connection is at its end, on purpose."""


class _Connection(socketserver.StreamRequestHandler):
    owner: FaultProxy
    disable_nagle_algorithm = True
    _server: socket.socket | None = None
    _answers: BinaryIO

    def handle(self) -> None:
        with contextlib.suppress(OSError, _BrokenError, ValueError):
            while self._one():
                pass
        if self._server is not None:
            self._server.close()

    def _one(self) -> bool:
        head = _head(self.rfile)
        if head is None:
            return False
        first, headers = head
        method, target, _ = first.split(" ", 2)
        request = Request(method, target, headers)
        if target.startswith("http://"):
            parts = urlsplit(target)
            request.target = f"{parts.path or '/'}?{parts.query}".rstrip("?")
        fault = self.owner.fault_for(request)
        if method == "CONNECT":
            self._tunnel(target)
        time.sleep(self.owner.latency_seconds)
        if headers.pop("expect", None):
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault.status is not None:
            self._refuse(request, fault)
            return True
        self.owner.rewrite(request)
        self._send(request, fault)
        self._answer(request, fault)
        return True

    def _tunnel(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._server = socket.create_connection((host, int(port)), 10)
        self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=_pump, args=(self._server, self.connection), daemon=True)
        back.start()
        _pump(self.connection, self._server)
        back.join()
        raise _BrokenError

    def _refuse(self, request: Request, fault: Fault) -> None:
        for _ in _blocks(self.rfile, int(request.headers.get("content-length", "0"))):
            pass
        body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>asked for by a test</Message></Error>"
        content = b"" if request.method == "HEAD" else body.encode()
        head = f"HTTP/1.1 {fault.status} {fault.code}\r\ncontent-type: application/xml\r\ncontent-length: {len(content)}\r\n\r\n"
        self.wfile.write(head.encode() + content)

    def _send(self, request: Request, fault: Fault) -> None:
        if self._server is None:
            self._server = socket.create_connection(self.owner.upstream, 10)
            self._server.settimeout(120)
            self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._answers = self._server.makefile("rb")
        lines = [f"{request.method} {request.target} HTTP/1.1"]
        lines += [f"{name}: {value}" for name, value in request.headers.items()]
        size_bytes = int(request.headers.get("content-length", "0"))
        if fault.then is not None:
            fault.then()
        self._server.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        seen_bytes, is_heard = 0, True
        for block in _blocks(self.rfile, size_bytes):
            self.owner.pass_time(len(block))
            passed = _changed(block, seen_bytes, fault.flip_request_at)
            seen_bytes += len(block)
            if fault.cut_request_after is not None and seen_bytes > fault.cut_request_after:
                self._reset()
            if is_heard:
                try:
                    self._server.sendall(passed)
                except OSError:
                    is_heard = False  # it has answered already and listens no longer
        time.sleep(fault.silent_seconds)

    def _answer(self, request: Request, fault: Fault) -> None:
        head = _head(self._answers)
        if head is None:
            raise _BrokenError
        first, headers = head
        status = int(first.split(" ", 2)[1])
        if fault.lose_answer:
            for _ in _body(self._answers, request, status, headers):
                pass
            self._reset()
        lines = [first, *(f"{name}: {value}" for name, value in headers.items())]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
        seen_bytes = 0
        for block in _body(self._answers, request, status, headers):
            self.owner.pass_time(len(block))
            passed = _changed(block, seen_bytes, fault.flip_answer_at)
            seen_bytes += len(block)
            if fault.cut_answer_after is not None and seen_bytes > fault.cut_answer_after:
                self._reset()
            self.wfile.write(passed)
        if headers.get("connection", "").lower() == "close":
            raise _BrokenError

    def _reset(self) -> None:
        """End the connection as a broken line does, not as a server that closes it."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        raise _BrokenError


def _head(stream: BinaryIO) -> tuple[str, dict[str, str]] | None:
    first = stream.readline().decode("latin-1").rstrip("\r\n")
    if not first:
        return None
    headers = {}
    while line := stream.readline().decode("latin-1").rstrip("\r\n"):
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if first.startswith("HTTP/1.1 100"):
        return _head(stream)
    return first, headers


def _blocks(stream: BinaryIO, size_bytes: int) -> Iterator[bytes]:
    while size_bytes > 0:
        block = stream.read(min(size_bytes, _BLOCK_BYTES))
        if not block:
            raise _BrokenError
        size_bytes -= len(block)
        yield block


def _body(stream: BinaryIO, request: Request, status: int, headers: dict[str, str]) -> Iterator[bytes]:
    """The body of an answer as it stands on the wire, chunk heads included."""
    if request.method == "HEAD" or status in (204, 304):
        return
    if headers.get("transfer-encoding", "").lower() != "chunked":
        yield from _blocks(stream, int(headers.get("content-length", "0")))
        return
    while True:
        line = stream.readline()
        yield line
        size_bytes = int(line.split(b";")[0], 16)
        yield from _blocks(stream, size_bytes + 2)
        if size_bytes == 0:
            return


def _changed(block: bytes, offset: int, position: int | None) -> bytes:
    if position is None or not offset <= position < offset + len(block):
        return block
    changed = bytearray(block)
    changed[position - offset] ^= 1
    return bytes(changed)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while block := source.recv(_BLOCK_BYTES):
            sink.sendall(block)
        sink.shutdown(socket.SHUT_WR)
