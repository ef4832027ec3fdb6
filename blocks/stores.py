"""How the service's store is opened: the one place that knows which settings, or which Prefect block, it comes from.

Without ATHENA_STORE_BLOCK Prefect is neither asked nor imported: sets can be listed and checked with its server down.
"""

import threading
import time
from typing import TYPE_CHECKING

from athena_backup.crew import WAITING_LIMIT
from athena_backup.settings import Settings
from athena_backup.store import Store
from athena_backup.store.clients import Keys, Way, google_access, open_azure, open_gcs, open_s3
from athena_backup.store.google import GoogleAccess
from athena_backup.store.local import open_local
from athena_backup.store.sweep import S3Access

if TYPE_CHECKING:
    from blocks.store_blocks import StoreBlock

LOOK_AGAIN_SECONDS = 60
"""How long a process that keeps its store may miss what somebody changed in the block."""


def open_store(settings: Settings, *, adopt: bool = False) -> Store:
    """The service's store, ready for use; raises `FinalError` saying what keeps it from being used, and `UnavailableError`.

    ``adopt`` is for the start of the service: a directory may be new (`open_local`).
    """
    if settings.athena_store_block is not None:
        return open_block(settings.athena_store_block, settings, adopt=adopt)
    match settings.object_store_location_type:
        case "s3":
            access = _s3_of(settings)
            return open_s3(
                *(access.bucket, access.endpoint, access.region, access.keys),
                path_style=access.path_style,
                way=way_of(settings),
            )
        case "azure-blob-storage":
            return open_azure(
                settings.azure_storage_account_name,
                settings.azure_storage_account_service_url,
                settings.azure_storage_container_name,
                settings.azure_account_key,
                way=way_of(settings),
            )
        case "gcp-cloud-storage":
            return open_gcs(
                settings.gcp_cloud_storage_bucket_name, settings.gcp_service_account_json, way=way_of(settings)
            )
        case "local":
            memory = settings.athena_home / "stores.json"
            return open_local(settings.object_store_location_local, memory, adopt=adopt)


def open_block(name: str, settings: Settings, *, adopt: bool = False) -> Store:
    """The store of a Prefect block, by ``name`` or ``slug/name``; takes ``adopt`` and raises like `open_store`."""
    from blocks.store_blocks import load_block

    return _opened(load_block(name), settings, adopt=adopt)


def _opened(block: "StoreBlock", settings: Settings, *, adopt: bool = False) -> Store:
    return block.open(way_of(settings), settings.athena_home / "stores.json", adopt=adopt)


def way_of(settings: Settings) -> Way:
    """How bytes travel between this machine and any object store."""
    return Way(
        streams=settings.athena_jobs + WAITING_LIMIT,
        allow_http=settings.athena_store_allow_http,
        read_back=settings.athena_read_back,
        ca_bundle=settings.athena_ca_bundle,
    )


def bucket_access(settings: Settings) -> S3Access | GoogleAccess | None:
    """How the service's bucket is reached without obstore; None for Azure and directories. Raises like `open_store`."""
    if settings.athena_store_block is not None:
        from blocks.store_blocks import AthenaGcsStore, AthenaS3Store, load_block

        block = load_block(settings.athena_store_block)
        return block.access(way_of(settings)) if isinstance(block, AthenaS3Store | AthenaGcsStore) else None
    match settings.object_store_location_type:
        case "s3":
            return _s3_of(settings)
        case "gcp-cloud-storage":
            return google_access(
                settings.gcp_cloud_storage_bucket_name, settings.gcp_service_account_json, settings.athena_ca_bundle
            )
        case _:
            return None


def _s3_of(settings: Settings) -> S3Access:
    key, secret = settings.aws_access_key, settings.aws_secret_key
    return S3Access(
        settings.aws_s3_bucket_name,
        settings.aws_s3_endpoint,
        settings.aws_s3_region,
        Keys(key.get_secret_value(), secret.get_secret_value()) if key is not None and secret is not None else None,
        path_style=settings.aws_s3_force_path_style,
        ca_bundle=settings.athena_ca_bundle,
    )


def local_directory(settings: Settings) -> str | None:
    """The directory of the service's store; None where it is an object store. Raises like `open_store`."""
    if settings.athena_store_block is not None:
        from blocks.store_blocks import AthenaLocalStore, load_block

        block = load_block(settings.athena_store_block)
        return block.directory if isinstance(block, AthenaLocalStore) else None
    return settings.object_store_location_local if settings.object_store_location_type == "local" else None


class KeptStore:
    """The service's store for a process that needs it at each request: one client for all of them, not one each.

    A directory is opened anew each time, which costs nothing and looks whether the right one is mounted.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._store: Store | None = None
        self._block: StoreBlock | None = None
        self._looked_seconds = 0.0

    def get(self) -> Store:
        """The store; raises like `open_store`."""
        settings = self._settings
        if settings.athena_store_block is None and settings.object_store_location_type == "local":
            return open_store(settings)
        with self._lock:
            if settings.athena_store_block is not None:
                self._follow(settings.athena_store_block)
            if self._store is None:
                self._store = open_store(settings)
            return self._store

    def _follow(self, name: str) -> None:
        """Open the block again if somebody has changed it, looking every `LOOK_AGAIN_SECONDS`."""
        if self._store is not None and time.monotonic() - self._looked_seconds < LOOK_AGAIN_SECONDS:
            return
        from blocks.store_blocks import load_block

        block = load_block(name)
        if block != self._block:
            self._store = _opened(block, self._settings)
            self._block = block
        self._looked_seconds = time.monotonic()
