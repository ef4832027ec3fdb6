"""What every process of the service is started with."""

import contextlib
import http.server
import os
import sqlite3
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from authority import Authority
from prefect.settings import PREFECT_API_URL, temporary_settings
from service import ROOT, Service

from athena_backup.settings import Settings
from deployments.service import _why_no_answer, service_environment


@pytest.mark.parametrize(("given", "expected"), [(None, "2"), ("7", "7")])
def test_the_c_library_is_kept_to_few_heaps_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if given is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
    assert service_environment(Settings(), "http://127.0.0.1:1/api", own_server=False)["MALLOC_ARENA_MAX"] == expected


def test_clients_of_our_own_prefect_server_read_one_authority_and_those_of_another_what_its_operator_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PREFECT_API_SSL_CERT_FILE", raising=False)
    settings = Settings(athena_home=tmp_path)

    def file(*, own_server: bool) -> str | None:
        environment = service_environment(settings, "http://127.0.0.1:1/api", own_server=own_server)
        return environment.get("PREFECT_API_SSL_CERT_FILE")

    assert file(own_server=False) is None
    assert len(ssl.create_default_context(cafile=file(own_server=True)).get_ca_certs()) == 1
    monkeypatch.setenv("PREFECT_API_SSL_CERT_FILE", "/theirs.pem")
    assert file(own_server=True) == file(own_server=False) == "/theirs.pem"


def test_the_lock_of_a_prefect_server_that_was_killed_does_not_hold_up_the_next_one(tmp_path: Path) -> None:
    service = Service(tmp_path, {"OBJECT_STORE_LOCATION_LOCAL": str(tmp_path / "store")})
    lock = tmp_path / "athena" / "prefect" / "concurrency_leases" / "expirations.lock"
    (tmp_path / "store").mkdir()
    lock.parent.mkdir(parents=True)
    # A process that lives, as in a container that starts again the same ids are given to the same processes.
    lock.write_text(str(os.getpid()))
    try:
        service.start()
        limit = service.prefect("GET", "/v2/concurrency_limits/athena-app")["name"]
        asked = {"names": [limit], "slots": 1, "mode": "concurrency", "lease_duration": 60}
        assert service.prefect("POST", "/v2/concurrency_limits/increment-with-lease", asked)["lease_id"]
    finally:
        service.close()


def test_a_write_that_finds_prefects_database_locked_is_refused_within_seconds(tmp_path: Path) -> None:
    """Whoever waits for the lock may stop the whole server for so long, the transaction that has it too."""
    (tmp_path / "store").mkdir()
    service = Service(tmp_path, {"OBJECT_STORE_LOCATION_LOCAL": str(tmp_path / "store")})
    limit: dict[str, object] = {"name": "of-a-test", "limit": 1}
    try:
        service.start()
        with contextlib.closing(sqlite3.connect(tmp_path / "athena" / "prefect" / "prefect.db", timeout=30)) as other:
            other.execute("BEGIN IMMEDIATE")
            url = f"{service.prefect_url}/api/v2/concurrency_limits/"
            # Half of what Prefect's own setting would let it wait.
            assert httpx.post(url, json=limit, timeout=30, trust_env=False).status_code == 503
            other.rollback()
        assert service.prefect("POST", "/v2/concurrency_limits/", limit)["id"]
    finally:
        service.close()


class _Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"true")

    def log_message(self, *_: object) -> None:
        """Nothing, as the test says what went wrong."""


def test_a_prefect_server_of_ones_own_is_asked_as_prefects_clients_ask_it(authority: Authority) -> None:
    """Behind TLS by an authority of the cluster's own, as every other process of the service is told to trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.server.certificate, authority.server.key)

    def why(**environment: str) -> str:
        asked = [sys.executable, "-c", "from deployments.service import _why_no_answer; print(_why_no_answer())"]
        address = f"https://127.0.0.1:{server.server_port}/api"
        given = {"PREFECT_API_URL": address, "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], **environment}
        return subprocess.run(asked, env=given, capture_output=True, text=True, check=True).stdout.strip()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Healthy) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            assert why(PREFECT_API_SSL_CERT_FILE=str(authority.bundle)) == ""
            assert "CERTIFICATE_VERIFY_FAILED" in why()
        finally:
            server.shutdown()


def test_the_line_end_of_a_mounted_file_is_no_part_of_prefects_address() -> None:
    assert Settings(prefect_api_url="http://127.0.0.1:4200/api/\n").prefect_api_url == "http://127.0.0.1:4200/api"


@pytest.mark.parametrize("password", ["hunter2/", "hunter2#"])
def test_an_address_that_is_no_url_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch, password: str
) -> None:
    with temporary_settings({PREFECT_API_URL: f"http://user:{password}@127.0.0.1:1/api"}):
        why = _why_no_answer()
    assert "hunter2" not in why
    assert "percent-encode" in why
