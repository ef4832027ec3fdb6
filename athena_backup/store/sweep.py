"""Multipart uploads that a killed writer left: seen and aborted without obstore, which can do neither.

On S3 through boto3, on Google by its XML API. What an exception or a cancel leaves is aborted by the writer itself
("stores", section 7). Azure drops uncommitted blocks after a week.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote
from xml.etree import ElementTree  # the store's own answers, read by an expat that bounds entities

import boto3
import botocore.exceptions
from botocore.config import Config

from athena_backup.errors import DeniedError, UnavailableError
from athena_backup.store.credentials import bare_environment, google_credentials

if TYPE_CHECKING:
    import requests
    from types_boto3_s3 import S3Client

    from athena_backup.store.clients import Keys

_PROBLEMS = (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError)
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_TRIES = 5


class UploadAccess(Protocol):
    """What can see and abort unfinished uploads; each call raises `DeniedError` and `UnavailableError`."""

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """Key and id of every unfinished upload below ``prefix``."""

    def abort_upload(self, key: str, upload: str) -> None:
        """Abort one of them; one that is gone is no fault."""


def abort_uploads(access: UploadAccess, prefix: str) -> int:
    """Abort every unfinished upload below ``prefix``, whose writers are known to be dead; returns how many."""
    found = access.list_uploads(prefix)
    for key, upload in found:
        access.abort_upload(key, upload)
    return len(found)


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
                retries={"max_attempts": _TRIES, "mode": "standard"},
                connect_timeout=_CONNECT_SECONDS,
                read_timeout=_READ_SECONDS,
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

    def abort_upload(self, key: str, upload: str) -> None:
        """See `UploadAccess`."""
        try:
            self.client().abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload)
        except _PROBLEMS as error:
            if _code(error) != "NoSuchUpload":
                raise _told(error, "s3:AbortMultipartUpload") from None


@dataclass(frozen=True)
class GoogleAccess:
    """How a Google bucket is reached by the XML API (Google's manual, "XML API multipart uploads").

    ``service_account`` is the JSON of its key; None: Google's default credentials.
    """

    bucket: str
    endpoint: str
    service_account: str | None = field(default=None, repr=False)
    ca_bundle: Path | None = None

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """See `UploadAccess`."""
        found: list[tuple[str, str]] = []
        with self._session() as session:
            after: dict[str, str] = {}
            while True:
                page = self._asked(session, "GET", "", {"uploads": "", "prefix": prefix, **after})
                found += [(_text(one, "Key"), _text(one, "UploadId")) for one in page if _tag(one) == "Upload"]
                if _text(page, "IsTruncated") != "true":
                    return found
                after = {
                    "key-marker": _text(page, "NextKeyMarker"),
                    "upload-id-marker": _text(page, "NextUploadIdMarker"),
                }

    def abort_upload(self, key: str, upload: str) -> None:
        """See `UploadAccess`."""
        with self._session() as session:
            self._asked(session, "DELETE", key, {"uploadId": upload})

    def keeps_versions(self) -> bool:
        """Whether the bucket keeps what is deleted or overwritten; raises like the rest."""
        with self._session() as session:
            return _text(self._asked(session, "GET", "", {"versioning": ""}), "Status") == "Enabled"

    def _session(self) -> requests.Session:
        from google.auth.transport.requests import AuthorizedSession
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        session: requests.Session = AuthorizedSession(google_credentials(self.service_account))
        if self.ca_bundle is not None:
            session.verify = str(self.ca_bundle)
        again = Retry(_TRIES, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504), raise_on_status=False)
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(max_retries=again))
        return session

    def _asked(self, session: requests.Session, method: str, key: str, query: dict[str, str]) -> ElementTree.Element:
        import google.auth.exceptions
        import requests

        url = f"{self.endpoint.rstrip('/')}/{quote(self.bucket)}/{quote(key)}"
        try:
            answer = session.request(method, url, params=query, timeout=(_CONNECT_SECONDS, _READ_SECONDS))
            if answer.ok or (method == "DELETE" and answer.status_code == 404):
                return ElementTree.fromstring(answer.content) if answer.ok and answer.content else _NOTHING  # noqa: S314
        except (requests.RequestException, google.auth.exceptions.GoogleAuthError) as error:
            raise UnavailableError(
                f"unfinished uploads could not be listed or aborted: {type(error).__name__}"
            ) from None
        except ElementTree.ParseError:
            raise UnavailableError("unfinished uploads could not be listed: the answer is no XML") from None
        if answer.status_code in (401, 403, 405, 501):
            raise DeniedError(
                f"unfinished uploads can't be listed or aborted: HTTP {answer.status_code}",
                next_step="grant storage.multipartUploads.list and storage.multipartUploads.abort, or let a lifecycle rule"
                " abort incomplete uploads after 7 days",
            )
        raise UnavailableError(f"unfinished uploads could not be listed or aborted: HTTP {answer.status_code}")


_NOTHING = ElementTree.Element("nothing")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ElementTree.Element, tag: str) -> str:
    return next((one.text or "" for one in element if _tag(one) == tag), "")


def _code(error: Exception) -> str:
    return error.response.get("Error", {}).get("Code", "") if isinstance(error, botocore.exceptions.ClientError) else ""


def _told(error: Exception, permission: str) -> DeniedError | UnavailableError:
    if _code(error) in ("AccessDenied", "403", "NotImplemented", "MethodNotAllowed"):
        return DeniedError(
            f"unfinished uploads can't be listed or aborted: {error}",
            next_step=f"grant {permission}, or let a lifecycle rule abort incomplete uploads after 7 days",
        )
    return UnavailableError(f"unfinished uploads could not be listed or aborted: {error}")
