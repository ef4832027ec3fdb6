"""The embedded servers start although one of their ports is taken between the moment it was found free and their start."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from athena_backup import ports
from athena_backup.ports import PortTakenError, free_ports
from athena_backup.postgres.embedded import embedded_server
from deployments.embedded_stores import embedded_azure, embedded_s3


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def found(taken: int, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What each look for free ports found; the first of all found the taken one as the first of its ports."""
    found: list[list[int]] = []

    def finding(count: int) -> list[int]:
        found.append([taken, *free_ports(count - 1)] if not found else free_ports(count))
        return found[-1]

    monkeypatch.setattr(ports, "free_ports", finding)
    return found


def test_ports_found_together_are_different_ones() -> None:
    assert len(set(free_ports(2000))) == 2000


def test_postgres_starts_on_another_port(tmp_path: Path, taken: int, found: list[list[int]]) -> None:
    with embedded_server(tmp_path / "postgres") as server:
        assert found == [[taken], [server.port]]
        with psycopg.connect(server.url().render_as_string(hide_password=False)) as session:
            assert session.execute("SELECT 1").fetchone() == (1,)


def test_seaweedfs_starts_on_other_ports(tmp_path: Path, taken: int, found: list[list[int]]) -> None:
    with embedded_s3(tmp_path / "seaweed") as server:
        assert len(found) == 2
        assert server.access.client().list_objects_v2(Bucket=server.bucket)["KeyCount"] == 0


def test_azurite_starts_on_another_port(tmp_path: Path, taken: int, found: list[list[int]]) -> None:
    with embedded_azure(tmp_path / "azurite") as server:
        assert len(found) == 2
        assert str(found[1][0]) in server.service_url
        assert httpx.get(server.service_url, trust_env=False).status_code < 500


def test_a_port_that_stays_taken_is_told_with_the_servers_own_words(
    tmp_path: Path, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "free_ports", lambda count: [taken])
    with (
        pytest.raises(PortTakenError, match=r"(?s)PostgreSQL did not start.*already in use"),
        embedded_server(tmp_path / "p"),
    ):
        pass
