"""`athena-backup check`: says what is wrong before it hurts.

Each look is on its own, so one fault hides no other; what it prints is for the person who has to mend it.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sqlalchemy import text

from athena_backup.errors import AthenaError, FinalError
from athena_backup.mounts import Mount, mounts, origin
from athena_backup.postgres.clients import client_version, find_client
from athena_backup.postgres.sessions import (
    Database,
    NoDatabaseError,
    identity,
    refuse_older,
    refuse_pooler,
    refuse_several_servers,
    session,
)
from athena_backup.schedule import in_words, upcoming
from athena_backup.settings import Settings
from athena_backup.store.local import NoStoreYetError
from athena_backup.volume_walk import LOST_AND_FOUND
from blocks.stores import local_directory, open_block
from deployments.looks import Finding, Note, look
from deployments.store_checkup import store_findings

UPCOMING_RUNS = 5
_FIELDS_WITHOUT_WEEKDAY = 5


def findings(settings: Settings, now: datetime | None = None) -> Iterator[Finding]:
    """Look at everything a backup needs; nothing is changed but a probe object in the store, which goes again."""
    try:
        databases = [Database(name, url) for name, url in settings.database_urls.items()]
    except AthenaError as error:
        databases = []
        yield Finding("ATHENA_DATABASES", "FAIL", str(error))
    if not settings.athena_databases and not settings.athena_volumes:
        yield Finding("components", "FAIL", "no database and no volume is configured: ATHENA_DATABASES, ATHENA_VOLUMES")
    for database in databases:
        yield look(f"database {database.name}", lambda: check_database(database, settings.athena_pg_bin))  # noqa: B023
    yield from _volume_findings(settings)
    yield from store_findings(settings)
    for name in settings.athena_copy_to:
        yield look(f"copies to {name}", lambda: check_further_store(name, settings))  # noqa: B023
    yield from _schedule_findings(settings, now or datetime.now(UTC))


def check_further_store(name: str, settings: Settings) -> str | Note:
    """That the block of a further store is there, and its store can be listed; what may be written shows at the first copy."""
    try:
        store = open_block(name, settings)
    except NoStoreYetError as error:
        return Note(f"{error.cause}: the first copy makes it one (if there should be sets, mount it)")
    next(store.folders(f"{settings.athena_namespace}/"), None)
    return f"{store.location.type} {store.location.place}, readable"


def check_database(database: Database, client_directories: list[Path]) -> str:
    """That the database is reachable, on one server and not through a pooler, every table readable, and pg_dump new enough.

    Raises `FinalError` and `UnavailableError` for whatever keeps a backup from reading it.
    """
    try:
        return _check_there(database, client_directories)
    except NoDatabaseError as error:
        # In a new cluster, before a restore, it is as it has to be.
        raise FinalError(
            error.cause, next_step="to back it up, correct its URL in ATHENA_DATABASES; a restore creates it"
        ) from None


def _check_there(database: Database, client_directories: list[Path]) -> str:
    with session(database.url) as connection:
        refuse_pooler(connection)
        server = identity(connection)
        refuse_older(server.version)
        with session(database.url) as other:
            refuse_several_servers(server, identity(other))
        unreadable = [
            str(name)
            for name in connection.execute(
                text(
                    "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c"
                    " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
                    " WHERE c.relkind IN ('r', 'p', 'S') AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'"
                    " AND NOT CASE c.relkind WHEN 'S' THEN pg_catalog.has_sequence_privilege(c.oid, 'SELECT')"
                    " ELSE pg_catalog.has_table_privilege(c.oid, 'SELECT') END LIMIT 6"
                )
            ).scalars()
        ]
        hidden = [
            str(name)
            for name in connection.execute(
                text(
                    "SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) FROM pg_catalog.pg_class c"
                    " JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace"
                    " JOIN pg_catalog.pg_roles r ON r.rolname OPERATOR(pg_catalog.=) current_user"
                    " WHERE c.relrowsecurity AND NOT r.rolsuper AND NOT r.rolbypassrls AND"
                    " (c.relforcerowsecurity OR NOT pg_catalog.pg_has_role(c.relowner, 'USAGE')) LIMIT 6"
                )
            ).scalars()
        ]
    if unreadable:
        raise FinalError(
            f"may not be read: {', '.join(unreadable)}", next_step="GRANT SELECT on them to the backup's role"
        )
    if hidden:
        raise FinalError(
            f"row-level security hides rows of {', '.join(hidden)} from the backup's role",
            next_step="ALTER ROLE ... BYPASSRLS, or back up as a role that sees all rows",
        )
    dump = find_client("pg_dump", server.version, client_directories)
    find_client("pg_restore", server.version, client_directories)
    version = f"{server.version // 10_000}.{server.version % 10_000}"
    return f"PostgreSQL {version}, readable; {dump} is version {client_version(dump) // 10_000}"


def _volume_findings(settings: Settings) -> Iterator[Finding]:
    for name, directory in settings.athena_volumes.items():
        may_be_empty = name in settings.athena_empty_volumes
        yield look(f"volume {name}", partial(check_volume, directory, may_be_empty=may_be_empty))
    store_directory = None
    with contextlib.suppress(AthenaError):  # the look at the store tells of it
        store_directory = local_directory(settings)
    yield from (Finding("volumes", "FAIL", overlap) for overlap in overlaps(settings, store_directory))


def check_volume(directory: Path, *, may_be_empty: bool) -> str:
    """That the volume is a directory that is there, and whose entries are there too and can be read."""
    if not directory.is_dir():
        raise FinalError(f"{directory} is not a directory", next_step="mount it, or correct ATHENA_VOLUMES")
    if not os.access(directory, os.R_OK | os.X_OK):
        raise FinalError(f"{directory} may not be read by this user", next_step="run the service as a user that may")
    with os.scandir(directory) as found:
        entries = list(found)
    # A disk that was just formatted has a folder, and is as empty as a mount that is missing.
    is_empty = all(os.fsencode(one.name) == LOST_AND_FOUND and one.is_dir(follow_symlinks=False) for one in entries)
    if is_empty and not may_be_empty:
        raise FinalError(
            f"{directory} is empty",
            next_step="is it mounted? a restore fills it; name the volume in ATHENA_EMPTY_VOLUMES only if it is meant to be empty",
        )
    unreadable = next((one.name for one in entries if not os.access(one.path, os.R_OK, follow_symlinks=False)), None)
    if unreadable is not None:
        raise FinalError(
            f"{directory}/{unreadable} may not be read by this user", next_step="run the service as one that may"
        )
    if directory.is_mount():
        return f"{directory}, a mount point, readable"
    return f"{directory}, readable"


def refuse_overlaps(settings: Settings, store_directory: str | None) -> None:
    """Raise `FinalError` for volumes that can't be backed up and restored each by itself."""
    found = overlaps(settings, store_directory)
    if found:
        raise FinalError("; ".join(found), next_step="correct ATHENA_VOLUMES", step="starting")


def overlaps(settings: Settings, store_directory: str | None) -> list[str]:
    """Volumes that lie in one another, or that hold the local store, our own state or a PostgreSQL server's ("volumes", 5)."""
    places = {f"volume {name}": Path(os.path.realpath(path)) for name, path in settings.athena_volumes.items()}
    forbidden = {"ATHENA_HOME": Path(os.path.realpath(settings.athena_home))}
    forbidden["PREFECT_HOME"] = Path(os.path.realpath(settings.prefect_home))
    if store_directory is not None:
        forbidden["the store"] = Path(os.path.realpath(store_directory))
    seen: list[Mount] = []
    with contextlib.suppress(OSError):
        seen = mounts()
    among = [
        f"{name} and {other} lie in one another: each byte has to belong to one component"
        for name, other in itertools.combinations(places, 2)
        if _overlap(places[name], places[other], seen)
    ]
    with_ours = [
        f"{name} and {what} lie in one another: a backup must not back itself up, nor a restore replace it"
        for name, what in itertools.product(places, forbidden)
        if _overlap(places[name], forbidden[what], seen)
    ]
    with_servers = [
        f"{name} holds the data directory of a PostgreSQL server: copied as files, it could not be started again"
        for name, place in places.items()
        if _holds_data_directory(place)
    ]
    return among + with_ours + with_servers


def _holds_data_directory(place: Path) -> bool:
    """Whether the place, one above it or one directly in it is a data directory (PostgreSQL manual, 73.1)."""
    with contextlib.suppress(OSError):
        if any((folder / "PG_VERSION").is_file() for folder in (place, *place.parents)):
            return True
        with os.scandir(place) as found:
            return any(one.is_dir() and os.path.isfile(f"{one.path}/PG_VERSION") for one in found)
    return False


def _overlap(one: Path, other: Path, seen: list[Mount]) -> bool:
    """By their paths, and by what lies there: a bind mount, or a disk's ``subPath``, is the same files by another path."""
    if one.is_relative_to(other) or other.is_relative_to(one):
        return True
    return _holds_by_another_path(one, other, seen) or _holds_by_another_path(other, one, seen)


def _holds_by_another_path(one: Path, other: Path, seen: list[Mount]) -> bool:
    origins = origin(one, seen), origin(other, seen)
    if origins[0] is None or origins[1] is None or origins[0][0] != origins[1][0]:
        return False
    if not origins[1][1].is_relative_to(origins[0][1]):
        return False
    inside = one / origins[1][1].relative_to(origins[0][1])
    try:
        # No file system's list of mounts is believed alone.
        return inside.samefile(other)
    except FileNotFoundError:
        return not inside.exists() and not other.exists()  # it is yet to be made, and would be inside
    except OSError:
        return True


def _schedule_findings(settings: Settings, now: datetime) -> Iterator[Finding]:
    schedule = settings.schedule
    if not settings.enable_regular_backups:
        yield Finding("schedule", "ok", f"off (ENABLE_REGULAR_BACKUPS=false); it would be: {in_words(schedule)}")
    else:
        yield Finding("schedule", "ok", in_words(schedule))
    if len(settings.backup_frequency.split()) == _FIELDS_WITHOUT_WEEKDAY:
        yield Finding(
            "schedule",
            "note",
            "the five fields of BACKUP_FREQUENCY are read with the seconds first, and without the day of week: elsewhere the"
            " minutes are the first of five; for midnight write `0 0 0 * * *`",
        )
    for instant in upcoming(schedule, now, UPCOMING_RUNS):
        yield Finding("next run", "ok", f"{instant:%a %Y-%m-%d %H:%M:%S} UTC")
    yield Finding(
        "retention",
        "ok",
        "this version deletes no set by itself: BACKUP_RETENTION_COUNT and BACKUP_RETENTION_PERIOD are read, not applied",
    )
