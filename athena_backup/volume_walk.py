"""The walk over a live tree: every entry once, by descriptors from one opened root.

What can go wrong in a tree that people write to stands in "volumes", section 1; git's own order is `volume_git`. An
`OSError` never leaves this module: an entry that is gone is vanished, anything else that can't be read is a `FinalError`
that names the entry.
"""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from athena_backup import volume_git
from athena_backup.errors import FinalError
from athena_backup.operation import Operation
from athena_backup.volume_entry import (
    DIRECTORY_FLAGS,
    GONE,
    LOOKS,
    Entry,
    is_same,
    mount_of,
    open_quietly,
    reading,
    shown,
)

STAGING_PREFIX = b".athena-"
"""Names at the root of a volume that are ours; never backed up."""
DEPTH_LIMIT = 250
"""Folders within folders; each holds a descriptor open while what is below it is read."""
PATH_LIMIT_SEGMENTS = DEPTH_LIMIT + 4
"""Of any path that the walk gives: git's order goes down to `objects/info/commit-graphs/*` without counting."""


def open_root(root: Path) -> int:
    """A descriptor of a volume's root; raises `FinalError` for one that is not there."""
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise FinalError(
            f"{root} can't be opened: {error.strerror}", next_step="mount it, or correct ATHENA_VOLUMES"
        ) from None


def check_root(root: Path, status: os.stat_result) -> None:
    """Raise `FinalError` unless the root's path still leads to the directory that had this status when it was opened."""
    try:
        now = os.stat(root)
    except OSError as error:
        raise FinalError(f"{root} is gone: {error.strerror}", next_step="was it unmounted during the backup?") from None
    if (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino):
        raise FinalError(f"{root} became another directory during the backup", next_step="was it mounted over?")


@dataclass
class Walk:
    """A walk over one volume, and what it could not give."""

    root: Path
    operation: Operation
    vanished: list[str] = field(default_factory=list)
    sockets: int = 0
    other_file_systems: list[str] = field(default_factory=list)
    alternates: list[str] = field(default_factory=list)
    gone_objects: set[bytes] = field(default_factory=set)
    """Objects of the present repository that vanished in the present pass over them."""
    device: int = -1
    may_enter: Callable[[bytes], bool] = lambda _: True
    """Whether a folder of that path may be given; one that may not counts as vanished."""

    def entries(self, root: int | None = None) -> Iterator[Entry]:
        """Every entry below the root, a directory after its content, the root itself (path ``.``) last.

        ``root``: a descriptor of the root where it is open already. Raises `FinalError` for a root that is not there or is
        another one at the end, and for what can't be read.
        """
        descriptor = os.dup(root) if root is not None else open_root(self.root)
        try:
            with reading(b"."):
                status = os.fstat(descriptor)
            self.device = status.st_dev
            yield from self.content(descriptor, b"", 0)
            yield Entry(b".", status, descriptor, descriptor)
            check_root(self.root, status)
        finally:
            os.close(descriptor)

    def content(self, folder: int, path: bytes, depth: int, *, is_passing: bool = False) -> Iterator[Entry]:
        """What lies in an open directory; ``path`` is its own with the closing slash, empty for the root."""
        if depth > DEPTH_LIMIT:
            raise FinalError(
                f"{shown(path)} lies more than {DEPTH_LIMIT} folders deep", next_step="is it made by mistake?"
            )
        names = self.names(folder, path)
        if volume_git.is_repository(folder, names):
            yield from volume_git.repository(self, folder, path, names, depth)
            return
        for name in names:
            if not (is_passing and name.endswith(b".lock")):
                yield from self.one(folder, path, name, depth, is_passing=is_passing)

    def names(self, folder: int, path: bytes) -> list[bytes]:
        """The names in an open directory, in order, without those that are ours."""
        self.operation.check()
        with reading(path or b"."):
            names = sorted(os.fsencode(name) for name in os.listdir(folder))
        return [name for name in names if path or not name.startswith(STAGING_PREFIX)]

    def one(self, folder: int, path: bytes, name: bytes, depth: int, *, is_passing: bool = False) -> Iterator[Entry]:
        """An entry and all that is below it; one that is gone is noted and passed over."""
        own = path + name
        found = self.look(folder, own, name)
        if found is None:
            if not is_passing:
                self.vanished.append(shown(own))
            return
        status, inner = found
        if inner is None:
            if self._is_mounted(folder, own, name, status):
                # A mount point, of a file or of a folder: it stands in the archive as an empty folder, or not at all.
                self.other_file_systems.append(shown(own))
                if stat.S_ISDIR(status.st_mode):
                    yield Entry(own, status, folder)
            elif stat.S_ISSOCK(status.st_mode):
                self.sockets += 1
            else:
                yield Entry(own, status, folder, is_passing=is_passing)
            return
        try:
            yield from self.content(inner, own + b"/", depth + 1, is_passing=is_passing)
            # Its content has been read by now, but what is promised is the folder as it was found.
            yield Entry(own, status, folder, inner)
        finally:
            os.close(inner)

    def _is_mounted(self, folder: int, path: bytes, name: bytes, status: os.stat_result) -> bool:
        """Whether an entry is another file system's; its number alone says so of folders only."""
        if status.st_dev == self.device or stat.S_ISDIR(status.st_mode):
            return status.st_dev != self.device
        with reading(path):
            try:
                return mount_of(name, folder) != mount_of(b".", folder)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                return False  # whoever reads it finds that it is gone

    def look(self, folder: int, path: bytes, name: bytes) -> tuple[os.stat_result, int | None] | None:
        """The status of an entry and, for a folder of this file system, a descriptor of it; None if it is gone."""
        with reading(path):
            try:
                for _ in range(LOOKS):
                    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode) and not self.may_enter(path):
                        return None
                    if not stat.S_ISDIR(status.st_mode) or status.st_dev != self.device:
                        return status, None
                    inner = open_quietly(name, DIRECTORY_FLAGS, folder)
                    if is_same(status, os.fstat(inner)):
                        return status, inner
                    os.close(inner)
            except OSError as error:
                if error.errno not in GONE:
                    raise
        return None

    def note_vanished(self, entry: Entry) -> None:
        """Say that an entry of this walk was gone when it was to be read."""
        if entry.is_object:
            self.gone_objects.add(entry.path)
        elif not entry.is_passing:
            self.vanished.append(shown(entry.path))
