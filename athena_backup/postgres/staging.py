"""A database of a set, built beside the live one: create, load, prove, dress.

What has to hold before is `preflight`'s. The staged database is created from `template0` with the properties that the
manifest holds, loaded by `pg_restore` from the stored stream, compared with what the manifest promises, and given what no
dump of one database holds ("PostgreSQL", section 3). The live database is not touched by anything here.
"""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy
from sqlalchemy import Connection, text

from athena_backup.crew import Crew
from athena_backup.errors import DamagedError, FinalError, UnavailableError
from athena_backup.manifest import Component, DatabaseFacts, Setting
from athena_backup.operation import Operation
from athena_backup.postgres.clients import client_version, find_client
from athena_backup.postgres.collations import changed_collations
from athena_backup.postgres.copy_in import rows_of
from athena_backup.postgres.load import SOON_BYTES, Loading
from athena_backup.postgres.order import rerouted_partition_names
from athena_backup.postgres.rename import (
    database_oid,
    drop_database,
    forget_subscriptions,
    maintenance_session,
    side_databases,
    side_name,
    subscriptions_of,
)
from athena_backup.postgres.roles import create_missing_roles, roles_without_login
from athena_backup.postgres.sessions import Database, cancelled_with, quoted, run_sql, session, translated
from athena_backup.store import Store

# These would hinder the loading's own later sessions, so they come last ("PostgreSQL", section 3).
_LAST_SETTINGS = ("default_transaction_read_only", "session_preload_libraries", "local_preload_libraries")
_LOCALE_PROVIDERS = {"c": "libc", "i": "icu", "b": "builtin"}
# The parameters whose value is a list of identifiers; pg_dump has the same table (variable_is_guc_list_quote), since no
# catalog tells, and extensions may not add to it.
_LIST_SETTINGS = ("local_preload_libraries", "search_path", "session_preload_libraries", "temp_tablespaces")
_COUNTED_AT_ONCE = 25
"""The locks of each one and of its indexes are held until all are counted, and a server may have room for no more than some
thousand.
"""
SERVER_SECONDS = 600.0
"""How long a server may be away in the middle of a restore before that is given up; it then begins anew."""
_SERVER_LOOK_SECONDS = 2.0
_LIST_ITEM = re.compile(r'"((?:[^"]|"")*)"|([^",\s]+)')


@dataclass(frozen=True)
class StagedDatabase:
    """A staged database: its side name, and the OID by which alone it is addressed from now on."""

    name: str
    oid: int
    notes: tuple[str, ...] = ()
    """What did not come back as it was, in words: somebody has to see to it by hand."""


def facts_of(component: Component) -> DatabaseFacts:
    """The facts of a database component; raises `DamagedError` where the manifest has none."""
    if component.database is None:
        raise DamagedError("the manifest holds no facts about this database", component=component.name, step="reading")
    return component.database


def create_staging(connection: Connection, facts: DatabaseFacts, target: Database, restore_id: str) -> None:
    """Create the staging database and the roles that the destination lacks.

    Raises `FinalError` if there is a database of that name: another component of this restore is the same database.
    """
    name = side_name(target.database, "r", restore_id)
    if database_oid(connection, name) is not None:
        raise FinalError(
            f"{name} exists already: another component restores into database {target.database} too",
            next_step="remove one of the two from ATHENA_DATABASES",
        )
    create_missing_roles(connection, facts, restore_id)
    run_sql(connection, f"CREATE DATABASE {quoted(name)} {_properties(connection, facts)}")


def _properties(connection: Connection, facts: DatabaseFacts) -> str:
    server = connection.execute(text("SELECT pg_catalog.current_setting('server_version_num')::int")).scalar_one()
    options = [
        "TEMPLATE template0",
        f"OWNER {quoted(facts.owner)}",
        f"ENCODING {_literal(facts.encoding)}",
        f"LC_COLLATE {_literal(facts.collate)}",
        f"LC_CTYPE {_literal(facts.ctype)}",
    ]
    if facts.tablespace != "pg_default":  # naming even the default one takes a right that an ordinary owner lacks
        options.append(f"TABLESPACE {quoted(facts.tablespace)}")
    if server >= 150_000:
        provider = _LOCALE_PROVIDERS.get(facts.locale_provider)
        if provider is None:
            raise DamagedError(f"the manifest names a locale provider {facts.locale_provider!r}, which there is not")
        options.append(f"LOCALE_PROVIDER {provider}")
        if facts.locale_provider == "i" and facts.locale:
            options.append(f"ICU_LOCALE {_literal(facts.locale)}")
        if facts.locale_provider == "b" and facts.locale:
            options.append(f"BUILTIN_LOCALE {_literal(facts.locale)}")
        if facts.icu_rules and server >= 160_000:
            options.append(f"ICU_RULES {_literal(facts.icu_rules)}")
    return " ".join(options)


def stage_database(
    component: Component,
    target: Database,
    store: Store,
    restore_id: str,
    operation: Operation,
    *,
    crew: Crew | None = None,
    client_directories: Sequence[Path] = (),
    soon_bytes: int = SOON_BYTES,
) -> StagedDatabase:
    """Load the component into its staging database, dress it, and prove it whole; the live one serves on.

    ``crew`` does the loading; without one, one thing is done after the other. The indexes of tables of ``soon_bytes`` raw bytes
    and more are made while others load.
    Raises `DamagedError` for stored bytes that are not the written ones, `FinalError` for whatever `pg_restore` or the
    comparison finds; the caller discards the staging then.
    """
    facts = facts_of(component)
    operation.expect(component.name, component.raw_size_bytes)
    with maintenance_session(target.url) as connection:
        name = side_name(target.database, "r", restore_id)
        if database_oid(connection, name) is None:  # preflight's was thrown away with a failed try
            create_staging(connection, facts, target, restore_id)
        oid = database_oid(connection, name)
        server = connection.execute(text("SELECT pg_catalog.current_setting('server_version_num')::int")).scalar_one()
    if oid is None:
        raise FinalError(f"the staging database {name} vanished while it was made")
    client = restoring_client(facts, server, client_directories)
    staging_url = target.url.set(database=name)
    staging, crew = Database(component.name, staging_url), crew or Crew(1)
    with (
        Loading(component, staging, client, server, store, operation, soon_bytes).loaded(crew) as run_code,
        session(staging_url) as inside,
        cancelled_with(inside, operation),
    ):
        _prove(inside, facts, component)
        notes = [f"materialized view {one}" for one in run_code()]
        notes += dress(inside, name, facts)
        operation.check()  # cancelled meanwhile, it is no setting that was refused
        disabled = subscriptions_of(inside, name)
        notes += changed_collations(inside, facts, server)
        without_login = roles_without_login(inside, facts)
    notes += [f"subscription {one} is disabled: enable it where it is to be used here" for one in disabled]
    notes += [
        f"role {one} was missing and was made without a login and password: ALTER ROLE {quoted(one)} LOGIN PASSWORD '...'"
        for one in without_login
    ]
    return StagedDatabase(name, oid, tuple(notes))


def restoring_client(facts: DatabaseFacts, server: int, directories: Sequence[Path]) -> Path:
    """The `pg_restore` to use: as new as the `pg_dump` that wrote the dump, and as the destination's server."""
    client = find_client("pg_restore", server, directories)
    wrote = int("".join(digit for digit in facts.dump_version.split(".")[0] if digit.isdigit()) or 0)
    if client_version(client) // 10_000 < wrote:
        client = find_client("pg_restore", wrote * 10_000, directories)
    return client


def _prove(inside: Connection, facts: DatabaseFacts, component: Component) -> None:
    """Compare row counts and sequences with what the manifest promises: an exit code of 0 alone proves nothing."""
    wrong = []
    loaded = rows_of(component.streams)
    promised: Counter[object] = Counter()
    found: Counter[object] = Counter()
    names: dict[object, str] = {}
    rerouted = rerouted_partition_names(inside)
    # Of a table that was loaded by COPY the server has told how many rows it took, stream by stream.
    uncounted = [table for table in facts.tables if (table.schema_name, table.name) not in loaded]
    for batch in (uncounted[start : start + _COUNTED_AT_ONCE] for start in range(0, len(uncounted), _COUNTED_AT_ONCE)):
        counted = " UNION ALL ".join(
            f"SELECT {number}, count(*) FROM ONLY {quoted(table.schema_name)}.{quoted(table.name)}"  # noqa: S608 - quoted
            for number, table in enumerate(batch)
        )
        for number, rows in run_sql(inside, counted).tuples():
            loaded[batch[number].schema_name, batch[number].name] = rows
    for table in facts.tables:
        # Of some partitions only the sum comes back, as the same row may belong into another one here.
        place = rerouted.get((table.schema_name, table.name), f"{table.schema_name}.{table.name}")
        promised[place] += table.rows
        found[place] += loaded[table.schema_name, table.name]
        names[place] = f"{table.schema_name}.{table.name}"
    wrong += [
        f"{names[place]} has {found[place]} rows instead of {rows}"
        for place, rows in promised.items()
        if found[place] != rows
    ]
    for sequence in facts.sequences:
        name = f"{quoted(sequence.schema_name)}.{quoted(sequence.name)}"
        state = run_sql(inside, f"SELECT last_value, is_called FROM {name}").one()  # noqa: S608 - quoted identifiers
        if (state.last_value, state.is_called) != (sequence.last_value, sequence.is_called):
            wrong.append(
                f"sequence {sequence.schema_name}.{sequence.name} stands at {state.last_value}, not {sequence.last_value}"
            )
    large_objects = inside.execute(text("SELECT count(*) FROM pg_catalog.pg_largeobject_metadata")).scalar_one()
    if large_objects != facts.large_objects:
        wrong.append(f"there are {large_objects} large objects instead of {facts.large_objects}")
    if wrong:
        raise DamagedError(
            f"the staged database is not what the manifest promises: {'; '.join(wrong[:5])}",
            next_step="the live database is untouched; restore another set",
            component=component.name,
            step="comparing",
        )


def dress(inside: Connection, name: str, facts: DatabaseFacts) -> list[str]:
    """Give the staging database what hangs on a database's OID and stands in no dump ("PostgreSQL", section 3).

    When it returns, all of the database is on the server's disk. Returns in words which settings and labels could not be set: one
    that this role may not set, or that this server does not know any more, is no reason to throw away all that was loaded.
    """
    refused: list[str] = []
    own = quoted(name)
    # Whatever was loaded without waiting for the disk stands in the log before these commits, which wait for it, also where
    # the server or the role is set to wait for none.
    run_sql(
        inside,
        "SELECT pg_catalog.set_config('synchronous_commit', 'on', false)"
        " WHERE pg_catalog.current_setting('synchronous_commit') OPERATOR(pg_catalog.=) 'off'",
    )
    if facts.comment is not None:
        run_sql(inside, f"COMMENT ON DATABASE {own} IS {_literal(facts.comment)}")
    for label in facts.labels:
        with _noted(refused, f"the security label of {label.provider}"):
            run_sql(inside, f"SECURITY LABEL FOR {quoted(label.provider)} ON DATABASE {own} IS {_literal(label.label)}")
    if facts.acl is not None:
        _grant(inside, own, facts.owner, facts.acl)
    run_sql(inside, f"ALTER DATABASE {own} CONNECTION LIMIT {facts.connection_limit:d}")
    if facts.is_template:
        run_sql(inside, f"ALTER DATABASE {own} IS_TEMPLATE true")
    for setting in sorted(facts.settings, key=lambda one: one.name in _LAST_SETTINGS):
        with _noted(refused, f"the setting {setting.name}" + (f" of role {setting.role}" if setting.role else "")):
            _apply_setting(inside, own, setting)
    return refused


@contextlib.contextmanager
def _noted(refused: list[str], what: str) -> Iterator[None]:
    """Note what the server refuses; a lost connection is no refusal."""
    try:
        yield
    except sqlalchemy.exc.DBAPIError as error:
        if error.connection_invalidated or translated(error).passing:
            raise
        refused.append(f"{what} could not be set here: {translated(error).cause}")


def _grant(inside: Connection, own: str, owner: str, acl: Sequence[str]) -> None:
    # The owner's own rights can be revoked too, and an ACL can be empty: nobody but superusers may then connect.
    run_sql(inside, f"REVOKE ALL ON DATABASE {own} FROM PUBLIC, {quoted(owner)}")
    if not acl:
        return
    # In the order of the ACL: who passes a right on stands behind the entry that gave it to him.
    rows = inside.execute(
        text(
            "SELECT a.privilege_type, a.is_grantable, r.rolname AS grantee, g.rolname AS grantor FROM"
            " pg_catalog.aclexplode(CAST(:acl AS pg_catalog.aclitem[])) WITH ORDINALITY a"
            " LEFT JOIN pg_catalog.pg_roles r ON r.oid OPERATOR(pg_catalog.=) a.grantee"
            " LEFT JOIN pg_catalog.pg_roles g ON g.oid OPERATOR(pg_catalog.=) a.grantor ORDER BY a.ordinality"
        ),
        {"acl": list(acl)},
    ).all()
    for row in rows:
        grantee = "PUBLIC" if row.grantee is None else quoted(row.grantee)
        option = " WITH GRANT OPTION" if row.is_grantable else ""
        with _acting_as(inside, None if row.grantor in (None, owner) else row.grantor):
            run_sql(inside, f"GRANT {row.privilege_type} ON DATABASE {own} TO {grantee}{option}")


@contextlib.contextmanager
def _acting_as(inside: Connection, role: str | None) -> Iterator[None]:
    """Be ``role`` for the block, so that it is the grantor; whoever may not be it grants the same right himself."""
    if role is not None:
        with contextlib.suppress(sqlalchemy.exc.DBAPIError):
            run_sql(inside, f"SET ROLE {quoted(role)}")
    try:
        yield
    finally:
        if role is not None:
            run_sql(inside, "RESET ROLE")


def _apply_setting(inside: Connection, own: str, setting: Setting) -> None:
    whom = f"DATABASE {own}" if setting.role is None else f"ROLE {quoted(setting.role)} IN DATABASE {own}"
    parameter = ".".join(quoted(step) for step in setting.name.split("."))
    values = [setting.value]
    if setting.name.lower() in _LIST_SETTINGS:
        # Stored as a list of identifiers, which one constant would make into one identifier.
        values = [quoted_one.replace('""', '"') or plain for quoted_one, plain in _LIST_ITEM.findall(setting.value)]
    run_sql(inside, f"ALTER {whom} SET {parameter} TO {', '.join(_literal(value) for value in values or [''])}")


def await_server(target: Database, operation: Operation) -> None:
    """Wait until the server lets us in, as after a restart or a failover; raises its error once `SERVER_SECONDS` have passed."""
    deadline = time.monotonic() + SERVER_SECONDS
    while True:
        try:
            with maintenance_session(target.url):
                return
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
        operation.pause(_SERVER_LOOK_SECONDS)


def discard_staging(target: Database, restore_id: str | None = None) -> list[str]:
    """Drop the side databases of this restore, or, with None, of every restore: the slot's holder knows they are dead.

    Returns the names. What was live before a switch is among them: its replacement is complete.
    """
    dropped = []
    with maintenance_session(target.url) as connection:
        for name, oid in side_databases(connection, target.database, restore_id).items():
            subscriptions = subscriptions_of(connection, name)
            if subscriptions:
                forget_subscriptions(target.url.set(database=name), subscriptions)
            drop_database(connection, name, oid)
            dropped.append(name)
    return dropped


def _literal(value: str) -> str:
    """A string constant for statements that take no parameters (manual, 4.1.2.1 and 4.1.2.2)."""
    escaped = value.replace("\\", "\\\\").replace("'", "''")
    return f"E'{escaped}'"
