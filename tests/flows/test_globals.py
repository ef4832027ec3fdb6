"""A server's globals are stored for people to read: whatever fails there fails no backup."""

from types import SimpleNamespace

import pytest

from athena_backup.errors import FinalError
from flows.backup import write_server_globals


@pytest.mark.parametrize(
    "error",
    [FinalError("pg_dumpall said no"), OSError(11, "no room for a process"), MemoryError(), ValueError("unforeseen")],
)
def test_whatever_keeps_the_globals_from_the_set_is_only_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """The errors are made up: a machine runs out of processes when it will."""
    asked: list[object] = []

    def fail(held: object, *rest: object) -> None:
        asked.append(held)
        raise error

    monkeypatch.setattr("flows.backup.write_globals", fail)
    held = [
        SimpleNamespace(server=SimpleNamespace(number=0), database=SimpleNamespace(name=name))
        for name in ("asp", "gogs")
    ]
    settings = SimpleNamespace(athena_pg_bin=[])
    working = SimpleNamespace(
        cut=SimpleNamespace(held={one.database.name: one for one in held}),
        store=None,
        set_id=None,
        operation=None,
        settings=settings,
    )
    write_server_globals(working)  # type: ignore[arg-type]
    assert len(asked) == 1, "once for each server"
    assert "the globals of the server of gogs are not in the set" in caplog.text
