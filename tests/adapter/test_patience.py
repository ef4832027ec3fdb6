"""A Prefect server that is busy for a moment costs a caller of the API milliseconds; one that stays busy is told."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from adapter import patience
from adapter.patience import patient_client


@pytest.fixture
def busy_server() -> Iterator[Callable[[int], str]]:
    """A server that answers 503, as Prefect's does while its database is locked, so many times: no real one does on demand."""
    servers: list[ThreadingHTTPServer] = []

    def start(times: int) -> str:
        left = [times]

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                left[0] -= 1
                body = b'"well"' if left[0] < 0 else b'{"exception_message": "Service Unavailable"}'
                self.send_response(200 if left[0] < 0 else 503)
                self.send_header("Retry-After", "16")  # as `deployments.prefect_server` says to those who come often
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/api"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_server_that_is_busy_for_a_moment_is_asked_again_at_once(busy_server: Callable[[int], str]) -> None:
    with (
        temporary_settings({PREFECT_API_URL: busy_server(6), PREFECT_CLIENT_MAX_RETRIES: 1}),
        patient_client() as client,
    ):
        began = time.monotonic()
        assert client.hello().json() == "well"
        # Prefect's own client would have given up, after two waits of about two seconds each.
        assert time.monotonic() - began < 3.5


def test_a_server_that_stays_busy_is_told(busy_server: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0.2)
    settings = {PREFECT_API_URL: busy_server(1_000), PREFECT_CLIENT_MAX_RETRIES: 1}
    with temporary_settings(settings), patient_client() as client, pytest.raises(PrefectHTTPStatusError):
        client.hello()
