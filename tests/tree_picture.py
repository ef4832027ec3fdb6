"""What a restore promises of a tree, as a value that two trees can be compared by."""

import hashlib
import os
import stat
from pathlib import Path


def picture(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything about a tree that a restore promises, by path; hard links as the set of names that share an inode."""
    found: dict[bytes, tuple[object, ...]] = {}
    inodes: dict[int, list[bytes]] = {}
    top = os.fsencode(root)
    places = [top]
    for folder, folders, files in os.walk(top):
        places += [os.path.join(folder, name) for name in (*folders, *files)]
    for place in places:
        status = os.lstat(place)
        if stat.S_ISSOCK(status.st_mode):
            continue
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(Path(os.fsdecode(place)).read_bytes()).hexdigest()
            inodes.setdefault(status.st_ino, []).append(place[len(top) :])
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(place)
        elif stat.S_ISCHR(status.st_mode):
            content = status.st_rdev
        xattrs = {
            name: os.getxattr(place, name, follow_symlinks=False) for name in os.listxattr(place, follow_symlinks=False)
        }
        found[place[len(top) :]] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, content, xattrs)
    linked = [tuple(sorted(names)) for names in inodes.values() if len(names) > 1]
    found[b"hard links"] = tuple(sorted(linked))
    return found
