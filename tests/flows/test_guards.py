"""What keeps an operation from doing harm: the slot, names that nobody knows, the health of the destination's services."""

import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from service import Service, await_true

from athena_backup.postgres.embedded import EmbeddedServer
from athena_backup.postgres.sessions import run_sql, session
from athena_backup.settings import MASK


class Health:
    """A service of the destination that can be well or not, and knows how often it was asked."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://probe:hidden@127.0.0.1:{server.server_port}/healthz"
        self.shown = self.url.replace("hidden", MASK)
        self.is_well = True
        self.asked = 0


@pytest.fixture(scope="module")
def health() -> Iterator[Health]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += 1
            self.send_response(200 if state.is_well else 503)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        state = Health(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield state
        server.shutdown()


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service], health: Health) -> Service:
    made = make_service(
        "guards",
        ATHENA_HEALTH_URLS=json.dumps([health.url]),
        ATHENA_HEALTH_SECONDS="1",
        ATHENA_NICE="7",
        ATHENA_RATE_LIMIT_MB="8",
    )
    made.start()
    return made


@pytest.fixture(scope="module")
def timestamp(service: Service) -> str:
    timestamp, status = service.back_up()
    assert status == "Success"
    return timestamp


@pytest.fixture
def file(service: Service) -> Path:
    """A live file that differs from the set's: who reads it sees whether a restore has touched it."""
    file = Path(json.loads(service.environment["ATHENA_VOLUMES"])["gitserver"]) / "folder" / "file"
    file.write_text("live")
    return file


def test_an_operation_steps_back_and_reads_no_faster_than_it_is_set_to(service: Service) -> None:
    noise = Path(json.loads(service.environment["ATHENA_VOLUMES"])["edweb"]) / "noise"
    noise.write_bytes(os.urandom(48 << 20))
    service.start_backup()
    with service.stopped_child("pg_dump"):
        assert os.getpriority(os.PRIO_PROCESS, service.pid_of("prefect.engine")) == 7
        began = time.monotonic()
    await_true(lambda: service.status() == "Success", "the backup's end")
    assert time.monotonic() - began > 4
    noise.unlink()


def test_a_run_that_finds_the_slot_taken_ends_as_skipped_and_is_no_backup(service: Service, timestamp: str) -> None:
    service.start_backup()
    with service.stopped_child("pg_dump"):
        listed = service.call("GET", "/backup/list").json()
        run = service.press_run("backup", {})
        await_true(lambda: service.run_state(run) == "COMPLETED", "the second run's end", 60)
        assert service.prefect("GET", f"/flow_runs/{run}")["state_name"] == "Skipped"
    await_true(lambda: service.status() == "Success", "the first backup's end")
    assert len(service.call("GET", "/backup/list").json()["backup-list"]) == len(listed["backup-list"]) + 1


def test_a_typo_in_the_form_of_prefects_ui_overwrites_nothing(service: Service, timestamp: str, file: Path) -> None:
    run = service.press_run("restore", {"request": {"timestamp": timestamp, "skip": ["gitsrever"]}})
    await_true(lambda: service.run_state(run) == "FAILED", "the run's end", 60)
    status = service.status("/restore/status", json.dumps({"timestamp": timestamp}))
    assert "error checking before the restore: neither the set nor this service has gitsrever" in status
    assert file.read_text() == "live"


def test_a_destination_that_is_not_healthy_is_not_touched(
    service: Service, timestamp: str, file: Path, health: Health
) -> None:
    health.is_well = False
    status = service.restore(timestamp)
    assert f"not healthy before the restore: {health.shown}" in status
    assert "--skip-health-checks" in status
    assert file.read_text() == "live"


def test_one_that_is_not_healthy_afterwards_is_told_beside_what_was_restored(
    service: Service, timestamp: str, file: Path, health: Health
) -> None:
    health.is_well = False
    status = service.restore(timestamp, disablePreRestoreChecks=True)
    assert f"error checking health after the restore: not healthy after the restore: {health.shown}" in status
    assert "; restored: asp gogs edweb gitserver" in status
    assert file.read_text() == "content of gitserver"


def test_what_did_not_come_back_is_told_though_something_else_failed(service: Service, health: Health) -> None:
    """What was restored is live: no later restore tells what it lacks."""
    health.is_well = True
    repository = Path(json.loads(service.environment["ATHENA_VOLUMES"])["gitserver"]) / "borrower.git"
    (repository / "objects" / "info").mkdir(parents=True)
    (repository / "objects" / "info" / "alternates").write_text("/elsewhere/objects\n")
    (repository / "refs").mkdir()
    (repository / "HEAD").write_text("ref: refs/heads/main\n")
    timestamp, _ = service.back_up()
    health.is_well = False
    status = service.restore(timestamp, disablePreRestoreChecks=True)
    assert "not healthy after the restore" in status
    assert "gitserver: borrows objects from outside the volume: borrower.git" in status
    shutil.rmtree(repository)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make devices")
def test_what_a_restore_does_by_request_only_is_refused_with_the_request_s_own_word(
    service: Service, timestamp: str, health: Health
) -> None:
    health.is_well = True
    device = Path(json.loads(service.environment["ATHENA_VOLUMES"])["edweb"]) / "null"
    os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    with_device, status = service.back_up()
    assert status == "Success"
    device.unlink()
    assert "the set holds 1 device nodes (set allowDevices in the restore's request" in service.restore(with_device)
    assert service.restore(with_device, allowDevices=True, acceptMetadataLoss=True) == "Success"
    assert device.is_char_device()
    [run] = service.prefect("POST", "/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})
    assert run["parameters"]["request"]["accept_metadata_loss"] is True
    device.unlink()
    ended = service.command("restore", with_device, "--allow-devices", "--accept-metadata-loss", "--skip", "postgres")
    assert ended.returncode == 0, ended
    assert device.is_char_device()
    device.unlink()


def test_the_health_checks_can_be_left_out(service: Service, timestamp: str, file: Path, health: Health) -> None:
    health.is_well, health.asked = False, 0
    status = service.restore(timestamp, disablePreRestoreChecks=True, disablePostRestoreChecks=True)
    assert (status, health.asked) == ("Success", 0)
    assert file.read_text() == "content of gitserver"
    ended = service.command("restore", timestamp, "--skip-health-checks", "--skip", "postgres")
    assert (ended.returncode, health.asked) == (0, 0), ended
    health.is_well = True
    assert service.restore(timestamp) == "Success"
    assert health.asked == 2


def test_a_database_that_is_read_is_let_go_while_another_is_still_read(
    service: Service, postgres: EmbeddedServer
) -> None:
    databases = {url.rpartition("/")[2] for url in json.loads(service.environment["ATHENA_DATABASES"]).values()}
    assert len(databases) == 2

    def held() -> set[str]:
        with session(postgres.url()) as connection:
            return databases & set(
                run_sql(
                    connection,
                    "SELECT a.datname FROM pg_stat_activity a JOIN pg_locks l USING (pid)"
                    " WHERE a.application_name LIKE 'athena%' AND l.mode = 'AccessShareLock' AND l.relation >= 16384",
                ).scalars()
            )

    service.start_backup()
    with service.stopped_child("pg_dump"):
        await_true(lambda: len(held()) == 1, f"only one of {databases} is held")
    await_true(lambda: service.status() == "Success", "the backup's end")
    assert held() == set()


def test_a_connection_that_breaks_costs_one_more_try_of_its_component_under_the_same_snapshot(
    service: Service, postgres: EmbeddedServer
) -> None:
    database = json.loads(service.environment["ATHENA_DATABASES"])["gogs"].rpartition("/")[2]
    broken = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
        f" WHERE datname = '{database}' AND state = 'active' AND query LIKE 'COPY %'"
    )
    with session(postgres.url(database)) as connection:
        # With it the COPYs last for seconds at the rate that is set, so that one is met; it is small enough to be pg_dump's.
        filler = "SELECT md5(i::text) || md5((-i)::text) FROM generate_series(1, 140000) i"
        run_sql(connection, f"CREATE TABLE public.filler AS {filler}")
    timestamp = service.start_backup()
    with session(postgres.url()) as connection:
        await_true(lambda: run_sql(connection, broken).scalar_one(), "the connection that reads a table is broken")
    with session(postgres.url(database)) as connection:
        run_sql(connection, "INSERT INTO public.t VALUES (-1, 'after the cut')")
    await_true(lambda: "ongoing" not in service.status(), "the backup's end")
    assert service.status() == "Success"
    directory = Path(service.environment["OBJECT_STORE_LOCATION_LOCAL"]) / "app" / timestamp
    tries = {
        name: sorted(json.loads(file.read_text())["state"] for file in directory.glob(f"*/{name}/*/component.json"))
        for name in ("asp", "gogs", "edweb", "gitserver")
    }
    assert tries.pop("gogs") == ["complete", "failed"]
    assert set(map(tuple, tries.values())) == {("complete",)}
    assert service.restore(timestamp) == "Success"
    with session(postgres.url(database)) as connection:
        assert run_sql(connection, "SELECT count(*), min(i) FROM public.t").one() == (20_000, 1)
        run_sql(connection, "DROP TABLE public.filler")
