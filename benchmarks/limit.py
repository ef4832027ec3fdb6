"""The limit that no backup on this machine can pass: COPY's own CPU in the server, zstd 1 of its bytes, and loopback.

Each piece is measured alone; the limit is their sum over the cores. COPY goes to /dev/null by psql on two connections, the
big table in halves by ctid.
"""

import itertools
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import zstandard

from benchmarks.database_data import BIG, CHUNK_BYTES, DATABASE, copied, table_bytes, tables_of
from benchmarks.measuring import tree_cpu_seconds
from benchmarks.results import Limit
from benchmarks.servers import Cluster

FORMS = ("binary", "text")
_LOOPBACK_BYTES = 1 << 30


def database_limits(cluster: Cluster, psql: Path) -> list[Limit]:
    """For both forms of COPY."""
    send, receive = loopback()
    found = []
    for form in FORMS:
        cluster.settle()
        before = tree_cpu_seconds([cluster.pid])
        _to_null(cluster, psql, form)
        server = tree_cpu_seconds([cluster.pid]) - before
        raw, compressed, zstd = _compressed(cluster, psql, form)
        found.append(Limit(form, raw, compressed, server, zstd, receive * raw, (send + receive) * compressed))
    return found


def _queries(cluster: Cluster, form: str) -> list[str]:
    """Every table, the biggest first, the big one in halves."""
    sizes = table_bytes(cluster)
    names = sorted(tables_of(cluster), key=lambda name: -sizes[name])
    with cluster.connect(DATABASE) as session:
        (blocks,) = session.execute("SELECT pg_relation_size(%s::regclass) / 8192", (BIG,)).fetchone() or (0,)
    half = f"ctid {{}} '({blocks // 2},0)'"
    halves = [f"(SELECT * FROM {BIG} WHERE {half.format(side)})" for side in ("<", ">=")]
    return [f"COPY {what} TO STDOUT (FORMAT {form})" for what in [*halves, *(name for name in names if name != BIG)]]


def _to_null(cluster: Cluster, psql: Path, form: str) -> None:
    queries = _queries(cluster, form)
    processes = [
        subprocess.Popen(
            [
                str(psql),
                "--no-psqlrc",
                "-q",
                "-v",
                "ON_ERROR_STOP=1",
                "-d",
                cluster.url(DATABASE),
                *itertools.chain(*(("-c", one) for one in mine)),
            ],
            stdout=subprocess.DEVNULL,
        )
        for mine in (queries[0::2], queries[1::2])
    ]
    for process in processes:
        if process.wait() != 0:
            raise RuntimeError("COPY to nowhere failed")


def _compressed(cluster: Cluster, psql: Path, form: str) -> tuple[int, int, float]:
    """Raw bytes, compressed bytes, and the CPU seconds of zstd alone."""
    raw, sizes, spent = 0, [0], [0.0]
    for query in _queries(cluster, form):
        compressor = zstandard.ZstdCompressor(level=1).compressobj()

        def take(chunk: bytes, to: "zstandard.ZstdCompressionObj" = compressor) -> None:
            began = time.thread_time()
            sizes.append(len(to.compress(chunk)))
            spent.append(time.thread_time() - began)

        raw += copied(cluster, psql, query, take)
        sizes.append(len(compressor.flush()))
    return raw, sum(sizes), sum(spent)


def volume_limit(directory: Path) -> Limit:
    """Of a volume: reading the files, and zstd 1 of what is in them."""
    send, receive = loopback()
    raw, compressed, reading, zstd = 0, 0, 0.0, 0.0
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    for folder, _, names in os.walk(directory):
        for name in names:
            with (Path(folder) / name).open("rb", buffering=0) as file:
                while True:
                    began = time.thread_time()
                    chunk = file.read(CHUNK_BYTES)
                    middle = time.thread_time()
                    if not chunk:
                        break
                    compressed += len(compressor.compress(chunk))
                    reading, zstd = reading + middle - began, zstd + time.thread_time() - middle
                    raw += len(chunk)
    compressed += len(compressor.flush())
    return Limit("files", raw, compressed, reading, zstd, 0.0, (send + receive) * compressed)


def loopback() -> tuple[float, float]:
    """CPU seconds per byte of sending and of receiving on the loopback interface."""
    spent: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def receive() -> None:
            connection, _ = server.accept()
            with connection:
                buffer = bytearray(CHUNK_BYTES)
                while connection.recv_into(buffer):
                    pass
                spent.append(time.thread_time())

        thread = threading.Thread(target=receive)
        thread.start()
        began = time.thread_time()
        with socket.create_connection(server.getsockname()) as connection:
            block = bytes(CHUNK_BYTES)
            for _ in range(_LOOPBACK_BYTES // CHUNK_BYTES):
                connection.sendall(block)
        sent = time.thread_time() - began
        thread.join()
    return sent / _LOOPBACK_BYTES, spent[0] / _LOOPBACK_BYTES
