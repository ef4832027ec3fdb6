"""Whoever goes on using a volume while a restore switches it: what they lose, in sentences for the restore's message.

Called by `volume_exchange`, which waits for nobody and deletes what it has replaced: a volume's users are to be stopped before.
"""

import bisect
import contextlib
import os
import time
from collections.abc import Iterator, Sequence

from athena_backup.volume_entry import Some, is_same
from athena_backup.volume_staging import MET, opened_folder
from athena_backup.volume_walk import STAGING_PREFIX

_ADVICE = "stop whatever uses the volume, and restore again"
_LOOK_SECONDS = 5
"""How long processes are looked through for users: a machine may have any number of them."""


def written_meanwhile(root: int, staging: int, moved_in: Sequence[bytes] | None) -> list[str]:
    """What live writers made in the open root during a switch.

    ``moved_in`` are all names of the set in the root, sorted; None where they are not known. Fails no switch that is done: what
    can't be looked at is left out.
    """
    beside, replaced = Some(), Some()
    with contextlib.suppress(OSError), os.scandir(root) as items:
        for name in (os.fsencode(item.name) for item in items):
            if moved_in is not None and not name.startswith(STAGING_PREFIX) and not _holds(moved_in, name):
                beside = beside.and_another(name)
    with contextlib.suppress(OSError), opened_folder(staging, MET) as met:
        for name in sorted({os.fsencode(item).partition(b"-")[2] for item in os.listdir(met)}):
            replaced = replaced.and_another(name)
    told = []
    if beside.count:
        told.append(f"made by somebody else during the switch, and beside what was restored: {beside}; {_ADVICE}")
    if replaced.count:
        told.append(f"written by somebody else during the switch, and lost: {replaced}; {_ADVICE}")
    return told


def _holds(names: Sequence[bytes], name: bytes) -> bool:
    place = bisect.bisect_left(names, name)
    return place < len(names) and names[place] == name


def still_used(staging: int, name: bytes) -> list[str]:
    """Which processes have something open below the open staging place, whose name is ``name``, or are in it (proc_pid_fd(5)).

    Of those that this process may look at; one that only has a file mapped into its memory is not found.
    """
    users = Some()
    deadline = time.monotonic() + _LOOK_SECONDS
    with contextlib.suppress(OSError):
        for process in filter(str.isdigit, os.listdir("/proc")):
            if time.monotonic() > deadline:
                break
            with contextlib.suppress(OSError):
                if int(process) != os.getpid() and any(_is_below(staging, name, link) for link in _links(process)):
                    with open(f"/proc/{process}/comm", "rb") as command:
                        users = users.and_another(b"%b (pid %b)" % (command.read().strip(), process.encode()))
    return [f"still using what was replaced, where what they write is lost: {users}; {_ADVICE}"] if users.count else []


def _links(process: str) -> Iterator[str]:
    yield f"/proc/{process}/cwd"
    yield f"/proc/{process}/root"
    with contextlib.suppress(OSError), os.scandir(f"/proc/{process}/fd") as links:
        for link in links:
            yield link.path


def _is_below(staging: int, name: bytes, link: str) -> bool:
    """Whether a link of a process leads below the staging place.

    The path of one in a container begins at that container's mount, so what counts is its end: and that there is the same file,
    for elsewhere there may be another volume with a staging place of that name.
    """
    with contextlib.suppress(OSError):
        path = os.readlink(os.fsencode(link)).partition(b"/%b/" % name)[2]
        return bool(path) and is_same(os.stat(path, dir_fd=staging, follow_symlinks=False), os.stat(link))
    return False
