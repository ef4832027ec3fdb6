"""How the settings' store is opened: the one place that knows which settings belong to which kind of store."""

from athena_backup.errors import FinalError
from athena_backup.settings import Settings
from athena_backup.store import Store
from athena_backup.store.local import open_local


def open_store(settings: Settings) -> Store:
    """The store that the settings name, ready for use; raises `FinalError` saying what keeps it from being used."""
    if settings.object_store_location_type != "local":
        raise FinalError(
            f"OBJECT_STORE_LOCATION_TYPE={settings.object_store_location_type} is not supported by this version",
            next_step="set it to local and mount a directory at OBJECT_STORE_LOCATION_LOCAL",
        )
    return open_local(settings.object_store_location_local, settings.athena_home / "stores.json")
