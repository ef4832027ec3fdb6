"""The stores as Prefect blocks: forms that Prefect's UI shows, kept encrypted by its server, secrets masked.

Each is composed of the credentials block of the cloud's own Prefect collection and opens as an engine's `Store`. What a block
holds is *where* a store is; *how* its bytes travel (`Way`: streams, CA bundle, read-back) is each machine's own setting. Of
Google's collection none is used: prefect-gcp would bring seventeen packages, grpcio among them, for one secret field.

`prefect block register -m blocks.store_blocks` makes the forms known to a Prefect server; `athena-backup up` does so itself.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias, TypeVar, cast
from urllib.parse import urlsplit

import httpx
import pydantic
from prefect.blocks.core import Block
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings
from prefect_aws.credentials import AwsCredentials
from prefect_azure.credentials import AzureBlobStorageCredentials
from pydantic import Field, SecretStr

from athena_backup.errors import FinalError, UnavailableError
from athena_backup.settings import Settings
from athena_backup.store import Store
from athena_backup.store.clients import Keys, Way, google_access, open_azure, open_gcs, open_s3
from athena_backup.store.google import GoogleAccess
from athena_backup.store.local import open_local
from athena_backup.store.sweep import S3Access
from blocks.keys import block_name

_OF_SETTINGS = (
    "The block that bears the service's namespace is written anew from the environment at each start; for a store of your own"
    " make one of another name, and set ATHENA_STORE_BLOCK to it."
)
_Block = TypeVar("_Block", bound=Block)


class NoBlockError(FinalError):
    """Prefect has no store block of that name."""


class AthenaS3Store(Block):
    """Backup sets in a bucket of S3, or of a server that speaks its protocol."""

    _block_type_name = "Athena S3 store"
    _block_type_slug = "athena-s3-store"
    _description = f"Backup sets in a bucket of Amazon S3, or of a server that speaks its protocol. {_OF_SETTINGS}"

    bucket_name: str = Field(title="Bucket", description="The bucket's name. It has to exist.")
    endpoint: str = Field(
        default="https://s3.us-west-2.amazonaws.com", title="Endpoint", description="URL of the S3 server."
    )
    region: str = Field(default="us-west-2", title="Region", description="The bucket's region.")
    force_path_style: bool = Field(
        default=True, title="Path style", description="The bucket's name goes into the path instead of the host."
    )
    credentials: AwsCredentials = Field(
        default_factory=AwsCredentials,
        title="Credentials",
        description="Access key ID and secret; leave both empty to use the machine's own role (web identity, instance role)."
        " Of the block's other fields none may say who is acting: no session token, profile or role.",
    )

    def access(self, way: Way) -> S3Access:
        """How boto3 reaches the bucket; raises `FinalError` for credentials that would be used only in part."""
        given = self.credentials
        secret = given.aws_secret_access_key.get_secret_value() if given.aws_secret_access_key else ""
        if bool(given.aws_access_key_id) != bool(secret):
            raise self._refused(
                "only one of access key ID and secret", "give both, or neither to use the machine's role"
            )
        if given.aws_session_token or given.profile_name or given.assume_role_arn:
            raise self._refused(
                "a session token, profile or role",
                "give access key ID and secret, or nothing to use the machine's own role",
            )
        keys = Keys(given.aws_access_key_id, secret) if given.aws_access_key_id else None
        return S3Access(
            *(self.bucket_name, self.endpoint, self.region, keys),
            path_style=self.force_path_style,
            ca_bundle=way.ca_bundle,
        )

    def open(self, way: Way, memory: Path, *, adopt: bool) -> Store:
        """The store; raises `FinalError`. ``memory`` and ``adopt`` are for local ones."""
        del memory, adopt
        access = self.access(way)
        return open_s3(
            access.bucket, access.endpoint, access.region, access.keys, path_style=access.path_style, way=way
        )

    def _refused(self, what: str, next_step: str) -> FinalError:
        return FinalError(f"the S3 store block's credentials hold {what}", next_step=next_step)


class AthenaAzureBlobStore(Block):
    """Backup sets in a container of Azure Blob Storage."""

    _block_type_name = "Athena Azure Blob store"
    _block_type_slug = "athena-azure-blob-store"
    _description = f"Backup sets in a container of Azure Blob Storage. {_OF_SETTINGS}"

    container_name: str = Field(title="Container", description="The container's name. It has to exist.")
    account_name: str | None = Field(
        default=None,
        title="Account name",
        description="Of the storage account; only needed where neither connection string nor URL tell it.",
    )
    credentials: AzureBlobStorageCredentials = Field(
        title="Credentials",
        description="Either a connection string with the account's key, or the account URL alone to use the machine's managed"
        " identity. Service principals are taken from the environment (AZURE_CLIENT_ID and its kin), not from here.",
    )

    def open(self, way: Way, memory: Path, *, adopt: bool) -> Store:
        """The store; raises `FinalError`. ``memory`` and ``adopt`` are for local ones."""
        del memory, adopt
        if self.credentials.client_id or self.credentials.client_secret:
            raise FinalError(
                "the Azure store block's credentials hold a service principal",
                next_step="set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET for the service instead",
            )
        account, url, key = self._account()
        return open_azure(account, url, self.container_name, key, way=way)

    def _account(self) -> tuple[str, str, str | None]:
        """Name, URL and key of the account."""
        if self.credentials.connection_string is None:
            url = self.credentials.account_url or ""
            # https://NAME.blob.core.windows.net, and emulators' http://127.0.0.1:10000/NAME
            path = urlsplit(url).path.strip("/")
            return self.account_name or path or (urlsplit(url).hostname or "").partition(".")[0], url, None
        text = self.credentials.connection_string.get_secret_value()
        members = dict(one.strip().split("=", 1) for one in text.split(";") if "=" in one)
        name, key = members.get("AccountName") or self.account_name, members.get("AccountKey")
        if not name or not key:
            raise FinalError(
                "the Azure store block's connection string lacks AccountName or AccountKey",
                next_step="copy it anew from the storage account's access keys; a shared access signature is not enough",
            )
        protocol = members.get("DefaultEndpointsProtocol", "https")
        suffix = members.get("EndpointSuffix", "core.windows.net")
        return name, members.get("BlobEndpoint") or f"{protocol}://{name}.blob.{suffix}", key


class AthenaGcsStore(Block):
    """Backup sets in a bucket of Google Cloud Storage."""

    _block_type_name = "Athena GCS store"
    _block_type_slug = "athena-gcs-store"
    _description = f"Backup sets in a bucket of Google Cloud Storage. {_OF_SETTINGS}"

    bucket_name: str = Field(title="Bucket", description="The bucket's name. It has to exist.")
    service_account: SecretStr | None = Field(
        default=None,
        title="Service account",
        description="The whole JSON of a service account's key; leave it empty to use Google's default credentials.",
    )

    def access(self, way: Way) -> GoogleAccess:
        """How its unfinished uploads are reached; raises `FinalError`."""
        return google_access(self.bucket_name, self._key(), way.ca_bundle)

    def open(self, way: Way, memory: Path, *, adopt: bool) -> Store:
        """The store; raises `FinalError`. ``memory`` and ``adopt`` are for local ones."""
        del memory, adopt
        return open_gcs(self.bucket_name, self._key(), way=way)

    def _key(self) -> str | None:
        return (self.service_account.get_secret_value() if self.service_account else "") or None


class AthenaLocalStore(Block):
    """Backup sets in a directory that is mounted on the machine where the service runs."""

    _block_type_name = "Athena local store"
    _block_type_slug = "athena-local-store"
    _description = f"Backup sets in a directory that is mounted on every machine of the service. {_OF_SETTINGS}"

    directory: str = Field(title="Directory", description="Absolute path of the mounted directory.")

    def open(self, way: Way, memory: Path, *, adopt: bool) -> Store:
        """The store; raises `FinalError`. ``memory`` is where its id is remembered, and for ``adopt`` see `open_local`."""
        del way
        if not Path(self.directory).is_absolute():
            raise FinalError(
                f"the local store block's directory {self.directory!r} is no absolute path",
                next_step="correct it in Prefect's UI",
            )
        return open_local(self.directory, memory, adopt=adopt)


StoreBlock: TypeAlias = AthenaS3Store | AthenaAzureBlobStore | AthenaGcsStore | AthenaLocalStore
_KINDS: tuple[type[StoreBlock], ...] = (AthenaS3Store, AthenaAzureBlobStore, AthenaGcsStore, AthenaLocalStore)


def register(settings: Settings) -> None:
    """Make the forms known to Prefect's UI, and the namespace's own block say what the settings say."""
    for kind in _KINDS:
        kind.register_type_and_schema()
    if settings.athena_store_block is None:
        block_of(settings).save(block_name(settings.athena_namespace), overwrite=True)


def block_of(settings: Settings) -> StoreBlock:
    """The store that the contract's variables describe, as a block."""
    match settings.object_store_location_type:
        case "s3":
            return AthenaS3Store(
                bucket_name=settings.aws_s3_bucket_name,
                endpoint=settings.aws_s3_endpoint,
                region=settings.aws_s3_region,
                force_path_style=settings.aws_s3_force_path_style,
                credentials=AwsCredentials(
                    aws_access_key_id=settings.aws_access_key.get_secret_value() if settings.aws_access_key else None,
                    aws_secret_access_key=settings.aws_secret_key,
                ),
            )
        case "azure-blob-storage":
            account, url = settings.azure_storage_account_name, settings.azure_storage_account_service_url
            key = settings.azure_account_key
            given = (
                {"connection_string": SecretStr(f"AccountName={account};AccountKey={key};BlobEndpoint={url}")}
                if key is not None
                else {"account_url": url}
            )
            return AthenaAzureBlobStore(
                container_name=settings.azure_storage_container_name,
                account_name=account,
                credentials=AzureBlobStorageCredentials(**given),
            )
        case "gcp-cloud-storage":
            account_json = settings.gcp_service_account_json
            return AthenaGcsStore(
                bucket_name=settings.gcp_cloud_storage_bucket_name,
                service_account=SecretStr(account_json) if account_json is not None else None,
            )
        case "local":
            return AthenaLocalStore(directory=settings.object_store_location_local)


def load_block(name: str) -> StoreBlock:
    """The store block ``name``, or ``slug/name`` where several kinds have one of that name.

    Raises `NoBlockError` if there is none, `FinalError` if there is more than one, and `UnavailableError` if Prefect can't be
    asked.
    """
    if not get_current_settings().api.url:
        # Prefect's client would start a server of its own, which has no such block.
        raise FinalError(
            f"the store block {name} is kept by a Prefect server, and none is known here",
            next_step="start `athena-backup up`, or set PREFECT_API_URL",
        )
    slug, _, plain = name.rpartition("/")
    kinds = [kind for kind in _KINDS if slug in ("", kind.get_block_type_slug())]
    found = [block for kind in kinds if (block := _load(kind, plain)) is not None]
    if len(found) > 1:
        slugs = ", ".join(f"{type(block).get_block_type_slug()}/{plain}" for block in found)
        raise FinalError(f"there are several store blocks {name}", next_step=f"name one of them in full: {slugs}")
    if not found:
        raise NoBlockError(
            f"Prefect has no store block {name}",
            next_step="make it in Prefect's UI under Blocks (an Athena ... store), or correct the name",
        )
    return found[0]


def _load(kind: type[_Block], name: str) -> _Block | None:
    try:
        # In a thread of its own: inside an event loop Prefect would hand out a coroutine instead.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return cast("_Block", thread.submit(kind.load, name).result())
    except (pydantic.ValidationError, RuntimeError) as error:
        # Prefect wraps the one into the other. Neither text is told: pydantic's quotes what it was given.
        cause = error if isinstance(error, pydantic.ValidationError) else error.__cause__
        if not isinstance(cause, pydantic.ValidationError):
            raise
        fields = ", ".join(".".join(map(str, issue["loc"])) or str(issue["msg"]) for issue in cause.errors())
        raise FinalError(
            f"the store block {kind.get_block_type_slug()}/{name} has faults in: {fields}",
            next_step="open and save it anew in Prefect's UI",
        ) from None
    except ValueError:  # how Prefect says that there is none
        return None
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        raise UnavailableError(
            f"the store block {name} can't be read: the Prefect server does not answer as it should"
            f" ({type(error).__name__})",
            next_step="is `athena-backup up` running?",
        ) from None
