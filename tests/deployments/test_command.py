"""The command line from outside: what it refuses, in one clear line without a secret, and what `check` finds."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from service import Service, await_true


def refusal(service: Service, *arguments: str, **environment: str) -> str:
    """The one line on stderr of a command that ends with exit code 1, as every refusal does."""
    ended = service.command(*arguments, **environment)
    assert ended.returncode == 1, ended
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    return ended.stderr


def test_a_component_to_skip_that_nobody_knows_is_refused_because_it_would_be_overwritten(service: Service) -> None:
    timestamp, _ = service.back_up()
    file = Path(json.loads(service.environment["ATHENA_VOLUMES"])["gitserver"]) / "folder" / "file"
    file.write_text("to be kept")
    assert "gitsrever" in refusal(service, "restore", timestamp, "--skip", "gitsrever", "--skip", "postgres")
    assert file.read_text() == "to be kept"
    kept = service.command("restore", timestamp, "--skip", "gitserver", "--skip", "postgres")
    assert kept.returncode == 0, kept
    assert file.read_text() == "to be kept"
    file.write_text("content of gitserver")


@pytest.mark.parametrize("home", ["/dev/null/home", "/proc/home"])
def test_a_home_that_cannot_be_written_is_named(service: Service, home: str) -> None:
    assert f"ATHENA_HOME: {home} can't be written" in refusal(service, "up", ATHENA_HOME=home)


def test_a_taken_port_is_named_with_its_setting(service: Service, tmp_path: Path) -> None:
    port = service.api_url.rpartition(":")[2]
    for name in ("ATHENA_API_PORT", "ATHENA_PREFECT_PORT"):
        said = refusal(service, "up", ATHENA_HOME=str(tmp_path), **{name: port})
        assert f"port {port}" in said
        assert name in said


def test_a_prefect_server_that_does_not_answer_is_named_without_its_password(service: Service, tmp_path: Path) -> None:
    said = refusal(service, "up", ATHENA_HOME=str(tmp_path), PREFECT_API_URL="http://user:hunter2@127.0.0.1:1/api")
    assert "http://user:********@127.0.0.1:1/api does not answer" in said


def test_commands_that_only_look_make_no_store_of_a_directory_where_none_is_mounted(
    service: Service, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    given = {"OBJECT_STORE_LOCATION_LOCAL": str(place), "ATHENA_HOME": str(tmp_path / "home")}
    told = f"the store's directory {place} is empty, and no store yet (mount it"
    assert f"note  store: {told}" in service.command("check", **given).stdout
    listed = service.command("list", **given)
    assert listed.returncode == 1
    assert told in listed.stderr
    assert list(place.iterdir()) == []


def test_an_empty_volume_that_would_fail_the_backup_fails_the_check(service: Service, tmp_path: Path) -> None:
    volumes = json.dumps({"edweb": str(tmp_path)})
    checked = service.command("check", ATHENA_VOLUMES=volumes)
    assert f"FAIL  volume edweb: {tmp_path} is empty (is it mounted? a restore fills it; " in checked.stdout
    checked = service.command("check", ATHENA_VOLUMES=volumes, ATHENA_EMPTY_VOLUMES='["edweb"]')
    assert f"ok    volume edweb: {tmp_path}" in checked.stdout


def test_volumes_that_cannot_be_restored_each_by_itself_are_refused_at_every_start(
    service: Service, tmp_path: Path
) -> None:
    for folder in ("outer/inner", "cluster/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "cluster" / "data" / "PG_VERSION").write_text("18\n")
    (tmp_path / "link").symlink_to(tmp_path / "outer" / "inner")
    volumes = {"one": "outer", "two": "link", "three": "cluster"}
    places = json.dumps({name: str(tmp_path / folder) for name, folder in volumes.items()})
    said = refusal(service, "up", ATHENA_HOME=str(tmp_path / "outer" / "home"), ATHENA_VOLUMES=places)
    assert "volume one and volume two lie in one another" in said
    assert "volume one and ATHENA_HOME lie in one another" in said
    assert "volume three holds the data directory of a PostgreSQL server" in said


def test_ctrl_c_while_the_service_starts_stops_it_at_once(make_service: Callable[..., Service]) -> None:
    starting = make_service("starting")
    starting.begin()
    await_true(lambda: any("starting the Prefect server" in line for line in starting.output), "the start")
    await_true(lambda: any("prefect_server" in command for command in starting.processes().values()), "the server")
    assert starting.stop(signal.SIGINT) == 0
    assert not any("starting the runner" in line for line in starting.output)
    assert not starting.processes()
