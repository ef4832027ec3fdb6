"""What the tests stand up: a PostgreSQL server, a store in a directory. Each is stopped or removed when its user is done."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from athena_backup.postgres.embedded import EmbeddedServer, embedded_server
from athena_backup.store.local import LocalStore, initialize


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedServer]:
    """One real PostgreSQL server for the whole session; tests make databases of their own on it."""
    with (
        tempfile.TemporaryDirectory(prefix="athena-test-pg-") as directory,
        embedded_server(Path(directory) / "data") as server,
    ):
        yield server


@pytest.fixture
def local_store(tmp_path: Path) -> LocalStore:
    """An initialized store in an empty directory."""
    root = tmp_path / "store"
    root.mkdir()
    initialize(root)
    return LocalStore(str(root))
