"""Multipart uploads that a killed writer left in S3: seen and aborted through boto3, since obstore can do neither.

What an exception or a cancel leaves is aborted by the writer itself ("stores", section 7). Azure drops uncommitted blocks
after a week; for Google a lifecycle rule does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import botocore.exceptions
from botocore.config import Config

from athena_backup.errors import DeniedError, UnavailableError
from athena_backup.store.credentials import bare_environment

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

    from athena_backup.store.clients import Keys

_PROBLEMS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)


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
            verify=str(self.ca_bundle) if self.ca_bundle else None,
            config=Config(
                s3={"addressing_style": "path" if self.path_style else "virtual"},
                retries={"max_attempts": 5, "mode": "standard"},
                connect_timeout=10,
                read_timeout=60,
            ),
        )


def list_uploads(access: S3Access, prefix: str) -> list[tuple[str, str]]:
    """Key and id of every unfinished upload below ``prefix``; raises `DeniedError`, `UnavailableError`."""
    found = []
    try:
        for page in (
            access.client().get_paginator("list_multipart_uploads").paginate(Bucket=access.bucket, Prefix=prefix)
        ):
            found += [(one["Key"], one["UploadId"]) for one in page.get("Uploads", [])]
    except _PROBLEMS as error:
        raise _told(error, "s3:ListBucketMultipartUploads") from None
    return found


def abort_uploads(access: S3Access, prefix: str) -> int:
    """Abort every unfinished upload below ``prefix``, whose writers are known to be dead; returns how many."""
    found = list_uploads(access, prefix)
    client = access.client() if found else None
    for key, upload in found:
        try:
            if client is not None:
                client.abort_multipart_upload(Bucket=access.bucket, Key=key, UploadId=upload)
        except botocore.exceptions.ClientError as error:
            if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
                raise _told(error, "s3:AbortMultipartUpload") from None
        except botocore.exceptions.BotoCoreError as error:
            raise _told(error, "s3:AbortMultipartUpload") from None
    return len(found)


def _told(error: Exception, permission: str) -> DeniedError | UnavailableError:
    code = error.response.get("Error", {}).get("Code", "") if isinstance(error, botocore.exceptions.ClientError) else ""
    if code in ("AccessDenied", "403", "NotImplemented", "MethodNotAllowed"):
        return DeniedError(
            f"unfinished uploads can't be listed or aborted: {error}",
            next_step=f"grant {permission}, or let a lifecycle rule abort incomplete uploads after 7 days",
        )
    return UnavailableError(f"unfinished uploads could not be listed or aborted: {error}")
