"""Which tables leave the dump for a COPY of their own, and in which ranges they are read ("PostgreSQL", section 2)."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import text

from athena_backup.manifest import Stream, TableData
from athena_backup.postgres.bulk_keys import Key, keys_of
from athena_backup.postgres.held import Held
from athena_backup.postgres.order import order_dependent_tables, rerouted_partitions
from athena_backup.postgres.sessions import ascii_quoted, driver_of, quoted

BULK_BYTES = 16 << 20
"""Tables from this size on are taken out of the dump, which one process reads and one loads."""
DUMP_BYTES = 256 << 20
"""Where the dump would have to hold more than this, smaller tables are taken out of it too, the biggest first."""
_SMALLEST_BYTES = 1 << 20
"""A COPY of its own for less costs more than it saves."""
RANGE_BYTES = 128 << 20
"""About how much of a table one COPY reads where it is split: the last one keeps a core busy alone for some two seconds."""
_SHARES_LIMIT, _NEAR_SHARES_LIMIT = 1.0, 1.5
"""So many of the ``jobs`` shares of a database a table may be that is read in one piece. Of a server on this machine more: its
COPY and our compression of it share the cores that two COPYs would share.
"""
_TABLES_LIMIT = 1_000
"""pg_dump is told of each by a pattern in its command line."""
_RANGES_LIMIT = 1_000
_CTID_SCAN_SINCE = 140_000
# Escapes in identifiers, in any encoding of the server (release notes of 13); of SQL_ASCII no character is known, and the names
# of EUC_TW are not read in that encoding.
_ESCAPES_SINCE = 130_000
_STREAM_NAME = re.compile(r"tables/(\d+)\.")
logger = logging.getLogger("athena_backup.postgres")

# Types whose binary form is the same in every version since 10 and depends on no setting but client_encoding; of all others
# (and of what extensions bring) only the text is sure to be read by a newer server.
_BINARY_TYPES = (
    *(
        "bool",
        "bytea",
        "int2",
        "int4",
        "int8",
        "float4",
        "float8",
        "numeric",
        "text",
        "varchar",
        "bpchar",
        "uuid",
        "json",
    ),
    *("jsonb", "date", "time", "timetz", "timestamp", "timestamptz", "interval", "inet", "cidr", "macaddr", "macaddr8"),
)
# Ordinary tables that pg_dump would read, but members of extensions: of those it reads what the extension says.
_TABLES = text(
    "SELECT c.oid::bigint AS oid, n.nspname AS schema_name, c.relname AS name,"
    " pg_catalog.pg_table_size(c.oid)::bigint AS size_bytes,"
    " (pg_catalog.pg_relation_size(c.oid) / pg_catalog.current_setting('block_size')::bigint)::bigint AS blocks,"
    " coalesce(m.amname OPERATOR(pg_catalog.=) 'heap', false) AS is_heap,"
    " ARRAY(SELECT a.attname::text FROM pg_catalog.pg_attribute a WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid"
    " AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped AND a.attgenerated OPERATOR(pg_catalog.=) ''"
    " ORDER BY a.attnum) AS columns,"
    " NOT EXISTS (SELECT FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) a.atttypid"
    # Only true arrays: an int2vector has elements too, and is refused in binary when it is empty (tried).
    " LEFT JOIN pg_catalog.pg_type e ON e.oid OPERATOR(pg_catalog.=) t.typelem AND e.typarray OPERATOR(pg_catalog.=) t.oid"
    " WHERE a.attrelid OPERATOR(pg_catalog.=) c.oid"
    " AND a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped AND a.attgenerated OPERATOR(pg_catalog.=) ''"
    " AND NOT (coalesce(e.typnamespace, t.typnamespace) OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace"
    " AND coalesce(e.typname, t.typname) OPERATOR(pg_catalog.=) ANY (CAST(:binary AS name[])))) AS is_binary"
    " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " LEFT JOIN pg_catalog.pg_am m ON m.oid OPERATOR(pg_catalog.=) c.relam"
    " WHERE c.relkind OPERATOR(pg_catalog.=) 'r' AND c.oid OPERATOR(pg_catalog.=) ANY (CAST(:oids AS oid[]))"
    # A standby has nothing of these (manual, 27.4.2).
    " AND NOT (c.relpersistence OPERATOR(pg_catalog.=) 'u' AND pg_catalog.pg_is_in_recovery())"
    " AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.objid OPERATOR(pg_catalog.=) c.oid"
    " AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass"
    " AND d.deptype OPERATOR(pg_catalog.=) 'e')"
    " ORDER BY c.oid OPERATOR(pg_catalog.=) ANY (CAST(:dependent AS oid[])) DESC, size_bytes DESC, c.oid LIMIT :limit"
)


@dataclass(frozen=True)
class BulkTable:
    """A table that is read by COPY."""

    oid: int
    schema_name: str
    name: str
    columns: tuple[str, ...]
    is_binary: bool
    blocks: int
    """Of the table's own file, without what is stored out of line."""
    size_bytes: int
    has_ctid_scan: bool
    """Whether a range of its blocks can be read without the others."""
    key: Key | None = None
    """Of a table without ctid scans: what it can be split by instead, if anything."""

    @property
    def format(self) -> Literal["binary", "text"]:
        """Which of COPY's forms it is read in."""
        return "binary" if self.is_binary else "text"

    @property
    def full_name(self) -> str:
        """The name for use in SQL; of pg_dump's patterns it matches this table alone ("pg_dump", Notes)."""
        return f"{quoted(self.schema_name)}.{quoted(self.name)}"

    @property
    def ascii_name(self) -> str:
        """The name for a session whose driver writes its SQL in UTF-8, whatever its client_encoding is."""
        return f"{ascii_quoted(self.schema_name)}.{ascii_quoted(self.name)}"

    @property
    def is_ascii(self) -> bool:
        """Whether the names of table and columns are plain ASCII."""
        return all(name.isascii() for name in (self.schema_name, self.name, *self.columns))

    def ranges(self, range_bytes: int | None) -> list["TableRange"]:
        """The pieces of about ``range_bytes`` in which it is read, or, for None, the one.

        Together they have every row that it has or may yet get.
        """
        count = 1 if range_bytes is None else min(-(-self.size_bytes // range_bytes), _RANGES_LIMIT)
        conditions: Sequence[str | None] = [None]
        if self.has_ctid_scan:
            conditions = self._block_ranges(min(count, self.blocks))
        elif self.key is not None and count > 1:
            conditions = self.key.ranges(count)
        size_bytes = self.size_bytes // len(conditions)
        return [TableRange(self, number, one, size_bytes) for number, one in enumerate(conditions)]

    def _block_ranges(self, count: int) -> list[str | None]:
        bounds = [number * self.blocks // count for number in range(1, count)]
        return [
            " AND ".join(
                [f"ctid >= '({first},0)'"] * (first is not None) + [f"ctid < '({last},0)'"] * (last is not None)
            )
            or None
            for first, last in zip([None, *bounds], [*bounds, None], strict=True)
        ]


@dataclass(frozen=True)
class TableRange:
    """The rows of a table that meet a condition in SQL; None: all."""

    table: BulkTable
    number: int
    condition: str | None
    size_bytes: int

    @property
    def by_key(self) -> bool:
        """Whether an index has to find its rows: without, each range would be a scan of the whole table."""
        return self.condition is not None and not self.table.has_ctid_scan

    @property
    def stream_name(self) -> str:
        """File name of its stream inside the component's folder."""
        return f"tables/{self.table.oid}.{self.number:04}.{'bin' if self.table.is_binary else 'txt'}.zst"

    @property
    def query(self) -> str | None:
        """What selects its rows; None where it is the whole table, which COPY reads cheaper as such."""
        table, columns = self.table, ", ".join(map(ascii_quoted, self.table.columns))
        if self.condition is None and table.is_ascii:
            return None
        where = f" WHERE {self.condition}" if self.condition is not None else ""
        return f"SELECT {columns} FROM ONLY {table.ascii_name}{where}"  # noqa: S608 - quoted

    def data(self, rows: int) -> TableData:
        """What the manifest says of the range."""
        return TableData(
            schema_name=self.table.schema_name,
            name=self.table.name,
            columns=self.table.columns,
            format=self.table.format,
            rows=rows,
        )


def table_oid(stream: Stream) -> int | None:
    """The OID that the table of a stream had when it was read, as the stream's name has it; None if it has none."""
    found = _STREAM_NAME.match(stream.name)
    return int(found[1]) if found else None


def bulk_tables(held: Held, sizes: Mapping[int, int], *, bulk_bytes: int = BULK_BYTES) -> list[BulkTable]:
    """The tables of a held database that are worth a COPY of their own, the biggest first; ``sizes``: of all, by OID, in bytes.

    Behind them, in the order of their names, stand those that have to be loaded last, however small they are. None where one of
    those can't be copied: pg_dump reads all then, alone and slower, and the log says so. Raises SQLAlchemy's errors.
    """
    # L holds the locks that looking at sizes takes; S would have to wait behind DDL that waits for L.
    with held.locks_lock:
        rerouted = rerouted_partitions(held.locks)
        locked = {oid for oid, _, _ in held.locked}
        dependent = [oid for oid in order_dependent_tables(held.locks) if oid in locked]
        last_oids, smallest_bytes = set(dependent), min(bulk_bytes, _SMALLEST_BYTES)
        parameters = {
            "oids": [
                oid
                for oid in locked
                if oid not in rerouted and (oid in last_oids or sizes.get(oid, 0) >= smallest_bytes)
            ],
            "dependent": dependent,
            "limit": _TABLES_LIMIT,
            "binary": list(_BINARY_TYPES),
        }
        rows = held.locks.execute(_TABLES, parameters).all()
        splitting = {row.oid: row.is_heap and held.identity.version >= _CTID_SCAN_SINCE for row in rows}
        keys = keys_of(held, [oid for oid, has_ctid_scan in splitting.items() if not has_ctid_scan])
    encoding = driver_of(held.reader).info.parameter_status("server_encoding")
    can_be_named = held.identity.version >= _ESCAPES_SINCE and encoding not in ("SQL_ASCII", "EUC_TW")
    keys = {oid: key for oid, key in keys.items() if can_be_named or key.column.isascii()}
    found = [
        BulkTable(
            row.oid,
            row.schema_name,
            row.name,
            tuple(row.columns),
            row.is_binary,
            row.blocks,
            row.size_bytes,
            splitting[row.oid],
            None if row.oid in held.defective else keys.get(row.oid),
        )
        for row in rows
        if row.columns
    ]
    named = {table.oid: table for table in found if can_be_named or table.is_ascii}
    last = [named.pop(oid) for oid in dependent if oid in named]
    worth = worth_copying(list(named.values()), sum(sizes.values()), bulk_bytes)
    if not worth:
        return []  # where pg_dump writes all others, it knows best in which order
    if len(last) < len(dependent):
        logger.warning(
            "%s is read by pg_dump alone, not by parallel COPY: a table whose checks or stored values call functions"
            " can't be copied, and has to be loaded in pg_dump's order",
            held.database.name,
        )
        return []
    return [*worth, *last]


def worth_copying(tables: Sequence[BulkTable], all_bytes: int, bulk_bytes: int) -> list[BulkTable]:
    """Those that don't belong into the dump: of ``bulk_bytes`` or more, and as many as leave it no more than it should hold."""
    worth: list[BulkTable] = []
    for table in sorted(tables, key=lambda one: -one.size_bytes):
        if table.size_bytes < bulk_bytes and all_bytes <= DUMP_BYTES:
            break
        worth.append(table)
        all_bytes -= table.size_bytes
    return worth


def range_size(size_bytes: int, all_bytes: int, jobs: int, *, is_near: bool) -> int | None:
    """In ranges of how many bytes a table of ``size_bytes`` is read where its database has ``all_bytes``; None: in one piece.

    In one, unless it is so much more than its share of the work that others would wait for it; ``is_near``: the server is on
    this machine. In ranges it takes a quarter more of the server's processor time: a scan by ctid has no ring of buffers of its
    own, and what the ranges have must be counted. What is in one piece, one session loads.
    """
    return RANGE_BYTES if size_bytes * jobs > (_NEAR_SHARES_LIMIT if is_near else _SHARES_LIMIT) * all_bytes else None
