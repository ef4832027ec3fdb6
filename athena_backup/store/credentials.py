"""The platform's own identity where no keys are given: AWS, Azure, Google ("stores", section 6).

Given keys are used with nothing of the environment beside them (`bare_environment`). Each other function returns what the
object store's client calls whenever its credentials are about to expire; the platform's own libraries find and renew them.
"""

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.exceptions
import botocore.session

from athena_backup.errors import DeniedError

_AHEAD = timedelta(minutes=5)
"""The client asks for new credentials five minutes before it is told that they expire; ten are wanted."""
_LOOK_AGAIN = timedelta(minutes=15)
"""Expiry told to the client where the platform's library renews by itself: it asks again well before this."""

_GOOGLE_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_write",)
_FOREIGN_PREFIXES = ("AWS_", "AZURE_", "GOOGLE_", "STORAGE_EMULATOR_")
_environment_lock = threading.Lock()

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


def aws_identity() -> Identity:
    """The usual AWS chain: environment, shared files, web identity, container and instance role (botocore)."""
    found = None

    def identity() -> dict[str, Any]:
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
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError, OSError) as error:
            raise DeniedError(f"AWS gives no credentials: {error}", next_step="check the pod's role") from None
        # botocore tells the expiry to nobody; without it credentials of a minute would be used for ten.
        expiry = getattr(found, "_expiry_time", None) or datetime.now(UTC) + _LOOK_AGAIN
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": min(expiry.astimezone(UTC), datetime.now(UTC) + _LOOK_AGAIN) if frozen.token else None,
        }

    return identity


def azure_identity() -> Identity:
    """Managed identity, workload identity and the rest of azure-identity's default chain."""
    from azure.core.exceptions import AzureError
    from azure.identity import DefaultAzureCredential

    with _whole_environment():
        credential = DefaultAzureCredential(exclude_interactive_browser_credential=True)

    def identity() -> dict[str, Any]:
        try:
            token = credential.get_token("https://storage.azure.com/.default")
        except AzureError as error:
            raise DeniedError(
                f"Azure gives no token: {str(error).splitlines()[0]}",
                next_step="assign a managed identity to the pod, or set AZURE_STORAGE_ACCESS_KEY",
            ) from None
        return {"token": token.token, "expires_at": datetime.fromtimestamp(token.expires_on, UTC) - _AHEAD}

    return identity


def google_identity() -> Identity:
    """Google's default credentials: file named by the environment, workload identity, metadata server."""
    import google.auth.exceptions
    from google.auth.transport.requests import Request

    found: Any = None

    def identity() -> dict[str, Any]:
        nonlocal found
        try:
            if found is None:
                found = google_credentials(None)
            found.refresh(Request())
        except google.auth.exceptions.GoogleAuthError as error:
            raise DeniedError(
                f"Google gives no token: {error}",
                next_step="bind a service account to the pod, or set GCP_SERVICE_ACCOUNT",
            ) from None
        return {"token": found.token, "expires_at": found.expiry.replace(tzinfo=UTC) - _AHEAD}

    return identity


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
