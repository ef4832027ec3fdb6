"""How stores are opened: the settings' one, and those of Prefect blocks by name."""

from athena_backup.errors import FinalError
from athena_backup.settings import Settings
from athena_backup.store import Store
from athena_backup.store.clients import Keys, Way, open_azure, open_s3
from athena_backup.store.local import open_local


def open_store(settings: Settings) -> Store:
    """The store that the settings name, ready for use; raises `FinalError` saying what keeps it from being used."""
    way = Way(streams=settings.athena_jobs, allow_http=settings.athena_store_allow_http)
    match settings.object_store_location_type:
        case "s3":
            access, secret = settings.aws_access_key, settings.aws_secret_key
            return open_s3(
                settings.aws_s3_bucket_name,
                settings.aws_s3_endpoint,
                settings.aws_s3_region,
                Keys(access.get_secret_value(), secret.get_secret_value()) if access and secret else None,
                path_style=settings.aws_s3_force_path_style,
                way=way,
            )
        case "azure-blob-storage":
            key = settings.azure_storage_access_key
            return open_azure(
                settings.azure_storage_account_name,
                settings.azure_storage_account_service_url,
                settings.azure_storage_container_name,
                key.get_secret_value() if key else None,
                way=way,
            )
        case "local":
            return open_local(settings.object_store_location_local, settings.athena_home / "stores.json")
        case other:
            raise FinalError(f"OBJECT_STORE_LOCATION_TYPE={other} is not supported by this version")


def open_named_store(name: str, settings: Settings) -> Store:
    """The store of a Prefect block, by its name."""
    from blocks.store_blocks import AthenaLocalStore

    try:
        block = AthenaLocalStore.load(name)
    except ValueError:
        raise FinalError(
            f"Prefect has no store block {name}", next_step="make it in Prefect's UI, or correct the name"
        ) from None
    if not isinstance(block, AthenaLocalStore):
        raise TypeError("a block class loads its own kind")
    return open_local(block.directory, settings.athena_home / "stores.json")
