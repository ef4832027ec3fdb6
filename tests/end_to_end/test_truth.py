"""Point 4 of the first issue, from outside: what can go wrong fails the set, and its status names component, step, cause."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from service import Service
from sqlalchemy import text

from athena_backup.postgres.embedded import EmbeddedServer
from athena_backup.postgres.sessions import run_sql, session


@pytest.fixture(scope="module")
def service(make_service: Callable[..., Service]) -> Service:
    made = make_service("truth", ENABLE_REGULAR_BACKUPS="true", ATHENA_CATCH_UP="false")
    made.start()
    return made


def volume(service: Service, name: str) -> Path:
    return Path(json.loads(service.environment["ATHENA_VOLUMES"])[name])


def test_a_volume_that_is_not_mounted_fails_the_set_and_the_rest_is_still_backed_up(service: Service) -> None:
    directory = volume(service, "edweb")
    directory.rename(directory.with_name("away"))
    directory.mkdir()
    try:
        timestamp, status = service.back_up()
    finally:
        directory.rmdir()
        directory.with_name("away").rename(directory)
    assert status.startswith("edweb: error archiving: ")
    assert "is it mounted?" in status
    folder = Path(service.environment["OBJECT_STORE_LOCATION_LOCAL"]) / "app" / timestamp
    assert not (folder / "manifest.json").exists()
    assert (folder / "failure.json").exists()
    assert list(folder.glob("databases/asp/*/component.json"))
    assert service.back_up()[1] == "Success"


def test_a_table_that_row_level_security_hides_from_nobody_is_in_the_set(
    service: Service, postgres: EmbeddedServer
) -> None:
    with session(postgres.url("truth_asp"), {"search_path": "public"}) as connection:
        run_sql(connection, "CREATE TABLE secret AS SELECT generate_series(1, 10) AS i")
        run_sql(connection, "ALTER TABLE secret ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        run_sql(connection, "ALTER DATABASE truth_asp SET extra_float_digits = -5")
    timestamp, status = service.back_up()
    assert status == "Success"
    with session(postgres.url("truth_asp")) as connection:
        run_sql(connection, "TRUNCATE public.secret")
    assert service.restore(timestamp) == "Success"
    with session(postgres.url("truth_asp")) as connection:
        assert connection.execute(text("SELECT count(*) FROM public.secret")).scalar_one() == 10


def test_a_restore_names_what_came_back_disabled(service: Service, postgres: EmbeddedServer) -> None:
    def drop() -> None:
        with session(postgres.url("truth_asp")) as connection:
            run_sql(connection, "ALTER SUBSCRIPTION far SET (slot_name = NONE)")
            run_sql(connection, "DROP SUBSCRIPTION far")

    with session(postgres.url("truth_asp")) as connection:
        run_sql(connection, "CREATE SUBSCRIPTION far CONNECTION 'host=nowhere' PUBLICATION p WITH (connect = false)")
    timestamp, _ = service.back_up()
    drop()
    assert service.restore(timestamp, enableReportGeneration=True) == "Success"
    asked = {"flow_runs": {"tags": {"all_": [f"timestamp:{timestamp}"]}}, "flows": {"name": {"any_": ["restore"]}}}
    [run] = service.prefect("POST", "/flow_runs/filter", asked)
    note = "asp: subscription far is disabled: enable it where it is to be used here"
    assert note in run["state"]["message"]
    reports = service.prefect("POST", "/artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    assert any(note in str(report["data"]) for report in reports)
    drop()


def test_a_restore_that_finds_a_fault_beforehand_touches_nothing(service: Service) -> None:
    timestamp, _ = service.back_up()
    file = volume(service, "gitserver") / "folder" / "file"
    file.write_text("still live")
    (part,) = (Path(service.environment["OBJECT_STORE_LOCATION_LOCAL"]) / "app" / timestamp).glob(
        "volumes/edweb/*/*.0000"
    )
    part.write_bytes(part.read_bytes() + b"x")
    status = service.restore(timestamp)
    assert part.name in status
    assert "left as they were: asp gogs edweb gitserver" in status
    assert file.read_text() == "still live"


def test_the_deployments_next_runs_are_the_coming_midnights_utc(service: Service) -> None:
    asked = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 3}
    runs = httpx.post(f"{service.prefect_url}/api/flow_runs/filter", json=asked, trust_env=False).json()
    assert len(runs) == 3
    assert all(run["expected_start_time"][10:19] == "T00:00:00" for run in runs)


def test_check_says_what_is_wrong_and_shows_the_next_five_runs(service: Service) -> None:
    command = [sys.executable, "-m", "deployments.cli", "check", "--settings"]
    environment = {**service.environment, "ATHENA_VOLUMES": json.dumps({"edweb": "/nowhere/at/all"})}
    checked = subprocess.run(command, env=environment, cwd=service.home, capture_output=True, text=True)
    assert checked.returncode == 1
    assert "FAIL  volume edweb: /nowhere/at/all is not a directory" in checked.stdout
    assert "ok    database asp: PostgreSQL 18" in checked.stdout
    assert checked.stdout.count("next run: ") == 5
    assert "a-test-key" not in checked.stdout
