"""What a restored volume's folders look like in the end, and its symbolic links, in few bytes each: there may be millions."""

import itertools
import struct
from collections.abc import Iterator

from athena_backup.volume_hand import twice
from athena_backup.volume_pax import DIRECTORY, SYMLINK, Member

_LOOK = struct.Struct("<IIIqI")
"""Mode, owner, group, and the time in seconds and nanoseconds."""
_SECOND_NS = 10**9


class Folders:
    """Each folder's member by its path; those with attributes, which are few, as they are."""

    def __init__(self) -> None:
        self._looks: dict[bytes, bytes | Member] = {}

    def __len__(self) -> int:
        return len(self._looks)

    def add(self, path: bytes, member: Member) -> None:
        """Note what a folder is to look like; raises `FinalError` for a second opinion."""
        if path in self._looks:
            raise twice(path)
        self._looks[path] = _packed(member)

    def deepest_first(self) -> Iterator[list[bytes]]:
        """The paths of all folders, those of one depth together; the root, which is empty, comes last."""
        for _, paths in itertools.groupby(sorted(self._looks, key=_depth, reverse=True), key=_depth):
            yield list(paths)

    def of(self, path: bytes) -> Member:
        """A folder's member."""
        look = self._looks[path]
        if isinstance(look, Member):
            return look
        return _unpacked(path, DIRECTORY, look)


class SymbolicLinks:
    """Each link's member, in the order in which they came; one with attributes as it is."""

    def __init__(self) -> None:
        # Side by side: a pair for each would be as much as what it holds.
        self._paths: list[bytes] = []
        self._looks: list[bytes | Member] = []

    def add(self, path: bytes, member: Member) -> None:
        """Note a link that is to be made."""
        look = _packed(member)
        self._paths.append(path)
        self._looks.append(look if isinstance(look, Member) else look + member.link)

    def __iter__(self) -> Iterator[tuple[bytes, Member]]:
        for path, look in zip(self._paths, self._looks, strict=True):
            yield path, look if isinstance(look, Member) else _unpacked(path, SYMLINK, look)


def _packed(member: Member) -> bytes | Member:
    if member.xattrs:
        return member
    try:
        return _LOOK.pack(member.mode, member.uid, member.gid, *divmod(member.mtime_ns, _SECOND_NS))
    except struct.error:  # of a number that no file system has: who sets it finds out
        return member


def _unpacked(path: bytes, kind: bytes, look: bytes) -> Member:
    mode, uid, gid, seconds, nanoseconds = _LOOK.unpack_from(look)
    return Member(path, kind, mode, uid, gid, seconds * _SECOND_NS + nanoseconds, link=look[_LOOK.size :])


def _depth(path: bytes) -> int:
    return path.count(b"/") if path else -1
