"""The walk over a live tree: every entry once, by descriptors from one opened root.

What can go wrong in a tree that people write to stands in "volumes", section 1; git's own order is `volume_git`. An
`OSError` never leaves this module: an entry that is gone is vanished, anything else that can't be read is a `FinalError`
that names the entry.
"""

import contextlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from athena_backup import volume_git
from athena_backup.errors import FinalError
from athena_backup.operation import Operation
from athena_backup.volume_ahead import Ahead
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
from athena_backup.volume_moved import Lost, Moved, files_below, last_change_ns

STAGING_PREFIX = b".athena-"
"""Names at the root of a volume that are ours; never backed up."""
LOST_AND_FOUND = b"lost+found"
"""A folder that an ext4 file system is made with, at the root of a volume that is one; backed up as any other."""
DEPTH_LIMIT = 250
"""Folders within folders; each holds a descriptor open while what is below it is read."""
_SEARCHES = 3
"""How often renamed folders are sought: while what is in them is read, others in them may be renamed."""
_OWN_NUMBERS = 8
"""Of so many folders the listing has another number though nothing in their parents changed, before no number is believed."""
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
    missed_files: int = 0
    """How many more vanished with those, in folders that are named as one."""
    sockets: int = 0
    other_file_systems: list[str] = field(default_factory=list)
    alternates: list[str] = field(default_factory=list)
    gone_objects: set[bytes] = field(default_factory=set)
    """Objects of the present repository that vanished in the present pass over them."""
    device: int = -1
    may_enter: Callable[[bytes], bool] = lambda _: True
    """Whether a folder of that path may be given; one that may not counts as vanished."""
    _ahead: Ahead | None = None
    _moved: Moved = field(default_factory=Moved)
    _numbers_agree: bool = True
    """Whether listings have the inode numbers that looks have: not on every overlay, nor on FAT or every SMB share."""
    _misnumbered: list[int] = field(default_factory=list)
    """Numbers that listings had for folders where looks had others, and nobody can have replaced the folder."""

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
            self._moved = Moved()
            with Ahead(self.operation.check, content=True) as self._ahead:
                yield from self.content(descriptor, b"", 0)
                yield from self._moved_folders(descriptor)
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
        with reading(path or b"."):
            rested_ns = last_change_ns(folder)
        names, folders = self._listing(folder, path)
        if volume_git.is_repository(folder, names):
            yield from volume_git.repository(self, folder, path, names, depth)
            return
        for name in self.ahead(folder, names):
            if not (is_passing and name.endswith(b".lock")):
                inode = None if is_passing else folders.get(name)
                yield from self.one(folder, path, name, depth, is_passing=is_passing, inode=inode, rested_ns=rested_ns)

    def names(self, folder: int, path: bytes) -> list[bytes]:
        """The names in an open directory, in order, without those that are ours."""
        return self._listing(folder, path)[0]

    def _listing(self, folder: int, path: bytes) -> tuple[list[bytes], dict[bytes, int]]:
        """The same, and of those that are folders the inode numbers."""
        self.operation.check()
        names: list[bytes] = []
        folders: dict[bytes, int] = {}
        with reading(path or b"."), os.scandir(folder) as items:
            for item in items:
                name = os.fsencode(item.name)
                if not path and name.startswith(STAGING_PREFIX):
                    continue
                names.append(name)
                if item.is_dir(follow_symlinks=False):
                    folders[name] = item.inode()
        return sorted(names), folders

    def ahead(self, folder: int, names: Sequence[bytes]) -> Iterator[bytes]:
        """The names in an open directory again, each of which is used at once: where that is slow, the next are fetched meanwhile."""
        return iter(names) if self._ahead is None else self._ahead.names(folder, names)

    def one(
        self,
        folder: int,
        path: bytes,
        name: bytes,
        depth: int,
        *,
        is_passing: bool = False,
        inode: int | None = None,
        rested_ns: int | None = None,
    ) -> Iterator[Entry]:
        """An entry and all that is below it; one that is gone is noted and passed over.

        ``inode``: of what was listed as a folder, its number. One that was renamed since is sought when all has been read.
        ``rested_ns``: since when nothing had changed in the folder above when that was listed, if it is known.
        """
        own = path + name
        found = self.look(folder, own, name)
        if found is None:
            if not is_passing:
                self._lose(own, inode, is_replaced=False)
            return
        status, inner = found
        if inode is not None:
            if not stat.S_ISDIR(status.st_mode):
                self._lose(own, inode, is_replaced=True)
            elif inner is not None and self._is_another(folder, name, status, inode, rested_ns):
                self._lose(own, inode, is_replaced=True)
                self._moved.enter(status.st_ino)
            elif inner is not None:
                self._moved.enter(inode)
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

    def _is_another(self, folder: int, name: bytes, status: os.stat_result, inode: int, rested_ns: int | None) -> bool:
        """Whether another folder is where one was listed."""
        if status.st_ino == inode or not self._numbers_agree:
            return False
        with contextlib.suppress(OSError):
            if mount_of(name, folder) != mount_of(b".", folder):
                return False  # a bind mount: the listing has the number of the folder beneath
        with contextlib.suppress(OSError), os.scandir(folder) as items:
            if any(os.fsencode(item.name) == name and item.inode() == inode for item in items):
                self._numbers_agree = False
                return False
        # Where every listing makes up its numbers, each folder would cost one of the folder above. Whoever replaces a folder
        # changes that one: if it is as it was, the numbers differ by themselves.
        with contextlib.suppress(OSError):
            if rested_ns is not None and rested_ns == last_change_ns(folder):
                self._misnumbered.append(inode)
        if len(self._misnumbered) < _OWN_NUMBERS:
            return True
        self._numbers_agree = False
        self._moved.forget(self._misnumbered)
        return False

    def _moved_folders(self, root: int) -> Iterator[Entry]:
        """What was in folders that were renamed before the walk came to them, under the names that they had.

        Of one in whose place another folder was put by then, which has that name, the files are counted as vanished; so are those
        of folders that are renamed again and again. Where listings have no numbers by which to find them, each counts as one.
        """
        if not self._numbers_agree:
            self.vanished += [shown(lost.path) for lost in self._moved.take().values()]
            return
        for search in range(_SEARCHES):
            sought = self._moved.take()
            if not sought:
                return
            is_last = search == _SEARCHES - 1
            for found in self._moved.seek(sought, root, self.device, DEPTH_LIMIT, self.operation.check, STAGING_PREFIX):
                self._moved.enter(found.inode)
                own, is_replaced = sought[found.inode]
                if is_replaced or is_last or not self.may_enter(own):
                    self._miss(own, found.descriptor)
                    continue
                with reading(own):
                    status = os.fstat(found.descriptor)
                yield from self.content(found.descriptor, own + b"/", own.count(b"/") + 1)
                yield Entry(own, status, found.descriptor, found.descriptor)
            for inode, lost in sought.items():
                if self._moved.is_entered(inode):
                    continue
                if not is_last:
                    # Sought once more, with those that were lost meanwhile: it may have been renamed while this went on.
                    self._moved.lose(inode, lost)
                elif not lost.is_replaced:
                    self.vanished.append(shown(lost.path))

    def _lose(self, path: bytes, inode: int | None, *, is_replaced: bool) -> None:
        """Note an entry that was listed and is not there, a folder by its number where it can be found by that."""
        if inode is None or not self._numbers_agree or not self._moved.lose(inode, Lost(path, is_replaced)):
            self.vanished.append(shown(path))

    def _miss(self, path: bytes, folder: int) -> None:
        """Note a folder that is left out with all that is in it."""
        self.vanished.append(shown(path))
        self.missed_files += max(0, files_below(folder, self.device, DEPTH_LIMIT, self.operation.check) - 1)

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
