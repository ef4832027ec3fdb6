"""Google's unfinished uploads where its answers are none that the tests' server gives: pages, refusals, silence, tokens.

What stands in for Google is a small server here; that uploads are really seen and aborted is proved in test_store_ways.
"""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from object_stores import gcs_account

from athena_backup.errors import DeniedError, UnavailableError
from athena_backup.store.clients import Way, google_access, open_gcs
from athena_backup.store.sweep import abort_uploads
from deployments.store_checkup import google_findings

NAMES = "http://s3.amazonaws.com/doc/2006-03-01/"
Reply = Callable[[BaseHTTPRequestHandler], tuple[int, str]]


@pytest.fixture
def google() -> Iterator[Callable[[Reply], str]]:
    """Start a server on loopback that answers by a function of the request; its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                status, text = reply(self)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.send_header("Content-Type", "application/json" if text.startswith("{") else "application/xml")
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_DELETE = do_POST = answer  # noqa: N815 - the library's names

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def page(keys: list[str], marker: str = "") -> str:
    uploads = "".join(f"<Upload><Key>{key}</Key><UploadId>id of {key}</UploadId></Upload>" for key in keys)
    more = f"<NextKeyMarker>{marker}</NextKeyMarker><NextUploadIdMarker>id</NextUploadIdMarker>" if marker else ""
    return (
        f"<ListMultipartUploadsResult xmlns='{NAMES}'><Bucket>b</Bucket>{more}"
        f"<IsTruncated>{str(bool(marker)).lower()}</IsTruncated>{uploads}</ListMultipartUploadsResult>"
    )


def test_every_page_is_read_and_an_upload_that_is_gone_meanwhile_is_no_fault(google: Callable[[Reply], str]) -> None:
    aborted = []

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        target = urlsplit(request.path)
        query = parse_qs(target.query, keep_blank_values=True)
        if request.command == "DELETE":
            aborted.append((target.path, query["uploadId"][0]))
            return (404, "") if target.path.endswith("b") else (204, "")
        assert (target.path, query["uploads"], query["prefix"]) == ("/bucket/", [""], ["app/"])
        return 200, page(["app/c d"]) if query.get("key-marker") == ["app/b"] else page(["app/a", "app/b"], "app/b")

    access = google_access("bucket", gcs_account(google(reply)), None)
    assert abort_uploads(access, "app/") == 3
    assert aborted == [
        ("/bucket/app/a", "id of app/a"),
        ("/bucket/app/b", "id of app/b"),
        ("/bucket/app/c%20d", "id of app/c d"),
    ]


def test_a_busy_moment_passes_and_a_refusal_asks_for_a_lifecycle_rule(google: Callable[[Reply], str]) -> None:
    answers = [(503, ""), (429, ""), (200, page([]))]
    address = google(lambda _: answers.pop(0) if answers else (403, ""))
    access = google_access("bucket", gcs_account(address), None)
    assert access.list_uploads("app/") == []
    with pytest.raises(DeniedError, match=r"grant storage\.multipartUploads\.list .* or let a lifecycle rule"):
        access.list_uploads("app/")
    # No operation depends on it.
    assert open_gcs("bucket", gcs_account(address), way=Way(allow_http=True)).sweep("app/") == 0
    uploads, versions = google_findings(access, "app")
    assert uploads.good
    assert "a lifecycle rule that aborts incomplete uploads after 7 days" in uploads.text
    assert "may not be looked at (storage.buckets.get)" in versions.text


def test_versions_that_are_kept_are_told(google: Callable[[Reply], str]) -> None:
    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        is_versions = "versioning" in request.path
        return (
            200,
            "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>" if is_versions else page([]),
        )

    uploads, versions = google_findings(google_access("bucket", gcs_account(google(reply)), None), "app")
    assert uploads.text.startswith("0 there")
    assert "the bucket keeps old versions" in versions.text


@pytest.mark.parametrize("answer", [(200, "no XML"), (404, "")])
def test_an_answer_that_is_none_is_told(google: Callable[[Reply], str], answer: tuple[int, str]) -> None:
    with pytest.raises(UnavailableError, match="unfinished uploads could not be listed"):
        google_access("bucket", gcs_account(google(lambda _: answer)), None).list_uploads("app/")


def test_a_service_accounts_token_goes_with_each_request_and_its_key_with_none(google: Callable[[Reply], str]) -> None:
    heard: list[str] = []

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        heard.append(request.headers.get("Authorization", ""))
        if request.path == "/token":
            return 200, json.dumps({"access_token": "of-the-account", "expires_in": 3600, "token_type": "Bearer"})
        return 200, page([])

    address = google(reply)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"gcs_base_url": address, "client_email": "backup@project", "token_uri": f"{address}/token"}
    access = google_access("bucket", json.dumps({**account, "private_key": key.decode()}), None)
    assert access.list_uploads("app/") == []
    assert heard == ["", "Bearer of-the-account"]
    assert "PRIVATE" not in repr(access)
