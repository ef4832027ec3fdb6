"""The platform's own identity where no keys are given: each cloud's own library, asked through the way that a pod has.

What stands in for the clouds' endpoints inside a machine (Azure's identity endpoint, Google's metadata server) is a small
server here; AWS' token service is moto's.
"""

import json
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from athena_backup.errors import DeniedError
from athena_backup.store.clients import Way, open_azure
from athena_backup.store.credentials import aws_identity, google_identity

Answer = Callable[[str, dict[str, str]], tuple[int, dict[str, object]]]


@pytest.fixture
def endpoint() -> Iterator[Callable[[Answer], str]]:
    """Start a server on loopback that answers GET and HEAD by a function of target and headers; its address."""
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, document = answer(self.path, {name.lower(): value for name, value in self.headers.items()})
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Metadata-Flavor", "Google")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815 - the library's name

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


def test_azures_managed_identity_is_who_speaks_to_the_store(
    endpoint: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expires = datetime.now(UTC) + timedelta(hours=1)

    def identity(target: str, headers: dict[str, str]) -> tuple[int, dict[str, object]]:
        assert parse_qs(urlsplit(target).query)["resource"] == ["https://storage.azure.com"]
        assert headers["x-identity-header"] == "of-this-pod"
        return 200, {
            "access_token": "managed",
            "expires_on": str(int(expires.timestamp())),
            "resource": "https://storage.azure.com",
            "token_type": "Bearer",
        }

    heard: list[str] = []

    def store(target: str, headers: dict[str, str]) -> tuple[int, dict[str, object]]:
        del target
        heard.append(headers.get("authorization", ""))
        return 404, {}

    monkeypatch.setenv("IDENTITY_ENDPOINT", endpoint(identity))
    monkeypatch.setenv("IDENTITY_HEADER", "of-this-pod")
    address = endpoint(store)
    assert open_azure("account", f"{address}/account", "container", way=Way(allow_http=True)).head("app/x") is None
    assert heard == ["Bearer managed"]


def test_googles_default_credentials_come_from_the_metadata_server(
    endpoint: Callable[[Answer], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def metadata(target: str, headers: dict[str, str]) -> tuple[int, dict[str, object]]:
        asked.append(urlsplit(target).path)
        if asked[-1].endswith("/token"):
            assert headers["metadata-flavor"] == "Google"
            return 200, {"access_token": "of-the-pod", "expires_in": 3600, "token_type": "Bearer"}
        return 200, {"email": "pod@project", "scopes": [], "aliases": ["default"]}

    host = endpoint(metadata).removeprefix("http://")
    for name in ("GCE_METADATA_HOST", "GCE_METADATA_ROOT", "GCE_METADATA_IP"):
        monkeypatch.setenv(name, host)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    # Google's library reads the host's name when it is imported.
    monkeypatch.setattr("google.auth.compute_engine._metadata._GCE_METADATA_HOST", host, raising=False)
    monkeypatch.setattr("google.auth.compute_engine._metadata._METADATA_IP_ROOT", f"http://{host}", raising=False)
    given = google_identity()()
    assert given["token"] == "of-the-pod"
    # The client asks five minutes before what it is told, so ten minutes before the token's end.
    assert timedelta(minutes=54) < given["expires_at"] - datetime.now(UTC) <= timedelta(minutes=55)
    assert any(path.endswith("/token") for path in asked)


@pytest.fixture
def web_identity(moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What Kubernetes gives a pod with a service account's role: the file with its token."""
    token = tmp_path / "token"
    token.write_text("signed-by-the-cluster")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(token))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/backup")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", moto)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    return token


def test_aws_web_identity_is_exchanged_for_credentials_that_end(web_identity: Path) -> None:
    given = aws_identity()()
    assert given["access_key_id"].startswith("ASIA")
    assert given["token"]
    assert given["expires_at"] > datetime.now(UTC)


def test_a_web_identity_that_is_gone_is_told(web_identity: Path) -> None:
    web_identity.unlink()
    with pytest.raises(DeniedError, match="AWS gives no credentials"):
        aws_identity()()
