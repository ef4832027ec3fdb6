"""What a switch replaced is removed while people still work in it, however much it is; what can't be removed harms nobody."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from athena_backup.manifest import Component
from athena_backup.operation import Operation
from athena_backup.store.local import LocalStore
from athena_backup.volume_exchange import discard_volume, leftovers, recover_volume, stage_volume, switch_volume

RESTORE_ID = "0123456789ab"
STAGING = f".athena-{RESTORE_ID}"


@pytest.fixture
def live(tmp_path: Path) -> Path:
    root = tmp_path / "live"
    (root / "repository").mkdir(parents=True)
    (root / "repository" / "object").write_text("old")
    return root


def test_writers_that_work_in_a_replaced_folder_do_not_fail_the_switch(
    component: Component, local_store: LocalStore, live: Path
) -> None:
    """As a git server does: its processes have the repository as their working directory."""
    script = (
        "import itertools, os, sys\n"
        "os.chdir(sys.argv[1])\n"
        "print(flush=True)\n"
        "for number in itertools.count():\n"
        "    try:\n"
        "        os.mkdir(f'tmp-{number}')\n"
        "        with open(f'tmp-{number}/object', 'w') as file: file.write('x')\n"
        "        os.unlink(f'tmp-{number}/object')\n"
        "        if number % 3: os.rmdir(f'tmp-{number}')\n"
        "    except OSError:\n"
        "        if os.stat('.').st_nlink == 0: sys.exit(0)\n"
    )
    for _ in range(10):
        (live / "repository").mkdir(exist_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", script, str(live / "repository")], stdout=subprocess.PIPE)
        try:
            assert writer.stdout is not None
            writer.stdout.readline()
            stage_volume(component, local_store, live, RESTORE_ID, Operation())
            switch_volume(live, RESTORE_ID, Operation())
            assert os.listdir(live) == ["new"]
            assert writer.wait(60) == 0
        finally:
            writer.kill()
            writer.wait()
            writer.stdout.close()  # type: ignore[union-attr]


def test_what_cannot_be_removed_makes_no_failure_of_a_switch_that_is_done(
    component: Component, local_store: LocalStore, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_volume(component, local_store, live, RESTORE_ID, Operation())
    real: Callable[..., None] = os.unlink

    def busy(name: bytes, *, dir_fd: int) -> None:
        if name == b"object":  # as a file that somebody has open on NFS, or an immutable one
            raise OSError(16, "Device or resource busy", name)
        real(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", busy)
    switch_volume(live, RESTORE_ID, Operation())
    assert (live / "new").read_text() == "new"
    assert not (live / "repository").exists()
    assert leftovers(live) == [RESTORE_ID]
    assert recover_volume(live, RESTORE_ID) is True, "and it stands in no later restore's way"
    monkeypatch.undo()
    discard_volume(live, RESTORE_ID)
    assert os.listdir(live) == ["new"]


def test_removing_lists_every_folder_once(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(200):
        (live / STAGING / "old" / str(number)).mkdir(parents=True)
    listed = []
    real = os.listdir

    def counted(folder: int | Path) -> list[str]:
        listed.append(folder)
        return real(folder)

    monkeypatch.setattr(os, "listdir", counted)
    discard_volume(live, RESTORE_ID)
    monkeypatch.undo()
    assert leftovers(live) == []
    assert len(listed) < 210, "with a listing of all for each of them, 8,000 folders took 87 seconds"
