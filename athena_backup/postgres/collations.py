"""Which collations a destination has in another version than the source had ("PostgreSQL", section 4).

A restore makes every index anew, so none is defective by it. But text may be sorted, and may be equal, otherwise: what a unique
index, a partition's bounds or a query relied on is for people to look at.
"""

from sqlalchemy import Connection, text

from athena_backup.manifest import Collation, DatabaseFacts
from athena_backup.postgres.sessions import quoted

_NAMED_LIMIT = 10
_DATABASE_VERSION_SINCE = 150_000
# Those of index keys; the server itself has none in a catalog of ours that a version could change (below 16384).
_IN_USE = text(
    "SELECT n.nspname AS schema_name, c.collname AS name, c.collversion AS version"
    " FROM pg_catalog.pg_collation c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.collnamespace"
    " WHERE c.collversion IS NOT NULL AND EXISTS (SELECT FROM pg_catalog.pg_index i"
    " WHERE i.indrelid OPERATOR(pg_catalog.>=) CAST(16384 AS oid) AND c.oid OPERATOR(pg_catalog.=) ANY (i.indcollation))"
    " ORDER BY 1, 2"
)
_OWN_VERSION = text(
    "SELECT datcollversion FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) current_database()"
)
_INDEXES = text(
    "SELECT n.nspname AS schema_name, x.relname AS name FROM pg_catalog.pg_index i"
    " JOIN pg_catalog.pg_class x ON x.oid OPERATOR(pg_catalog.=) i.indexrelid"
    " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) x.relnamespace"
    " JOIN pg_catalog.pg_collation c ON c.oid OPERATOR(pg_catalog.=) ANY (i.indcollation)"
    " JOIN pg_catalog.pg_namespace s ON s.oid OPERATOR(pg_catalog.=) c.collnamespace"
    " WHERE i.indrelid OPERATOR(pg_catalog.>=) CAST(16384 AS oid) AND n.nspname !~ '^pg_toast'"
    " AND s.nspname OPERATOR(pg_catalog.=) CAST(:schema_name AS name) AND c.collname OPERATOR(pg_catalog.=) CAST(:name AS name)"
    " GROUP BY 1, 2 ORDER BY 1, 2"
)


def collations_of(connection: Connection) -> tuple[Collation, ...]:
    """The collations by which indexes of the session's database are sorted, with the versions that the catalog has of them.

    To ask for the version that a collation has by now may fail. Those without one, such as C, never change. The database's own is
    not among them. Raises SQLAlchemy's errors.
    """
    return tuple(Collation(schema_name=row[0], name=row[1], version=row[2]) for row in connection.execute(_IN_USE))


def changed_collations(connection: Connection, facts: DatabaseFacts, server: int) -> list[str]:
    """What sorts otherwise, maybe, in the session's database than in the one of the ``facts``, in words; ``server``: its version.

    Raises SQLAlchemy's errors.
    """
    here = {(one.schema_name, one.name): one.version for one in collations_of(connection)}
    changed = [
        _told(connection, one.schema_name, one.name, f"collation {quoted(one.name)}", one.version, version)
        for one in facts.collations
        if (version := here.get((one.schema_name, one.name), one.version)) != one.version
    ]
    if facts.collation_version is not None and server >= _DATABASE_VERSION_SINCE:
        version = connection.execute(_OWN_VERSION).scalar_one()
        if version not in (None, facts.collation_version):
            own = ("pg_catalog", "default", "the database's own collation", facts.collation_version, version)
            changed.append(_told(connection, *own))
    return changed


def _told(connection: Connection, schema_name: str, name: str, what: str, there: str, here: str) -> str:
    rows = connection.execute(_INDEXES, {"schema_name": schema_name, "name": name}).all()
    names = [f"{quoted(row.schema_name)}.{quoted(row.name)}" for row in rows]
    more = f" and {len(names) - _NAMED_LIMIT} more" if len(names) > _NAMED_LIMIT else ""
    indexes = f"; indexes by it, made anew: {', '.join(names[:_NAMED_LIMIT])}{more}" if names else ""
    return f"{what} has version {here} here and had {there}: text may be sorted otherwise{indexes}"
