"""The platform's own identity where no keys are given: AWS, Azure, Google ("stores", section 6).

Each function returns what the object store's client calls whenever its credentials are about to expire; the platform's own
libraries find and renew them. The tokens that they return are never kept longer than `RENEW_SECONDS` without a new look.
"""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import botocore.exceptions
import botocore.session

from athena_backup.errors import DeniedError

RENEW_AHEAD = timedelta(minutes=10)
_LOOK_AGAIN = timedelta(minutes=15)
"""Expiry told to the client where the platform's library renews by itself: it asks again well before this."""

Identity = Callable[[], Any]


def aws_identity() -> Identity:
    """The usual AWS chain: environment, shared files, web identity, container and instance role (botocore)."""
    found = None

    def identity() -> dict[str, Any]:
        nonlocal found
        try:
            if found is None:
                found = botocore.session.get_session().get_credentials()
            if found is None:
                raise DeniedError(
                    "no AWS credentials were found in environment, files, web identity or instance role",
                    next_step="set AWS_ACCESS_KEY and AWS_SECRET_KEY, or give the pod a role",
                )
            frozen = found.get_frozen_credentials()
        except botocore.exceptions.BotoCoreError as error:
            raise DeniedError(f"AWS gives no credentials: {error}", next_step="check the pod's role") from None
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _LOOK_AGAIN if frozen.token else None,
        }

    return identity


def azure_identity() -> Identity:
    """Managed identity, workload identity and the rest of azure-identity's default chain."""
    from azure.core.exceptions import AzureError
    from azure.identity import DefaultAzureCredential

    credential = DefaultAzureCredential(exclude_interactive_browser_credential=True)

    def identity() -> dict[str, Any]:
        try:
            token = credential.get_token("https://storage.azure.com/.default")
        except AzureError as error:
            raise DeniedError(
                f"Azure gives no token: {str(error).splitlines()[0]}",
                next_step="assign a managed identity to the pod, or set AZURE_STORAGE_ACCESS_KEY",
            ) from None
        return {"token": token.token, "expires_at": datetime.fromtimestamp(token.expires_on, UTC)}

    return identity


def google_identity() -> Identity:
    """Google's default credentials: file named by the environment, workload identity, metadata server."""
    import google.auth
    import google.auth.exceptions
    from google.auth.transport.requests import Request

    found: Any = None

    def identity() -> dict[str, Any]:
        nonlocal found
        try:
            if found is None:
                found, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/devstorage.read_write"])
            found.refresh(Request())
        except google.auth.exceptions.GoogleAuthError as error:
            raise DeniedError(
                f"Google gives no token: {error}",
                next_step="bind a service account to the pod, or set GCP_SERVICE_ACCOUNT",
            ) from None
        return {"token": found.token, "expires_at": found.expiry.replace(tzinfo=UTC)}

    return identity
