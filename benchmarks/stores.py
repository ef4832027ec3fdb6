"""Upload and download rate against the same server's other clients, in paired runs, and memory against the object's size.

One command: `make bench-stores` (``SIZE=8192`` measures memory with an object of so many MiB too). S3 is SeaweedFS, with
rclone and boto3 beside us; Azure is Azurite, with Azure's own client. Every client is a process of its own that takes its
bytes from a file and drops what it reads; its start and imports are not counted, except rclone's (some 50 ms).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from athena_backup.store.clients import Keys, Way, open_azure, open_s3
from athena_backup.store.objects import ObjectStore
from athena_backup.store.sweep import S3Access
from deployments.embedded_stores import embedded_azure, embedded_s3

MIB = 1 << 20
KEY = "bench/object"
Verb = str


@dataclass(frozen=True)
class Place:
    """Where a child finds its store; its secret comes by standard input."""

    kind: str
    url: str
    bucket: str
    name: str
    secret: str
    region: str = ""

    def store(self) -> ObjectStore:
        """Ours."""
        way = Way(streams=1, allow_http=True)
        if self.kind == "s3":
            return open_s3(self.bucket, self.url, self.region, Keys(self.name, self.secret), way=way)
        return open_azure(self.name, self.url, self.bucket, self.secret, way=way)


@dataclass(frozen=True)
class Run:
    """One run of one client."""

    seconds: float
    peak_bytes: int


def ours(place: Place, verb: Verb, source: BinaryIO) -> None:
    """This project's store."""
    store = place.store()
    if verb == "put":
        store.write(KEY, iter(lambda: source.read(MIB), b""))
    else:
        for _ in store.read(KEY):
            pass


def boto3_(place: Place, verb: Verb, source: BinaryIO) -> None:
    """AWS' client with its transfer manager's defaults."""
    client = S3Access(place.bucket, place.url, place.region, Keys(place.name, place.secret)).client()
    with Path(os.devnull).open("wb") as sink:
        if verb == "put":
            client.upload_fileobj(source, place.bucket, KEY)
        else:
            client.download_fileobj(place.bucket, KEY, sink)


def azure_sdk(place: Place, verb: Verb, source: BinaryIO) -> None:
    """Azure's client, with as many connections as we use."""
    from azure.storage.blob import BlobServiceClient

    with (
        BlobServiceClient(place.url, credential=place.secret) as service,
        service.get_blob_client(place.bucket, KEY) as blob,
        Path(os.devnull).open("wb") as sink,
    ):
        if verb == "put":
            blob.upload_blob(source, overwrite=True, max_concurrency=8)
        else:
            blob.download_blob(max_concurrency=8).readinto(sink)


CLIENTS: dict[str, Callable[[Place, Verb, BinaryIO], None]] = {"ours": ours, "boto3": boto3_, "azure-sdk": azure_sdk}
PEERS = {"s3": ("ours", "rclone", "boto3"), "azure": ("ours", "azure-sdk")}


def child(client: str, verb: Verb, path: str) -> None:
    """What a client's process does: tells the seconds that it took."""
    place = Place(**json.load(sys.stdin))
    with Path(path).open("rb") as source:
        began = time.perf_counter()
        CLIENTS[client](place, verb, source)
        print(time.perf_counter() - began)


def run(client: str, place: Place, verb: Verb, path: Path) -> Run:
    """One run; raises where the client fails."""
    if client == "rclone":
        remote = f":s3,provider=Other,endpoint='{place.url}':{place.bucket}/{KEY}"
        command = [str(Path(sys.executable).parent / "rclone"), *(["rcat"] if verb == "put" else ["cat"]), remote]
        environment = {**os.environ, "RCLONE_S3_ACCESS_KEY_ID": place.name, "RCLONE_S3_SECRET_ACCESS_KEY": place.secret,
                       "RCLONE_S3_REGION": place.region, "RCLONE_CONFIG": os.devnull}  # fmt: skip
        began = time.perf_counter()
        with path.open("rb") as source:
            process = subprocess.Popen(command, stdin=source, stdout=subprocess.DEVNULL, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    else:
        command = [sys.executable, "-m", "benchmarks.stores", "--child", client, verb, str(path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(place)))
        process.stdin.close()
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = float(said or 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, (client, verb)
    return Run(seconds, usage.ru_maxrss * 1024)


def measured(place: Place, size_mib: int, rounds: int, root: Path, clients: tuple[str, ...]) -> None:
    """Print rates, ratios and peaks of ``rounds`` rounds, in each of which every client has its turn."""
    path = root / "object"
    with path.open("wb") as file:
        for block in _blocks(size_mib):
            file.write(block)
    runs: dict[tuple[str, Verb], list[Run]] = {(client, verb): [] for client in clients for verb in ("put", "get")}
    store = place.store()
    for number in range(rounds):
        for client in clients[number % len(clients) :] + clients[: number % len(clients)]:
            store.delete([KEY])
            for verb in ("put", "get"):
                runs[client, verb].append(run(client, place, verb, path))
    store.delete([KEY])
    path.unlink()
    for verb in ("put", "get"):
        own = [one.seconds for one in runs["ours", verb]]
        for client in clients:
            seconds = [one.seconds for one in runs[client, verb]]
            ratio = statistics.median(theirs / mine for theirs, mine in zip(seconds, own, strict=True))
            rate = size_mib / statistics.median(seconds)
            peak = max(one.peak_bytes for one in runs[client, verb]) >> 20
            beside = "" if client == "ours" else f", we are {ratio:.2f} times as fast"
            print(
                f"{place.kind:5} {verb} {size_mib:5} MiB {client:9} {rate:5.0f} MiB/s, peak {peak:4} MiB{beside}",
                flush=True,
            )


def _blocks(size_mib: int) -> Iterator[bytes]:
    block = os.urandom(MIB)
    for number in range(size_mib):
        yield number.to_bytes(8) + block[8:]


def main() -> None:
    """All servers, all sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 512, 2048], help="MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--also", type=int, nargs="*", default=[], help="MiB, by our client alone: its memory")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(*asked.child)
        return
    with tempfile.TemporaryDirectory(prefix="athena-bench-") as name:
        root = Path(name)
        with embedded_s3(root / "s3") as s3:
            place = Place("s3", s3.endpoint, s3.bucket, s3.keys.access_key, s3.keys.secret_key, s3.region)
            _measure_all(place, asked, root)
        with embedded_azure(root / "azure") as azure:
            _measure_all(Place("azure", azure.service_url, azure.container, azure.account, azure.key), asked, root)


def _measure_all(place: Place, asked: argparse.Namespace, root: Path) -> None:
    for size_mib in asked.sizes:
        measured(place, size_mib, asked.rounds, root, PEERS[place.kind])
    for size_mib in asked.also:
        measured(place, size_mib, 1, root, ("ours",))


if __name__ == "__main__":
    main()
