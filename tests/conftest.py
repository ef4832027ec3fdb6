"""What the tests stand up: a PostgreSQL server, a store in a directory, a service. Each is stopped when its users are done."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from athena_backup.manifest import Component
from athena_backup.names import SetId, Timestamp
from athena_backup.operation import Operation
from athena_backup.postgres.embedded import EmbeddedServer, binaries, embedded_server
from athena_backup.postgres.sessions import Database, quoted, run_sql, session
from athena_backup.store import Store
from athena_backup.store.local import LocalStore, initialize
from athena_backup.volume_archive import Volume, write_volume
from deployments.embedded_stores import EmbeddedAzure, EmbeddedS3, embedded_azure, embedded_s3

sys.path.insert(0, str(Path(__file__).parent))

from authority import Authority, make_authority
from fault_proxy import FaultProxy, fault_proxy
from object_stores import OBJECT_STORES, PATIENT, Server, azure_server, gcs_server, moto_s3, moto_server, s3_server
from service import Service

# Where the tests were started to outlive their terminal (nohup), every service of theirs would ignore its hang-up too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No test is timed, and what it tries is the same each time.
settings.register_profile("athena", deadline=None, derandomize=True)
settings.load_profile("athena")


_SERVICES: list[Service] = []
_TOLD_LINES = 80


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """With a failure, what the services said last: most of what they do is seen from outside alone."""
    report = yield
    if report.failed:
        for service in _SERVICES:
            report.sections.append((f"{service.home.name} said last", "\n".join(service.output[-_TOLD_LINES:])))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The flows' files first: they wait the longest, and one that began last would be waited for alone."""
    items.sort(key=lambda item: "flows" not in item.path.parts)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedServer]:
    """One real PostgreSQL server for the whole session; tests make databases of their own on it."""
    settings = {"max_prepared_transactions": "5", "wal_level": "logical", "max_connections": "200"}
    with (
        tempfile.TemporaryDirectory(prefix="athena-test-pg-") as directory,
        embedded_server(Path(directory) / "data", settings) as server,
    ):
        yield server


@pytest.fixture
def local_store(tmp_path: Path) -> LocalStore:
    """An initialized store in an empty directory."""
    root = tmp_path / "store"
    root.mkdir()
    initialize(root)
    return LocalStore(str(root))


@pytest.fixture
def component(tmp_path: Path, local_store: LocalStore) -> Component:
    """The backup of a volume with one file, ``new``, in `local_store`."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "new").write_text("new")
    set_id = SetId("app", Timestamp.parse("2023-02-02t16-00-00"))
    return write_volume(Volume("repos", source), local_store, set_id, "run", Operation())


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority of the tests, and a server's certificate by it for 127.0.0.1."""
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedS3]:
    """A SeaweedFS for the whole session."""
    with embedded_s3(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedAzure]:
    """An Azurite for the whole session."""
    with embedded_azure(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture(scope="session")
def moto() -> Iterator[str]:
    """The address of moto's server, for the whole session."""
    with moto_server() as address:
        yield address


@pytest.fixture(scope="session")
def _servers(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Server]]:
    """Each of the `OBJECT_STORES` by its name, started at first use."""
    with contextlib.ExitStack() as stack:
        makers: dict[str, Callable[[], Server]] = {
            "s3": lambda: s3_server(request.getfixturevalue("seaweed")),
            "moto": lambda: moto_s3(request.getfixturevalue("moto")),
            "azure": lambda: azure_server(request.getfixturevalue("azurite")),
            "gcs": lambda: stack.enter_context(gcs_server(request.getfixturevalue("moto"))),
        }
        yield functools.cache(lambda kind: makers[kind]())


@pytest.fixture
def open_server(_servers: Callable[[str], Server]) -> Callable[[str], Server]:
    """One of the `OBJECT_STORES` by its name, emptied for this test."""

    def opened(kind: str) -> Server:
        server = _servers(kind)
        server.clean()
        return server

    return opened


@pytest.fixture(params=OBJECT_STORES)
def object_server(request: pytest.FixtureRequest, open_server: Callable[[str], Server]) -> Server:
    """Each of the object stores in turn, empty."""
    return open_server(request.param)


@pytest.fixture(params=["local", *OBJECT_STORES])
def store(request: pytest.FixtureRequest, open_server: Callable[[str], Server]) -> Store:
    """Each kind of store in turn, empty."""
    return (
        request.getfixturevalue("local_store") if request.param == "local" else open_server(request.param).open(PATIENT)
    )


@pytest.fixture
def proxy(object_server: Server) -> Iterator[FaultProxy]:
    """A proxy before the object store, which breaks nothing until it is told to."""
    with fault_proxy(object_server.address) as running:
        yield running


@pytest.fixture
def make_database(postgres: EmbeddedServer) -> Iterator[Callable[..., Database]]:
    """Make a database with some SQL in it; all are dropped when the test is done."""
    made: list[str] = []

    def make(name: str, sql: str = "", owner: str = "postgres") -> Database:
        with session(postgres.url()) as connection:
            run_sql(connection, f"CREATE DATABASE {quoted(name)} OWNER {quoted(owner)}")
        made.append(name)
        url = postgres.url(name, user=owner)
        if sql:
            with session(url, {"search_path": "public"}) as connection:
                run_sql(connection, sql)
        return Database(re.sub(r"[^a-z0-9]", "", name.lower()) or "database", url)

    yield make
    with session(postgres.url()) as connection:
        there = set(run_sql(connection, "SELECT datname FROM pg_database").scalars())
        for name in there - {"postgres", "template0", "template1"}:
            if any(name == one or name.startswith(f"{one}__athena") for one in made):
                run_sql(connection, f"DROP DATABASE {quoted(name)} WITH (FORCE)")


@functools.cache
def _migrated_database() -> bytes:
    """A new Prefect server's database, which each service would take ten seconds of processor time to make by itself."""
    with tempfile.TemporaryDirectory() as home:
        subprocess.run(
            [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"],
            env={"PATH": os.environ["PATH"], "HOME": home, "PREFECT_HOME": home},
            check=True,
            capture_output=True,
        )
        return (Path(home) / "prefect.db").read_bytes()


@contextlib.contextmanager
def _services(postgres: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def make(name: str, **environment: str) -> Service:
        home = tmp_path_factory.mktemp(name)
        (home / "backup").mkdir()
        (home / "athena" / "prefect").mkdir(parents=True)
        (home / "athena").chmod(0o700)
        (home / "athena" / "prefect" / "prefect.db").write_bytes(_migrated_database())
        databases, volumes = {}, {}
        for component in ("asp", "gogs"):
            database = f"{name}_{component}"
            with session(postgres.url()) as connection:
                run_sql(connection, f"CREATE DATABASE {quoted(database)}")
            with session(postgres.url(database), {"search_path": "public"}) as connection:
                rows = "SELECT i, repeat(md5(i::text), 10) FROM generate_series(1, 20000) i"
                run_sql(connection, f"CREATE TABLE t (i integer PRIMARY KEY, v text); INSERT INTO t {rows}")
            databases[component] = postgres.url(database).render_as_string(hide_password=False)
        for component in ("edweb", "gitserver"):
            directory = home / "volumes" / component
            (directory / "folder").mkdir(parents=True)
            (directory / "folder" / "file").write_text(f"content of {component}")
            volumes[component] = str(directory)
        service = Service(
            home,
            {
                "ATHENA_DATABASES": json.dumps(databases),
                "ATHENA_VOLUMES": json.dumps(volumes),
                "ATHENA_PG_BIN": json.dumps([str(binaries())]),
                "OBJECT_STORE_LOCATION_LOCAL": str(home / "backup"),
                **environment,
            },
        )
        _SERVICES.append(service)
        made.append(service)
        return service

    try:
        yield make
    finally:
        for service in made:
            service.close()
            _SERVICES.remove(service)


@pytest.fixture(scope="module")
def make_service(
    postgres: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Service]]:
    """Define a service over databases and volumes of its own; the caller starts it, the end of the file's tests closes it.

    Each would take a fifteenth of a core from the tests behind it.
    """
    with _services(postgres, tmp_path_factory) as make:
        yield make


@pytest.fixture(scope="session")
def service(postgres: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One running service for every test that does it no harm."""
    with _services(postgres, tmp_path_factory) as make:
        made = make("shared")
        made.start()
        yield made
