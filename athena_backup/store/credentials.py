"""The platform's own identity where no keys are given: AWS, Azure, Google ("stores", section 6).

Given keys are used with nothing of the environment beside them (`bare_environment`). Each other function returns what the
object store's client calls whenever its credentials are about to expire; the platform's own libraries find and renew them.
It raises `DeniedError`, and `UnavailableError` for what may pass: an identity service that is busy or away is no wrong role.
"""

import contextlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import botocore.exceptions
import botocore.session

from athena_backup.errors import DeniedError, UnavailableError

_AHEAD = timedelta(minutes=5)
"""The client asks for new credentials five minutes before it is told that they expire; ten are wanted."""
_LOOK_AGAIN = timedelta(minutes=15)
"""Expiry told to the client where the platform's library renews by itself: it asks again well before this."""
_PAUSE = timedelta(seconds=30)
"""An identity service that failed is left alone for so long, as long as what it gave last is good."""
_PASSES = "the identity service is asked again with the next try; if that lasts, look at it, and at the way to it"
# Of the token service: what it refuses for good, and what it asks to try again.
_AWS_REFUSALS = ("AccessDenied", "InvalidIdentityToken")
_AWS_BUSY = ("Throttling", "ThrottlingException", "IDPCommunicationError")
# A container's agent tells its status in botocore's words alone.
_AWS_AGENT_BUSY = re.compile(r"non 200 response (?:429|5\d\d) from container metadata")
# What goes wrong in botocore, answers that are none among it.
_AWS_PROBLEMS = (
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    OSError,
    RuntimeError,
    LookupError,
    ValueError,
)

_GOOGLE_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)
_FOREIGN_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")
_environment_lock = threading.Lock()
logger = logging.getLogger("athena_backup.store")

Identity = Callable[[], Any]


@contextlib.contextmanager
def bare_environment() -> Iterator[None]:
    """While the block lasts, this process's environment holds nothing that a client would take for one of its settings.

    Every client reads it at its making, explicit options or not: a foreign AWS_SESSION_TOKEN went with every request (tried).
    """
    with _environment_lock:
        foreign = {name: value for name, value in os.environ.items() if name.upper().startswith(_FOREIGN_PREFIXES)}
        for name in foreign:
            del os.environ[name]
        try:
            yield
        finally:
            os.environ.update(foreign)


@contextlib.contextmanager
def _whole_environment() -> Iterator[None]:
    """While the block lasts, no other thread has the environment bare."""
    with _environment_lock:
        yield


@dataclass(frozen=True)
class _Given:
    """What an identity gave."""

    credentials: Mapping[str, Any] = field(repr=False)
    ends: datetime | None
    """None: nobody says."""
    asked_again: datetime | None
    """What the client is told as their end; None: it never asks again."""


class _Ask(Protocol):
    def __call__(self, *, is_renewal: bool) -> _Given:
        """New credentials; raises `DeniedError` and `UnavailableError`. A renewal was given some before."""


def _lasting(ask: _Ask) -> Identity:
    """An identity that gives what it got last for as long as that is good, where it gets nothing new."""
    last: _Given | None = None
    failed_at = datetime.min.replace(tzinfo=UTC)

    def identity() -> dict[str, Any]:
        nonlocal last, failed_at
        if last is None or not _is_good(last) or datetime.now(UTC) - failed_at >= _PAUSE:
            try:
                last = ask(is_renewal=last is not None)
                return {**last.credentials, "expires_at": last.asked_again}
            except (DeniedError, UnavailableError) as error:
                if last is None or not _is_good(last):
                    raise
                failed_at = datetime.now(UTC)
                logger.warning("credentials are not renewed, and used on until they end: %s", error)
        return {**last.credentials, "expires_at": last.ends or datetime.now(UTC) + _LOOK_AGAIN}

    return identity


def _is_good(given: _Given) -> bool:
    return given.ends is None or given.ends > datetime.now(UTC)


def aws_identity() -> Identity:
    """The usual AWS chain: environment, shared files, web identity, container and instance role (botocore)."""
    found = None

    def ask(*, is_renewal: bool) -> _Given:
        nonlocal found
        try:
            if found is None:
                with _whole_environment():
                    found = botocore.session.get_session().get_credentials()
            if found is None:
                raise DeniedError(
                    "no AWS credentials were found in environment, files, web identity or instance role",
                    next_step="set AWS_ACCESS_KEY and AWS_SECRET_KEY, or give the pod a role",
                )
            frozen = found.get_frozen_credentials()
        # A role that may not be assumed, and a token's file that is not there, are told by types of their own.
        except _AWS_PROBLEMS as error:
            cause = f"AWS gives no credentials: {_first_line(error)}"
            if _passes_on_aws(error, is_renewal=is_renewal):
                raise UnavailableError(cause, next_step=_PASSES) from None
            raise DeniedError(cause, next_step="check the pod's role") from None
        credentials = {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
        }
        if not frozen.token:
            return _Given(credentials, None, None)
        # botocore tells the expiry to nobody; without it credentials of a minute would be used for ten.
        expiry = getattr(found, "_expiry_time", None)
        ends = expiry.astimezone(UTC) if expiry is not None else None
        look_again = datetime.now(UTC) + _LOOK_AGAIN
        return _Given(credentials, ends, min(ends or look_again, look_again))

    return _lasting(ask)


def _passes_on_aws(error: Exception, *, is_renewal: bool) -> bool:
    """Whether another try may succeed: a renewal that fails says nothing against the role, unless AWS refuses it by name."""
    if isinstance(error, botocore.exceptions.ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code not in _AWS_REFUSALS and (is_renewal or code in _AWS_BUSY or status == 429 or status >= 500)
    no_answer = (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError)
    return (
        is_renewal
        or any(isinstance(one, no_answer) for one in _causes(error))
        or _AWS_AGENT_BUSY.search(str(error)) is not None
    )


def azure_identity() -> Identity:
    """Managed identity, workload identity and the rest of azure-identity's default chain."""
    from azure.core.exceptions import AzureError, ServiceRequestError, ServiceResponseError
    from azure.identity import DefaultAzureCredential

    with _whole_environment():
        credential = DefaultAzureCredential(exclude_interactive_browser_credential=True)

    def passes(error: AzureError) -> bool:
        status = getattr(error, "status_code", None) or 0
        no_answer = (ServiceRequestError, ServiceResponseError)
        return status == 429 or status >= 500 or any(isinstance(one, no_answer) for one in _causes(error))

    def ask(*, is_renewal: bool) -> _Given:
        try:
            token = credential.get_token("https://storage.azure.com/.default")
        except AzureError as error:
            cause = f"Azure gives no token: {_first_line(error)}"
            # The chain says in one word that nobody answered and that there is no identity: who was given one has one.
            if is_renewal or passes(error):
                raise UnavailableError(cause, next_step=_PASSES) from None
            raise DeniedError(
                cause, next_step="assign a managed identity to the pod, or set AZURE_STORAGE_ACCESS_KEY"
            ) from None
        ends = datetime.fromtimestamp(token.expires_on, UTC)
        return _Given({"token": token.token}, ends, ends - _AHEAD)

    return _lasting(ask)


def google_identity() -> Identity:
    """Google's default credentials: file named by the environment, workload identity, metadata server."""
    import google.auth.exceptions
    from google.auth.transport.requests import Request

    found: Any = None

    def ask(*, is_renewal: bool) -> _Given:
        del is_renewal  # Google's library tells by itself what may pass
        nonlocal found
        try:
            if found is None:
                found = google_credentials(None)
            found.refresh(Request())
        except google.auth.exceptions.GoogleAuthError as error:
            cause = f"Google gives no token: {_first_line(error)}"
            if passes_on_google(error):
                raise UnavailableError(cause, next_step=_PASSES) from None
            raise DeniedError(
                cause, next_step="bind a service account to the pod, or set GCP_SERVICE_ACCOUNT"
            ) from None
        ends = found.expiry.replace(tzinfo=UTC)
        return _Given({"token": found.token}, ends, ends - _AHEAD)

    return _lasting(ask)


def passes_on_google(error: Exception) -> bool:
    """Whether another try at a token, which raised this, may succeed."""
    from google.auth.exceptions import GoogleAuthError, TransportError

    for one in _causes(error):
        # With an answer beside its text the metadata server has refused: to this machine no account is bound.
        if isinstance(one, TransportError) and len(one.args) < 2:
            return True
        if isinstance(one, GoogleAuthError) and one.retryable:
            return True
    return False


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those because of which it was raised: a time-out is told by the libraries in words of their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
    """What an error says, as far as a client passes it on."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def google_credentials(service_account: str | None) -> Any:
    """Credentials of Google's own library: of the key with this JSON, or without one its default ones; None for no tokens.

    Raises its `GoogleAuthError`, and `DeniedError` for a key that is none.
    """
    import google.auth
    from google.oauth2.service_account import Credentials

    if service_account is None:
        with _whole_environment():
            found, _ = google.auth.default(scopes=_GOOGLE_SCOPES)
        return found
    document = json.loads(service_account)
    if document.get("disable_oauth"):
        return None
    try:
        return Credentials.from_service_account_info(document, scopes=_GOOGLE_SCOPES)
    except (ValueError, TypeError):
        raise DeniedError("the Google service account's key can't be used", next_step="download a new key") from None
