"""The roles that a restore makes where the destination lacks them: without a login or any power, and gone again if it fails.

Passwords are in no set ("PostgreSQL", section 3), so who is to log in is told in the restore's message.
"""

from collections.abc import Collection

import sqlalchemy
from sqlalchemy import Connection, text

from athena_backup.manifest import DatabaseFacts
from athena_backup.postgres.rename import maintenance_session
from athena_backup.postgres.session_settings import apply_settings
from athena_backup.postgres.sessions import Database, quoted, run_sql

_SELF_GRANT_SINCE = 160_000
_OWN_ROLE = text(
    "SELECT rolname::text AS name, rolsuper AS is_superuser, pg_catalog.current_setting('server_version_num')::int AS version"
    " FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) current_user"
)
_MADE = text(
    "SELECT rolname::text FROM pg_catalog.pg_roles WHERE NOT rolcanlogin"
    " AND pg_catalog.starts_with(pg_catalog.shobj_description(oid, 'pg_authid'), :mark) ORDER BY 1"
)
_IS_STAGED = text("SELECT EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname ~ '__athena_r_[0-9a-f]{12}$')")
_MARK = "made without a login by Athena Backup, restore "


def roles_of(facts: DatabaseFacts) -> frozenset[str]:
    """The names of the roles that the database refers to."""
    return frozenset({role.name for role in facts.roles} | {facts.owner})


def missing_roles(connection: Connection, facts: DatabaseFacts) -> list[str]:
    """Those of them that the destination lacks."""
    wanted = sorted(roles_of(facts))
    have = set(
        connection.execute(
            text("SELECT rolname FROM pg_catalog.pg_roles WHERE rolname OPERATOR(pg_catalog.=) ANY (:names)"),
            {"names": wanted},
        ).scalars()
    )
    return [name for name in wanted if name not in have]


def create_missing_roles(connection: Connection, facts: DatabaseFacts, restore_id: str) -> None:
    """Create the roles that the destination lacks, without a login or any power; memberships only among those.

    One exception: whoever creates them without being a superuser becomes a member, or he could make nothing theirs. A comment
    on each says of which restore it is.
    """
    missing = missing_roles(connection, facts)
    # Since version 16 who creates a role may administer it but not be it (manual, "createrole_self_grant"); before, it is
    # no member unless it says so.
    apply_settings(connection, {"createrole_self_grant": "set, inherit"})
    own = connection.execute(_OWN_ROLE).one()
    is_to_join = not own.is_superuser and own.version < _SELF_GRANT_SINCE
    joined = f" ROLE {quoted(own.name)}" if is_to_join else ""
    for name in missing:
        run_sql(connection, f"CREATE ROLE {quoted(name)} NOLOGIN{joined}")
        run_sql(connection, f"COMMENT ON ROLE {quoted(name)} IS '{_MARK}{restore_id}'")
    for role in facts.roles:
        for parent in role.member_of:
            if role.name in missing and parent in missing:
                run_sql(connection, f"GRANT {quoted(parent)} TO {quoted(role.name)}")


def roles_without_login(connection: Connection, facts: DatabaseFacts) -> list[str]:
    """The roles that a restore has made, be it one that was killed, nobody has given a login yet, and had one at the source."""
    made = set(connection.execute(_MADE, {"mark": _MARK}).scalars())
    return [role.name for role in facts.roles if role.can_login and role.name in made]


def discard_roles(target: Database, restore_id: str, kept: Collection[str]) -> list[str]:
    """Drop the roles that this restore has made on the target's server and nothing needs, but those ``kept``; returns the names.

    None while anything is staged on that server, be it by another service: what is dropped may be about to own something.
    """
    dropped: list[str] = []
    with maintenance_session(target.url) as connection:
        if connection.execute(_IS_STAGED).scalar_one():
            return dropped
        for name in connection.execute(_MADE, {"mark": f"{_MARK}{restore_id}"}).scalars().all():
            if name in kept:
                continue
            try:
                run_sql(connection, f"DROP ROLE {quoted(name)}")
                dropped.append(name)
            except sqlalchemy.exc.DBAPIError as error:
                # What depends on it, or that it is not ours to drop, keeps it: it can do nothing.
                if error.connection_invalidated:
                    raise
    return dropped
