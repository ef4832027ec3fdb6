"""What would keep a database from being restored, found before anything that is live is touched ("PostgreSQL", section 6).

Every fault is collected, none hides another. All that is made are the empty staging database and the roles that it lacks.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import sqlalchemy
from sqlalchemy import Connection, text

from athena_backup.errors import AthenaError, FinalError
from athena_backup.manifest import Component, DatabaseFacts
from athena_backup.postgres.rename import maintenance_session, side_name, subscriptions_of
from athena_backup.postgres.roles import missing_roles
from athena_backup.postgres.sessions import Database, quoted, refuse_older, refuse_pooler, session, translated
from athena_backup.postgres.staging import create_staging, facts_of, restoring_client


def preflight_database(
    component: Component, target: Database, restore_id: str, client_directories: Sequence[Path] = ()
) -> list[AthenaError]:
    """Everything that would keep this database from being restored, found without touching what is live.

    Creates the (empty) staging database, and the roles that are missing, and connects to it: `pg_hba.conf` may list databases by
    name. The caller discards it by `discard_staging`, and them by `discard_roles`, when the restore doesn't go on.
    """
    facts = facts_of(component)
    faults: list[AthenaError] = []
    with maintenance_session(target.url) as connection:
        with _collected(faults):
            refuse_pooler(connection)
        server = connection.execute(text("SELECT pg_catalog.current_setting('server_version_num')::int")).scalar_one()
        faults += _version_faults(component, server)
        with _collected(faults):
            restoring_client(facts, server, client_directories)
        faults += _permission_faults(connection, facts, target)
        faults += _absent_things(connection, facts)
        faults += _obstacles(connection, target)
        if not faults:
            with _collected(faults):
                create_staging(connection, facts, target, restore_id)
    if not faults:
        with (
            _collected(faults),
            session(target.url.set(database=side_name(target.database, "r", restore_id))) as inside,
        ):
            faults += _extension_faults(inside, facts)
    return faults


@contextlib.contextmanager
def _collected(faults: list[AthenaError]) -> Iterator[None]:
    try:
        yield
    except AthenaError as error:
        faults.append(error)
    except sqlalchemy.exc.DBAPIError as error:
        faults.append(translated(error))


def _version_faults(component: Component, server: int) -> list[AthenaError]:
    try:
        refuse_older(server)
    except FinalError as error:
        return [error]
    source = component.server.version if component.server else 0
    if source // 10_000 <= server // 10_000:
        return []
    return [
        FinalError(
            f"the set was taken from PostgreSQL {source // 10_000}, the destination runs {server // 10_000}",
            next_step="restore into a server of the same or a newer major version",
        )
    ]


def _permission_faults(connection: Connection, facts: DatabaseFacts, target: Database) -> list[AthenaError]:
    row = connection.execute(
        text(
            "SELECT rolsuper, rolcreatedb, rolcreaterole, rolname FROM pg_catalog.pg_roles"
            " WHERE rolname OPERATOR(pg_catalog.=) current_user"
        )
    ).one()
    if row.rolsuper:
        return []
    faults: list[AthenaError] = []
    if not row.rolcreatedb:
        faults.append(
            FinalError(f"role {row.rolname} may not create databases", next_step=f"ALTER ROLE {row.rolname} CREATEDB")
        )
    missing = missing_roles(connection, facts)
    if missing and not row.rolcreaterole:
        faults.append(
            FinalError(
                f"the destination lacks the roles {', '.join(missing)}, and role {row.rolname} may not create roles",
                next_step=f"create them, or ALTER ROLE {row.rolname} CREATEROLE",
            )
        )
    owner = connection.execute(
        text(
            "SELECT r.rolname, pg_catalog.pg_has_role(current_user, d.datdba, 'MEMBER') AS ours FROM pg_catalog.pg_database d"
            " JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) d.datdba WHERE d.datname OPERATOR(pg_catalog.=) :name"
        ),
        {"name": target.database},
    ).one_or_none()
    if owner is not None and not owner.ours:
        faults.append(
            FinalError(
                f"database {target.database} belongs to {owner.rolname}, so role {row.rolname} can't rename it",
                next_step=f"GRANT {owner.rolname} TO {row.rolname}",
            )
        )
    return faults


def _absent_things(connection: Connection, facts: DatabaseFacts) -> list[AthenaError]:
    statement = text(
        "SELECT spcname, pg_catalog.has_tablespace_privilege(oid, 'CREATE') AS ours FROM pg_catalog.pg_tablespace"
    )
    ours = {row.spcname: row.ours for row in connection.execute(statement)}
    faults: list[AthenaError] = []
    # CREATE DATABASE takes the right too where it names the database's own, which it does for all but pg_default.
    free = {"pg_default"} & {facts.tablespace}
    for name in dict.fromkeys((facts.tablespace, *facts.tablespaces)):
        if name not in ours:
            faults.append(
                FinalError(f"the destination lacks the tablespace {name}", next_step="create it, then try again")
            )
        elif not ours[name] and name not in free:
            role = connection.execute(text("SELECT current_user")).scalar_one()
            faults.append(
                FinalError(
                    f"role {role} may make nothing in the tablespace {name}",
                    next_step=f"GRANT CREATE ON TABLESPACE {quoted(name)} TO {quoted(role)}",
                )
            )
    return faults


def _obstacles(connection: Connection, target: Database) -> list[AthenaError]:
    """What would block RENAME or be lost with the replaced database ("PostgreSQL", section 6)."""
    questions = {
        "a prepared transaction, which no one but you can end: COMMIT PREPARED or ROLLBACK PREPARED it": (
            "SELECT gid FROM pg_catalog.pg_prepared_xacts WHERE database OPERATOR(pg_catalog.=) :name"
        ),
        "a logical replication slot, which would stay with the replaced database: drop it first": (
            "SELECT slot_name FROM pg_catalog.pg_replication_slots WHERE database OPERATOR(pg_catalog.=) :name"
        ),
        "a session of a role that this one may not terminate: end it, or grant pg_signal_backend": (
            "SELECT 'pid ' || a.pid || ' of ' || coalesce(a.usename, '?') FROM pg_catalog.pg_stat_activity a"
            " JOIN pg_catalog.pg_roles me ON me.rolname OPERATOR(pg_catalog.=) current_user"
            " LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) a.usesysid"
            " WHERE a.datname OPERATOR(pg_catalog.=) :name AND a.pid <> pg_catalog.pg_backend_pid() AND NOT me.rolsuper"
            # Whom a role may not signal, of him it sees no backend_type either; what has no user is the server's own.
            " AND coalesce(a.backend_type, 'client backend') OPERATOR(pg_catalog.=) 'client backend'"
            " AND a.usesysid IS NOT NULL AND (coalesce(r.rolsuper, true)"
            " OR NOT (pg_catalog.pg_has_role(current_user, a.usesysid, 'USAGE')"
            " OR pg_catalog.pg_has_role(current_user, 'pg_signal_backend', 'USAGE')))"
        ),
        "a background worker bound to it, which would keep or lose its work with the switch: stop it first": (
            "SELECT a.backend_type || ', pid ' || a.pid FROM pg_catalog.pg_stat_activity a"
            " WHERE a.datname OPERATOR(pg_catalog.=) :name AND a.backend_type OPERATOR(pg_catalog.<>) ALL"
            " (ARRAY['client backend', 'parallel worker', 'autovacuum worker', 'walsender'])"
        ),
    }
    faults: list[AthenaError] = []
    for what, query in questions.items():
        found = [str(one) for one in connection.execute(text(query), {"name": target.database}).scalars()]
        if found:
            described, _, advice = what.partition(": ")
            faults.append(
                FinalError(f"database {target.database} has {described} ({', '.join(found[:5])})", next_step=advice)
            )
    subscriptions = subscriptions_of(connection, target.database)
    if subscriptions:
        faults.append(
            FinalError(
                f"database {target.database} has subscriptions ({', '.join(subscriptions[:5])}): their slots would be lost",
                next_step="drop them first, and make them again after the restore",
            )
        )
    return faults


_BOUND_EXTENSIONS = frozenset({"pg_cron"})
"""Those whose CREATE EXTENSION looks at the name of the database, which is another one until the switch."""


def bound_extensions(facts: DatabaseFacts) -> list[str]:
    """A database's extensions for which no restore can make it: it comes back by the set's RESTORE.md alone."""
    return [extension.name for extension in facts.extensions if extension.name in _BOUND_EXTENSIONS]


def _extension_faults(inside: Connection, facts: DatabaseFacts) -> list[AthenaError]:
    available = set(inside.execute(text("SELECT name FROM pg_catalog.pg_available_extensions")).scalars())
    missing = [extension.name for extension in facts.extensions if extension.name not in available]
    faults: list[AthenaError] = []
    if missing:
        faults.append(
            FinalError(
                f"the destination lacks the extensions {', '.join(missing)}", next_step="install them on the server"
            )
        )
    if bound := bound_extensions(facts):
        faults.append(
            FinalError(
                f"{', '.join(bound)} can be made only in the one database that its server's settings name, not in one beside it",
                next_step="leave this database out, and restore it by the set's RESTORE.md",
            )
        )
    return faults
