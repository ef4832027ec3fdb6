"""How a store is reached: TLS with an own authority, proxies, addresses by path and by host; and what a killed writer leaves."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from authority import Authority, make_authority, tls_server
from fault_proxy import fault_proxy
from object_stores import PATIENT, QUICK, Server, gcs_account, s3_server

from athena_backup.errors import AthenaError, FinalError, UnavailableError
from athena_backup.store.clients import Keys, Way, open_azure, open_gcs, open_s3
from athena_backup.store.objects import UPLOAD_PART_BYTES
from athena_backup.store.sweep import S3Access, abort_uploads
from deployments.embedded_stores import (
    EmbeddedAzure,
    EmbeddedS3,
    embedded_azure,
    embedded_s3,
)

KEYS = Keys("key", "secret")
BIG = random.Random(5).randbytes(UPLOAD_PART_BYTES + 1_000_000)


@pytest.fixture(scope="module")
def secure_s3(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    with embedded_s3(tmp_path_factory.mktemp("secure-s3"), authority.server) as server:
        yield server


@pytest.fixture(scope="module")
def secure_azure(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedAzure]:
    with embedded_azure(tmp_path_factory.mktemp("secure-azure"), authority.server) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


class TestOwnAuthority:
    def test_s3(self, secure_s3: EmbeddedS3, authority: Authority) -> None:
        way = Way(ca_bundle=authority.bundle)
        store = open_s3(secure_s3.bucket, secure_s3.endpoint, secure_s3.region, secure_s3.keys, way=way)
        store.write("app/part", [BIG])
        assert b"".join(store.read("app/part")) == BIG
        assert store.sweep("app/") == 0
        assert store.proof == "digest"

    def test_azure_over_tls_needs_no_leave_for_http(self, secure_azure: EmbeddedAzure, authority: Authority) -> None:
        server, way = secure_azure, Way(ca_bundle=authority.bundle)
        store = open_azure(server.account, server.service_url, server.container, server.key, way=way)
        store.write("app/part", [BIG])
        assert b"".join(store.read("app/part")) == BIG
        assert store.proof == "tls+size"

    def test_an_authority_that_nobody_named_is_not_trusted(self, secure_s3: EmbeddedS3) -> None:
        quickly = replace(QUICK, retry_seconds=0.5)
        store = open_s3(secure_s3.bucket, secure_s3.endpoint, secure_s3.region, secure_s3.keys, way=quickly)
        with pytest.raises(FinalError, match=r"certificate.*own authority"):
            store.head("app/part")

    @pytest.mark.parametrize(
        ("flaw", "told"),
        [
            ({"hours": (-3, -1)}, "certificate has expired .*renewed"),
            ({"hours": (1, 3)}, "certificate is not valid yet .*clocks"),
            ({"name": "127.0.0.2"}, "certificate is for another name .*by a name that its certificate holds"),
            ({"is_authority": True}, "certificate is an authority's .*CA:FALSE"),
        ],
    )
    def test_what_is_wrong_with_a_servers_certificate_is_told(
        self, flaw: dict[str, Any], told: str, tmp_path: Path
    ) -> None:
        authority = make_authority(tmp_path, **flaw)
        with tls_server(authority.server) as url, pytest.raises(FinalError, match=told):
            open_s3("b", url, "r", KEYS, way=replace(QUICK, ca_bundle=authority.bundle)).head("app/part")

    def test_a_bundle_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "bundle.pem").write_text("no certificate")
        for path in (tmp_path / "bundle.pem", tmp_path / "missing.pem"):
            with pytest.raises(FinalError):
                open_s3("b", "https://127.0.0.1:9", "r", way=replace(QUICK, ca_bundle=path)).head("app/part")

    def test_http_without_leave_is_refused_where_nothing_proves_the_bytes(self) -> None:
        with pytest.raises(FinalError, match="ATHENA_STORE_ALLOW_HTTP"):
            open_azure("account", "http://127.0.0.1:9/account", "container", "a2V5")
        with pytest.raises(FinalError, match="ATHENA_STORE_ALLOW_HTTP"):
            open_gcs("bucket", '{"gcs_base_url": "http://127.0.0.1:9"}')


class TestNoAnswer:
    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("http://127.0.0.1:9", "127.0.0.1:9: Connection refused"),
            (
                f"http://{'no' * 40}:9",
                "failed to lookup address information",
            ),  # longer than a name may be: nobody is asked
        ],
    )
    def test_why_nobody_answers_is_told(self, url: str, told: str) -> None:
        with pytest.raises(UnavailableError, match=told):
            open_s3("b", url, "r", KEYS, way=replace(QUICK, retry_seconds=0.2)).head("app/part")


class TestProxies:
    def test_https_goes_through_the_proxy_and_past_it_where_no_proxy_says_so(
        self, secure_s3: EmbeddedS3, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        way = Way(ca_bundle=authority.bundle)
        with fault_proxy(secure_s3.endpoint) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            open_s3(secure_s3.bucket, secure_s3.endpoint, secure_s3.region, secure_s3.keys, way=way).write("a/1", [BIG])
            host = secure_s3.endpoint.removeprefix("https://")
            assert {(request.method, request.target) for request in proxy.seen} == {("CONNECT", host)}
            proxy.seen.clear()
            monkeypatch.setenv("NO_PROXY", "127.0.0.1")
            open_s3(secure_s3.bucket, secure_s3.endpoint, secure_s3.region, secure_s3.keys, way=way).write("a/2", [BIG])
            assert proxy.seen == []

    def test_a_proxy_that_is_not_there_is_told(self, seaweed: EmbeddedS3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        with pytest.raises(AthenaError, match="the way to it"):
            s3_server(seaweed).open(replace(QUICK, retry_seconds=0.2)).head("app/part")


class TestAddresses:
    @pytest.mark.parametrize("is_told_with_bucket", [False, True])
    def test_the_bucket_in_the_hosts_name(
        self, seaweed: EmbeddedS3, monkeypatch: pytest.MonkeyPatch, is_told_with_bucket: bool
    ) -> None:
        """Not every resolver knows names below localhost: a proxy, which needs to know none, brings the requests there."""
        s3_server(seaweed).clean()
        port = seaweed.endpoint.rpartition(":")[2]
        endpoint = f"http://{seaweed.bucket}.localhost:{port}" if is_told_with_bucket else f"http://localhost:{port}"
        with fault_proxy(seaweed.endpoint) as proxy:
            monkeypatch.setenv("HTTP_PROXY", proxy.url)
            store = open_s3(seaweed.bucket, endpoint, seaweed.region, seaweed.keys, path_style=False, way=PATIENT)
            store.write("app/part", [BIG])
            assert b"".join(store.read("app/part")) == BIG
            assert [entry.key for entry in store.entries("app/")] == ["app/part"]
            assert store.sweep("app/") == 0
            store.delete(["app/part"])
            assert list(store.entries("")) == []
        for request in proxy.seen:
            assert request.headers["host"] == f"{seaweed.bucket}.localhost:{port}", request
            assert not request.target.startswith(f"/{seaweed.bucket}"), request


WRITER = """
import json, sys, threading
from athena_backup.store.clients import Keys, Way, open_gcs, open_s3

place = json.load(sys.stdin)
if "account" in place:
    store = open_gcs(place["bucket"], place["account"], way=Way(allow_http=True))
else:
    store = open_s3(place["bucket"], place["endpoint"], place["region"], Keys(place["access"], place["secret"]))


def chunks():
    for number in range(40):
        yield number.to_bytes(4) * (1 << 18)
    print("sent", flush=True)
    threading.Event().wait()


store.write(place["key"], chunks())
"""


def killed_writer(server: Server, access: S3Access, key: str, until: Callable[[], bool]) -> None:
    """A process that is killed in the middle of a multipart upload."""
    assert access.keys is not None
    place = {"bucket": access.bucket, "endpoint": access.endpoint, "region": access.region, "key": key,
             "access": access.keys.access_key, "secret": access.keys.secret_key}  # fmt: skip
    if server.kind == "gcs":
        place["account"] = gcs_account(server.address)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ}
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(place))
    process.stdin.close()
    assert process.stdout.readline() == "sent\n"
    while not until():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_what_a_killed_writer_left_is_invisible_and_swept_and_that_of_others_stays(
    open_server: Callable[[str], Server], kind: str
) -> None:
    server = open_server(kind)
    access = server.access
    assert access is not None
    client, key = access.client(), "app/2026-11-23t12-00-00/volumes/asp/0123456789ab/0000.tar.zst.0000"

    def has_parts() -> bool:
        for found, upload in access.list_uploads("app/"):
            if found == key:
                return bool(client.list_parts(Bucket=access.bucket, Key=key, UploadId=upload).get("Parts"))
        return False

    other = client.create_multipart_upload(Bucket=access.bucket, Key="other/set/part")["UploadId"]
    alike = client.create_multipart_upload(Bucket=access.bucket, Key="app2/set/part")["UploadId"]
    killed_writer(server, access, key, has_parts)

    store = server.open()
    assert list(store.entries("")) == []
    assert store.head(key) is None
    assert store.sweep("app/") == 1
    assert sorted(access.list_uploads("")) == sorted([("app2/set/part", alike), ("other/set/part", other)])
    assert store.sweep("app/") == 0


def test_an_upload_that_somebody_aborts_is_worth_another_try(seaweed: EmbeddedS3) -> None:
    server: Server = s3_server(seaweed)
    server.clean()
    key = "app/2026-11-23t12-00-00/volumes/asp/0123456789ab/0000.tar.zst.0000"

    def chunks() -> Iterator[bytes]:
        yield bytes(UPLOAD_PART_BYTES)
        yield bytes(UPLOAD_PART_BYTES)
        while not abort_uploads(seaweed.access, "app/"):
            pass
        for _ in range(12):
            yield bytes(UPLOAD_PART_BYTES)

    with pytest.raises(UnavailableError, match="somebody abort it"):
        server.open().write(key, chunks())
    assert server.open().head(key) is None
