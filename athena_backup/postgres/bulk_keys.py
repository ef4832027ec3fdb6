"""What a table is split by where its blocks can't be read by themselves: a column with an index ("PostgreSQL", section 2).

Blocks can be in versions from 14 on, of heap tables. Elsewhere a range of a column is as cheap only where an index finds its rows,
and these lie in the column's order, more or less: then the statistics have its bounds, and nothing has to be read for them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import text

from athena_backup.postgres.held import Held
from athena_backup.postgres.sessions import ascii_quoted

_CORRELATION = 0.9
"""Of rows that lie in another order than the column's, each range would have to look at most of the table's blocks."""
_UNEVEN = 0.2
"""So much of the rows may be NULL or have one of the most common values: they are spread over the ranges by chance."""
# Types of which no collation decides what is less, and whose texts are plain ASCII and read alike in every session of ours.
_KEY_TYPES = ("int2", "int4", "int8", "numeric", "uuid", "date", "timestamp", "timestamptz")
_KEYS = text(
    "SELECT c.oid::bigint AS oid, a.attname::text AS column, s.histogram_bounds::text::text[] AS bounds"
    " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " JOIN pg_catalog.pg_index i ON i.indrelid OPERATOR(pg_catalog.=) c.oid AND i.indisvalid AND i.indpred IS NULL"
    " JOIN pg_catalog.pg_opclass o ON o.oid OPERATOR(pg_catalog.=) i.indclass[0] AND o.opcdefault"
    " JOIN pg_catalog.pg_am m ON m.oid OPERATOR(pg_catalog.=) o.opcmethod AND m.amname OPERATOR(pg_catalog.=) 'btree'"
    " JOIN pg_catalog.pg_attribute a ON a.attrelid OPERATOR(pg_catalog.=) c.oid"
    " AND a.attnum OPERATOR(pg_catalog.=) i.indkey[0] AND a.attnum OPERATOR(pg_catalog.>) 0"
    " JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) a.atttypid"
    " AND t.typnamespace OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace"
    " AND t.typname OPERATOR(pg_catalog.=) ANY (CAST(:types AS name[]))"
    " JOIN pg_catalog.pg_stats s ON s.schemaname OPERATOR(pg_catalog.=) n.nspname"
    " AND s.tablename OPERATOR(pg_catalog.=) c.relname AND s.attname OPERATOR(pg_catalog.=) a.attname AND NOT s.inherited"
    " WHERE c.oid OPERATOR(pg_catalog.=) ANY (CAST(:oids AS oid[])) AND s.histogram_bounds IS NOT NULL"
    " AND pg_catalog.abs(s.correlation) OPERATOR(pg_catalog.>=) CAST(:correlation AS float4)"
    # The bounds know nothing of NULLs and of the most common values.
    " AND s.null_frac OPERATOR(pg_catalog.+) coalesce((SELECT pg_catalog.sum(f) FROM pg_catalog.unnest(s.most_common_freqs) f),"
    " 0) OPERATOR(pg_catalog.<=) CAST(:uneven AS float4)"
    " ORDER BY c.oid, pg_catalog.abs(s.correlation) DESC, i.indisunique DESC, a.attnum"
)


@dataclass(frozen=True)
class Key:
    """A column by whose values a table is read in ranges."""

    column: str
    bounds: Sequence[str]
    """Values, ascending, between which about as many rows lie each time, but for NULLs and the most common values."""

    def ranges(self, count: int) -> list[str | None]:
        """About ``count`` conditions in SQL, of which each row there may be meets exactly one."""
        steps = max(min(count, len(self.bounds) - 1), 1)
        found = dict.fromkeys(self.bounds[number * (len(self.bounds) - 1) // steps] for number in range(1, steps))
        column, bounds = ascii_quoted(self.column), list(found)
        ranges: list[str | None] = [
            " AND ".join(
                [f"{column} >= '{first}'"] * (first is not None) + [f"{column} < '{last}'"] * (last is not None)
            )
            for first, last in zip([None, *bounds], [*bounds, None], strict=True)
        ]
        if not bounds:
            return [None]
        # Also where the column says that it has none: such a constraint can be not yet valid (18).
        return [*ranges, f"{column} IS NULL"]


def keys_of(held: Held, oids: Sequence[int]) -> Mapping[int, Key]:
    """The columns by which tables of a held database, given by their OIDs, can be read in ranges; those without are left out.

    The caller has ``locks_lock``. Raises SQLAlchemy's errors.
    """
    found: dict[int, Key] = {}
    parameters = {"oids": list(oids), "types": list(_KEY_TYPES), "correlation": _CORRELATION, "uneven": _UNEVEN}
    for row in held.locks.execute(_KEYS, parameters).all():
        found.setdefault(row.oid, Key(row.column, row.bounds))
    return found
