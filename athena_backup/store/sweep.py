"""Multipart uploads that a killed writer left: seen and aborted without obstore, which can do neither.

On S3 through boto3, on Google by `google`. What an exception or a cancel leaves is aborted by the writer itself
("stores", section 7). Azure drops uncommitted blocks after a week.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import boto3
import botocore.exceptions
import certifi
from botocore.config import Config

from athena_backup.errors import AthenaError, DeniedError, FinalError, UnavailableError
from athena_backup.store import check_key
from athena_backup.store.credentials import bare_environment

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    from athena_backup.store.clients import Keys

_PROBLEMS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)


class UploadAccess(Protocol):
    """What can see and abort unfinished uploads; each call raises `DeniedError` and `UnavailableError`."""

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Key and id of every unfinished upload below ``prefix``."""

    def abort_uploads(self, uploads: Sequence[tuple[str, str]]) -> None:
        """Abort these, whatever becomes of each, then raise what the first that failed did; one that is gone is no fault."""


def abort_uploads(access: UploadAccess, prefix: str) -> int:
    """Abort every unfinished upload below ``prefix``, whose writers are known to be dead; returns how many."""
    found = [(key, upload) for key, upload in access.list_uploads(prefix) if upload and _is_below(key, prefix)]
    if found:
        access.abort_uploads(found)
    return len(found)


def _is_below(key: str, prefix: str) -> bool:
    """Whether an upload is one of ours, whatever the server makes of the prefix that it was asked for."""
    try:
        check_key(key)
    except FinalError:
        return False
    return key.startswith(prefix)


@dataclass(frozen=True)
class S3Access:
    """How boto3 reaches a bucket; ``keys`` None: the usual AWS chain."""

    bucket: str
    endpoint: str
    region: str
    keys: Keys | None
    path_style: bool = True
    ca_bundle: Path | None = None

    def client(self) -> S3Client:
        """A client of its own, made from these values alone where keys are given."""
        if self.keys is None:
            return self._made(boto3.Session(region_name=self.region))
        with bare_environment():
            return self._made(boto3.Session(self.keys.access_key, self.keys.secret_key, region_name=self.region))

    def _made(self, session: boto3.Session) -> S3Client:
        return session.client(
            "s3",
            endpoint_url=self.endpoint,
            verify=_with_usual(self.ca_bundle) if self.ca_bundle else None,
            config=Config(
                s3={"addressing_style": "path" if self.path_style else "virtual"},
                retries={"max_attempts": 5, "mode": "standard"},
                connect_timeout=10,
                read_timeout=60,
            ),
        )

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """See `UploadAccess`."""
        found = []
        try:
            for page in (
                self.client().get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=prefix)
            ):
                found += [(one["Key"], one["UploadId"]) for one in page.get("Uploads", [])]
        except _PROBLEMS as error:
            raise _told(error, "s3:ListBucketMultipartUploads") from None
        return found

    def abort_uploads(self, uploads: Sequence[tuple[str, str]]) -> None:
        """See `UploadAccess`."""
        client = self.client()
        first: AthenaError | None = None
        for key, upload in uploads:
            try:
                client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
            except _PROBLEMS as error:
                if _code(error) != "NoSuchUpload":
                    first = first or _told(error, "s3:AbortMultipartUpload")
        if first is not None:
            raise first


def _with_usual(bundle: Path) -> str:
    """A file with the usual authorities and those of ``bundle``: boto3 trusts one file alone. Raises `FinalError`."""
    try:
        return _joined(bundle.read_bytes())
    except OSError as error:
        raise FinalError(f"the CA bundle {bundle} can't be read: {error.strerror}") from None


@functools.cache
def _joined(authorities: bytes) -> str:
    with tempfile.NamedTemporaryFile("wb", prefix="athena-ca-", suffix=".pem", delete=False) as file:
        atexit.register(Path(file.name).unlink, missing_ok=True)
        file.write(Path(certifi.where()).read_bytes() + b"\n" + authorities)
    return file.name


def _code(error: Exception) -> str:
    return error.response.get("Error", {}).get("Code", "") if isinstance(error, botocore.exceptions.ClientError) else ""


def _told(error: Exception, permission: str) -> DeniedError | UnavailableError:
    if _code(error) in ("AccessDenied", "403", "NotImplemented", "MethodNotAllowed"):
        return DeniedError(
            f"unfinished uploads can't be listed or aborted: {error}",
            next_step=f"grant {permission}, or let a lifecycle rule abort incomplete uploads after 7 days",
        )
    return UnavailableError(f"unfinished uploads could not be listed or aborted: {error}")
