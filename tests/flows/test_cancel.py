"""Who cancels a run in Prefect sees it end soon as Cancelled; nothing else that stops a run is called so."""

import json

import httpx
import pytest
from service import Service, await_true

CANCELLING = {"state": {"type": "CANCELLING", "name": "Cancelling"}}


@pytest.fixture(scope="module")
def timestamp(service: Service) -> str:
    """A set to restore."""
    timestamp, status = service.back_up()
    assert status == "Success"
    return timestamp


def newest_run(service: Service) -> dict[str, str]:
    asked = {"sort": "EXPECTED_START_TIME_DESC", "limit": 1, "flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}}}
    [run] = service.prefect("POST", "/flow_runs/filter", asked)
    return dict(run)


def cancel(service: Service, child: str) -> str:
    """Cancel the running operation in the middle of a child of it; the state of its run after its end."""
    with service.stopped_child(child):
        run = newest_run(service)["id"]
        service.prefect("POST", f"/flow_runs/{run}/set_state", CANCELLING)
    await_true(lambda: service.run_state(run) not in ("RUNNING", "CANCELLING"), "the run's end")
    await_true(lambda: not any("prefect.engine" in one for one in service.processes().values()), "no process is left")
    return service.run_state(run)


def test_a_cancelled_backup_is_cancelled_and_the_next_one_works(service: Service) -> None:
    timestamp = service.start_backup()
    assert cancel(service, "pg_dump") == "CANCELLED"
    assert service.status("/backup/status", json.dumps({"timestamp": timestamp})) == "Cancelled"
    assert service.back_up()[1] == "Success"


def test_a_cancelled_restore_is_cancelled_and_the_next_one_works(service: Service, timestamp: str) -> None:
    asked = json.dumps({"timestamp": timestamp, "sourceNamespace": "app"})
    assert service.call("POST", "/ondemandrestore", asked).status_code == 202
    assert cancel(service, "pg_restore") == "CANCELLED"
    assert service.status("/restore/status", asked) == "Cancelled"
    assert service.restore(timestamp) == "Success"


def test_a_backup_that_lost_its_slot_says_so_and_was_cancelled_by_nobody(service: Service) -> None:
    timestamp = service.start_backup()
    with service.stopped_child("pg_dump"):
        [lease] = [tag.removeprefix("lease:") for tag in newest_run(service)["tags"] if tag.startswith("lease:")]
        url = f"{service.prefect_url}/api/v2/concurrency_limits/decrement-with-lease"
        httpx.post(url, json={"lease_id": lease}, trust_env=False).raise_for_status()
        await_true(lambda: "ongoing" not in service.status(), "the backup's end", 60)
    status = service.status("/backup/status", json.dumps({"timestamp": timestamp}))
    assert ": error stopping: the slot was lost: its lease has ended" in status


def test_a_run_that_somebody_deletes_ends_and_the_next_one_works(service: Service) -> None:
    """Without its run nothing would renew its slot, and the next operation would take what it builds for left behind."""
    service.start_backup()
    with service.stopped_child("pg_dump"):
        service.prefect("DELETE", f"/flow_runs/{newest_run(service)['id']}")
        await_true(
            lambda: not any("prefect.engine" in one for one in service.processes().values()), "no process is left", 90
        )
    await_true(lambda: service.call("POST", "/ondemandbackup").status_code == 202, "the slot is free again", 90)
    await_true(lambda: service.status() == "Success", "the next backup's end")
