"""The limit that no backup that reads in the same form can pass: COPY's CPU in the server, zstd 1 of its bytes, and loopback.

Each piece is measured alone; the limit is their sum over the cores. COPY goes to /dev/null by psql on two connections, every
table in one piece. What a set needs besides (its hashes, an S3 server that takes the bytes in on the same
cores) is measured too, and stands beside the limit, not in it.
"""

import hashlib
import itertools
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import zstandard

from athena_backup.store.clients import open_s3
from benchmarks.bucket import Bucket
from benchmarks.database_data import CHUNK_BYTES, DATABASE, copied, table_bytes, tables_of
from benchmarks.measuring import tree_cpu_seconds
from benchmarks.results import Limit
from benchmarks.servers import Cluster

FORMS = ("binary", "text")
_LOOPBACK_BYTES = 1 << 30
_HASHED_BYTES = 1 << 30
_UPLOADED_BYTES = 1 << 30
_BLOCK_BYTES = 4 << 20


def database_limits(cluster: Cluster, psql: Path, bucket: Bucket, settle: Callable[[], None]) -> list[Limit]:
    """For both forms of COPY, each after ``settle``."""
    send, receive = loopback()
    sha256, service = hashing(), uploading(bucket)
    found = []
    for form in FORMS:
        settle()
        before = tree_cpu_seconds([cluster.pid])
        _to_null(cluster, psql, form)
        server = tree_cpu_seconds([cluster.pid]) - before
        raw, compressed, zstd = _compressed(cluster, psql, form)
        found.append(
            Limit(
                *(form, raw, compressed, server, zstd, receive * raw, (send + receive) * compressed),
                sha256_cpu_seconds=sha256 * compressed,
                store_cpu_seconds=(send + service) * compressed,
            )
        )
    return found


def _queries(cluster: Cluster, form: str) -> list[str]:
    """Every table, the biggest first."""
    sizes = table_bytes(cluster)
    return [
        f"COPY {name} TO STDOUT (FORMAT {form})" for name in sorted(tables_of(cluster), key=lambda name: -sizes[name])
    ]


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
        for mine in (queries[:1], queries[1:])
    ]
    # All are waited for first: none is to run on beside a contender.
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError("COPY to nowhere failed")


def _compressed(cluster: Cluster, psql: Path, form: str) -> tuple[int, int, float]:
    """Raw bytes, compressed bytes, and the CPU seconds of zstd alone."""
    raw, zstd = 0, _Zstd()
    for query in _queries(cluster, form):
        raw += copied(cluster, psql, query, zstd.take)
        zstd.end()
    return raw, zstd.compressed_bytes, zstd.cpu_seconds


class _Zstd:
    """Level 1 with the checksum that every frame of a set has to carry, in one call for every `_BLOCK_BYTES`, which is cheaper than
    piece by piece: zstd would copy each first.
    """

    def __init__(self) -> None:
        self.compressed_bytes = 0
        self.cpu_seconds = 0.0
        self._compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
        self._block = bytearray()

    def take(self, chunk: bytes) -> None:
        """The next bytes of a stream."""
        self._block += chunk
        if len(self._block) >= _BLOCK_BYTES:
            self.end()

    def end(self) -> None:
        """Compress what has been gathered."""
        began = time.thread_time()
        self.compressed_bytes += len(self._compressor.compress(self._block))
        self.cpu_seconds += time.thread_time() - began
        self._block.clear()


def volume_limit(directory: Path, bucket: Bucket) -> Limit:
    """Of a volume: reading the files, and zstd 1 of what is in them."""
    send, receive = loopback()
    sha256, service = hashing(), uploading(bucket)
    raw, reading, zstd = 0, 0.0, _Zstd()
    for folder, _, names in os.walk(directory):
        for name in names:
            with (Path(folder) / name).open("rb", buffering=0) as file:
                while True:
                    began = time.thread_time()
                    chunk = file.read(CHUNK_BYTES)
                    reading += time.thread_time() - began
                    if not chunk:
                        break
                    zstd.take(chunk)
                    raw += len(chunk)
    zstd.end()
    compressed = zstd.compressed_bytes
    return Limit(
        *("files", raw, compressed, reading, zstd.cpu_seconds, 0.0, (send + receive) * compressed),
        sha256_cpu_seconds=sha256 * compressed,
        store_cpu_seconds=(send + service) * compressed,
    )


def hashing() -> float:
    """CPU seconds per byte of SHA-256."""
    block, digest = bytes(_BLOCK_BYTES), hashlib.sha256()
    began = time.thread_time()
    for _ in range(_HASHED_BYTES // len(block)):
        digest.update(block)
    return (time.thread_time() - began) / _HASHED_BYTES


def uploading(bucket: Bucket) -> float:
    """The S3 server's CPU seconds per byte of an upload with our requests by a client that does nothing else."""
    server, block = bucket.server, os.urandom(_BLOCK_BYTES)
    store = open_s3(server.bucket, server.endpoint, server.region, server.keys)
    before = tree_cpu_seconds([server.pid])
    store.write("limit", itertools.repeat(block, _UPLOADED_BYTES // _BLOCK_BYTES))
    spent = tree_cpu_seconds([server.pid]) - before
    bucket.empty()
    return spent / _UPLOADED_BYTES


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
