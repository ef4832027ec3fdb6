"""What the head of a custom-format dump says of its sequences, without a second read of the dump.

The table of contents stands before all data, and a SEQUENCE SET entry is whole inside it, so the first megabytes, given to
`pg_restore`, tell where every sequence will stand after a restore ("PostgreSQL", section 4).
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from athena_backup.errors import FinalError
from athena_backup.manifest import SequenceState
from athena_backup.operation import Operation
from athena_backup.process import running

_FIRST_LOOK_BYTES = 1 << 20
_LIMIT_BYTES = 256 << 20
"""A table of contents beyond this (some 400,000 objects) fails the dump: it can't be proven at a restore."""
# Number, catalog and OID of the entry, then its kind. Of what is a row of a catalog, as a table in a schema "DATA" is, the
# catalog is not 0; other entries may have these words in their names.
_SEQUENCE_SET = re.compile(rb"^\d+; 0 \d+ SEQUENCE SET .*$", re.MULTILINE)
_TABLE_DATA = re.compile(rb"^\d+; 0 (\d+) TABLE DATA ", re.MULTILINE)
_SETVAL = re.compile(r"^SELECT pg_catalog\.setval\(E?'((?:[^']|'')*)', (-?\d+), (true|false)\);$", re.MULTILINE)
# As the source's sessions have it: in its strings a backslash is doubled then (manual, 19.13.1).
_ESCAPES = re.compile(rb"^SET standard_conforming_strings = off;$", re.MULTILINE)
_IDENTIFIER = re.compile(r'"((?:[^"]|"")*)"|([^."]+)')


class ArchiveHead:
    """Collects the head of one dump as it streams by, until its table of contents is whole.

    ``codec`` is Python's for the dump's encoding: its names have to be those that a session reads.
    """

    def __init__(self, client: Path, codec: str, operation: Operation) -> None:
        self._client = client
        self._codec = codec
        self._operation = operation
        self._head = bytearray()
        self._next_look = _FIRST_LOOK_BYTES
        self._found: list[SequenceState] | None = None
        self._tables: frozenset[int] = frozenset()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the dump."""
        if self._found is not None:
            return
        self._head += chunk
        if len(self._head) >= self._next_look:
            self._look()
            self._next_look *= 4
            if self._found is None and len(self._head) >= _LIMIT_BYTES:
                raise FinalError(
                    f"the dump's table of contents is larger than {_LIMIT_BYTES >> 20} MiB", step="dumping"
                )

    def sequences(self) -> list[SequenceState]:
        """The states that the dump holds; raises `FinalError` if its head can't be read: then neither can a restore."""
        if self._found is None:
            self._look()
        if self._found is None:
            raise FinalError(
                "pg_restore can't read the table of contents of the dump that was just written", step="dumping"
            )
        return self._found

    @property
    def is_whole(self) -> bool:
        """Whether what it was fed holds the whole table of contents."""
        return self._found is not None

    @property
    def content(self) -> bytes:
        """The head itself, from which `pg_restore` can make everything but data; raises like `sequences`."""
        self.sequences()
        return bytes(self._head)

    def listing(self, *options: str) -> bytes:
        """`pg_restore`'s list of contents with some of its ``options``; raises like `sequences`."""
        with unnamed_file(self.content) as head:
            listed = self._run([*options, "--list", head])
        if listed is None:
            raise FinalError("pg_restore can't list what it has just listed", step="reading")
        return listed

    def tables(self) -> frozenset[int]:
        """The OIDs of the tables whose rows the dump holds; raises like `sequences`."""
        self.sequences()
        return self._tables

    def _look(self) -> None:
        with unnamed_file(bytes(self._head)) as head:
            listing = self._run(["--list", head])
            if listing is None:
                return
            with unnamed_file(b"\n".join(_SEQUENCE_SET.findall(listing)) + b"\n") as entries:
                sql = self._run(["--section=data", f"--use-list={entries}", "--file=-", head])
        if sql is not None:
            self._tables = frozenset(map(int, _TABLE_DATA.findall(listing)))
            has_escapes = _ESCAPES.search(sql) is not None
            self._found = [
                _state(_unescaped(name, has_escapes=has_escapes), value, is_called)
                for name, value, is_called in _SETVAL.findall(sql.decode(self._codec))
            ]

    def _run(self, arguments: list[str]) -> bytes | None:
        environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C"}
        with running([str(self._client), *arguments], self._operation, environment=environment, writes=True) as child:
            said = child.stdout.read()
            ended = child.wait(self._operation)
        return said if ended.exit_code == 0 else None


@contextlib.contextmanager
def unnamed_file(content: bytes) -> Iterator[str]:
    """The path of a file in memory that a child of ours can open by name: a dump's bytes don't belong onto a local disk."""
    descriptor = os.memfd_create("athena-head", os.MFD_CLOEXEC)
    with open(descriptor, "wb", buffering=0) as file:
        file.write(content)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"


def _unescaped(constant: str, *, has_escapes: bool) -> str:
    name = constant.replace("''", "'")
    return name.replace(r"\\", "\\") if has_escapes else name


def _state(name: str, value: str, is_called: str) -> SequenceState:
    schema, own = (quoted.replace('""', '"') or plain for quoted, plain in _IDENTIFIER.findall(name))
    return SequenceState(schema_name=schema, name=own, last_value=int(value), is_called=is_called == "true")
