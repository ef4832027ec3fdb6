"""A store is built from one source only, and credentials that end in the middle of a run are renewed ("stores", section 6)."""

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fault_proxy import Fault, FaultProxy, fault_proxy
from object_stores import PATIENT, QUICK, Server

from athena_backup.errors import DeniedError, UnavailableError
from athena_backup.store import read_document
from athena_backup.store.clients import Way, open_s3
from athena_backup.store.objects import UPLOAD_PART_BYTES, ObjectStore
from deployments.embedded_stores import BUCKET, REGION

BIG = random.Random(6).randbytes(2 * UPLOAD_PART_BYTES + 1_000_000)
NONSENSE = "nonsense"
FOREIGN = {
    "AWS": """ACCESS_KEY_ID SECRET_ACCESS_KEY SESSION_TOKEN TOKEN REGION DEFAULT_REGION ENDPOINT ENDPOINT_URL ENDPOINT_URL_S3 PROFILE
        DEFAULT_PROFILE CONFIG_FILE SHARED_CREDENTIALS_FILE CA_BUNDLE BUCKET BUCKET_NAME ALLOW_HTTP VIRTUAL_HOSTED_STYLE_REQUEST
        S3_EXPRESS REQUEST_PAYER SKIP_SIGNATURE UNSIGNED_PAYLOAD CHECKSUM_ALGORITHM CONDITIONAL_PUT COPY_IF_NOT_EXISTS
        SERVER_SIDE_ENCRYPTION SSE_KMS_KEY_ID SSE_CUSTOMER_KEY_BASE64 WEB_IDENTITY_TOKEN_FILE ROLE_ARN ROLE_SESSION_NAME
        CONTAINER_CREDENTIALS_RELATIVE_URI CONTAINER_CREDENTIALS_FULL_URI METADATA_ENDPOINT IMDSV1_FALLBACK USE_DUALSTACK_ENDPOINT
        MAX_ATTEMPTS RETRY_MODE DEFAULTS_MODE PROXY_URL TIMEOUT ALLOW_INVALID_CERTIFICATES""",
    "AZURE": """STORAGE_ACCOUNT_NAME STORAGE_ACCOUNT_KEY STORAGE_ACCESS_KEY STORAGE_SAS_KEY STORAGE_SAS_TOKEN STORAGE_TOKEN
        STORAGE_CLIENT_ID STORAGE_ENDPOINT STORAGE_USE_EMULATOR CLIENT_ID CLIENT_SECRET TENANT_ID AUTHORITY_HOST CONTAINER_NAME
        FEDERATED_TOKEN_FILE MSI_ENDPOINT SKIP_SIGNATURE USE_FABRIC_ENDPOINT USE_AZURE_CLI ENDPOINT ALLOW_HTTP TIMEOUT""",
    "GOOGLE": """SERVICE_ACCOUNT SERVICE_ACCOUNT_PATH SERVICE_ACCOUNT_KEY BUCKET BUCKET_NAME APPLICATION_CREDENTIALS CLOUD_PROJECT
        SKIP_SIGNATURE BASE_URL TIMEOUT""",
}


def test_nothing_that_the_environment_says_reaches_a_store_with_given_keys(
    object_server: Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for prefix, names in FOREIGN.items():
        for name in names.split():
            monkeypatch.setenv(f"{prefix}_{name}", NONSENSE)
            monkeypatch.setenv(f"{prefix}_{name}".lower(), NONSENSE)
    store = object_server.open(PATIENT, through=proxy)
    store.write("app/part", [BIG])
    assert store.put("app/manifest.json", b"{}", if_absent=True)
    assert b"".join(store.read("app/part")) == BIG
    assert [entry.key for entry in store.entries("app/")] == ["app/manifest.json", "app/part"]
    store.delete(["app/part"])
    assert store.sweep("app/") == 0
    assert proxy.seen
    for request in proxy.seen:
        assert NONSENSE not in f"{request.target} {request.headers}"
        assert "x-amz-security-token" not in request.headers


@dataclass
class Role:
    """Credentials as a container's role hands them out: new ones at every question, good for ``lifetime``."""

    lifetime: timedelta
    given: dict[str, datetime] = field(default_factory=dict)
    status: int = 200
    """Any other is answered without credentials."""
    refusals: int = 0

    def next(self) -> dict[str, str]:
        token = f"token-{len(self.given) + 1}"
        self.given[token] = datetime.now(UTC) + self.lifetime
        expiration = self.given[token].strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"AccessKeyId": "moto", "SecretAccessKey": "moto", "Token": token, "Expiration": expiration}


@pytest.fixture
def role(monkeypatch: pytest.MonkeyPatch) -> Iterator[Role]:
    """A role for this process, which botocore finds by the environment."""
    running = Role(timedelta(hours=2))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_given = running.status == 200
            running.refusals += not is_given
            body = json.dumps(running.next() if is_given else {"message": "not now"}).encode()
            self.send_response(running.status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setattr("botocore.utils.ContainerMetadataFetcher.SLEEP_TIME", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.server_address[1]}/role")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        server.shutdown()


@pytest.fixture
def guarded(moto: str, role: Role) -> Iterator[FaultProxy]:
    """A proxy before an S3 server, which refuses tokens that expired (or that a test withdrew)."""
    with fault_proxy(moto) as proxy:
        yield proxy


def refusing(role: Role, status: int = 400) -> Fault:
    def is_expired(token: str) -> bool:
        return role.given.get(token, datetime.min.replace(tzinfo=UTC)) <= datetime.now(UTC)

    return Fault(
        on=lambda request: is_expired(request.headers.get("x-amz-security-token", "")),
        times=1_000, status=status, code="ExpiredToken",
    )  # fmt: skip


def by_role(proxy: FaultProxy, way: Way = QUICK) -> ObjectStore:
    return open_s3(BUCKET, proxy.url, REGION, way=way)


class TestRole:
    @pytest.fixture(autouse=True)
    def _clean(self, open_server: object) -> None:
        open_server("moto")  # type: ignore[operator]

    def test_credentials_that_live_shorter_than_an_upload(self, role: Role, guarded: FaultProxy) -> None:
        role.lifetime = timedelta(seconds=3)
        refused = guarded.inject(refusing(role))
        guarded.bytes_per_second = 3 << 20
        by_role(guarded, PATIENT).write(
            "app/part", (BIG[start : start + (1 << 20)] for start in range(0, len(BIG), 1 << 20))
        )
        guarded.bytes_per_second = None
        tokens = {request.headers["x-amz-security-token"] for request in guarded.seen}
        assert len(tokens) > 1
        assert refused.hits == 0
        assert b"".join(by_role(guarded).read("app/part")) == BIG

    def test_credentials_that_live_long_are_asked_for_once(self, role: Role, guarded: FaultProxy) -> None:
        store = by_role(guarded)
        for number in range(5):
            store.put(f"app/{number}", b"")
        assert len(role.given) == 1

    @pytest.mark.parametrize("status", [400, 403])
    def test_credentials_that_are_withdrawn_in_mid_run_are_renewed_once_by_every_call(
        self, role: Role, guarded: FaultProxy, status: int
    ) -> None:
        guarded.inject(refusing(role, status))
        store = by_role(guarded)
        store.put("app/old", b"old")
        calls = (
            lambda: store.put("app/new", b"", if_absent=True),
            lambda: store.put("app/other", b""),
            lambda: store.write("app/small", [b"small"]),
            lambda: store.head("app/old"),
            lambda: read_document(store, "app/old"),
            lambda: list(store.entries("app/")),
            lambda: list(store.folders("")),
            lambda: store.delete(["app/other"]),
            lambda: store.write("app/big", [BIG]),
        )
        for number, call in enumerate(calls, start=2):
            role.given[f"token-{number - 1}"] = datetime.now(UTC)
            call()
            assert len(role.given) == number

    def test_credentials_withdrawn_within_an_upload_let_the_next_try_succeed(
        self, role: Role, guarded: FaultProxy
    ) -> None:
        guarded.inject(refusing(role, 403))
        store = by_role(guarded)

        def chunks(*, withdraw: bool) -> Iterator[bytes]:
            yield BIG[: UPLOAD_PART_BYTES + 1]
            if withdraw:
                role.given["token-1"] = datetime.now(UTC)
            yield BIG[UPLOAD_PART_BYTES + 1 :]

        with pytest.raises(UnavailableError, match="renewed for another try"):
            store.write("app/first", chunks(withdraw=True))
        assert store.head("app/first") is None
        store.write("app/second", chunks(withdraw=False))
        assert b"".join(store.read("app/second")) == BIG

    def test_a_role_that_may_nothing_is_denied_after_one_renewal(self, role: Role, guarded: FaultProxy) -> None:
        guarded.inject(Fault(times=1_000, status=403, code="AccessDenied"))
        with pytest.raises(DeniedError):
            by_role(guarded).write("app/part", [BIG])
        assert len(role.given) == 2

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_role_service_that_is_busy_is_asked_again_and_is_no_bad_role(
        self, role: Role, guarded: FaultProxy, status: int
    ) -> None:
        role.status = status
        store = by_role(guarded)
        with pytest.raises(UnavailableError, match=r"^AWS gives no credentials: .*the identity service is asked again"):
            store.head("app/part")
        # Three questions are one try of botocore's.
        assert role.refusals > 3
        role.status = 200
        assert store.head("app/part") is None

    def test_a_role_service_that_is_away_is_no_bad_role(
        self, role: Role, guarded: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:9/role")
        with pytest.raises(UnavailableError, match=r"^AWS gives no credentials"):
            by_role(guarded).write("app/part", [BIG])

    def test_a_role_that_is_refused_is_denied(self, role: Role, guarded: FaultProxy) -> None:
        role.status = 403
        with pytest.raises(DeniedError, match=r"^AWS gives no credentials: .*check the pod's role"):
            by_role(guarded).head("app/part")

    def test_what_the_role_gave_last_is_used_until_it_ends(self, role: Role, guarded: FaultProxy) -> None:
        role.lifetime = timedelta(seconds=4)
        store = by_role(guarded)
        store.put("app/first", b"")
        ends = max(role.given.values())
        role.status = 503
        time.sleep(0.3)  # the client asks for nothing right after it was given something
        store.put("app/second", b"")
        assert role.refusals
        time.sleep(max(0.0, (ends - datetime.now(UTC)).total_seconds()) + 0.1)
        with pytest.raises(UnavailableError, match=r"^AWS gives no credentials"):
            store.put("app/third", b"")
        role.status = 200
        store.put("app/third", b"")


def test_a_machine_without_any_identity_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(DeniedError, match=r"^no AWS credentials were found.*set AWS_ACCESS_KEY"):
        open_s3(BUCKET, "http://127.0.0.1:9", REGION, way=QUICK).head("app/part")


def test_no_secret_shows_in_a_representation(object_server: Server) -> None:
    assert "ObjectStore(" in repr(object_server.open())
    assert "secret" not in repr(object_server)
