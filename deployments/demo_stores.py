"""The demo's store: a directory, or a real object store of its own beside it, told to the service by the contract's variables."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from athena_backup.settings import Settings
from deployments.embedded_stores import embedded_azure, embedded_s3

DemoStore = Literal["local", "s3", "azure"]
STORES: tuple[DemoStore, ...] = ("local", "s3", "azure")
STORE_VARIABLES = {
    name.upper()
    for name in Settings.model_fields
    if name.startswith(("object_store_", "aws_", "azure_", "gcp_", "athena_store_", "athena_copy_", "athena_read_back"))
}
"""What of a person's own environment would lead the demo into their store."""


@contextlib.contextmanager
def demo_store(kind: DemoStore, root: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """A store below ``root`` for the length of the block: what it is, in words, and the variables that name it.

    Raises `FinalError` if its server is not installed or won't start.
    """
    match kind:
        case "local":
            root.mkdir(parents=True, exist_ok=True)
            yield (
                "a directory",
                {"OBJECT_STORE_LOCATION_TYPE": "local", "OBJECT_STORE_LOCATION_LOCAL": str(root)},
            )
        case "s3":
            with embedded_s3(root) as s3:
                yield (
                    f"S3, a SeaweedFS at {s3.endpoint}",
                    {
                        "OBJECT_STORE_LOCATION_TYPE": "s3",
                        "AWS_S3_BUCKET_NAME": s3.bucket,
                        "AWS_S3_ENDPOINT": s3.endpoint,
                        "AWS_S3_REGION": s3.region,
                        "AWS_S3_FORCE_PATH_STYLE": "true",
                        "AWS_ACCESS_KEY": s3.keys.access_key,
                        "AWS_SECRET_KEY": s3.keys.secret_key,
                    },
                )
        case "azure":
            with embedded_azure(root) as azure:
                yield (
                    f"Azure Blob Storage, an Azurite at {azure.service_url}",
                    {
                        "OBJECT_STORE_LOCATION_TYPE": "azure-blob-storage",
                        "AZURE_STORAGE_ACCOUNT_NAME": azure.account,
                        "AZURE_STORAGE_ACCOUNT_SERVICE_URL": azure.service_url,
                        "AZURE_STORAGE_CONTAINER_NAME": azure.container,
                        "AZURE_STORAGE_ACCESS_KEY": azure.key,
                        # Azurite speaks plain http here: every part is read back and hashed before it counts.
                        "ATHENA_STORE_ALLOW_HTTP": "true",
                    },
                )
