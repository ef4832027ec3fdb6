"""What is mounted where, as far as this process can see (proc_pid_mountinfo(5))."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from athena_backup.operation import Operation
from athena_backup.pipeline import watched


@dataclass(frozen=True)
class Mount:
    """One mount: the folder ``root`` of the file system ``device`` (major:minor), seen at ``place``."""

    device: str
    root: str
    place: str


def mounts() -> list[Mount]:
    """All of them, a later one over an earlier one at the same place. Raises `OSError`."""
    return [parse(line) for line in Path("/proc/self/mountinfo").read_bytes().splitlines()]


def await_answer(place: Path, operation: Operation) -> None:
    """Have a folder's file system answer once, before it is touched by calls that nobody can end.

    A mount whose server is gone keeps whoever touches it for ever (nfs(5), "hard"): this look is left to itself then. What it
    finds, faults among it, is for whoever looks next. Raises like `Operation.check`.
    """

    def look() -> None:
        with contextlib.suppress(OSError), os.scandir(place) as entries:
            next(entries, None)

    watched(look, operation)


def parse(line: bytes) -> Mount:
    """One line of the list. NFS shows every folder of an export as its root; which one it is stands in the mount's source."""
    words = line.split()
    separator = words.index(b"-", 6)
    root = words[3]
    if words[separator + 1] in (b"nfs", b"nfs4"):
        # Without the server, which may have several names: the number of the file system says which one it is.
        root = b"/" + words[separator + 2].partition(b":/")[2]
    return Mount(os.fsdecode(words[2]), _decoded(root), _decoded(words[4]))


def _decoded(word: bytes) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), word))


def origin(place: Path, among: list[Mount]) -> tuple[str, Path] | None:
    """In which file system, and where in it, an absolute path without symbolic links lies; None where no mount shows it.

    Two paths with the same origin are one directory, whatever they are called: bind mounts, volumes of one disk by ``subPath``.
    """
    holding = [mount for mount in among if place.is_relative_to(mount.place)]
    if not holding:
        return None
    # Of two at one place the later one is seen.
    mount = max(enumerate(holding), key=lambda one: (len(one[1].place), one[0]))[1]
    return mount.device, Path(mount.root) / place.relative_to(mount.place)
