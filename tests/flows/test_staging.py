"""A restore's second try begins with nothing of what a failed one has built, also where that could not be dropped."""

from types import SimpleNamespace
from uuid import uuid4

import pytest

from athena_backup.errors import UnavailableError
from athena_backup.operation import Operation
from flows import restore
from flows.operating import WORKING


def test_what_could_not_be_dropped_is_dropped_before_anything_is_loaded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made up: a server that goes away while it loads, is away when the half loaded database is to be dropped, and comes back."""
    happened: list[str] = []
    is_away = True

    def load(*_: object, **__: object) -> SimpleNamespace:
        happened.append("load")
        if is_away:
            raise UnavailableError("the server went away")
        return SimpleNamespace(notes=())

    def drop(*_: object) -> None:
        happened.append("drop")
        if is_away:
            raise UnavailableError("the server is away")

    monkeypatch.setattr(restore, "await_server", lambda *_: happened.append("wait"))
    monkeypatch.setattr(restore, "stage_database", load)
    monkeypatch.setattr(restore, "discard_staging", drop)
    monkeypatch.setattr(restore, "component_of", lambda name, _: SimpleNamespace(name=name, kind="database"))
    monkeypatch.setattr(restore, "database_of", lambda *_: None)
    working = SimpleNamespace(
        operation=Operation(), run_id=uuid4(), settings=SimpleNamespace(athena_pg_bin=[]), store=None, crew=None,
        begun=set(), staged={}, notes={}, faults={}, seconds={},
    )  # fmt: skip
    token = WORKING.set(working)  # type: ignore[arg-type]
    try:
        with pytest.raises(UnavailableError, match="went away"):
            restore.stage.fn("asp")
        with pytest.raises(UnavailableError, match="is away"):
            restore.stage.fn("asp")
        is_away = False
        restore.stage.fn("asp")
    finally:
        WORKING.reset(token)
    assert happened == ["load", "drop", "wait", "drop", "wait", "drop", "load"]
    assert list(working.staged) == ["asp"]
