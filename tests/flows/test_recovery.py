"""A restore that is killed inside a switch leaves nothing half: the service finishes it, at once or at its next start."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from service import Service, await_true

from athena_backup.store import read_document
from athena_backup.store.local import LocalStore

ENTRIES = 20_000
"""So many entries that the switch of the volume can be caught in the middle."""
RESTORE = "0123456789ab"


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service]) -> Service:
    made = make_service("recovery")
    made.start()
    return made


def volume(service: Service) -> Path:
    return Path(json.loads(service.environment["ATHENA_VOLUMES"])["edweb"])


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def is_switching(directory: Path) -> bool:
    """Whether a switch of the volume has begun and not ended: its state is the text of a link."""
    staging = [name for name in os.listdir(directory) if name.startswith(".athena-")]
    return any(os.path.lexists(directory / name / "state") for name in staging)


def kill_inside_the_switch(service: Service, timestamp: str, sig: signal.Signals = signal.SIGKILL) -> None:
    """Start a restore and kill (or stop) its process while entries of the volume are on their way."""
    body = json.dumps({"timestamp": timestamp, "sourceNamespace": "app"})
    assert service.call("POST", "/ondemandrestore", body).status_code == 202
    deadline = time.monotonic() + 60
    while not is_switching(volume(service)):
        assert time.monotonic() < deadline, "the switch did not begin"
    os.kill(service.pid_of("prefect.engine"), sig)
    assert is_switching(volume(service)), "the switch was over before it was killed"


def await_next_backup(service: Service) -> None:
    """The recovery holds the slot until it has looked at everything; then a backup can be taken."""
    await_true(lambda: service.call("POST", "/ondemandbackup").status_code == 202, "the slot is free again", 60)
    await_true(lambda: service.status() == "Success", "the next backup's end", 60)


@pytest.fixture
def backed_up(service: Service) -> tuple[str, set[str]]:
    """A set with the many entries, which then are replaced by others; its timestamp and their names."""
    directory = volume(service)
    for number in range(ENTRIES):
        (directory / f"{number}").touch()
    wanted = names(directory)
    timestamp, status = service.back_up()
    assert status == "Success"
    for number in range(ENTRIES):
        (directory / f"{number}").replace(directory / f"live-{number}")
    return timestamp, wanted


def test_a_restore_killed_inside_a_switch_is_finished_without_anyones_help(
    service: Service, backed_up: tuple[str, set[str]]
) -> None:
    timestamp, wanted = backed_up
    kill_inside_the_switch(service, timestamp)
    await_true(lambda: names(volume(service)) == wanted, "the volume is wholly at the backup", 120)
    asked = json.dumps({"timestamp": timestamp})
    await_true(lambda: "ongoing" not in service.status("/restore/status", asked), "the death is seen", 60)
    assert service.status("/restore/status", asked).startswith("error running the restore: ")
    await_next_backup(service)


def test_a_cancelled_restore_that_is_killed_inside_a_switch_is_finished_too(
    service: Service, backed_up: tuple[str, set[str]]
) -> None:
    """As one whose switch takes longer than the thirty seconds that a runner waits: this one does not go on at all."""
    timestamp, wanted = backed_up
    kill_inside_the_switch(service, timestamp, signal.SIGSTOP)
    running = {"state": {"type": {"any_": ["RUNNING"]}}}
    [run] = service.prefect("POST", "/flow_runs/filter", {"flow_runs": running})
    cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    service.prefect("POST", f"/flow_runs/{run['id']}/set_state", cancelling)
    await_true(lambda: names(volume(service)) == wanted, "the volume is wholly at the backup", 120)
    asked = json.dumps({"timestamp": timestamp, "sourceNamespace": "app"})
    await_true(lambda: service.status("/restore/status", asked) == "Cancelled", "the run's end", 60)
    await_next_backup(service)


def test_a_restore_killed_with_the_whole_service_is_finished_at_the_next_start(
    service: Service, backed_up: tuple[str, set[str]]
) -> None:
    timestamp, wanted = backed_up
    kill_inside_the_switch(service, timestamp)
    os.kill(service.pid, signal.SIGKILL)
    service.wait()
    await_true(lambda: not service.processes(), "no process is left", 60)
    service.start()
    await_true(lambda: names(volume(service)) == wanted, "the volume is wholly at the backup", 120)
    await_next_backup(service)


def test_a_backup_never_reads_a_volume_that_is_half_switched(service: Service) -> None:
    directory = volume(service)
    shutil.rmtree(directory)
    staging = directory / f".athena-{RESTORE}"
    for name in ("new", "old", "met"):
        (staging / name).mkdir(parents=True)
    # As a kill between two renames of the second phase leaves it: one staged entry is in its place, one is not yet.
    (directory / "first").write_text("from the set")
    (staging / "new" / "second").write_text("from the set too")
    (staging / "old" / "live").write_text("replaced")
    (staging / "time").symlink_to("1700000000000000000 1700000000000000000")
    (staging / "state").symlink_to("moving in")
    (staging / "switched").symlink_to("switched")
    timestamp, status = service.back_up()
    assert status == "Success"
    assert names(directory) == {"first", "second"}
    store = LocalStore(service.environment["OBJECT_STORE_LOCATION_LOCAL"])
    manifest = json.loads(read_document(store, f"app/{timestamp}/manifest.json"))
    [edweb] = [one for one in manifest["components"] if one["name"] == "edweb"]
    assert edweb["volume"]["files"] == 2
