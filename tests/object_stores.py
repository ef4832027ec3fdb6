"""The object stores that the tests run against, each on a loopback port, and how a `Store` in one of them is opened.

S3 is proved twice: on SeaweedFS, which checks signatures, and on moto's server, written by others, which doesn't. Azure Blob
Storage is Azurite. For Google Cloud Storage nothing that the registries have serves the XML API which the client speaks:
**there is no Google emulator here**. Its store is proved against moto's S3 server behind a translator of ours, which turns
Google's conditions into those of S3 and knows of nothing else: so paths, multipart uploads, ranges, listings and errors are
tried on a real server of the same shape, Google's own checks and its tokens are not.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

import httpx
from fault_proxy import FaultProxy, Request, fault_proxy

from athena_backup.ports import free_ports
from athena_backup.process import die_with_parent
from athena_backup.store.clients import Keys, Way, open_azure, open_gcs, open_s3
from athena_backup.store.objects import ObjectStore
from athena_backup.store.sweep import S3Access
from deployments.embedded_stores import BUCKET, REGION, EmbeddedAzure, EmbeddedS3

OBJECT_STORES = ("s3", "moto", "azure", "gcs")
MOTO_KEYS = Keys("moto", "moto")
PATIENT = Way(allow_http=True)
"""As the product is."""
QUICK = Way(allow_http=True, timeout_seconds=2, retry_seconds=8, pause_seconds=0.05)
"""The product's way with its patience scaled down, so that thirty seconds of silence are three."""


@dataclass(frozen=True)
class Server:
    """A running server and how it is opened; ``address`` is its own, or a proxy's before it."""

    kind: str
    address: str
    opener: Callable[[str, Way], ObjectStore] = field(repr=False)
    clean: Callable[[], None] = field(repr=False, default=lambda: None)
    access: S3Access | None = None
    """How boto3 reaches the S3 server that it is, or that stands behind it."""

    def open(self, way: Way = QUICK, *, through: FaultProxy | None = None) -> ObjectStore:
        """The store in the server, or seen through a proxy."""
        return self.opener(through.url if through is not None else self.address, way)


def s3_server(server: EmbeddedS3) -> Server:
    """SeaweedFS."""

    def opener(address: str, way: Way) -> ObjectStore:
        return open_s3(server.bucket, address, server.region, server.keys, way=way)

    return Server("s3", server.endpoint, opener, _renewed(server.access), server.access)


# Of a conditional PUT moto looks first and writes then, and another of its threads may write between; S3 and Google let one win.
_MOTO = """
import threading
from moto.s3.responses import S3Response
from moto.server import main

lock, put_object = threading.Lock(), S3Response.put_object

def put_one_at_a_time(self):
    with lock:
        return put_object(self)

S3Response.put_object = put_one_at_a_time
main()
"""


@contextlib.contextmanager
def moto_server() -> Iterator[str]:
    """moto's S3 server with one bucket; yields its address."""
    [port] = free_ports(1)
    command = [sys.executable, "-c", _MOTO, "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(die_with_parent(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while not _is_up(address):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        S3Access(BUCKET, address, REGION, MOTO_KEYS).client().create_bucket(
            Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION}
        )
        yield address
    finally:
        process.terminate()
        process.wait()


def moto_s3(address: str) -> Server:
    """The second S3."""

    def opener(address: str, way: Way) -> ObjectStore:
        return open_s3(BUCKET, address, REGION, MOTO_KEYS, way=way)

    access = S3Access(BUCKET, address, REGION, MOTO_KEYS)
    return Server("moto", address, opener, _renewed(access), access)


def azure_server(server: EmbeddedAzure) -> Server:
    """Azurite."""
    account = server.service_url.rpartition("/")[2]

    def opener(address: str, way: Way) -> ObjectStore:
        url = f"{address.removesuffix('/' + account)}/{account}"
        return open_azure(server.account, url, server.container, server.key, way=way)

    def clean() -> None:
        with server.service() as service:
            container = service.get_container_client(server.container)
            for blob in container.list_blobs():
                container.delete_blob(blob.name)

    return Server("azure", server.service_url, opener, clean)


@contextlib.contextmanager
def gcs_server(moto: str) -> Iterator[Server]:
    """Google's XML API, translated for an S3 server; a bucket of its own on it."""
    bucket = "athena-google"
    access = S3Access(bucket, moto, REGION, MOTO_KEYS)
    access.client().create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})

    def translate(request: Request) -> None:
        # The client escapes the bucket's name, which moto takes as it stands.
        _, _, path = request.target.removeprefix("/").partition("/")
        at_bucket, mark, query = request.target.partition("?")
        request.target = f"/{bucket}/{path}" if path else f"/{bucket}{mark}{query}"
        assert unquote(at_bucket).startswith(f"/{bucket}"), request.target
        if request.headers.pop("x-goog-if-generation-match", None) == "0":
            request.headers["if-none-match"] = "*"
        assert not [name for name in request.headers if name.startswith("x-goog-")], request.headers
        # An anonymous request would be refused; moto looks at the key's name only.
        scope = f"{MOTO_KEYS.access_key}/20260101/{REGION}/s3/aws4_request"
        request.headers["authorization"] = f"AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0"

    def opener(address: str, way: Way) -> ObjectStore:
        return open_gcs(bucket, gcs_account(address), way=way)

    with fault_proxy(moto, translate) as translator:
        yield Server("gcs", translator.url, opener, _renewed(access), access)


def gcs_account(address: str) -> str:
    """The service account's JSON that names a server without tokens."""
    account = {"gcs_base_url": address, "disable_oauth": True, "client_email": "", "private_key": ""}
    return json.dumps({**account, "private_key_id": ""})


def _renewed(access: S3Access) -> Callable[[], None]:
    """Makes the bucket anew: SeaweedFS shows the folders of deleted objects for a while."""
    client = access.client()

    def renew() -> None:
        with contextlib.suppress(client.exceptions.NoSuchBucket):
            for page in client.get_paginator("list_objects_v2").paginate(Bucket=access.bucket):
                for one in page.get("Contents", []):
                    client.delete_object(Bucket=access.bucket, Key=one["Key"])
            for upload in client.list_multipart_uploads(Bucket=access.bucket).get("Uploads", []):
                client.abort_multipart_upload(Bucket=access.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            client.delete_bucket(Bucket=access.bucket)
        # Asked for again by the client where an answer was lost, it is there already (seen once, on a busy machine).
        with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=access.bucket, CreateBucketConfiguration={"LocationConstraint": access.region})
        # The first object of a bucket is slow in SeaweedFS.
        client.put_object(Bucket=access.bucket, Key="first", Body=b"x")
        client.delete_object(Bucket=access.bucket, Key="first")

    return renew


def _is_up(address: str) -> bool:
    try:
        return httpx.get(address, timeout=2, trust_env=False).status_code < 500
    except httpx.HTTPError:
        return False
