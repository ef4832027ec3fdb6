"""Mounts: a look at one that does not answer."""

import os
import threading
from pathlib import Path

import pytest

from athena_backup import pipeline
from athena_backup.errors import DeadlineError
from athena_backup.mounts import await_answer
from athena_backup.operation import Operation


def test_a_mount_whose_server_is_gone_keeps_no_operation_beyond_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake, as no file system of a test hangs: nfs(5) with a dead server does not come back from the call."""
    is_back = threading.Event()

    def hang(place: object) -> object:
        is_back.wait(60)
        raise OSError(str(place))

    monkeypatch.setattr(os, "scandir", hang)
    monkeypatch.setattr(pipeline, "_GRACE_SECONDS", 0.1)
    try:
        with pytest.raises(DeadlineError):
            await_answer(tmp_path, Operation.lasting(0.2))
    finally:
        is_back.set()


def test_what_is_wrong_with_a_folder_is_left_to_whoever_looks_next(tmp_path: Path) -> None:
    await_answer(tmp_path / "missing", Operation())
    await_answer(tmp_path, Operation())
