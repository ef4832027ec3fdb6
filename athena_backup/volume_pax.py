"""Tar headers in pax form, written and read: what a member's header says, to the byte ("volumes", section 2).

Our own, because the standard library's rounds times and maps owners by name. Names are bytes. Format: POSIX pax
interchange format (pax(1), "pax Interchange Format"), GNU tar's sparse format 1.0 (GNU tar manual, "Storing Sparse Files").
"""

import functools
import os
import re
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from athena_backup.errors import DamagedError, FinalError

BLOCK_BYTES = 512
END = b"\0" * (2 * BLOCK_BYTES)
EXTENDED_LIMIT_BYTES = 16 << 20
"""The largest extended header that is written or read: xattrs are at most 64 KiB each (xattr(7)), names 4 KiB."""

SEGMENT_LIMIT = 1 << 20
"""The most pieces of data that the map of a sparse file has; behind them its holes are written as zeros."""

FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_EXTENDED, _GLOBAL = b"x", b"g"
_TYPES = {
    stat.S_IFREG: FILE,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHARACTER,
    stat.S_IFBLK: BLOCK,
    stat.S_IFDIR: DIRECTORY,
    stat.S_IFIFO: FIFO,
}
_OCTAL_7, _OCTAL_11 = 0o7777777, 0o77777777777
_XATTR = "SCHILY.xattr."
_ACLS = {"system.posix_acl_access": "SCHILY.acl.access", "system.posix_acl_default": "SCHILY.acl.default"}
_ACL_TAGS = {0x01: "user", 0x02: "user", 0x04: "group", 0x08: "group", 0x10: "mask", 0x20: "other"}
_SECONDS_LIMIT = (1 << 63) - 1
"""Of a time in the kernel (timespec(3type))."""
_NO_ID = 0xFFFFFFFF
_KINDS = frozenset((FILE, HARD_LINK, SYMLINK, CHARACTER, BLOCK, DIRECTORY, FIFO))
_GNU_RECORDS = {"GNU.sparse.major", "GNU.sparse.minor", "GNU.sparse.name", "GNU.sparse.realsize"}


@dataclass(frozen=True, slots=True)
class Member:
    """One member of an archive as its header says it. ``size_bytes`` is the real size; holes are not in ``stored_bytes``."""

    name: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int = 0
    stored_bytes: int = 0
    link: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: Mapping[str, bytes] = field(default_factory=dict)
    is_sparse: bool = False


def member_of(
    name: bytes, status: os.stat_result, *, link: bytes = b"", xattrs: Mapping[str, bytes] | None = None
) -> Member:
    """The member for an entry with this status; sockets have none and raise `KeyError`."""
    kind = _TYPES[stat.S_IFMT(status.st_mode)]
    size_bytes = status.st_size if kind == FILE else 0
    return Member(
        name=name,
        type=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime_ns=status.st_mtime_ns,
        size_bytes=size_bytes,
        stored_bytes=size_bytes,
        link=link,
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in (CHARACTER, BLOCK) else (0, 0),
        xattrs=xattrs or {},
    )


def padding(size_bytes: int) -> bytes:
    """What fills the last block of a member's data."""
    return b"\0" * (-size_bytes % BLOCK_BYTES)


def sparse_map(segments: Sequence[tuple[int, int]]) -> bytes:
    """The map that precedes a sparse member's data: count, then offset and length of each piece of data."""
    numbers = [len(segments), *(number for segment in segments for number in segment)]
    text = b"".join(b"%d\n" % number for number in numbers)
    return text + padding(len(text))


def header(member: Member) -> bytes:
    """The blocks that precede a member's data: an extended header with what ustar can't hold, and the ustar header."""
    records: dict[str, bytes] = {"mtime": _decimal_seconds(member.mtime_ns)}
    name = member.name + (b"/" if member.type == DIRECTORY and not member.name.endswith(b"/") else b"")
    if not _is_utf8(name) or not _is_utf8(member.link):
        records = {"hdrcharset": b"BINARY", **records}
    if member.is_sparse:
        records |= {
            "GNU.sparse.major": b"1",
            "GNU.sparse.minor": b"0",
            "GNU.sparse.name": name,
            "GNU.sparse.realsize": b"%d" % member.size_bytes,
        }
        name = b"GNUSparseFile.0/" + name
    if len(name) > 100 or not name.isascii():
        records["path"] = name
    if len(member.link) > 100 or not member.link.isascii():
        records["linkpath"] = member.link
    if member.stored_bytes > _OCTAL_11:
        records["size"] = b"%d" % member.stored_bytes
    for key, number in (("uid", member.uid), ("gid", member.gid)):
        if number > _OCTAL_7:
            records[key] = b"%d" % number
    for attribute, value in sorted(member.xattrs.items()):
        if attribute in _ACLS:
            records[_ACLS[attribute]] = _acl_text(value)
        else:
            records[_XATTR + _escaped(attribute)] = value
    body = b"".join(_record(key, value) for key, value in records.items())
    if len(body) > EXTENDED_LIMIT_BYTES:
        raise FinalError(
            f"the extended attributes of {member.name.decode('utf-8', 'backslashreplace')} have more than"
            f" {EXTENDED_LIMIT_BYTES >> 20} MiB, which no restore would read",
            next_step="remove those that nobody needs",
        )
    extended = _announcing(len(body)) + body + padding(len(body))
    seconds = max(0, min(member.mtime_ns // 1_000_000_000, _OCTAL_11))
    return extended + _ustar(
        name[:100],
        member.type,
        member.mode,
        member.uid if member.uid <= _OCTAL_7 else 0,
        member.gid if member.gid <= _OCTAL_7 else 0,
        min(member.stored_bytes, _OCTAL_11),
        seconds,
        link=member.link[:100],
        device=member.device,
    )


@functools.lru_cache(1_024)
def _announcing(size_bytes: int) -> bytes:
    """The header of an extended header; that of most members has one of a few sizes."""
    return _ustar(b"./PaxHeaders/x", _EXTENDED, 0o644, 0, 0, size_bytes, 0)


def _ustar(
    name: bytes, kind: bytes, mode: int, uid: int, gid: int, size_bytes: int, seconds: int, *, link: bytes = b"",
    device: tuple[int, int] = (0, 0),
) -> bytes:  # fmt: skip
    fields = struct.pack(
        "100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x",
        name,
        b"%07o" % mode,
        b"%07o" % uid,
        b"%07o" % gid,
        b"%011o" % size_bytes,
        b"%011o" % seconds,
        b" " * 8,
        kind,
        link,
        b"ustar",
        b"00",
        b"",
        b"",
        b"%07o" % device[0],
        b"%07o" % device[1],
        b"",
    )
    return fields[:148] + b"%06o\0 " % _sum(fields) + fields[156:]


def _sum(block: bytes) -> int:
    """The sum of a block's bytes, ten times as fast as `sum`.

    The lower half of Adler-32 is 1 + the sum of the bytes modulo 65,521 (RFC 1950, section 8.2), and that of 256 is below it.
    """
    return sum((zlib.adler32(block[start : start + 256]) & 0xFFFF) - 1 for start in (0, 256))


def _record(key: str, value: bytes) -> bytes:
    body = b" " + os.fsencode(key) + b"=" + value + b"\n"
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return b"%d" % length + body


def _escaped(attribute: str) -> str:
    """An attribute's name inside a record's key, in which GNU tar writes '%' and '=' as %25 and %3D."""
    return attribute.replace("%", "%25").replace("=", "%3D")


def _unescaped(attribute: str) -> str:
    name = re.sub("%25|%3D", lambda found: "%" if found.group() == "%25" else "=", attribute)
    if not name or "\0" in name:
        raise DamagedError("the archive holds an extended attribute with a broken name")
    return name


def _decimal_seconds(nanoseconds: int) -> bytes:
    sign, nanoseconds = (b"-", -nanoseconds) if nanoseconds < 0 else (b"", nanoseconds)
    return sign + b"%d.%09d" % divmod(nanoseconds, 1_000_000_000)


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_header(block: bytes) -> tuple[bytes, int]:
    """Type and size of the data that follows, of a block that is checked; raises `DamagedError` for what is no header."""
    if len(block) != BLOCK_BYTES or block[257:262] != b"ustar":
        raise DamagedError("the archive holds something that is no tar header")
    if _octal(block[148:156]) != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise DamagedError("the archive holds a tar header with a wrong checksum")
    return block[156:157], _octal(block[124:136])


def is_extended(kind: bytes) -> bool:
    """Whether a header of this type only announces records for the next one."""
    if kind == _GLOBAL:
        raise DamagedError("the archive holds a global header, which ours never do")
    return kind == _EXTENDED


def read_records(body: bytes) -> dict[str, bytes]:
    """The records of an extended header; raises `DamagedError`."""
    records: dict[str, bytes] = {}
    position = 0
    while position < len(body):
        space = body.find(b" ", position, position + 12)
        digits = body[position:space]
        if space < 0 or not digits.isdigit():
            raise DamagedError("the archive holds a broken extended header")
        end = position + int(digits)
        key, equals, value = body[space + 1 : end].partition(b"=")
        if not equals or end > len(body) or not value.endswith(b"\n"):
            raise DamagedError("the archive holds a broken extended header")
        records[os.fsdecode(key)] = value[:-1]
        position = end
    return records


def read_member(block: bytes, records: Mapping[str, bytes]) -> Member:
    """The member that a checked ustar header and the records before it describe; raises `DamagedError`."""
    kind, size_bytes = read_header(block)
    kind = FILE if kind == b"\0" else kind
    prefix = block[345:500].split(b"\0")[0]
    short = block[:100].split(b"\0")[0]
    name = records.get("path") or (prefix + b"/" + short if prefix else short)
    stored = _number(records, "size", size_bytes)
    is_sparse = any(key.startswith("GNU.") for key in records)
    if is_sparse:
        version = records.get("GNU.sparse.major"), records.get("GNU.sparse.minor")
        if (
            version != (b"1", b"0")
            or kind != FILE
            or not _GNU_RECORDS.issuperset(k for k in records if k[:4] == "GNU.")
        ):
            raise DamagedError("the archive holds a sparse member of an unknown kind")
    name = records.get("GNU.sparse.name", name)
    if kind not in _KINDS:
        raise DamagedError(f"the archive holds a member of the unknown type {kind!r}")
    if kind != FILE and stored:
        raise DamagedError("the archive holds a member with content, which its type can't have")
    xattrs = {_unescaped(key.removeprefix(_XATTR)): value for key, value in records.items() if key.startswith(_XATTR)}
    for attribute, key in _ACLS.items():
        if key in records:
            xattrs[attribute] = _acl_bytes(records[key])
    return Member(
        name=name[:-1] if kind == DIRECTORY and name.endswith(b"/") else name,
        type=kind,
        mode=_octal(block[100:108]) & 0o7777,
        uid=_identifier(records, "uid", block[108:116]),
        gid=_identifier(records, "gid", block[116:124]),
        mtime_ns=_nanoseconds(records.get("mtime"), _octal(block[136:148])),
        size_bytes=_number(records, "GNU.sparse.realsize", stored),
        stored_bytes=stored,
        link=records.get("linkpath") or block[157:257].split(b"\0")[0],
        device=(_octal(block[329:337]), _octal(block[337:345])),
        xattrs=xattrs,
        is_sparse=is_sparse,
    )


def _octal(text: bytes) -> int:
    digits = text.strip(b" \0")
    try:
        return int(digits or b"0", 8)
    except ValueError:
        raise DamagedError("the archive holds a tar header with a broken number") from None


def _number(records: Mapping[str, bytes], key: str, default: int) -> int:
    value = records.get(key)
    if value is None:
        return default
    if not value.isdigit() or len(value) > 19:
        raise DamagedError(f"the archive holds an extended header with a broken {key}")
    return int(value)


def _identifier(records: Mapping[str, bytes], key: str, octal: bytes) -> int:
    number = _number(records, key, _octal(octal))
    if number >= _NO_ID:  # chown(2) takes it for "leave as it is"
        raise DamagedError(f"the archive holds a member whose {key} is {number}")
    return number


def _nanoseconds(value: bytes | None, seconds: int) -> int:
    if value is None:
        return seconds * 1_000_000_000
    whole, _, fraction = value.lstrip(b"-").partition(b".")
    if not whole.isdigit() or (fraction and not fraction.isdigit()) or len(whole) > 19:
        raise DamagedError("the archive holds an extended header with a broken mtime")
    # Whoever takes milliseconds for seconds makes files of the year 58,000: some file systems keep that, others their own limit.
    seconds = min(int(whole), _SECONDS_LIMIT)
    nanoseconds = seconds * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return -nanoseconds if value.startswith(b"-") else nanoseconds


def _acl_text(value: bytes) -> bytes:
    """A POSIX ACL's xattr as star's text form, with numeric ids (linux/posix_acl_xattr.h; star(1))."""
    entries = []
    for tag, permissions, identifier in struct.iter_unpack("<HHI", value[4:]):
        who = "" if identifier == _NO_ID else str(identifier)
        letters = "".join(letter if permissions & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        entries.append(f"{_ACL_TAGS[tag]}:{who}:{letters}")
    return ",".join(entries).encode()


def _acl_bytes(text: bytes) -> bytes:
    tags = {("user", False): 0x01, ("user", True): 0x02, ("group", False): 0x04, ("group", True): 0x08}
    packed = struct.pack("<I", 2)
    try:
        for entry in text.decode("ascii").split(","):
            kind, who, letters = entry.split(":")[:3]
            tag = {"mask": 0x10, "other": 0x20}.get(kind) or tags[(kind, bool(who))]
            permissions = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in letters)
            packed += struct.pack("<HHI", tag, permissions, int(who) if who else _NO_ID)
    except (ValueError, KeyError, struct.error):
        raise DamagedError("the archive holds a broken access control list") from None
    return packed
