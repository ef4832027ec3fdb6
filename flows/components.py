"""The configured components as the engine's values: which databases and volumes a flow works on."""

from athena_backup.errors import FinalError
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
