"""What obstore has no words for in a Google bucket, by its XML API: unfinished uploads, versions, lifecycle rules.

Proxies are taken from the environment and nothing else is: a login from ~/.netrc, which Google's own session would put in
the token's place, stays where it is ("stores", section 6).
"""

import contextlib
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import certifi
import google.auth.exceptions
import google.auth.transport
import httpx

from athena_backup.errors import AthenaError, DeniedError, FinalError, UnavailableError
from athena_backup.store.credentials import google_credentials, passes_on_google

_TRIES = 5
_PAUSE_SECONDS = 0.5
_CONNECT_SECONDS = 10
_READ_SECONDS = 60
_ANSWER_SECONDS = 120
"""For a whole answer: a server that trickles its bytes must not hold up who waits for it."""
_ANSWER_LIMIT_BYTES = 16 << 20
"""A page has a thousand uploads at most (Google's manual, "List multipart uploads")."""
_PAGES_LIMIT = 10_000
# Refused, or a server that lacks the call: whoever asks has to do without.
_REFUSALS = (400, 401, 403, 404, 405, 501)
_PASSING = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class GoogleAccess:
    """How a Google bucket is reached by the XML API (Google's manual, "XML API multipart uploads").

    ``service_account`` is the JSON of its key; None: Google's default credentials. Every method raises `DeniedError` for
    credentials or permissions and for a server that lacks the call, `FinalError` for a CA bundle, else `UnavailableError`.
    """

    bucket: str
    endpoint: str
    service_account: str | None = field(default=None, repr=False)
    ca_bundle: Path | None = None

    def list_uploads(self, prefix: str) -> list[tuple[str, str]]:
        """See `UploadAccess`."""
        found: list[tuple[str, str]] = []
        seen: set[tuple[str, str]] = {("", "")}
        after: dict[str, str] = {}
        with self._session() as session:
            for _ in range(_PAGES_LIMIT):
                page = session.get("ListMultipartUploadsResult", {"uploads": "", "prefix": prefix, **after})
                found += [(_text(one, "Key"), _text(one, "UploadId")) for one in page if _tag(one) == "Upload"]
                if _text(page, "IsTruncated") != "true":
                    return found
                marker = (_text(page, "NextKeyMarker"), _text(page, "NextUploadIdMarker"))
                if marker in seen:
                    break
                seen.add(marker)
                after = {"key-marker": marker[0], "upload-id-marker": marker[1]}
        raise UnavailableError("the list of unfinished uploads has no end")

    def abort_uploads(self, uploads: Sequence[tuple[str, str]]) -> None:
        """See `UploadAccess`."""
        first: AthenaError | None = None
        with self._session() as session:
            for key, upload in uploads:
                try:
                    session.delete(key, {"uploadId": upload})
                except AthenaError as error:
                    first = first or error
        if first is not None:
            raise first

    def keeps_versions(self) -> bool:
        """Whether the bucket keeps what is deleted or overwritten."""
        with self._session() as session:
            return _text(session.get("VersioningConfiguration", {"versioning": ""}), "Status") == "Enabled"

    def aborts_uploads(self) -> bool:
        """Whether a lifecycle rule of the bucket aborts uploads that are never finished."""
        with self._session() as session:
            found = session.get("LifecycleConfiguration", {"lifecycle": ""})
        return any(_tag(one) == "AbortIncompleteMultipartUpload" for one in found.iter())

    @contextlib.contextmanager
    def _session(self) -> Iterator["_Session"]:
        context = ssl.create_default_context()
        # A slim image may have no authorities of its own.
        context.load_verify_locations(certifi.where())
        if self.ca_bundle is not None:
            try:
                context.load_verify_locations(self.ca_bundle)
            except OSError as error:
                raise FinalError(f"the CA bundle {self.ca_bundle} can't be read: {error.strerror or error}") from None
        timeout = httpx.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS)
        with httpx.Client(verify=context, timeout=timeout, follow_redirects=False) as client:
            yield _Session(
                client, f"{self.endpoint.rstrip('/')}/{quote(self.bucket)}/", _token(client, self.service_account)
            )


@dataclass(frozen=True)
class _Session:
    client: httpx.Client
    url: str
    headers: Mapping[str, str] = field(repr=False)

    def get(self, root: str, query: dict[str, str]) -> ElementTree.Element:
        """The document that answers; anything else than one with that root is told as an answer that is none."""
        status, body = self._asked("GET", self.url, query)
        if status == 200:
            with contextlib.suppress(ElementTree.ParseError, LookupError, ValueError):
                # Of a server whose every byte is trusted with the backups; expat bounds what entities may grow to.
                document = ElementTree.fromstring(body)  # noqa: S314
                if _tag(document) == root:
                    return document
        raise _told(status)

    def delete(self, key: str, query: dict[str, str]) -> None:
        """Delete; what is gone already is no fault."""
        status, _ = self._asked("DELETE", self.url + quote(key), query)
        if status not in (200, 204, 404):
            raise _told(status)

    def _asked(self, method: str, url: str, query: dict[str, str]) -> tuple[int, bytes]:
        for number in range(_TRIES):
            if number:
                time.sleep(_PAUSE_SECONDS * 2 ** (number - 1))
            try:
                status, body = self._once(method, url, query)
            except httpx.TransportError as error:
                problem: str = type(error).__name__
                continue
            if status not in _PASSING:
                return status, body
            problem = f"HTTP {status}"
        raise UnavailableError(f"the XML API of {self.url} does not answer: {problem}")

    def _once(self, method: str, url: str, query: dict[str, str]) -> tuple[int, bytes]:
        deadline = time.monotonic() + _ANSWER_SECONDS
        body = bytearray()
        with self.client.stream(method, url, params=query, headers=self.headers) as answer:
            for chunk in answer.iter_bytes():
                body += chunk
                if len(body) > _ANSWER_LIMIT_BYTES or time.monotonic() > deadline:
                    raise UnavailableError(f"the XML API of {self.url} answers too much or too slowly")
            return answer.status_code, bytes(body)


class _Transport(google.auth.transport.Request):
    """How Google's library asks for a token: through the same client as everything else."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def __call__(
        self, url: str, method: str = "GET", body: Any = None, headers: Any = None, timeout: Any = None, **_: Any
    ) -> Any:
        del timeout
        try:
            answer = self._client.request(method, url, content=body, headers=headers)
        except httpx.HTTPError as error:
            raise google.auth.exceptions.TransportError(type(error).__name__) from error
        return _Answer(answer.status_code, dict(answer.headers), answer.content)


@dataclass(frozen=True)
class _Answer:
    """What Google's library wants of an answer; its own base class is abstract in all three."""

    status: int
    headers: Mapping[str, str]
    data: bytes


def _token(client: httpx.Client, service_account: str | None) -> dict[str, str]:
    """The header that says who asks, none for a server that wants no tokens."""
    try:
        credentials = google_credentials(service_account)
        if credentials is None:
            return {}
        credentials.refresh(_Transport(client))
    except google.auth.exceptions.GoogleAuthError as error:
        if passes_on_google(error):
            raise UnavailableError("Google gives no token at this moment") from None
        raise DeniedError(
            f"Google gives no token: {str(error).splitlines()[0]}", next_step="look at the service account and its key"
        ) from None
    except (ValueError, TypeError, LookupError) as error:
        raise DeniedError(
            f"Google gives no token: {type(error).__name__}", next_step="look at the service account and its key"
        ) from None
    return {"Authorization": f"Bearer {credentials.token}"}


def _told(status: int) -> DeniedError | UnavailableError:
    if status in _REFUSALS:
        return DeniedError(
            f"refused by the XML API: HTTP {status}",
            next_step="grant the permission, or use a server that has the call",
        )
    return UnavailableError(f"the XML API gave an answer that is none: HTTP {status}")


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _text(element: ElementTree.Element, tag: str) -> str:
    return next((one.text or "" for one in element if _tag(one) == tag), "")
