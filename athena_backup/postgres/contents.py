"""A dump's table of contents, and what of it can be made as soon as one table is full, while others still load.

`pg_restore` knows what depends on what and tells it in its verbose list; a parallel `pg_restore` orders its work by the same
("PostgreSQL", section 4).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

# Number, catalog and OID of the entry, then its kind; behind an entry stands what it depends on.
_LINE = re.compile(rb"^(?P<number>\d+); (?P<catalog>\d+) (?P<oid>\d+) (?P<rest>.*)$|^;\tdepends on:(?P<needs>[ \d]*)$")
# "ACL" and its like are no catalog's rows, so their kind is all that tells them.
_RIGHTS = re.compile(rb"^\d+; \d+ \d+ (DEFAULT ACL|ACL) ")
_VIEW_DATA = re.compile(rb"^\d+; \d+ \d+ MATERIALIZED VIEW DATA (?P<name>.*) \S+$")
# A comment or label is no catalog's row either: its tag says of what it is.
_EVENT_TRIGGER = re.compile(rb"^\d+; \d+ \d+ (?:EVENT TRIGGER |(?:COMMENT|SECURITY LABEL) \S+ EVENT TRIGGER )")
_ROW_SECURITY = re.compile(rb"^\d+; \d+ \d+ ROW SECURITY ")
_PG_CLASS, _PG_CONSTRAINT, _PG_STATISTIC_EXT = 1259, 2606, 3381
# pg_proc, pg_operator, pg_opclass and pg_opfamily: what somebody wrote may look into tables that are not full yet.
_CODE_CATALOGS = frozenset({1255, 2617, 2616, 2753})
_TABLE_ATTACH = b"TABLE ATTACH "
_TABLE, _INDEX, _CONSTRAINT, _STATISTICS = b"TABLE ", b"INDEX ", b"CONSTRAINT ", b"STATISTICS "
_FOREIGN_KEY = b"FK CONSTRAINT "


@dataclass(frozen=True)
class TableEntries:
    """What is made of one table once its rows are in, as lines of pg_restore's list."""

    shared: tuple[bytes, ...]
    """Indexes: several may be made at the same time."""
    exclusive: tuple[bytes, ...]
    """Extended statistics, keys and other constraints with an index of their own: each locks the table against all of these."""

    @property
    def lines(self) -> tuple[bytes, ...]:
        """All of them."""
        return (*self.shared, *self.exclusive)


@dataclass(frozen=True)
class ForeignKey:
    """A foreign key, which needs the rows of its tables and the keys that it refers to."""

    line: bytes
    tables: frozenset[int]
    """OIDs in the dump."""
    needs: frozenset[bytes]
    """Other entries of the same list."""


def lines_of(listing: bytes) -> list[bytes]:
    """The entries of a list of pg_restore's, without its comments."""
    return [line for line in listing.splitlines() if line[:1].isdigit()]


def are_rights(line: bytes) -> bool:
    """Whether an entry grants or revokes."""
    return _RIGHTS.match(line) is not None


def but_rights(entries: Sequence[bytes]) -> list[bytes]:
    """The entries without those that grant or revoke."""
    return [entry for entry in entries if not are_rights(entry)]


def fills_view(line: bytes) -> bool:
    """Whether an entry fills a materialized view."""
    return _VIEW_DATA.match(line) is not None


def view_name(line: bytes) -> str:
    """The schema and name of the materialized view that an entry fills, for people."""
    found = _VIEW_DATA.match(line)
    return found["name"].decode("utf-8", "backslashreplace") if found is not None else ""


def is_event_trigger(line: bytes) -> bool:
    """Whether an entry is an event trigger or says something of one."""
    return _EVENT_TRIGGER.match(line) is not None


def enables_row_security(line: bytes) -> bool:
    """Whether an entry has a table hide rows from whom its policies don't name: where it is forced, from its owner too."""
    return _ROW_SECURITY.match(line) is not None


class Contents:
    """What is in a dump behind its data, and what it depends on."""

    def __init__(self, verbose: bytes, post_data: Sequence[bytes]) -> None:
        """``verbose``: the whole list of contents with its dependencies; ``post_data``: the lines of that section."""
        self._tables: dict[int, int] = {}
        self._kinds: dict[int, tuple[int, bytes]] = {}
        self._needs: dict[int, set[int]] = {}
        self._late = {int(line.partition(b";")[0]): line for line in post_data}
        number = -1
        for line in verbose.splitlines():
            found = _LINE.match(line)
            if found is None:
                continue
            if found["needs"] is not None:
                self._needs[number] = set(map(int, found["needs"].split()))
                continue
            number, catalog = int(found["number"]), int(found["catalog"])
            self._kinds[number] = (catalog, found["rest"])
            if catalog == _PG_CLASS and found["rest"].startswith(_TABLE):
                self._tables[number] = int(found["oid"])
        self.parents = frozenset(
            self._tables[one]
            for number, (_, rest) in self._kinds.items()
            if number in self._tables or rest.startswith(_TABLE_ATTACH)
            for one in self._needs.get(number, ())
            if one in self._tables
        )
        """OIDs of the tables that others inherit from or are partitions of: what is done to one may be done to all below it."""

    def of_tables(self) -> dict[int, TableEntries]:
        """What needs nothing but the rows of one table, by the OID that the table has in the dump.

        An entry that needs a second table, another entry behind the data, or a function of somebody's, is not among them, nor a
        parent's key or constraint.
        """
        shared: dict[int, list[bytes]] = {}
        exclusive: dict[int, list[bytes]] = {}
        for number, line in self._late.items():
            owners = self._owners(number)
            if len(owners) != 1 or self._needs[number] & self._late.keys() or self._calls_code(number):
                continue
            [owner] = owners
            is_key = self._is(number, _PG_CONSTRAINT, _CONSTRAINT) and owner not in self.parents
            if self._is(number, _PG_CLASS, _INDEX):
                shared.setdefault(owner, []).append(line)
            elif is_key or self._is(number, _PG_STATISTIC_EXT, _STATISTICS):
                exclusive.setdefault(owner, []).append(line)
        return {
            oid: TableEntries(tuple(shared.get(oid, ())), tuple(exclusive.get(oid, ())))
            for oid in dict.fromkeys([*shared, *exclusive])
        }

    def foreign_keys(self) -> list[ForeignKey]:
        """The foreign keys of ordinary tables, in the list's order."""
        return [
            ForeignKey(
                line,
                self._owners(number),
                frozenset(self._late[one] for one in self._needs[number] & self._late.keys()),
            )
            for number, line in self._late.items()
            if self._is(number, _PG_CONSTRAINT, _FOREIGN_KEY) and self._owners(number)
        ]

    def left_by(self, lines: Collection[bytes]) -> frozenset[int]:
        """OIDs of the tables for which there is something behind the data that is not in ``lines``."""
        return frozenset(
            owner for number, line in self._late.items() if line not in lines for owner in self._owners(number)
        )

    def _calls_code(self, number: int) -> bool:
        return any(self._kinds.get(one, (0, b""))[0] in _CODE_CATALOGS for one in self._needs[number])

    def _owners(self, number: int) -> frozenset[int]:
        return frozenset(self._tables[one] for one in self._needs.get(number, ()) if one in self._tables)

    def _is(self, number: int, catalog: int, kind: bytes) -> bool:
        found = self._kinds.get(number)
        return found is not None and found[0] == catalog and found[1].startswith(kind)
