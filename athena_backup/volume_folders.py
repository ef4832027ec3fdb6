"""What the folders of a restored volume are to look like in the end, in few bytes each: one of repositories has millions."""

import itertools
import struct
from collections.abc import Iterator

from athena_backup.volume_hand import twice
from athena_backup.volume_pax import DIRECTORY, Member

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
        mode, uid, gid, seconds, nanoseconds = _LOOK.unpack(look)
        return Member(path, DIRECTORY, mode, uid, gid, seconds * _SECOND_NS + nanoseconds)


def _packed(member: Member) -> bytes | Member:
    if member.xattrs:
        return member
    try:
        return _LOOK.pack(member.mode, member.uid, member.gid, *divmod(member.mtime_ns, _SECOND_NS))
    except struct.error:  # of a number that no file system has: who sets it finds out
        return member


def _depth(path: bytes) -> int:
    return path.count(b"/") if path else -1
