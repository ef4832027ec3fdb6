"""A database's URL means the same to our sessions and to pg_dump, and its password is seen nowhere."""

import asyncio
import os
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from athena_backup.errors import AthenaError, DeniedError, FinalError, UnavailableError
from athena_backup.names import SetId
from athena_backup.operation import Operation
from athena_backup.postgres.copy_login import connect
from athena_backup.postgres.cut import hold_cut
from athena_backup.postgres.dump import write_database, write_globals
from athena_backup.postgres.embedded import EmbeddedServer, binaries
from athena_backup.postgres.preflight import preflight_database
from athena_backup.postgres.session_settings import READING_SETTINGS
from athena_backup.postgres.sessions import (
    Database,
    NoDatabaseError,
    ServerIdentity,
    libpq_environment,
    parse_database_url,
    refuse_older,
    run_sql,
    session,
    translated_state,
)
from athena_backup.postgres.staging import stage_database
from athena_backup.store.credentials import bare_environment
from athena_backup.store.local import LocalStore

SET = SetId.parse("app/2023-02-02t16-00-00", "app")


def test_every_part_of_a_url_may_be_percent_encoded() -> None:
    url = parse_database_url("asp", "postgresql://us%40er:p%3Aa%2Fs%25s@host:5433/my%20d%3Fb%25")
    assert (url.username, url.password, url.database) == ("us@er", "p:a/s%s", "my d?b%")


def test_a_child_is_told_even_while_a_store_renews_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        monkeypatch.setenv(f"AWS_VARIABLE_{number}", "set")
    monkeypatch.setenv("PGSSLROOTCERT", "/ca")
    ended = threading.Event()

    def renew() -> None:
        while not ended.is_set():
            with bare_environment():
                pass

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        url = parse_database_url("asp", "postgresql://u:p@host/asp")
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            assert libpq_environment(url)["PGSSLROOTCERT"] == "/ca"
    finally:
        ended.set()
        thread.join()


def test_a_child_is_told_what_the_session_is_told() -> None:
    parameters = "sslmode=verify-full&sslcrl=/crl&require_auth=scram-sha-256&hostaddr=10.0.0.1&connect_timeout=1"
    environment = libpq_environment(parse_database_url("asp", f"postgresql://u:p@host/asp?{parameters}"))
    wanted = {
        "PGSSLMODE": "verify-full",
        "PGSSLCRL": "/crl",
        "PGREQUIREAUTH": "scram-sha-256",
        "PGHOSTADDR": "10.0.0.1",
        "PGCONNECT_TIMEOUT": "10",
    }
    assert wanted.items() <= environment.items()


def test_a_child_is_told_what_the_session_takes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password from a secret, for example, which the session finds by itself; what the URL says goes before it."""
    given = {
        "PGPASSWORD": "secret",
        "PGUSER": "me",
        "PGSSLMODE": "require",
        "PGOPTIONS": "-c role=reader",
        "HOME": "/h",
    }
    for name, value in {**given, "PGSERVICE": "elsewhere", "AWS_SECRET_ACCESS_KEY": "other"}.items():
        monkeypatch.setenv(name, value)
    environment = libpq_environment(parse_database_url("asp", "postgresql://host/asp?sslmode=verify-full"))
    assert environment.pop("PGOPTIONS").startswith("-c role=reader -c ")
    wanted = {"PGPASSWORD": "secret", "PGUSER": "me", "PGHOST": "host", "PGSSLMODE": "verify-full", "HOME": "/h"}
    assert wanted.items() <= environment.items()
    assert not {"PGSERVICE", "AWS_SECRET_ACCESS_KEY"} & environment.keys()
    told = libpq_environment(parse_database_url("asp", "postgresql://u:p@host/asp"))
    assert (told["PGUSER"], told["PGPASSWORD"]) == ("u", "p")


@pytest.mark.parametrize("parameter", ["sslpassword=hush", "no_such=1", "password=hush&password=hush"])
def test_a_parameter_that_a_child_could_not_be_told_is_refused_without_its_value(parameter: str) -> None:
    with pytest.raises(FinalError, match="parameters that can't be used") as caught:
        parse_database_url("asp", f"postgresql://host/asp?{parameter}")
    assert "hush" not in str(caught.value)


def test_a_password_among_the_parameters_is_hidden_like_one_before_the_host() -> None:
    url = parse_database_url("asp", "postgresql://host/asp?user=me&password=hush")
    assert (url.username, url.password) == ("me", "hush")
    assert "hush" not in url.render_as_string(hide_password=True)


def test_no_password_is_in_any_command_line(
    make_database: Callable[..., Database], local_store: LocalStore, postgres: EmbeddedServer
) -> None:
    database = make_database("secretive", "CREATE TABLE t AS SELECT i, md5(i::text) FROM generate_series(1, 200000) i")
    database = Database(database.name, database.url.set(password="s3cret-word"))
    seen: set[str] = set()
    stopped = threading.Event()

    def look() -> None:
        while not stopped.wait(0.005):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(path.read_text(errors="replace"))
                except OSError:
                    continue

    looking = threading.Thread(target=look)
    looking.start()
    try:
        with hold_cut([database], Operation()) as cut:
            component = write_database(
                database, cut, local_store, SET, "run", Operation(), client_directories=[binaries()]
            )
            write_globals(cut.of(database.name), local_store, SET, Operation(), [binaries()])
        assert preflight_database(component, database, "0123456789ab", [binaries()]) == []
        stage_database(component, database, local_store, "0123456789ab", Operation(), client_directories=[binaries()])
    finally:
        stopped.set()
        looking.join()
    for program in ("pg_dump\0", "pg_dumpall\0", "pg_restore\0"):
        assert any(program in line for line in seen), program
    assert not [line for line in seen if "s3cret-word" in line]


def test_the_row_in_which_a_function_failed_is_not_shown() -> None:
    told = translated_state("P0001", 'no such account\nCONTEXT:  COPY t, line 7: "a secret"')
    assert str(told) == "PostgreSQL: no such account"


@pytest.mark.parametrize(
    ("changed", "kind", "next_step"),
    [
        ({"username": "nouser"}, DeniedError, "correct user or password"),
        ({"database": "nodatabase"}, NoDatabaseError, "create the database"),
        ({"database": 'role "x"'}, NoDatabaseError, "create the database"),
        ({"port": 1}, UnavailableError, "start the server, or correct host and port"),
        ({"host": "nosuch.invalid"}, UnavailableError, "start the server, or correct host and port"),
        ({"host": None, "query": {"host": "/nowhere"}}, UnavailableError, "start the server, or correct host and port"),
    ],
)
def test_why_a_session_is_not_opened_says_which_part_of_the_url_is_wrong(
    postgres: EmbeddedServer, changed: dict[str, Any], kind: type[AthenaError], next_step: str
) -> None:
    with pytest.raises(kind) as refused, session(postgres.url().set(**changed)):
        pass
    assert refused.value.next_step.startswith(next_step)


def test_a_standby_is_another_server_than_its_primary() -> None:
    primary = ServerIdentity("7", 1, "10.0.0.1", 5432, datetime.now(UTC), 150_000, in_recovery=False)
    assert primary.same_server(replace(primary, address="10.0.0.2"))
    assert not primary.same_server(replace(primary, in_recovery=True))


def test_a_server_notices_within_a_minute_that_we_are_gone(postgres: EmbeddedServer) -> None:
    """Until then the locks of a backup stand in the way of whoever wants to change a table, and of all that come after."""
    asked = "SELECT current_setting('tcp_keepalives_idle') || ' ' || current_setting('tcp_keepalives_count')"
    url = postgres.url()
    with session(url) as connection:
        assert run_sql(connection, asked).scalar_one() == "30 3"

    async def of_copy() -> str:
        connection = await connect(url)
        try:
            return str(await connection.fetchval(asked))
        finally:
            await connection.close()

    assert asyncio.run(of_copy()) == "30 3"
    environment = {"PATH": os.environ["PATH"], **libpq_environment(url)}
    command = [str(binaries() / "psql"), "--no-psqlrc", "-At", "-c", asked]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "30 3\n"


def test_a_reader_that_waits_for_its_store_is_no_reason_for_the_server_to_hang_up(postgres: EmbeddedServer) -> None:
    """With tcp_user_timeout it would, as long as the store's outage lasts: the client is there, and reads nothing."""
    with session(postgres.url()) as connection:
        assert run_sql(connection, "SELECT current_setting('tcp_user_timeout')").scalar_one() == "0"
    assert "tcp_user_timeout" not in libpq_environment(postgres.url())["PGOPTIONS"]


def test_a_server_that_is_too_old_is_refused_by_name() -> None:
    refuse_older(130_000)
    with pytest.raises(FinalError, match="the server is PostgreSQL 12, 13 is the oldest"):
        refuse_older(120_022)


def test_what_a_database_is_set_to_cuts_no_read_off(postgres: EmbeddedServer) -> None:
    with session(postgres.url()) as connection:
        run_sql(connection, "CREATE DATABASE impatient")
    try:
        with session(postgres.url()) as connection:
            for setting in ("statement_timeout = '1h'", "lock_timeout = '1h'", "synchronize_seqscans = on"):
                run_sql(connection, f"ALTER DATABASE impatient SET {setting}")
        with session(postgres.url("impatient")) as connection:
            for name in ("statement_timeout", "lock_timeout", "synchronize_seqscans"):
                assert run_sql(connection, f"SHOW {name}").scalar_one() == READING_SETTINGS[name]
    finally:
        with session(postgres.url()) as connection:
            run_sql(connection, "DROP DATABASE impatient WITH (FORCE)")
