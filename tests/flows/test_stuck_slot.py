"""A slot that a claim took and no lease will ever free is given back; one that somebody has is not."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from service import Service, await_true, volume_service

from flows import stuck_slot
from flows.stuck_slot import StuckSlots


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with volume_service(tmp_path_factory.mktemp("stuck")) as started:
        yield started


@pytest.fixture
def client(service: Service) -> SyncPrefectClient:
    return SyncPrefectClient(f"{service.prefect_url}/api")


def is_free(service: Service) -> bool:
    return not service.prefect("GET", "/v2/concurrency_limits/athena-app")["active_slots"]


@pytest.fixture
def stuck(service: Service) -> None:
    """Take the slot while Prefect's server can write no lease, as on a full disk: it counts the claim all the same."""
    leases = Path(service.environment["ATHENA_HOME"]) / "prefect" / "concurrency_leases"
    shutil.rmtree(leases, ignore_errors=True)
    leases.write_text("no directory")
    assert service.call("POST", "/ondemandbackup", "{}").status_code >= 500
    leases.unlink()
    assert not is_free(service)


@pytest.mark.usefixtures("stuck")
def test_a_slot_that_nobody_has_is_freed_once_it_was_so_for_long(service: Service, client: SyncPrefectClient) -> None:
    assert service.call("POST", "/ondemandbackup", "{}").status_code == 409
    slots = StuckSlots("app", limit_seconds=0.5)
    assert slots.free(client) == []
    assert not is_free(service)
    freed: list[str] = []
    await_true(lambda: freed.extend(slots.free(client)) or freed, "the slot is freed")
    assert freed == ["athena-app"]
    assert service.back_up()[1] == "Success"


@pytest.mark.usefixtures("stuck")
def test_after_a_time_without_a_look_the_count_begins_anew(
    service: Service, client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = StuckSlots("app", limit_seconds=100)
    now = 1_000.0
    monkeypatch.setattr(stuck_slot.time, "monotonic", lambda: now)
    assert slots.free(client) == []
    now += 500
    assert slots.free(client) == []
    now += 99
    assert slots.free(client) == []
    now += 2
    assert slots.free(client) == ["athena-app"]
    assert is_free(service)


def test_the_slot_of_an_operation_at_work_stays_its_own(service: Service, client: SyncPrefectClient) -> None:
    slots = StuckSlots("app", limit_seconds=0)
    timestamp = service.start_backup()
    looks = 0
    while "ongoing" in service.status("/backup/status", json.dumps({"timestamp": timestamp})):
        assert slots.free(client) == []
        looks += 1
    assert looks
    assert service.status("/backup/status", json.dumps({"timestamp": timestamp})) == "Success"


def test_a_run_whose_lease_is_lost_has_no_slot_and_is_no_reason_to_keep_it_taken(
    service: Service, client: SyncPrefectClient
) -> None:
    """As after a full disk: the server threw the lease away before it counted back, and the run's last state was lost."""
    timestamp = service.start_backup()
    await_true(lambda: any("prefect.engine" in one for one in service.processes().values()), "its process")
    process = service.pid_of("prefect.engine")
    os.kill(process, signal.SIGSTOP)
    try:
        slots = StuckSlots("app", limit_seconds=0, lost_seconds=0)
        assert [slots.free(client) for _ in range(3)] == [[], [], []]
        leases = Path(service.environment["ATHENA_HOME"]) / "prefect" / "concurrency_leases"
        shutil.rmtree(leases)
        assert slots.free(client) == []
        assert slots.free(client) == ["athena-app"]
        assert is_free(service)
    finally:
        os.kill(process, signal.SIGCONT)
    await_true(lambda: "ongoing" not in service.status(), "the backup's end", 60)
    assert service.status("/backup/status", json.dumps({"timestamp": timestamp})) == "Success"
