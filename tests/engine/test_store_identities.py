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
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import pytest
from azure.core.exceptions import (
    ClientAuthenticationError,
    HttpResponseError,
    ServiceRequestError,
    ServiceResponseError,
)
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    ReadTimeoutError,
)
from google.auth.exceptions import DefaultCredentialsError, RefreshError, TransportError

from athena_backup.errors import DeniedError, UnavailableError
from athena_backup.store.clients import Way, open_azure
from athena_backup.store.credentials import Identity, aws_identity, azure_identity, google_identity

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


AnswerOfLibrary = timedelta | Exception
"""For how long a token is good that the cloud's library gives, or what it raises."""


@pytest.fixture
def identity_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Identity]:
    """The identity of a cloud whose library answers so, one question after the other."""

    def made(cloud: str, *answers: AnswerOfLibrary) -> Identity:
        left = list(answers)

        def answer() -> tuple[str, datetime]:
            assert left, "asked once too often"
            one = left.pop(0)
            if isinstance(one, Exception):
                raise one
            return f"token-{len(answers) - len(left)}", datetime.now(UTC) + one

        class Credentials:
            """Of botocore and of Google's library."""

            def get_frozen_credentials(self) -> ReadOnlyCredentials:
                token, self._expiry_time = answer()
                return ReadOnlyCredentials("key", "secret", token)

            def refresh(self, request: object) -> None:
                self.token, expiry = answer()
                self.expiry = expiry.replace(tzinfo=None)

        def get_token(scope: str) -> SimpleNamespace:
            token, ends = answer()
            return SimpleNamespace(token=token, expires_on=int(ends.timestamp()))

        session = SimpleNamespace(get_credentials=Credentials)
        monkeypatch.setattr("botocore.session.get_session", lambda: session)
        monkeypatch.setattr("azure.identity.DefaultAzureCredential", lambda **_: SimpleNamespace(get_token=get_token))
        monkeypatch.setattr("athena_backup.store.credentials.google_credentials", lambda _: Credentials())
        return {"aws": aws_identity, "azure": azure_identity, "google": google_identity}[cloud]()

    return made


def refused(code: str, status: int = 400) -> ClientError:
    """What AWS' token service answers."""
    document = {"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(document, "AssumeRoleWithWebIdentity")  # type: ignore[arg-type]


def answered(status: int) -> HttpResponseError:
    """What Azure's library makes of an answer."""
    error = HttpResponseError("no token")
    error.status_code = status
    return error


def because(error: Exception, cause: Exception) -> Exception:
    """An error in which a library wraps another."""
    error.__cause__ = cause
    return error


NO_ROLE = CredentialRetrievalError(provider="container-role", error_msg="non 200 response 403 from container metadata")


@pytest.mark.parametrize(
    ("cloud", "error"),
    [
        ("aws", EndpointConnectionError(endpoint_url="http://sts")),
        ("aws", ReadTimeoutError(endpoint_url="http://sts")),
        ("aws", because(CredentialRetrievalError(provider="x", error_msg="x"), ConnectTimeoutError(endpoint_url="x"))),
        ("aws", refused("Throttling")),
        ("aws", refused("InternalFailure", 503)),
        ("azure", ServiceRequestError("no way")),
        ("azure", ServiceResponseError("cut")),
        ("azure", answered(429)),
        ("azure", answered(503)),
        ("google", TransportError("no way")),
        ("google", RefreshError("busy", retryable=True)),
        ("google", because(RefreshError("x"), TransportError("no way"))),
    ],
)
def test_a_moment_in_which_no_token_is_to_be_had_is_no_bad_role(
    identity_of: Callable[..., Identity], cloud: str, error: Exception
) -> None:
    identity = identity_of(cloud, error, timedelta(hours=1))
    with pytest.raises(UnavailableError, match="the identity service is asked again"):
        identity()
    assert identity()["token"] == "token-2"


@pytest.mark.parametrize(
    ("cloud", "error"),
    [
        ("aws", refused("AccessDenied", 403)),
        ("aws", refused("InvalidIdentityToken")),
        ("aws", NO_ROLE),
        ("azure", ClientAuthenticationError("no identity")),
        ("google", DefaultCredentialsError("none")),
        ("google", TransportError("Status: 404", object())),
    ],
)
def test_a_role_that_is_refused_is_told_as_that(
    identity_of: Callable[..., Identity], cloud: str, error: Exception
) -> None:
    with pytest.raises(DeniedError, match="gives no"):
        identity_of(cloud, error)()


@pytest.mark.parametrize(
    ("cloud", "error", "kind"),
    [
        ("aws", NO_ROLE, UnavailableError),
        ("aws", FileNotFoundError("the token's file"), UnavailableError),
        ("aws", refused("ExpiredTokenException"), UnavailableError),
        ("aws", refused("AccessDenied", 403), DeniedError),
        ("aws", refused("InvalidIdentityToken"), DeniedError),
        ("azure", ClientAuthenticationError("no answer"), UnavailableError),
        ("google", RefreshError("withdrawn"), DeniedError),
    ],
)
def test_a_renewal_that_fails_may_pass_unless_it_is_refused_by_name(
    identity_of: Callable[..., Identity], cloud: str, error: Exception, kind: type[Exception]
) -> None:
    identity = identity_of(cloud, timedelta(seconds=-1), error)
    identity()
    with pytest.raises(kind):
        identity()


@pytest.mark.parametrize(
    ("cloud", "error"),
    [
        ("aws", refused("AccessDenied", 403)),
        ("aws", EndpointConnectionError(endpoint_url="http://sts")),
        ("azure", ServiceRequestError("no way")),
        ("google", RefreshError("withdrawn")),
    ],
)
def test_what_was_given_last_is_given_again_as_long_as_it_is_good(
    identity_of: Callable[..., Identity], monkeypatch: pytest.MonkeyPatch, cloud: str, error: Exception
) -> None:
    identity = identity_of(cloud, timedelta(minutes=4), error, timedelta(hours=1))
    identity()
    for _ in range(3):  # of which only the first asks
        again = identity()
        assert again["token"] == "token-1"
        assert timedelta(minutes=3) < again["expires_at"] - datetime.now(UTC) < timedelta(minutes=4)
    monkeypatch.setattr("athena_backup.store.credentials._PAUSE", timedelta(0))
    assert identity()["token"] == "token-3"
