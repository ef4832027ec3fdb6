"""Every variable of the configuration: the contract's own (shared contract, section 1) and ours beside them.

Read from the environment, over ``.env`` in the working directory, over one file named by ``ATHENA_CONFIG`` (``.toml`` with
the variables' names in lower case, or ``.json`` as the platform writes it). Flows, adapter and command line read settings
here; the engine never does: its functions take what they need.
"""

import base64
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from sqlalchemy import URL

from athena_backup.errors import FinalError
from athena_backup.names import parse_component_name, parse_namespace
from athena_backup.postgres.sessions import parse_database_url
from athena_backup.schedule import Schedule, parse_schedule
from athena_backup.store import StoreType

MASK = "********"
# Up to the last "@": a password that is not percent-encoded may have any letter. Where there is no ":" there is none.
_PASSWORD_IN_ADDRESS = re.compile(r"^(?!/)((?:[^:/]*://)?+[^:]*:).*(?=@)", re.DOTALL)
_PASSWORD_IN_QUERY = re.compile(r"([?&]\w*(?:password|secret|token|key)\w*=)[^&#]*", re.IGNORECASE)

# The platform's JSON document, member by member (contract, section 1).
_JSON_MEMBERS = {
    "backupConfig.backupFrequency": "backup_frequency",
    "backupConfig.backupRetentionCount": "backup_retention_count",
    "backupConfig.enableRegularBackups": "enable_regular_backups",
    "objectStoreConfig.locationType": "object_store_location_type",
    "objectStoreConfig.localLocation": "object_store_location_local",
    "objectStoreConfig.aws.s3.bucketName": "aws_s3_bucket_name",
    "objectStoreConfig.aws.s3.endpoint": "aws_s3_endpoint",
    "objectStoreConfig.aws.s3.forcePathStyle": "aws_s3_force_path_style",
    "objectStoreConfig.aws.s3.region": "aws_s3_region",
    "objectStoreConfig.aws.accessKey": "aws_access_key",
    "objectStoreConfig.aws.secretKey": "aws_secret_key",
    "objectStoreConfig.azure.blobStorage.accountName": "azure_storage_account_name",
    "objectStoreConfig.azure.blobStorage.containerName": "azure_storage_container_name",
    "objectStoreConfig.azure.blobStorage.serviceURL": "azure_storage_account_service_url",
    "objectStoreConfig.azure.accessKey": "azure_storage_access_key",
    "objectStoreConfig.azure.useManagedIdentityToAuthenticate": "azure_use_managed_identity",
    "objectStoreConfig.gcp.cloudStorage.bucketName": "gcp_cloud_storage_bucket_name",
    "objectStoreConfig.gcp.serviceAccount": "gcp_service_account",
}


class ConfigurationError(FinalError):
    """Settings that can't be; the message names each variable with what is wrong, and never shows a value of a secret."""


class Settings(BaseSettings):
    """All settings of one process; `load_settings` makes one."""

    model_config = SettingsConfigDict(extra="ignore", frozen=True, env_file_encoding="utf-8", env_ignore_empty=True)

    enable_regular_backups: bool = Field(False, description="Take backups by the schedule.")
    backup_frequency: str = Field(
        "0 0 0 * * *", description="How often a backup is taken: six cron fields, seconds first."
    )
    backup_retention_count: int = Field(30, ge=1, description="Keep the last N successful sets.")
    backup_retention_period: int | None = Field(None, ge=1, description="Keep the sets of the last N days.")
    object_store_location_type: StoreType = Field("local", description="Which kind of store.")
    object_store_location_local: str = Field("/backup", min_length=1, description="The mounted directory for `local`.")
    aws_s3_bucket_name: str = Field("athena-ondemand-backup", description="S3 bucket.")
    aws_s3_endpoint: str = Field("https://s3.us-west-2.amazonaws.com", description="S3 endpoint.")
    aws_s3_force_path_style: bool = Field(True, description="Bucket name in the path instead of the host.")
    aws_s3_region: str = Field("us-west-2", description="S3 region.")
    aws_access_key: SecretStr | None = Field(None, description="S3 access key; none: the usual AWS chain.")
    aws_secret_key: SecretStr | None = Field(None, description="S3 secret key.")
    azure_storage_account_name: str = Field("prophecyathenabackup", description="Azure storage account.")
    azure_storage_account_service_url: str = Field(
        "https://prophecyathenabackup.blob.core.windows.net/", description="Azure storage account's URL."
    )
    azure_storage_container_name: str = Field("athena-ondemand-backup", description="Azure container.")
    azure_storage_access_key: SecretStr | None = Field(None, description="Azure storage account's key.")
    azure_use_managed_identity: bool = Field(False, description="Authenticate by managed identity, not key.")
    gcp_cloud_storage_bucket_name: str = Field("athena-ondemand-backup", description="Google Cloud Storage bucket.")
    gcp_service_account: SecretStr | None = Field(None, description="The service account's JSON, base64-encoded.")

    athena_store_block: str | None = Field(
        None, description="A Prefect block that somebody made, used as the store instead of the variables above."
    )
    athena_store_allow_http: bool = Field(
        False, description="Take plain http for Azure and Google; every part is then read back and hashed."
    )
    athena_read_back: bool = Field(False, description="Read every part again and hash it before the set is closed.")
    athena_ca_bundle: Path | None = Field(
        default_factory=lambda: Path(bundle) if (bundle := os.environ.get("AWS_CA_BUNDLE")) else None,
        description="Certificates (PEM) of an own authority that the object store's is signed by.",
    )
    athena_copy_to: list[str] = Field(default=[], description="Blocks of further stores that get a copy of every set.")

    athena_namespace: str = Field("app", description="The service's own namespace.")
    athena_api_host: str = Field("127.0.0.1", description="Address that the API listens on.")
    athena_api_port: int = Field(8080, ge=0, le=65535, description="Port of the API; 0: a free one.")
    athena_api_keys: list[SecretStr] = Field(default=[], description="Keys that may call the API; none: one is made.")
    athena_databases: dict[str, SecretStr] = Field(default={}, description="Component name to PostgreSQL URL.")
    athena_volumes: dict[str, Path] = Field(default={}, description="Component name to directory.")
    athena_catch_up: bool = Field(True, description="Take one backup at start if the last scheduled one was missed.")
    athena_health_urls: list[str] = Field(
        default=[], description="Asked before and after a restore; each has to answer 2xx."
    )
    athena_health_seconds: float = Field(120, ge=0, description="How long they are waited for.")
    athena_home: Path = Field(
        default_factory=lambda: (
            Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "athena-backup"
        ),
        description="Where the service remembers its store and its own Prefect server keeps its state.",
    )
    athena_pg_bin: list[Path] = Field(default=[], description="Folders searched first for pg_dump and pg_restore.")
    athena_jobs: int = Field(
        2, ge=1, le=64, description="Tables, archives and dumps that are read or written at once, of all components."
    )
    athena_rate_limit_mb: float | None = Field(
        None, gt=0, description="MB a second, uncompressed, that a backup reads at most; none: as fast as it goes."
    )
    athena_nice: int = Field(0, ge=0, le=19, description="How far operations step back for other processes (nice(1)).")
    athena_lock_timeout_seconds: float = Field(60, gt=0, description="How long a backup waits for its table locks.")
    athena_ddl_wait_seconds: float | None = Field(
        None, gt=0, description="How long DDL may queue behind a backup before that database's backup is given up."
    )
    athena_torn_limit: float = Field(
        0.01, ge=0, le=1, description="Share of a volume's files that may change while read."
    )
    athena_empty_volumes: list[str] = Field(
        default=[], description="Volumes that may be empty; any other empty one is taken for one that is not mounted."
    )
    athena_operation_timeout_seconds: float = Field(86_400, gt=0, description="How long a backup or restore may take.")
    athena_prefect_port: int = Field(4200, ge=0, le=65535, description="Port of the own Prefect server; 0: a free one.")
    prefect_api_url: str | None = Field(None, description="An existing Prefect server; none: an own one is started.")

    @pydantic.field_validator("athena_namespace")
    @classmethod
    def _namespace(cls, value: str) -> str:
        return parse_namespace(value)

    @pydantic.field_validator("backup_frequency")
    @classmethod
    def _frequency(cls, value: str) -> str:
        parse_schedule(value)
        return value

    @pydantic.field_validator("athena_databases", "athena_volumes")
    @classmethod
    def _component_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            parse_component_name(name)
        return value

    @pydantic.field_validator("athena_volumes")
    @classmethod
    def _absolute(cls, value: dict[str, Path]) -> dict[str, Path]:
        # A relative one would be another directory in each process, and "" the one that the service was started in.
        relative = [f"{name}: {str(path)!r}" for name, path in value.items() if not path.is_absolute()]
        if relative:
            raise ValueError(f"has to hold absolute paths, not {', '.join(relative)}")
        return value

    @pydantic.field_validator("athena_api_keys")
    @classmethod
    def _usable_keys(cls, value: list[SecretStr]) -> list[SecretStr]:
        # What a header carries is stripped, so such a key would never be known.
        if any(not key.get_secret_value() or key.get_secret_value() != key.get_secret_value().strip() for key in value):
            raise ValueError("a key is empty, or has white space at its beginning or end")
        return value

    @pydantic.field_validator("prefect_api_url")
    @classmethod
    def _without_slash(cls, value: str | None) -> str | None:
        return value.strip().rstrip("/") if value else value

    @pydantic.field_validator("aws_access_key", "aws_secret_key", "azure_storage_access_key", "gcp_service_account")
    @classmethod
    def _empty_is_none(cls, value: SecretStr | None) -> SecretStr | None:
        # A file may hold "" where the environment would hold nothing: then the platform's identity is asked for.
        return value if value is not None and value.get_secret_value().strip() else None

    @pydantic.field_validator("gcp_service_account")
    @classmethod
    def _service_account(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            try:
                is_object = isinstance(json.loads(_decoded(value)), dict)
            except ValueError:
                is_object = False
            if not is_object:
                raise ValueError("is not the base64 encoding of a service account's JSON")
        return value

    @pydantic.model_validator(mode="after")
    def _names_are_unique(self) -> "Settings":
        both = set(self.athena_databases) & set(self.athena_volumes)
        if both:
            raise ValueError(
                f"ATHENA_DATABASES and ATHENA_VOLUMES both have {', '.join(sorted(both))}: a name is one component's"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _keys_are_whole(self) -> "Settings":
        # With half a pair the platform's own identity would be used, which may be somebody else's.
        if (self.aws_access_key is None) != (self.aws_secret_key is None):
            given, missing = ("AWS_ACCESS_KEY", "AWS_SECRET_KEY")
            if self.aws_access_key is None:
                given, missing = missing, given
            raise ValueError(f"{given} is given without {missing}: give both, or neither to use the pod's own role")
        return self

    @property
    def schedule(self) -> Schedule:
        """BACKUP_FREQUENCY, parsed."""
        return parse_schedule(self.backup_frequency)

    @property
    def component_names(self) -> set[str]:
        """The names of all databases and volumes."""
        return {*self.athena_databases, *self.athena_volumes}

    @property
    def database_urls(self) -> dict[str, URL]:
        """The databases by component name; raises `FinalError` for a URL that can't be one."""
        return {name: parse_database_url(name, url.get_secret_value()) for name, url in self.athena_databases.items()}

    @property
    def azure_account_key(self) -> str | None:
        """The key that Azure is to be asked with; None: a managed (or workload) identity."""
        key = self.azure_storage_access_key
        return None if key is None or self.azure_use_managed_identity else key.get_secret_value()

    @property
    def gcp_service_account_json(self) -> str | None:
        """GCP_SERVICE_ACCOUNT, decoded; None: Google's default credentials."""
        return _decoded(self.gcp_service_account) if self.gcp_service_account is not None else None

    @property
    def prefect_home(self) -> Path:
        """Where the own Prefect server keeps its state."""
        return Path(os.environ.get("PREFECT_HOME") or self.athena_home / "prefect")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over .env over the file, each variable as a whole (pydantic-settings would merge objects member by member)."""
        del file_secret_settings
        path = os.environ.get("ATHENA_CONFIG") or _from_dotenv(dotenv_settings)
        file_values = _file_values(Path(path), set(cls.model_fields)) if path else {}
        values = {**file_values, **dotenv_settings(), **env_settings(), **init_settings()}
        return (InitSettingsSource(settings_cls, values),)


def load_settings(env_file: Path | None = Path(".env")) -> Settings:
    """The settings of this process; raises `ConfigurationError` with every fault that was found."""
    try:
        return Settings(_env_file=env_file)
    except pydantic.ValidationError as error:
        # Never pydantic's own text: it quotes the input, which may be a password.
        faults = [f"{_variable(issue['loc'])}: {_reason(issue)}" for issue in error.errors()]
    except SettingsError as error:
        faults = [f"{_quoted_name(str(error))}: is not JSON, where a JSON object or list is needed"]
    raise ConfigurationError(
        "; ".join(faults), next_step="correct the setting and start again", step="reading settings"
    )


def shown(settings: Settings) -> dict[str, Any]:
    """All settings for people to read, by variable name, with secrets masked."""
    values = settings.model_dump(mode="json", exclude={"athena_databases", "athena_api_keys"})
    secret_names = {"aws_access_key", "aws_secret_key", "azure_storage_access_key", "gcp_service_account"}
    masked = {name: (MASK if name in secret_names and value is not None else value) for name, value in values.items()}
    masked["athena_api_keys"] = [MASK] * len(settings.athena_api_keys)
    masked["athena_databases"] = {
        name: masked_url(url.render_as_string(hide_password=True)) for name, url in settings.database_urls.items()
    }
    masked["athena_health_urls"] = [masked_url(url) for url in settings.athena_health_urls]
    return {
        name.upper(): masked_url(value) if isinstance(value, str) else value for name, value in sorted(masked.items())
    }


def masked_url(url: str) -> str:
    """A URL for people to read: what may be a password in it is masked, though it be more than that (a port before an ``@``)."""
    # The query first, of which the address' mask would take the names; an "@" in it still ends what may be the password before.
    url = _PASSWORD_IN_QUERY.sub(lambda found: f"{found[1]}{MASK}{'@' if '@' in found[0] else ''}", url)
    return _PASSWORD_IN_ADDRESS.sub(rf"\1{MASK}", url)


def _decoded(value: SecretStr) -> str:
    # Encoders wrap their lines, as `base64` does.
    return base64.b64decode("".join(value.get_secret_value().split()), validate=True).decode()


def _variable(location: tuple[int | str, ...]) -> str:
    return ".".join([str(location[0]).upper(), *(str(step) for step in location[1:])]) if location else "settings"


def _reason(issue: Mapping[str, Any]) -> str:
    text = str(issue["msg"])
    return text.removeprefix("Value error, ")


def _quoted_name(text: str) -> str:
    parts = text.split('"')
    return parts[1].upper() if len(parts) > 2 else "a setting"


def _from_dotenv(source: PydanticBaseSettingsSource) -> str | None:
    if isinstance(source, DotEnvSettingsSource):
        return source.env_vars.get("athena_config") or None
    return None


def _file_values(path: Path, known: set[str]) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"ATHENA_CONFIG: {path} can't be read: {error.strerror}", next_step="correct the path, or make it readable"
        ) from None
    kind: Literal["toml", "json"] = "json" if path.suffix == ".json" else "toml"
    if path.suffix not in (".json", ".toml"):
        raise ConfigurationError(
            f"ATHENA_CONFIG: {path} has to end in .toml or .json", next_step="rename the file, or correct the path"
        )
    try:
        values = tomllib.loads(content.decode()) if kind == "toml" else _json_values(json.loads(content))
    except (ValueError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"ATHENA_CONFIG: {path} is not {kind.upper()}: {_without_content(error)}", next_step="correct the file"
        ) from None
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigurationError(
            f"ATHENA_CONFIG: {path} has members that nobody knows: {', '.join(unknown)}",
            next_step="correct or remove them",
        )
    return values


def _without_content(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (line {error.lineno}, column {error.colno})"
    return str(error) if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8 text"


def _json_values(document: Any) -> dict[str, Any]:
    """The members of the platform's JSON document; its names may be nested or dotted, in any mixture."""
    if not isinstance(document, dict):
        raise json.JSONDecodeError("a JSON object is needed", "", 0)
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and prefix not in _JSON_MEMBERS:
            for name, member in value.items():
                walk(f"{prefix}.{name}" if prefix else str(name), member)
        elif value is not None:
            flat[_JSON_MEMBERS.get(prefix, prefix)] = value

    walk("", document)
    return flat
