"""How a client for an object store is made: from explicit values alone, whatever the environment says ("stores", 4 to 6).

Each function takes its values and returns an `ObjectStore`; which settings or Prefect block they come from is not known
here. Given keys are used as they are; without keys the platform's own identity is asked for, anew before it expires.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from obstore.store import AzureStore, GCSStore, S3Store

from athena_backup.errors import FinalError
from athena_backup.store import StoreLocation
from athena_backup.store.credentials import aws_identity, azure_identity, bare_environment, google_identity
from athena_backup.store.google import GoogleAccess
from athena_backup.store.objects import PAUSE_SECONDS, ObjectStore
from athena_backup.store.sweep import S3Access, abort_uploads

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

TIMEOUT_SECONDS = 300
"""For one request, its body included: 8 MiB pass at 28 KB/s."""
STALL_SECONDS = 60
"""Without a byte of an answer: then a read is begun anew. Not for uploads: the client counts the time that the request's own
body takes too, and a slow line would never pass one (tried)."""
CONNECT_TIMEOUT_SECONDS = 10
RETRY_SECONDS = 240
"""Below five minutes: a request is repeated with the signature that it was given (obstore manual, RetryConfig)."""


@dataclass(frozen=True)
class Way:
    """How the bytes travel to a store, the same for every kind."""

    streams: int = 2
    """Objects that are written or read at once; `ObjectStore` divides its buffers among them."""
    allow_http: bool = False
    """Use plain http where nothing but a read-back would show a flipped byte (Azure, Google); S3 signs its bytes."""
    read_back: bool = False
    """Read every part again and hash it before it counts as written."""
    ca_bundle: Path | None = None
    """Certificates of an own authority, PEM; trusted besides the usual ones."""
    timeout_seconds: float = TIMEOUT_SECONDS
    stall_seconds: float = STALL_SECONDS
    retry_seconds: float = RETRY_SECONDS
    pause_seconds: float = PAUSE_SECONDS

    def client_options(self, *, to_read: bool) -> ClientConfig:
        """The HTTP client's options, for reading objects or for all else. Raises `FinalError`.

        Proxies come from HTTPS_PROXY, HTTP_PROXY and NO_PROXY.
        """
        options: ClientConfig = {
            "allow_http": True,
            "timeout": timedelta(seconds=self.timeout_seconds),
            "connect_timeout": timedelta(seconds=min(CONNECT_TIMEOUT_SECONDS, self.timeout_seconds)),
        }
        if to_read:
            options["read_timeout"] = timedelta(seconds=self.stall_seconds)
        if self.ca_bundle is not None:
            try:
                options["root_certificate"] = self.ca_bundle.read_bytes()
            except OSError as error:
                raise FinalError(f"the CA bundle {self.ca_bundle} can't be read: {error.strerror}") from None
        return options

    def retries(self) -> RetryConfig:
        """How often the client repeats a request on its own."""
        return {
            "max_retries": 8,
            "retry_timeout": timedelta(seconds=self.retry_seconds),
            "backoff": {
                "init_backoff": timedelta(seconds=self.pause_seconds / 2),
                "max_backoff": timedelta(seconds=15),
                "base": 2,
            },
        }

    def proof(self, url: str, *, digest: bool) -> str:
        """How bytes sent to ``url`` are known to be right; raises `FinalError` for http that nobody allowed."""
        if self.read_back:
            return "read-back"
        if digest:
            return "digest"
        if urlsplit(url).scheme != "http":
            return "tls+size"
        if not self.allow_http:
            raise FinalError(
                f"{url} is plain http, over which a flipped byte would not be noticed",
                next_step="use https, or set ATHENA_STORE_ALLOW_HTTP=true: every part is then read back and hashed",
            )
        return "read-back"


@dataclass(frozen=True)
class Keys:
    """An access key and its secret."""

    access_key: str
    secret_key: str = field(repr=False)


def open_s3(
    bucket: str,
    endpoint: str,
    region: str,
    keys: Keys | None = None,
    *,
    path_style: bool = True,
    way: Way | None = None,
) -> ObjectStore:
    """The store in an S3 bucket; without ``keys`` by the usual AWS chain (web identity, instance role, ...)."""
    way = way or Way()
    _check_address("S3", endpoint, bucket)
    proof = way.proof(endpoint, digest=True)
    # Of a virtual-hosted address the client wants the bucket's own host (obstore manual, S3Config, endpoint), boto3 the
    # service's; people give either.
    service = endpoint.rstrip("/") if path_style else endpoint.rstrip("/").replace(f"://{bucket}.", "://", 1)
    address = service if path_style else service.replace("://", f"://{bucket}.", 1)

    def client(identity: Callable[[], Any], *, to_read: bool) -> S3Store:
        with bare_environment():
            return S3Store(
                bucket,
                endpoint=address,
                region=region,
                virtual_hosted_style_request=not path_style,
                checksum_algorithm="SHA256",
                unsigned_payload=False,
                conditional_put="etag",
                disable_tagging=True,
                credential_provider=identity,
                client_options=way.client_options(to_read=to_read),
                retry_config=way.retries(),
            )

    def connect() -> tuple[S3Store, S3Store]:
        # Anew: a client whose credentials were refused must not get the same ones again.
        identity = aws_identity() if keys is None else _given(keys)
        return client(identity, to_read=False), client(identity, to_read=True)

    access = S3Access(bucket, service, region, keys, path_style=path_style, ca_bundle=way.ca_bundle)
    location = StoreLocation("s3", bucket, region, service)
    return ObjectStore(
        location,
        connect,
        streams=way.streams,
        pause_seconds=way.pause_seconds,
        proof=proof,
        abandon=partial(abort_uploads, access),
    )


def open_azure(
    account: str, service_url: str, container: str, key: str | None = None, *, way: Way | None = None
) -> ObjectStore:
    """The store in an Azure container; without ``key`` by managed identity (or workload identity, environment, ...)."""
    way = way or Way()
    _check_address("Azure", service_url, container)
    _check_account_key(key)
    proof = way.proof(service_url, digest=False)

    def client(who: dict[str, Any], *, to_read: bool) -> AzureStore:
        with bare_environment():
            return AzureStore(
                container,
                account_name=account,
                endpoint=service_url.rstrip("/"),
                disable_tagging=True,
                client_options=way.client_options(to_read=to_read),
                retry_config=way.retries(),
                **who,
            )

    def connect() -> tuple[AzureStore, AzureStore]:
        who: dict[str, Any] = {"account_key": key} if key is not None else {"credential_provider": azure_identity()}
        return client(who, to_read=False), client(who, to_read=True)

    location = StoreLocation("azure-blob-storage", f"{service_url.rstrip('/')}/{container}/")
    return ObjectStore(location, connect, streams=way.streams, pause_seconds=way.pause_seconds, proof=proof)


def open_gcs(bucket: str, service_account: str | None = None, *, way: Way | None = None) -> ObjectStore:
    """The store in a Google bucket; ``service_account`` is its JSON, without it Google's default credentials are used."""
    way = way or Way()
    address = _google_url(service_account)
    _check_address("Google", address, bucket)
    proof = way.proof(address, digest=False)

    def client(who: dict[str, Any], *, to_read: bool) -> GCSStore:
        with bare_environment():
            return GCSStore(
                bucket, client_options=way.client_options(to_read=to_read), retry_config=way.retries(), **who
            )

    def connect() -> tuple[GCSStore, GCSStore]:
        who: dict[str, Any] = (
            {"service_account_key": service_account}
            if service_account is not None
            else {"credential_provider": google_identity()}
        )
        return client(who, to_read=False), client(who, to_read=True)

    return ObjectStore(
        StoreLocation("gcp-cloud-storage", bucket),
        connect,
        streams=way.streams,
        pause_seconds=way.pause_seconds,
        proof=proof,
        abandon=partial(abort_uploads, google_access(bucket, service_account, way.ca_bundle)),
    )


def google_access(bucket: str, service_account: str | None, ca_bundle: Path | None) -> GoogleAccess:
    """How the unfinished uploads of a Google bucket are reached; raises `FinalError` for a key that is no JSON object."""
    return GoogleAccess(bucket, _google_url(service_account), service_account, ca_bundle)


def _given(keys: Keys) -> Callable[[], Any]:
    return lambda: {
        "access_key_id": keys.access_key,
        "secret_access_key": keys.secret_key,
        "token": None,
        "expires_at": None,
    }


def _check_address(service: str, url: str, bucket: str) -> None:
    """Refuse what is no address, and one with a secret in it: clients tell the whole address in their errors."""
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query:
        raise FinalError(
            f"the {service} address of {bucket} holds a user, password or signature",
            next_step="give the address alone, and the key in its own setting or field",
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FinalError(f"{url!r} is no address of a {service} server", next_step="it begins with https://")
    if not bucket or "/" in bucket:
        raise FinalError(f"{bucket!r} is no name of a bucket or container", next_step="give its name alone")


def _check_account_key(key: str | None) -> None:
    try:
        base64.b64decode(key or "", validate=True)
    except ValueError:
        raise FinalError(
            "the Azure storage account's key is not base64", next_step="copy it anew from the account's access keys"
        ) from None


def _google_url(service_account: str | None) -> str:
    """Where a service account's JSON says that its Google is; emulators are addressed so (obstore manual)."""
    try:
        document = json.loads(service_account) if service_account is not None else {}
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise FinalError("the Google service account is no JSON object", next_step="give the whole file of its key")
    return str(document.get("gcs_base_url") or "https://storage.googleapis.com")
