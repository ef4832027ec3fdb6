"""What no dump of one database holds, read under the cut's snapshot ("PostgreSQL", section 3), and every table's rows.

All of it is data for the manifest; a restore applies it statement by statement (`staging.dress`). An ordinary owner may
read every catalog that is asked here.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from sqlalchemy import Connection, text

from athena_backup.manifest import DatabaseFacts, Extension, Label, Role, SequenceState, Setting, TableCount
from athena_backup.operation import Operation
from athena_backup.postgres.clients import client_version
from athena_backup.postgres.collations import collations_of
from athena_backup.postgres.held import Held, lost_holder, snapshot_session
from athena_backup.postgres.session_settings import COUNTING_SETTINGS
from athena_backup.postgres.sessions import cancelled_with, quoted, run_sql, translated

# Ordinary tables and partitions whose rows pg_dump writes. Members of extensions are left out: CREATE EXTENSION makes
# their rows, so their number says nothing about the dump.
_TABLES = text(
    "SELECT c.oid::bigint AS oid, n.nspname AS schema_name, c.relname AS name,"
    # Of another table it would wait for whoever has it locked, with every other table locked by us.
    " CASE WHEN c.oid::bigint OPERATOR(pg_catalog.=) ANY (:locked) THEN pg_catalog.pg_table_size(c.oid)::bigint END AS size_bytes"
    " FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
    " WHERE c.relkind OPERATOR(pg_catalog.=) 'r' AND c.relpersistence <> 't' AND n.nspname <> 'information_schema'"
    " AND n.nspname !~ '^pg_' AND NOT (c.relpersistence OPERATOR(pg_catalog.=) 'u' AND pg_catalog.pg_is_in_recovery())"
    " AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend d WHERE d.objid OPERATOR(pg_catalog.=) c.oid"
    " AND d.classid OPERATOR(pg_catalog.=) 'pg_catalog.pg_class'::pg_catalog.regclass AND d.deptype OPERATOR(pg_catalog.=) 'e')"
    " ORDER BY n.nspname, c.relname"
)
_COUNTED_AT_ONCE = 200
# The bootstrap superuser (OID 10) is pinned: pg_shdepend has no line about it, so what it owns is looked up. Objects that
# initdb made (below 16384) and members of extensions are in no dump.
_BOOTSTRAP_OWNS = " OR ".join(
    f"EXISTS (SELECT FROM pg_catalog.{catalog} o WHERE o.{column} OPERATOR(pg_catalog.=) CAST(10 AS oid)"  # noqa: S608 - constants
    " AND o.oid OPERATOR(pg_catalog.>=) CAST(16384 AS oid) AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e"
    f" WHERE e.classid OPERATOR(pg_catalog.=) 'pg_catalog.{catalog}'::pg_catalog.regclass"
    " AND e.objid OPERATOR(pg_catalog.=) o.oid AND e.deptype OPERATOR(pg_catalog.=) 'e'))"
    for catalog, column in (
        ("pg_class", "relowner"),
        ("pg_proc", "proowner"),
        ("pg_namespace", "nspowner"),
        ("pg_type", "typowner"),
        ("pg_operator", "oprowner"),
        ("pg_largeobject_metadata", "lomowner"),
        ("pg_foreign_data_wrapper", "fdwowner"),
        ("pg_foreign_server", "srvowner"),
        ("pg_publication", "pubowner"),
        ("pg_event_trigger", "evtowner"),
        ("pg_language", "lanowner"),
        ("pg_collation", "collowner"),
        ("pg_ts_config", "cfgowner"),
        ("pg_ts_dict", "dictowner"),
        ("pg_statistic_ext", "stxowner"),
        ("pg_opclass", "opcowner"),
        ("pg_opfamily", "opfowner"),
        ("pg_conversion", "conowner"),
        ("pg_default_acl", "defaclrole"),
    )
)
_OWNER_OF_PUBLIC_SINCE = 150_000
# `public` is initdb's. Since version 15 pg_dump writes who owns it where that is not whom a new server's belongs to. Before, it
# takes the bootstrap superuser's rights away (REVOKE) where the owner is another one by now.
_BOOTSTRAP_HAS_PUBLIC = (
    "EXISTS (SELECT FROM pg_catalog.pg_namespace n WHERE n.nspname OPERATOR(pg_catalog.=) 'public'"
    " AND (:names_owner_of_public OPERATOR(pg_catalog.=) (n.nspowner OPERATOR(pg_catalog.=) CAST(10 AS oid))"
    " OR EXISTS (SELECT FROM pg_catalog.aclexplode(n.nspacl) a WHERE a.grantee OPERATOR(pg_catalog.=) CAST(10 AS oid)"
    " AND a.grantee OPERATOR(pg_catalog.<>) n.nspowner)))"
)
# What is granted to it or by it, and the policies and user mappings that name it.
_BOOTSTRAP_IS_NAMED = " OR ".join(
    [
        *(
            f"EXISTS (SELECT FROM pg_catalog.{catalog} o, pg_catalog.aclexplode(o.{column}) a WHERE o.{column} IS NOT NULL"  # noqa: S608 - constants
            f" AND o.{key} OPERATOR(pg_catalog.>=) CAST(16384 AS oid) AND CAST(10 AS oid) IN (a.grantee, a.grantor)"
            " AND NOT EXISTS (SELECT FROM pg_catalog.pg_depend e WHERE e.classid OPERATOR(pg_catalog.=)"
            f" 'pg_catalog.{'pg_class' if key == 'attrelid' else catalog}'::pg_catalog.regclass"
            f" AND e.objid OPERATOR(pg_catalog.=) o.{key} AND e.deptype OPERATOR(pg_catalog.=) 'e'))"
            for catalog, column, key in (
                ("pg_class", "relacl", "oid"),
                ("pg_attribute", "attacl", "attrelid"),
                ("pg_namespace", "nspacl", "oid"),
                ("pg_proc", "proacl", "oid"),
                ("pg_type", "typacl", "oid"),
                ("pg_language", "lanacl", "oid"),
                ("pg_foreign_data_wrapper", "fdwacl", "oid"),
                ("pg_foreign_server", "srvacl", "oid"),
                ("pg_largeobject_metadata", "lomacl", "oid"),
                ("pg_default_acl", "defaclacl", "oid"),
            )
        ),
        "EXISTS (SELECT FROM pg_catalog.pg_policy WHERE CAST(10 AS oid) OPERATOR(pg_catalog.=) ANY (polroles))",
        "EXISTS (SELECT FROM pg_catalog.pg_user_mappings WHERE umuser OPERATOR(pg_catalog.=) CAST(10 AS oid))",
    ]
)
# Every role that something in the database refers to: owners and grantees stand in pg_shdepend.
_ROLES = text(
    "SELECT r.rolname AS name, r.rolcanlogin AS can_login, r.rolinherit AS inherit, r.rolcreatedb AS create_database,"  # noqa: S608 - constants
    " r.rolconnlimit AS connection_limit, ARRAY(SELECT p.rolname::text FROM pg_catalog.pg_auth_members m"
    " JOIN pg_catalog.pg_roles p ON p.oid OPERATOR(pg_catalog.=) m.roleid"
    " WHERE m.member OPERATOR(pg_catalog.=) r.oid ORDER BY 1) AS member_of FROM pg_catalog.pg_roles r"
    " WHERE r.rolname !~ '^pg_' AND r.oid IN ("
    " SELECT refobjid FROM pg_catalog.pg_shdepend s JOIN pg_catalog.pg_database d ON d.datname OPERATOR(pg_catalog.=)"
    " current_database() WHERE s.refclassid OPERATOR(pg_catalog.=) 'pg_catalog.pg_authid'::pg_catalog.regclass"
    " AND (s.dbid OPERATOR(pg_catalog.=) d.oid OR (s.dbid OPERATOR(pg_catalog.=) 0 AND s.objid OPERATOR(pg_catalog.=) d.oid))"
    " UNION SELECT datdba FROM pg_catalog.pg_database WHERE datname OPERATOR(pg_catalog.=) current_database()"
    " UNION SELECT a.grantee FROM pg_catalog.pg_database, pg_catalog.aclexplode(datacl) a"
    " WHERE datname OPERATOR(pg_catalog.=) current_database()"
    " UNION SELECT setrole FROM pg_catalog.pg_db_role_setting s JOIN pg_catalog.pg_database d"
    " ON d.oid OPERATOR(pg_catalog.=) s.setdatabase WHERE d.datname OPERATOR(pg_catalog.=) current_database()"
    # Of a subscription pg_shdepend has a line that is no database's.
    " UNION SELECT u.subowner FROM pg_catalog.pg_subscription u JOIN pg_catalog.pg_database d"
    " ON d.oid OPERATOR(pg_catalog.=) u.subdbid WHERE d.datname OPERATOR(pg_catalog.=) current_database()"
    f" UNION SELECT CAST(10 AS oid) WHERE {_BOOTSTRAP_OWNS} OR {_BOOTSTRAP_HAS_PUBLIC}"
    f" OR {_BOOTSTRAP_IS_NAMED})"
    " ORDER BY r.rolname"
)


@dataclass(frozen=True)
class TableSize:
    """A table whose rows have to be in the backup."""

    oid: int
    schema_name: str
    name: str
    size_bytes: int
    """Without its indexes."""


def read_facts(held: Held, operation: Operation, client: Path, counted: Sequence[TableSize]) -> DatabaseFacts:
    """All facts but the dump's own (its warnings, ``sequences``, ``dump_version``), under the snapshot of the cut.

    ``client`` is the `pg_dump` that is used: what it writes differs with its version, and so whom its dump names.
    Rows are counted of the tables in ``counted``; those of others are left for `with_dump` to tell. Raises the driver's errors
    translated; a table hidden by row-level security is an error, never a lower count.
    """
    counts = _count_rows(held, operation, counted)
    with translating(held, operation), held.reader_lock, cancelled_with(held.reader, operation):
        reader = held.reader
        database = _database_row(reader, held.identity.version)
        whom = {"names_owner_of_public": client_version(client) >= _OWNER_OF_PUBLIC_SINCE}
        return DatabaseFacts(
            server=held.server.number if held.server else 0,
            database=held.database.database,
            oid=held.oid,
            **database,
            labels=_labels(reader, held.oid),
            settings=_settings(reader, held.oid),
            roles=tuple(Role.model_validate(dict(row._mapping)) for row in reader.execute(_ROLES, whom)),  # noqa: SLF001 - its API
            collations=collations_of(reader),
            tablespaces=_tablespaces(reader),
            tables=counts,
            sequences=(),
            extensions=tuple(
                Extension(name=row[0], version=row[1])
                for row in reader.execute(
                    text("SELECT extname, extversion FROM pg_catalog.pg_extension ORDER BY extname")
                )
            ),
            large_objects=reader.execute(text("SELECT count(*) FROM pg_catalog.pg_largeobject_metadata")).scalar_one(),
            omitted=(*_hidden_user_mappings(reader), *_unlogged_on_a_standby(reader)),
            dump_version="",
        )


@contextlib.contextmanager
def translating(held: Held, operation: Operation) -> Iterator[None]:
    """The holder's session outlives the block, so nothing else turns the driver's errors into this project's own."""
    try:
        yield
    except sqlalchemy.exc.DBAPIError as error:
        operation.check()  # a cancelled operation cancels the query in the server: that is no error of the database
        if error.connection_invalidated:
            held.lost = held.lost or lost_holder(error)
            raise held.lost from error
        raise translated(error) from error


def tables_with_rows(held: Held, operation: Operation) -> list[TableSize]:
    """Every table whose rows have to be in the backup, by name."""
    # L holds the locks that looking at sizes takes; S would have to wait behind DDL that waits for L.
    # L sees what is made after the cut too; S, like every reader of the snapshot, only what L has locked.
    locked = {oid for oid, _, _ in held.locked}
    with translating(held, operation), held.locks_lock, cancelled_with(held.locks, operation):
        rows = held.locks.execute(_TABLES, {"locked": list(locked)}).all()
    return [TableSize(row.oid, row.schema_name, row.name, row.size_bytes or 0) for row in rows if row.oid in locked]


def with_dump(
    facts: DatabaseFacts,
    omitted: Sequence[str],
    sequences: Sequence[SequenceState],
    version: str,
    counts: Sequence[TableCount] = (),
) -> DatabaseFacts:
    """The facts completed by what the dump itself said, and by the rows of the tables that were not counted."""
    return facts.model_copy(
        update={
            "omitted": (*facts.omitted, *omitted),
            "sequences": tuple(sequences),
            "dump_version": version,
            "tables": tuple(sorted([*facts.tables, *counts], key=lambda table: (table.schema_name, table.name))),
        }
    )


def _database_row(reader: Connection, version: int) -> dict[str, object]:
    # The columns of locale and collation have changed with almost every version.
    provider = "datlocprovider::text" if version >= 150_000 else "'c'"
    locale = "datlocale" if version >= 170_000 else "daticulocale" if version >= 150_000 else "NULL::text"
    rules = "daticurules" if version >= 160_000 else "NULL::text"
    collation = "datcollversion" if version >= 150_000 else "NULL::text"
    row = run_sql(
        reader,
        "SELECT pg_catalog.pg_get_userbyid(datdba) AS owner,"  # noqa: S608 - only constants are put in
        " CASE WHEN datacl IS NOT NULL THEN ARRAY(SELECT pg_catalog.unnest(datacl)::text) END AS acl,"
        " pg_catalog.shobj_description(d.oid, 'pg_database') AS comment, datconnlimit AS connection_limit,"
        " datistemplate AS is_template,"
        " t.spcname AS tablespace, pg_catalog.pg_encoding_to_char(encoding) AS encoding,"
        f" {provider} AS locale_provider, datcollate AS collate, datctype AS ctype, {locale} AS locale, {rules} AS icu_rules,"
        f" {collation} AS collation_version, pg_catalog.pg_database_size(d.oid) AS size_bytes"
        " FROM pg_catalog.pg_database d JOIN pg_catalog.pg_tablespace t ON t.oid OPERATOR(pg_catalog.=) d.dattablespace"
        " WHERE datname OPERATOR(pg_catalog.=) current_database()",
    ).one()
    return dict(row._mapping)  # noqa: SLF001 - its API


def _labels(reader: Connection, oid: int) -> tuple[Label, ...]:
    statement = text(
        "SELECT provider, label FROM pg_catalog.pg_shseclabel WHERE objoid OPERATOR(pg_catalog.=) CAST(:oid AS oid)"
        " AND classoid OPERATOR(pg_catalog.=) 'pg_catalog.pg_database'::pg_catalog.regclass ORDER BY provider"
    )
    return tuple(Label(provider=row.provider, label=row.label) for row in reader.execute(statement, {"oid": oid}))


def _settings(reader: Connection, oid: int) -> tuple[Setting, ...]:
    statement = text(
        "SELECT r.rolname AS role, pg_catalog.unnest(s.setconfig) AS setting FROM pg_catalog.pg_db_role_setting s"
        " LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) s.setrole"
        " WHERE s.setdatabase OPERATOR(pg_catalog.=) CAST(:oid AS oid) ORDER BY 1 NULLS FIRST, 2"
    )
    found = []
    for row in reader.execute(statement, {"oid": oid}):
        name, _, value = row.setting.partition("=")
        found.append(Setting(role=row.role, name=name, value=value))
    return tuple(found)


def _tablespaces(reader: Connection) -> tuple[str, ...]:
    """The tablespaces that relations are in by name, and in which a restore makes them again (manual, 22.6)."""
    statement = text(
        "SELECT DISTINCT t.spcname FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_tablespace t ON t.oid OPERATOR(pg_catalog.=) c.reltablespace"
        # Of the server's own relations some are in pg_global, and none is dumped.
        " WHERE c.oid OPERATOR(pg_catalog.>=) CAST(16384 AS oid) AND c.relpersistence OPERATOR(pg_catalog.<>) 't' ORDER BY 1"
    )
    return tuple(str(name) for name in reader.execute(statement).scalars())


def _hidden_user_mappings(reader: Connection) -> list[str]:
    """User mappings whose options, such as passwords, pg_dump leaves out without a word, as this role may not see them."""
    # The condition is that of the view's own definition (src/backend/catalog/system_views.sql, pg_user_mappings).
    statement = text(
        "SELECT m.usename, m.srvname FROM pg_catalog.pg_user_mappings m"
        " JOIN pg_catalog.pg_foreign_server s ON s.oid OPERATOR(pg_catalog.=) m.srvid"
        " JOIN pg_catalog.pg_roles me ON me.rolname OPERATOR(pg_catalog.=) current_user"
        " WHERE NOT me.rolsuper AND NOT CASE WHEN m.umuser OPERATOR(pg_catalog.=) CAST(0 AS oid)"
        " THEN pg_catalog.pg_has_role(s.srvowner, 'USAGE') ELSE m.usename OPERATOR(pg_catalog.=) current_user"
        " AND (pg_catalog.pg_has_role(s.srvowner, 'USAGE') OR pg_catalog.has_server_privilege(s.oid, 'USAGE')) END"
        " ORDER BY 2, 1"
    )
    return [
        f"options of the user mapping of {row.usename} on server {row.srvname}, which the backup's role may not see"
        for row in reader.execute(statement)
    ]


def _unlogged_on_a_standby(reader: Connection) -> list[str]:
    """Tables of which a standby has no rows (manual, 27.4.2)."""
    statement = text(
        "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c"
        " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
        " WHERE pg_catalog.pg_is_in_recovery() AND c.relkind OPERATOR(pg_catalog.=) 'r'"
        " AND c.relpersistence OPERATOR(pg_catalog.=) 'u' ORDER BY 1"
    )
    return [
        f"rows of the unlogged table {name}, of which a standby has none"
        for name in reader.execute(statement).scalars()
    ]


def _count_rows(held: Held, operation: Operation, tables: Sequence[TableSize]) -> tuple[TableCount, ...]:
    """The rows of the tables, so many of them in one transaction: their locks go with it."""
    counts: list[TableCount] = []
    if not tables:
        return ()
    with snapshot_session(held, operation, COUNTING_SETTINGS) as locking:
        for start in range(0, len(tables), _COUNTED_AT_ONCE):
            some = tables[start : start + _COUNTED_AT_ONCE]
            names = [f"{quoted(table.schema_name)}.{quoted(table.name)}" for table in some]
            operation.check()
            held.check()
            selects = [f"SELECT {number}, count(*) FROM ONLY {name}" for number, name in enumerate(names)]  # noqa: S608 - quoted
            rows = {row[0]: row[1] for row in run_sql(locking(names), " UNION ALL ".join(selects))}
            counts += [
                TableCount(schema_name=table.schema_name, name=table.name, rows=rows[number])
                for number, table in enumerate(some)
            ]
    return tuple(counts)
