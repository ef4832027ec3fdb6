"""Who holds the slot notices in time that he may have lost it, whatever the Prefect server does meanwhile."""

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
