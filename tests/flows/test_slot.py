"""Who holds the slot notices in time that he may have lost it, whatever the Prefect server does meanwhile."""

import http.server
import socket
import threading
from collections.abc import Iterator
from uuid import uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient

from athena_backup.operation import Operation
from flows import slot


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """Takes connections and never answers: what a server does whose machine is stuck, or behind a network that loses packets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/api"


def test_a_server_that_does_not_answer_costs_the_slot_before_its_lease_has_ended(
    hanging_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(slot, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(slot, "_LOST_AFTER_SECONDS", 1)
    monkeypatch.setattr(slot, "_JOIN_SECONDS", 0.1)
    # What Prefect is set to for a while is so in one thread only.
    monkeypatch.setattr(slot, "get_client", lambda **_: SyncPrefectClient(hanging_server))
    operation, is_cancelled = Operation(), threading.Event()
    operation.when_cancelled(is_cancelled.set)
    published = threading.Event()

    def hang() -> None:
        published.set()
        assert not threading.Event().wait(60)

    with slot.held(uuid4(), operation, run_id=uuid4(), every_look=hang):
        assert published.wait(20)
        # A call of Prefect's client alone waits a minute for an answer, and is then made again.
        assert is_cancelled.wait(20)
    with pytest.raises(Exception, match="the Prefect server does not answer"):
        operation.check()


class _Forgetful(http.server.BaseHTTPRequestHandler):
    """A server that takes its first request and never answers it, as Prefect's did while its event loop stood still."""

    asked: list[str]
    is_over: threading.Event

    def do_POST(self) -> None:
        self.asked.append(self.path)
        if len(self.asked) == 1:
            self.is_over.wait(120)
            return
        self.send_response(204)
        self.end_headers()

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nothing, as the test says what went wrong."""


def test_one_renewal_without_an_answer_does_not_cost_the_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    is_over, is_renewed = threading.Event(), threading.Event()
    handler = type("Handler", (_Forgetful,), {"asked": asked, "is_over": is_over})
    monkeypatch.setattr(slot, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(slot, "_ANSWER_SECONDS", 0.5)
    operation = Operation()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"

        def client_of(*, sync_client: bool, httpx_settings: dict[str, float] | None = None) -> SyncPrefectClient:
            del sync_client
            return SyncPrefectClient(url, httpx_settings=httpx_settings)

        monkeypatch.setattr(slot, "get_client", client_of)
        lease = uuid4()
        renewals = f"/api/v2/concurrency_limits/leases/{lease}/renew"

        def look() -> None:
            if asked.count(renewals) >= 3:
                is_renewed.set()

        monkeypatch.setattr(slot, "_LOOK_SECONDS", 0.05)
        try:
            with slot.held(lease, operation, every_look=look):
                # Far sooner than the minute that Prefect's client would have waited for the first answer.
                assert is_renewed.wait(30)
        finally:
            is_over.set()
            server.shutdown()
    operation.check()
    assert set(asked) == {renewals, "/api/v2/concurrency_limits/decrement-with-lease"}
