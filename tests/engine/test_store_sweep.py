"""Google's unfinished uploads where its answers are none that the tests' server gives: pages, refusals, silence, tokens.

What stands in for Google is a small server here; that uploads are really seen and aborted is proved in test_store_ways.
"""

import base64
import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from authority import Authority
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from object_stores import gcs_account

from athena_backup.errors import DeniedError, FinalError, UnavailableError
from athena_backup.settings import Settings
from athena_backup.store import google as xml_api
from athena_backup.store.clients import Way, google_access, open_gcs
from athena_backup.store.sweep import abort_uploads
from blocks.store_blocks import AthenaGcsStore, block_of
from blocks.stores import bucket_access
from deployments.embedded_stores import Certificate
from deployments.store_checkup import google_findings

NAMES = "http://s3.amazonaws.com/doc/2006-03-01/"
Reply = Callable[[BaseHTTPRequestHandler], tuple[int, str]]


@pytest.fixture
def google() -> Iterator[Callable[..., str]]:
    """Start a server on loopback that answers by a function of the request; its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply, certificate: Certificate | None = None) -> str:
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
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.certificate, certificate.key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http{'s' if certificate else ''}://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xml_api, "_PAUSE_SECONDS", 0.01)


def page(keys: list[str], marker: str = "") -> str:
    uploads = "".join(f"<Upload><Key>{key}</Key><UploadId>id of {key}</UploadId></Upload>" for key in keys)
    more = f"<NextKeyMarker>{marker}</NextKeyMarker><NextUploadIdMarker>id</NextUploadIdMarker>" if marker else ""
    return (
        f"<ListMultipartUploadsResult xmlns='{NAMES}'><Bucket>b</Bucket>{more}"
        f"<IsTruncated>{str(bool(marker)).lower()}</IsTruncated>{uploads}</ListMultipartUploadsResult>"
    )


def test_every_page_is_read_and_an_upload_that_is_gone_meanwhile_is_no_fault(google: Callable[..., str]) -> None:
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


def test_two_pages_may_divide_the_uploads_of_one_key(google: Callable[..., str]) -> None:
    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        return 200, page(["app/b"]) if "upload-id-marker=id" in request.path else page(["app/a"], "app/a")

    access = google_access("bucket", gcs_account(google(reply)), None)
    assert [key for key, _ in access.list_uploads("app/")] == ["app/a", "app/b"]


def test_what_lies_elsewhere_is_not_touched_whatever_the_server_lists(google: Callable[..., str]) -> None:
    deleted = []

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        if request.command == "DELETE":
            deleted.append(request.path)
        strange = "<Upload><Key>app/s/y</Key><UploadId></UploadId></Upload></List"
        return 200, page(["other/live", "app/s/../../other/k", "app2/x", "app/s/x"]).replace("</List", strange)

    access = google_access("bucket", gcs_account(google(reply)), None)
    assert abort_uploads(access, "app/s/") == 1
    assert deleted == ["/bucket/app/s/x?uploadId=id+of+app%2Fs%2Fx"]


def test_one_abort_that_is_refused_keeps_none_of_the_others(google: Callable[..., str]) -> None:
    deleted = []

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        if request.command == "DELETE":
            deleted.append(request.path.partition("?")[0])
            return (403, "") if len(deleted) == 1 else (204, "")
        return 200, page(["app/a", "app/b", "app/c"])

    with pytest.raises(DeniedError):
        abort_uploads(google_access("bucket", gcs_account(google(reply)), None), "app/")
    assert deleted == ["/bucket/app/a", "/bucket/app/b", "/bucket/app/c"]


def test_a_busy_moment_passes_and_a_refusal_asks_for_a_lifecycle_rule(google: Callable[..., str]) -> None:
    answers = [(503, ""), (429, ""), (200, page([]))]
    address = google(lambda _: answers.pop(0) if answers else (403, ""))
    access = google_access("bucket", gcs_account(address), None)
    assert access.list_uploads("app/") == []
    with pytest.raises(DeniedError, match="HTTP 403"):
        access.list_uploads("app/")
    uploads, versions = google_findings(access, "app")
    assert uploads.good
    assert "a lifecycle rule that aborts incomplete uploads after 7 days" in uploads.text
    assert "whether there is one may not be looked at (storage.buckets.get)" in uploads.text
    assert "may not be looked at (storage.buckets.get)" in versions.text


def test_a_busy_server_is_not_asked_for_ever(google: Callable[..., str]) -> None:
    address = google(lambda _: (429, ""))
    with pytest.raises(UnavailableError, match="HTTP 429"):
        google_access("bucket", gcs_account(address), None).list_uploads("app/")
    # No operation depends on it.
    assert open_gcs("bucket", gcs_account(address), way=Way(allow_http=True)).sweep("app/") == 0


def test_a_lifecycle_rule_and_versions_that_are_kept_are_seen(google: Callable[..., str]) -> None:
    documents = {
        "versioning": "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>",
        "lifecycle": "<LifecycleConfiguration><Rule><Action><AbortIncompleteMultipartUpload/></Action></Rule>"
        "</LifecycleConfiguration>",
    }

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        found = [document for name, document in documents.items() if name in request.path]
        return (200, found[0]) if found else (403, "")

    uploads, versions = google_findings(google_access("bucket", gcs_account(google(reply)), None), "app")
    assert uploads.text == "can't be listed, but a lifecycle rule aborts them"
    assert "the bucket keeps old versions" in versions.text


@pytest.mark.parametrize(
    "answer",
    [
        (200, "no XML"),
        (200, ""),
        (200, "<html>login</html>"),
        (200, "<ListBucketResult/>"),
        (200, '<?xml version="1.0" encoding="klingon"?><ListMultipartUploadsResult/>'),
        (302, ""),
        (
            200,
            page(["app/a"], "app/a").replace("<NextKeyMarker>app/a", "<NextKeyMarker>").replace("Marker>id", "Marker>"),
        ),
        (200, page(["app/a"], "app/a")),
        (200, "<ListMultipartUploadsResult>" + "x" * (17 << 20) + "</ListMultipartUploadsResult>"),
    ],
    ids=["no XML", "nothing", "a page", "a listing", "an encoding", "a way out", "no marker", "one marker", "too much"],
)
def test_an_answer_that_is_none_is_told(google: Callable[..., str], answer: tuple[int, str]) -> None:
    access = google_access("bucket", gcs_account(google(lambda _: answer)), None)
    with pytest.raises(UnavailableError):
        access.list_uploads("app/")
    uploads, _ = google_findings(access, "app")
    assert not uploads.good


def test_an_answer_that_trickles_is_given_up(google: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xml_api, "_ANSWER_SECONDS", 0.2)

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1000):
                request.wfile.write(b"x")
                threading.Event().wait(0.05)
        return 200, ""

    with pytest.raises(UnavailableError, match="too slowly"):
        google_access("bucket", gcs_account(google(reply)), None).list_uploads("app/")


def account_of(address: str, **members: object) -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    document = {"gcs_base_url": address, "client_email": "backup@project", "token_uri": f"{address}/token"}
    return json.dumps({**document, "private_key": key.decode(), **members})


def test_a_token_goes_with_each_request_over_an_own_authority_and_nothing_of_the_environment(
    google: Callable[..., str], authority: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heard: list[tuple[str, str]] = []

    def reply(request: BaseHTTPRequestHandler) -> tuple[int, str]:
        heard.append((request.command, request.headers.get("Authorization", "")))
        if request.path == "/token":
            return 200, json.dumps({"access_token": "of-the-account", "expires_in": 3600, "token_type": "Bearer"})
        return 200, page(["app/a", "app/b"])

    (tmp_path / "netrc").write_text("default login bob password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "netrc"))
    address = google(reply, authority.server)
    access = google_access("bucket", account_of(address), authority.bundle)
    assert abort_uploads(access, "app/") == 2
    bearer = "Bearer of-the-account"
    # One token for the list, one for all aborts.
    assert heard == [("POST", ""), ("GET", bearer), ("POST", ""), ("DELETE", bearer), ("DELETE", bearer)]
    assert "PRIVATE" not in repr(access)
    with pytest.raises(UnavailableError):
        google_access("bucket", account_of(address), None).list_uploads("app/")
    with pytest.raises(FinalError, match=r"CA bundle .*missing\.pem can't be read"):
        google_access("bucket", account_of(address), tmp_path / "missing.pem").list_uploads("app/")


@pytest.mark.parametrize(
    ("members", "answer"),
    [
        ({"private_key": "none"}, (200, "{}")),
        ({"private_key": 7}, (200, "{}")),
        ({"token_uri": None}, (200, "{}")),
        ({}, (400, '{"error": "invalid_grant"}')),
        ({}, (200, '{"access_token": "x", "expires_in": "soon"}')),
        ({}, (200, "no JSON")),
    ],
)
def test_credentials_that_are_none_are_told_and_no_operation_fails_for_them(
    google: Callable[..., str], members: dict[str, object], answer: tuple[int, str]
) -> None:
    address = google(lambda _: answer)
    with pytest.raises(DeniedError, match=r"key can't be used|Google gives no token"):
        google_access("bucket", account_of(address, **members), None).list_uploads("app/")
    access = google_access("bucket", account_of(address, **members), None)
    assert all(finding.good for finding in google_findings(access, "app"))


def test_default_credentials_that_there_are_not_fail_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/nonexistent.json")
    with pytest.raises(DeniedError, match=r"nonexistent\.json"):
        google_access("bucket", None, None).list_uploads("app/")
    assert open_gcs("bucket").sweep("app/") == 0


def test_the_settings_and_a_block_lead_to_the_same_bucket() -> None:
    account = gcs_account("http://127.0.0.1:1")
    settings = Settings(
        _env_file=None,
        athena_ca_bundle=None,
        object_store_location_type="gcp-cloud-storage",
        gcp_cloud_storage_bucket_name="bucket",
        gcp_service_account=base64.b64encode(account.encode()).decode(),
    )
    wanted = google_access("bucket", account, None)
    assert bucket_access(settings) == wanted
    block = block_of(settings)
    assert isinstance(block, AthenaGcsStore)
    assert block.access(Way()) == wanted
