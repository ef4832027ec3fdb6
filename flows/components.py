"""The configured components as the engine's values, and what the flows tell of the components of a set."""

from collections.abc import Sequence

from athena_backup.errors import FinalError
from athena_backup.manifest import Component
from athena_backup.postgres.preflight import bound_extensions
from athena_backup.postgres.sessions import Database
from athena_backup.settings import Settings
from athena_backup.volume_archive import Volume


def databases_of(settings: Settings) -> list[Database]:
    """The configured databases, in their order; raises `FinalError` for a URL that can't be one."""
    return [Database(name, url) for name, url in settings.database_urls.items()]


def volumes_of(settings: Settings) -> list[Volume]:
    """The configured volumes, in their order."""
    return [Volume(name, directory) for name, directory in settings.athena_volumes.items()]


def database_of(name: str, settings: Settings) -> Database:
    """The database of that component; raises `FinalError` where none is configured."""
    for one in databases_of(settings):
        if one.name == name:
            return one
    raise FinalError(f"no database {name} is configured here", next_step="add it to ATHENA_DATABASES")


def volume_of(name: str, settings: Settings) -> Volume:
    """The volume of that component; raises `FinalError` where none is configured."""
    for one in volumes_of(settings):
        if one.name == name:
            return one
    raise FinalError(f"no volume {name} is configured here", next_step="add it to ATHENA_VOLUMES")


def omissions(components: Sequence[Component]) -> list[str]:
    """What is known not to be in a set although its backup succeeded, or not to come back by itself, in words: it is to be done by
    hand.
    """
    told = []
    for component in components:
        if component.database is not None:
            told += [f"{component.name}: not in the set: {omitted}" for omitted in component.database.omitted]
            if bound := bound_extensions(component.database):
                told.append(
                    f"{component.name}: restored by hand only, by the set's RESTORE.md, as it has {', '.join(bound)}"
                )
        elif component.volume is not None:
            left_out = {
                "changed while it was read": component.volume.torn,
                "gone when it was to be read": component.volume.vanished,
                "another file system, not entered": component.volume.other_file_systems,
                "borrows objects from outside the volume": component.volume.alternates,
            }
            told += [f"{component.name}: {what}: {_some(names)}" for what, names in left_out.items() if names]
    return told


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
