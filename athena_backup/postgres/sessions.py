"""Connections to PostgreSQL: how a URL becomes a session that reads everything, and a child's environment.

Every session of ours is opened here, through SQLAlchemy over psycopg, with the settings without which a read may silently
be incomplete or different ("PostgreSQL", section 2). Passwords go into environments, never into command lines.
"""

import contextlib
import os
import re
import socket
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
import sqlalchemy
from sqlalchemy import URL, Connection, CursorResult, text
from sqlalchemy.pool import NullPool

from athena_backup.errors import AthenaError, DeniedError, FinalError, FullError, PassingError, UnavailableError
from athena_backup.operation import Operation
from athena_backup.postgres.session_settings import CHILD_SETTINGS, READING_SETTINGS, apply_settings, client_encoding

CONNECT_SECONDS = 10
_OLDEST_VERSION = 130_000
APPLICATION_NAME = "athena-backup"

# What a URL may carry besides host, port, user, password and database, with the variable by which a child is told the same
# (libpq, 34.15). A parameter without one would hold for our sessions and not for pg_dump's: such are refused.
_LIBPQ_VARIABLES = {
    "channel_binding": "PGCHANNELBINDING",
    "gssdelegation": "PGGSSDELEGATION",
    "gssencmode": "PGGSSENCMODE",
    "gsslib": "PGGSSLIB",
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "krbsrvname": "PGKRBSRVNAME",
    "load_balance_hosts": "PGLOADBALANCEHOSTS",
    "options": "PGOPTIONS",
    "passfile": "PGPASSFILE",
    "port": "PGPORT",
    "require_auth": "PGREQUIREAUTH",
    "requirepeer": "PGREQUIREPEER",
    "service": "PGSERVICE",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "sslcert": "PGSSLCERT",
    "sslcertmode": "PGSSLCERTMODE",
    "sslcrl": "PGSSLCRL",
    "sslcrldir": "PGSSLCRLDIR",
    "sslkey": "PGSSLKEY",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslrootcert": "PGSSLROOTCERT",
    "sslsni": "PGSSLSNI",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
# What libpq, or a library that it uses, looks up by itself beside them. Not a service: its host would go before the URL's,
# which a child has from its environment too.
_INHERITED = frozenset(
    {
        *(variable for variable in _LIBPQ_VARIABLES.values() if variable != "PGSERVICE"),
        *("HOME", "PGPASSWORD", "PGSERVICEFILE", "PGUSER"),
        *("KRB5CCNAME", "KRB5_CLIENT_KTNAME", "KRB5_CONFIG", "KRB5_KTNAME"),
        *("OPENSSL_CONF", "SSL_CERT_DIR", "SSL_CERT_FILE"),
    }
)
# What `session` and `libpq_environment` set themselves, whatever a URL says.
_OURS = frozenset(
    {
        "application_name",
        "client_encoding",
        "connect_timeout",
        "fallback_application_name",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "tcp_user_timeout",
    }
)

# How libpq and psycopg say why a connection was not made at all; they give no SQLSTATE.
_UNREACHED = re.compile(
    r"Connection refused|timeout expired|No route to host|Network is unreachable|failed to resolve host"
    r"|could not translate host name|on socket .*No such file or directory"
)
# Without one either; a database's name may hold any words, and stands behind the word.
_UNKNOWN_ROLE = re.compile(r'FATAL: +role ".*" (?:does not exist|is not permitted to log in)$')

_SERVERS_SIDE = text(
    "SELECT pg_catalog.host(pg_catalog.inet_server_addr()) AS server, pg_catalog.host(pg_catalog.inet_client_addr()) AS client,"
    " pg_catalog.inet_client_port() AS client_port"
)


class NoDatabaseError(FinalError):
    """The server has no database of the URL's name."""


@dataclass(frozen=True)
class Database:
    """A database that is a component: the component's name, and how to reach it (its own name is in the URL)."""

    name: str
    url: URL

    @property
    def database(self) -> str:
        """The database's own name on its server."""
        return self.url.database or ""


@dataclass(frozen=True)
class ServerIdentity:
    """Which server a session is on; two sessions are on one server if these agree ("PostgreSQL", section 1)."""

    system_identifier: str | None
    timeline: int | None
    address: str
    port: int
    started: datetime
    version: int
    in_recovery: bool

    def same_server(self, other: "ServerIdentity") -> bool:
        """Whether both are one server; by address and start time where a role may not read the control file."""
        if self.in_recovery != other.in_recovery:
            return False  # a standby has its primary's identifier and timeline, and its own instant
        if self.system_identifier is not None and other.system_identifier is not None:
            return (self.system_identifier, self.timeline) == (other.system_identifier, other.timeline)
        return (self.address, self.port, self.started) == (other.address, other.port, other.started)


def parse_database_url(name: str, url_text: str) -> URL:
    """A PostgreSQL URL from outside; raises `FinalError` that names the component and never shows the URL's password."""
    try:
        url = sqlalchemy.make_url(url_text)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise FinalError(
            f"the URL of database {name} can't be read",
            next_step="write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, with special characters percent-encoded",
        ) from None
    if url.get_backend_name() not in ("postgresql", "postgres") or not url.database:
        raise FinalError(
            f"the URL of database {name} is not of the form postgresql://USER:PASSWORD@HOST:PORT/DATABASE",
            next_step="only PostgreSQL databases can be components, each with its own name at the URL's end",
        )
    query = {key: value for key, value in url.query.items() if key not in _OURS}
    # libpq takes these two here as well; in the query a password would be shown wherever the URL is.
    user, password = query.pop("user", url.username), query.pop("password", url.password)
    unknown = sorted(query.keys() - _LIBPQ_VARIABLES.keys())
    if unknown or not isinstance(user, str | None) or not isinstance(password, str | None):
        raise FinalError(
            f"the URL of database {name} has parameters that can't be used: {', '.join(unknown) or 'user, password'}",
            next_step="leave them out; libpq's own, such as sslmode and sslrootcert, may be given",
        )
    # SQLAlchemy decodes user and password, but not the database, which libpq decodes too.
    database = urllib.parse.unquote(url.database)
    return URL.create("postgresql", user, password, url.host, url.port, database, query)


def libpq_environment(url: URL) -> dict[str, str]:
    """What a child (`pg_dump`, `psql`) needs in its environment to connect where ``url`` points."""
    given = {
        "PGHOST": url.host,
        "PGPORT": str(url.port) if url.port else None,
        "PGUSER": url.username,
        "PGPASSWORD": str(url.password) if url.password is not None else None,
        "PGDATABASE": url.database,
        "PGAPPNAME": APPLICATION_NAME,
        "PGCONNECT_TIMEOUT": str(CONNECT_SECONDS),
    }
    # What libpq takes from the environment for our own sessions, a password or TLS above all, holds for the child too.
    # Only these are looked up: while a store renews its client, other variables come and go (`bare_environment`).
    environment = {name: os.environ[name] for name in os.environ if name.startswith("PGSSL") or name in _INHERITED}
    environment |= {name: value for name, value in given.items() if value is not None}
    for name, value in url.query.items():
        variable = _LIBPQ_VARIABLES.get(name)
        if variable:
            environment[variable] = value if isinstance(value, str) else ",".join(value)
    environment["PGOPTIONS"] = " ".join(
        [environment.get("PGOPTIONS", ""), *(f"-c {name}={value}" for name, value in CHILD_SETTINGS.items())]
    ).strip()
    return environment


@contextlib.contextmanager
def session(url: URL, settings: Mapping[str, str] | None = None) -> Iterator[Connection]:
    """A session of its own (no pool), in autocommit, with the settings above and then ``settings``.

    For a transaction: ``connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)`` before
    the first statement. Errors of the driver leave the block as this project's own (`translated`).
    """
    engine = sqlalchemy.create_engine(
        url.set(drivername="postgresql+psycopg"),
        poolclass=NullPool,
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            "application_name": APPLICATION_NAME,
            # At once: SQLAlchemy's own first questions would find whatever functions a database's search_path leads to.
            "options": f"{url.query.get('options') or os.environ.get('PGOPTIONS', '')} -c search_path=",
            "client_encoding": "UTF8",  # until the server's own is known; of SQL_ASCII the driver would make bytes
            "keepalives": 1,
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 60_000,  # keepalives don't run while something sent is unanswered (tcp(7))
        },
        isolation_level="AUTOCOMMIT",
    )
    try:
        with engine.connect() as connection:
            apply_settings(
                connection, {**READING_SETTINGS, "client_encoding": _client_encoding(connection), **(settings or {})}
            )
            yield connection
    except sqlalchemy.exc.DBAPIError as error:
        raise translated(error) from error
    except psycopg.Error as error:  # of a COPY, which goes past SQLAlchemy
        raise translated_state(error.sqlstate or "", str(error)) from error
    finally:
        engine.dispose()


def _client_encoding(connection: Connection) -> str:
    encoding: str = connection.execute(text("SELECT pg_catalog.current_setting('server_encoding')")).scalar_one()
    return client_encoding(encoding)


def driver_of(connection: Connection) -> "psycopg.Connection[Any]":
    """The driver's own connection, for what SQLAlchemy has no words for."""
    driver = connection.connection.driver_connection
    if not isinstance(driver, psycopg.Connection):
        raise TypeError("every session of ours is psycopg's")
    return driver


def is_on_this_machine(connection: Connection) -> bool:
    """Whether the server shares this machine's cores with us; raises SQLAlchemy's errors.

    It does if both ends of the connection say the same: behind a relay (`ssh -L`, `kubectl port-forward`, a pooler) the server sees
    another port than ours. Where a socket in a file leads is not known; its server is nearly always here.
    """
    found = connection.execute(_SERVERS_SIDE).one()
    try:
        with socket.socket(fileno=os.dup(driver_of(connection).fileno())) as own:
            if own.family == socket.AF_UNIX:
                return found.server is None
            return bool(found.server == found.client and found.client_port == own.getsockname()[1])
    except (OSError, psycopg.Error):  # of a connection that is closed by now, or no descriptor is free
        return False


def codec(connection: Connection) -> str:
    """The name of Python's codec for the bytes that ``connection`` sends and takes."""
    return driver_of(connection).info.encoding


@contextlib.contextmanager
def cancelled_with(connection: Connection, operation: Operation) -> Iterator[None]:
    """While the block lasts, cancelling the operation cancels what ``connection`` is executing, in the server."""
    driver = driver_of(connection)

    def cancel() -> None:
        with contextlib.suppress(psycopg.Error):
            driver.cancel_safe(timeout=5)

    forget = operation.when_cancelled(cancel)
    try:
        yield
    finally:
        forget()


def identity(connection: Connection) -> ServerIdentity:
    """Which server ``connection`` is on."""
    row = connection.execute(
        text(
            "SELECT coalesce(pg_catalog.host(pg_catalog.inet_server_addr()), 'local') AS address,"
            " coalesce(pg_catalog.inet_server_port(), pg_catalog.current_setting('port')::int) AS port,"
            " pg_catalog.pg_postmaster_start_time() AS started,"
            " pg_catalog.current_setting('server_version_num')::int AS version,"
            " pg_catalog.pg_is_in_recovery() AS in_recovery,"
            " pg_catalog.has_function_privilege('pg_catalog.pg_control_system()', 'EXECUTE')"
            " AND pg_catalog.has_function_privilege('pg_catalog.pg_control_checkpoint()', 'EXECUTE') AS may_read"
        )
    ).one()
    system_identifier, timeline = None, None
    if row.may_read:
        control = connection.execute(
            text(
                "SELECT s.system_identifier::text AS system_identifier, c.timeline_id AS timeline"
                " FROM pg_catalog.pg_control_system() s, pg_catalog.pg_control_checkpoint() c"
            )
        ).one()
        system_identifier, timeline = control.system_identifier, control.timeline
    return ServerIdentity(system_identifier, timeline, row.address, row.port, row.started, row.version, row.in_recovery)


def refuse_several_servers(one: ServerIdentity, other: ServerIdentity) -> None:
    """Raise `FinalError` where the second login by a URL is on another server than the first: what one locks, the other does not see.

    By when each was started: a standby has its primary's identifier, and one server may be reached at several addresses.
    """
    if (one.started, one.in_recovery) != (other.started, other.in_recovery):
        raise FinalError(
            f"of two logins the first reached the server at {one.address}:{one.port}, the second that at {other.address}:{other.port}",
            next_step="the address leads to several servers: name one of them in ATHENA_DATABASES",
        )


def refuse_older(version: int) -> None:
    """Raise `FinalError` for a server that lacks what a backup or a restore says to it (pg_current_snapshot, DROP … FORCE)."""
    if version < _OLDEST_VERSION:
        raise FinalError(
            f"the server is PostgreSQL {version // 10_000}, {_OLDEST_VERSION // 10_000} is the oldest that is supported",
            next_step="upgrade it",
        )


def connection_string(database: str) -> str:
    """A libpq connection string that names just the database, whatever characters its name has (libpq, 34.1.1.1)."""
    escaped = database.replace("\\", "\\\\").replace("'", "\\'")
    return f"dbname='{escaped}'"


def child_connection(database: str) -> str:
    """The same for a child, with what a URL may not carry: a connection that is cut without a word is noticed, as ours is."""
    return f"{connection_string(database)} keepalives=1 keepalives_idle=30 keepalives_interval=10 keepalives_count=3"


def quoted(identifier: str) -> str:
    """An identifier for use in SQL text (manual, 4.1.1)."""
    return '"' + identifier.replace('"', '""') + '"'


def ascii_quoted(identifier: str) -> str:
    """An identifier as ASCII text, with escapes that the server turns into its own encoding (manual, 4.1.2.3)."""
    if identifier.isascii():
        return quoted(identifier)
    escaped = "".join(
        character if character.isascii() and character != "\\" else f"\\+{ord(character):06X}"
        for character in identifier
    )
    return "U&" + quoted(escaped)


def run_sql(connection: Connection, sql: str) -> CursorResult[Any]:
    """Run SQL text in which identifiers and constants stand literally, because the statement takes no parameters.

    SQLAlchemy's ``text`` would take a colon in a quoted name for a parameter, the driver a percent sign.
    """
    return connection.exec_driver_sql(sql, execution_options={"no_parameters": True})


def translated(error: sqlalchemy.exc.DBAPIError) -> AthenaError:
    """A driver's error as one of ours, by its SQLSTATE class (manual, appendix A), without URL or password."""
    origin = error.orig
    return translated_state(getattr(origin, "sqlstate", None) or "", str(origin) or type(origin).__name__)


def pooler_refused() -> FinalError:
    """The error for a server that is reached through a connection pooler: from one statement to the next it may be another session."""
    return FinalError(
        "the database is reached through a connection pooler, which can't hold a snapshot, nor settings",
        next_step="give the address of the PostgreSQL server itself in ATHENA_DATABASES",
    )


def refuse_pooler(connection: Connection) -> None:
    """Raise `FinalError` where ``connection`` goes through a connection pooler; SQLAlchemy's errors where it breaks."""
    # The pid that the server named at connection is the backend's own; a pooler makes one up.
    pid = connection.execute(text("SELECT pg_catalog.pg_backend_pid()")).scalar_one()
    if driver_of(connection).info.backend_pid != pid:
        raise pooler_refused()


def translated_state(state: str, message: str) -> AthenaError:
    """An SQLSTATE and its message as one of ours; an empty one: the connection was not made, or broke."""
    if state.startswith(("22", "23")):
        # What follows are the row's contents, which belong into no log.
        message = message.partition("\n")[0]
    # Where a function or a COPY failed: with the row that it had.
    message = " ".join(message.partition("\nCONTEXT:")[0].split())
    # libpq gives no SQLSTATE for a connection that was refused; its sentence is all there is. Of the settings that every session
    # of ours begins with, PgBouncer says this one.
    if "unsupported startup parameter" in message:
        return pooler_refused()
    is_refused = "password authentication failed" in message or "no password supplied" in message
    if state.startswith("28") or is_refused or (not state and _UNKNOWN_ROLE.search(message)):
        return DeniedError(
            f"PostgreSQL refuses the login: {message}", next_step="correct user or password in ATHENA_DATABASES"
        )
    if state == "3D000" or (not state and message.endswith("does not exist")):
        return NoDatabaseError(
            f"PostgreSQL: {message}", next_step="create the database or correct its URL in ATHENA_DATABASES"
        )
    if state == "42501":
        return DeniedError(
            f"PostgreSQL: {message}", next_step="grant the backup's role the missing right, or use the owner"
        )
    if state.startswith("53") and state != "53300":
        return FullError(f"PostgreSQL: {message}", next_step="give the server more room, then try again")
    if state in ("55P03", "55006") or state.startswith("40"):
        return PassingError(f"PostgreSQL: {message}")
    if state.startswith(("08", "57P")) or state == "53300" or not state:
        is_unreached = not state and _UNREACHED.search(message) is not None
        next_step = "start the server, or correct host and port in ATHENA_DATABASES" if is_unreached else ""
        return UnavailableError(f"PostgreSQL: {message}", next_step=next_step)
    return FinalError(f"PostgreSQL: {message}")
