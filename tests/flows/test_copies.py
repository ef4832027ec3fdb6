"""Copies as runs: after every backup and by hand, told where they fail, and in nobody's way."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from service import ROOT, Service, await_true

from athena_backup.catalog import SetState, find_set, list_sets, whole_manifest
from athena_backup.names import SetId
from athena_backup.store.local import LocalStore, initialize


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """The store of the copies."""
    root = tmp_path_factory.mktemp("second")
    initialize(root)
    return LocalStore(str(root))


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service], second: LocalStore) -> Service:
    made = make_service("copies", ATHENA_COPY_TO='["second"]')
    made.start()
    script = (
        "from blocks.store_blocks import AthenaLocalStore as B; import sys; B(directory=sys.argv[1]).save('second')"
    )
    environment = {**made.environment, "PREFECT_API_URL": f"{made.prefect_url}/api"}
    subprocess.run([sys.executable, "-c", script, second.location.place], env=environment, cwd=ROOT, check=True)
    return made


def set_of(timestamp: str) -> SetId:
    return SetId.parse(timestamp, "app")


def newest_copy(service: Service) -> dict[str, object]:
    asked = {"sort": "EXPECTED_START_TIME_DESC", "limit": 1, "flows": {"name": {"any_": ["copy"]}}}
    return dict(service.prefect("POST", "/flow_runs/filter", asked)[0])


def process_of(run: str) -> int:
    """The process that executes a run."""
    for directory in Path("/proc").iterdir():
        try:
            if directory.name.isdigit() and f"FLOW_RUN_ID={run}".encode() in (directory / "environ").read_bytes():
                return int(directory.name)
        except OSError:
            continue
    raise AssertionError(f"no process executes the run {run}")


@contextmanager
def stopped_copy(service: Service) -> Iterator[tuple[str, str, int]]:
    """A copy that has its slot and is held still (SIGSTOP): its set's timestamp, its run and process."""
    timestamp, status = service.back_up()
    assert status == "Success"
    run = str(newest_copy(service)["id"])
    await_true(lambda: any(tag.startswith("lease:") for tag in newest_copy(service)["tags"]), "the copy's slot")  # type: ignore[attr-defined]
    pid = process_of(run)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield timestamp, run, pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_a_backup_is_copied_and_its_command_waits_for_the_copy(service: Service, second: LocalStore) -> None:
    ended = service.command("backup")
    assert ended.returncode == 0, ended
    timestamp = ended.stdout.split()[1].rpartition("/")[2]
    assert f"copy of app/{timestamp} to second: " in ended.stdout
    primary = LocalStore(service.environment["OBJECT_STORE_LOCATION_LOCAL"])
    assert whole_manifest(second, set_of(timestamp)) == whole_manifest(primary, set_of(timestamp))
    again = service.command("copy", timestamp, "--to", "second")
    assert again.returncode == 0, again
    assert "of them stood there already" in again.stdout


def copy_metric(service: Service) -> str:
    [line] = [
        line
        for line in service.call("GET", "/metrics").text.splitlines()
        if line.startswith("athena_backup_copy_success{")
    ]
    return line.rpartition(" ")[2]


def test_a_copy_that_fails_is_told_and_the_set_stays_a_success(service: Service, second: LocalStore) -> None:
    place = Path(second.location.place)
    place.rename(place.with_name("away"))
    ended = service.command("backup")
    assert ended.returncode == 1, ended
    timestamp = ended.stdout.split()[1].rpartition("/")[2]
    told = f"copy of app/{timestamp} to second failed: second: error copying: the store's directory"
    assert told in ended.stdout
    assert newest_copy(service)["state_type"] == "FAILED"
    assert told in newest_copy(service)["state"]["message"]  # type: ignore[index]
    assert service.status("/backup/status", json.dumps({"timestamp": timestamp})) == "Success"
    assert copy_metric(service) == "0.0"
    checked = service.command("check").stdout
    assert "FAIL  copies to second: the store's directory" in checked
    place.with_name("away").rename(place)
    assert "ok    copies to second: local" in service.command("check").stdout
    assert find_set(second, set_of(timestamp)) is None
    mended = service.command("copy", timestamp, "--to", "second")
    assert mended.returncode == 0, mended
    assert whole_manifest(second, set_of(timestamp))
    assert copy_metric(service) == "1.0"


def test_a_set_or_store_that_there_is_not_is_named(service: Service) -> None:
    refused = service.command("copy", "2020-01-01t00-00-00", "--to", "second")
    assert refused.returncode == 1
    assert "there is no backup set app/2020-01-01t00-00-00" in refused.stderr
    timestamp, _ = service.back_up()
    nowhere = service.command("copy", timestamp, "--to", "nowhere")
    assert nowhere.returncode == 1
    assert "Prefect has no store block nowhere" in nowhere.stdout


def test_a_copy_holds_up_no_backup_and_its_set_is_not_deleted_meanwhile(service: Service, second: LocalStore) -> None:
    with stopped_copy(service) as (timestamp, run, _):
        assert find_set(second, set_of(timestamp)) is None or (
            find_set(second, set_of(timestamp)).state is SetState.UNFINISHED  # type: ignore[union-attr]
        )
        refused = service.call("DELETE", f"/backup/{timestamp}")
        assert refused.status_code == 409
        assert "it is being copied" in refused.json()["message"]
        later, status = service.back_up()
        assert status == "Success"
        assert service.run_state(run) == "RUNNING"
        waiting = service.call("DELETE", f"/backup/{later}")
        assert waiting.status_code == 409
    for one in (timestamp, later):
        await_true(lambda one=one: find_set(second, set_of(one)), "the copy's beginning", 120)  # type: ignore[misc]
        await_true(
            lambda one=one: find_set(second, set_of(one)).state is SetState.SUCCESS,  # type: ignore[misc, union-attr]
            "the copy's end",
            120,
        )
    await_true(lambda: service.call("DELETE", f"/backup/{timestamp}").status_code == 200, "the deletion", 30)
    assert whole_manifest(second, set_of(timestamp))


def test_a_copy_that_was_killed_is_told_and_the_next_one_completes_it(service: Service, second: LocalStore) -> None:
    with stopped_copy(service) as (timestamp, run, pid):
        os.kill(pid, signal.SIGKILL)
        await_true(lambda: service.run_state(run) == "CRASHED", "the runner sees it", 60)
        completed = service.command("copy", timestamp, "--to", "second")
        assert completed.returncode == 0, completed
    assert whole_manifest(second, set_of(timestamp))


def test_a_service_on_the_second_store_restores_from_it(service: Service, second: LocalStore) -> None:
    timestamp = next(one.set_id.timestamp for one in list_sets(second, "app") if one.state is SetState.SUCCESS)
    file = Path(json.loads(service.environment["ATHENA_VOLUMES"])["gitserver"]) / "folder" / "file"
    file.write_text("lost")
    service.stop()
    service.environment["OBJECT_STORE_LOCATION_LOCAL"] = second.location.place
    service.start()
    assert service.restore(str(timestamp)) == "Success"
    assert file.read_text() == "content of gitserver"
