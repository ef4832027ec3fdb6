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
_PG_CLASS, _PG_CONSTRAINT, _PG_STATISTIC_EXT = 1259, 2606, 3381
_TABLE, _INDEX, _CONSTRAINT, _STATISTICS = b"TABLE ", b"INDEX ", b"CONSTRAINT ", b"STATISTICS "


@dataclass(frozen=True)
class TableEntries:
    """What is made of one table once its rows are in, as lines of pg_restore's list."""

    shared: tuple[bytes, ...]
    """Indexes and extended statistics: several may be made at the same time."""
    exclusive: tuple[bytes, ...]
    """Keys and other constraints with an index of their own: each locks the table for itself."""

    def __bool__(self) -> bool:
        return bool(self.shared or self.exclusive)

    @property
    def lines(self) -> frozenset[bytes]:
        """All of them."""
        return frozenset([*self.shared, *self.exclusive])


def lines_of(listing: bytes) -> list[bytes]:
    """The entries of a list of pg_restore's, without its comments."""
    return [line for line in listing.splitlines() if line[:1].isdigit()]


def are_rights(line: bytes) -> bool:
    """Whether an entry grants or revokes."""
    return _RIGHTS.match(line) is not None


def entries_of_tables(verbose: bytes, post_data: Sequence[bytes], tables: Collection[int]) -> dict[int, TableEntries]:
    """What of ``post_data`` needs nothing but the rows of one of ``tables`` (OIDs in the dump), by table.

    ``verbose`` is the whole list of contents, with dependencies. An entry that needs a second table, or another entry of
    ``post_data``, is not among them.
    """
    tables_by_number: dict[int, int] = {}
    kinds: dict[int, tuple[int, bytes]] = {}
    needs: dict[int, set[int]] = {}
    number = -1
    for line in verbose.splitlines():
        found = _LINE.match(line)
        if found is None:
            continue
        if found["needs"] is not None:
            needs[number] = set(map(int, found["needs"].split()))
            continue
        number, catalog = int(found["number"]), int(found["catalog"])
        kinds[number] = (catalog, found["rest"])
        if catalog == _PG_CLASS and found["rest"].startswith(_TABLE):
            tables_by_number[number] = int(found["oid"])
    late = {int(line.partition(b";")[0]): line for line in post_data}
    shared: dict[int, list[bytes]] = {}
    exclusive: dict[int, list[bytes]] = {}
    for number, line in late.items():
        owners = {tables_by_number[one] for one in needs.get(number, ()) if one in tables_by_number}
        if len(owners) != 1 or not owners <= set(tables) or needs[number] & late.keys():
            continue
        catalog, rest = kinds[number]
        if (catalog == _PG_CLASS and rest.startswith(_INDEX)) or (
            catalog == _PG_STATISTIC_EXT and rest.startswith(_STATISTICS)
        ):
            shared.setdefault(owners.pop(), []).append(line)
        elif catalog == _PG_CONSTRAINT and rest.startswith(_CONSTRAINT):
            exclusive.setdefault(owners.pop(), []).append(line)
    return {oid: TableEntries(tuple(shared.get(oid, ())), tuple(exclusive.get(oid, ()))) for oid in tables}
