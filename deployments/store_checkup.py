"""What `athena-backup check` looks at in a store ("stores", sections 1, 5 and 7).

Backups need to write, read and list, nothing else: what only deleting sets needs, or only tidies up after a kill, is a note.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import botocore.exceptions

from athena_backup.errors import AthenaError, DeniedError, FinalError, UnavailableError
from athena_backup.settings import Settings
from athena_backup.store import Store, read_document
from athena_backup.store.google import GoogleAccess
from athena_backup.store.local import NoStoreYetError
from athena_backup.store.sweep import S3Access, UploadAccess
from blocks.stores import bucket_access, open_store
from deployments.looks import Finding, Note, look

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_RULE_DAYS = 7
_NO_VERSIONS = "the bucket keeps none: what is deleted is gone"
_UNFREED = "a deleted set frees no room before a lifecycle rule removes noncurrent versions"
_IF_KEPT = f"; if it does, {_UNFREED}"
_PROOFS = {
    "fsync+size": "objects are synced to the disk",
    "digest": "each upload is sent with its SHA-256",
    "tls+size": "bytes on the way are protected by TLS alone (ATHENA_READ_BACK=true reads every part again)",
    "read-back": "every part is read back and hashed",
}


def store_findings(settings: Settings) -> Iterator[Finding]:
    """Look at the store; nothing is changed but probe objects, which go again where they may be deleted."""
    try:
        store, access = open_store(settings), bucket_access(settings)
    except NoStoreYetError as error:
        # Nothing is written there, not even to try: it may be where a disk is to be mounted.
        yield Finding("store", "note", str(error))
        return
    except (AthenaError, OSError) as error:
        yield Finding("store", "FAIL", str(error))
        return
    probe = f"{settings.athena_namespace}/operations/probe-{secrets.token_hex(6)}"
    found = look("store", lambda: check_store(store, probe))
    yield found
    if not found.good:
        with contextlib.suppress(AthenaError):
            store.delete([probe])
        return
    yield look("store, deleting", lambda: check_deleting(store, probe))
    if isinstance(access, S3Access):
        yield from _s3_findings(access, settings.athena_namespace)
    elif isinstance(access, GoogleAccess):
        yield from google_findings(access, settings.athena_namespace)


def check_store(store: Store, key: str) -> str:
    """That the store can be written and read in, and that a second create of one key is refused ("stores", section 1)."""
    ours, other = secrets.token_bytes(16), secrets.token_bytes(16)
    is_made = store.put(key, ours, if_absent=True)
    # A client that repeats a create whose answer was lost is refused its own object (tried).
    if not is_made and read_document(store, key) != ours:
        raise FinalError("a probe object that nobody made exists already")
    if store.put(key, other, if_absent=True):
        raise FinalError(
            "it lets two writers create one object: both would believe that their backup stands",
            next_step="use another file system"
            if store.location.type == "local"
            else "use a server that keeps If-None-Match on puts",
        )
    if read_document(store, key) != ours:
        raise FinalError("it gives back other bytes than were written", next_step="do not rely on this store")
    if key not in {entry.key for entry in store.entries(key.rpartition("/")[0] + "/")}:
        raise FinalError("it does not list what was written", next_step="grant the permission to list")
    return f"{store.location.type} {store.location.place}, writable and readable; {_PROOFS[store.proof]}{_room(store)}"


def check_deleting(store: Store, key: str) -> str | Note:
    """Whether objects can be deleted, which backups and restores do not need."""
    try:
        store.delete([key])
    except DeniedError:
        return Note(
            f"refused, so sets can't be deleted through this service, and the probe {key} stays; backups and restores need no"
            " such permission"
        )
    return "allowed"


def _room(store: Store) -> str:
    if store.location.type != "local":
        return ""
    status = os.statvfs(store.location.place)
    return f", {status.f_bavail * status.f_frsize / (1 << 30):.1f} GiB free"


def _s3_findings(access: S3Access, namespace: str) -> Iterator[Finding]:
    try:
        client = access.client()
    except botocore.exceptions.BotoCoreError as error:
        yield Finding("store, permissions", "note", f"boto3 can't be used, so they are not looked at: {error}")
        return
    yield look("store, checksums", partial(check_checksums, client, access.bucket, namespace))
    yield look("store, unfinished uploads", partial(check_uploads, client, access, namespace))
    yield look("store, versions", partial(check_versions, client, access.bucket, namespace))


def check_checksums(client: S3Client, bucket: str, namespace: str) -> str | Note:
    """Whether the server looks at the SHA-256 that is sent along: a put with a wrong one has to be refused."""
    key = f"{namespace}/operations/probe-{secrets.token_hex(6)}"
    wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    try:
        client.put_object(Bucket=bucket, Key=key, Body=b"probe", ChecksumSHA256=wrong)
    except botocore.exceptions.ClientError as error:
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 400:
            return "an upload that does not match its SHA-256 is refused"
        raise _told(error, "s3:PutObject") from None
    except botocore.exceptions.BotoCoreError as error:
        raise _told(error, "s3:PutObject") from None
    with contextlib.suppress(botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
        client.delete_object(Bucket=bucket, Key=key)
    return Note(
        "the server takes a SHA-256 without looking at it: only the requests' signatures protect bytes on their way"
        " (ATHENA_READ_BACK=true reads every part again)"
    )


def google_findings(access: GoogleAccess, namespace: str) -> Iterator[Finding]:
    """What only its XML API tells of a Google bucket."""

    def uploads() -> str | Note:
        try:
            return _unfinished(access, namespace)
        except DeniedError as error:
            reason = f"those of a killed backup can't be listed: {error.cause}"
        try:
            if access.aborts_uploads():
                return "can't be listed, but a lifecycle rule aborts them"
        except DeniedError:
            return Note(f"{reason}; {_wanted_rule()}; whether there is one may not be looked at (storage.buckets.get)")
        return Note(f"{reason}; {_wanted_rule()}; there is none")

    def versions() -> str | Note:
        try:
            is_kept = access.keeps_versions()
        except DeniedError:
            return Note(f"whether the bucket keeps old versions may not be looked at (storage.buckets.get){_IF_KEPT}")
        if is_kept:
            return Note(f"the bucket keeps old versions: {_UNFREED}")
        return "the bucket keeps none; where soft delete is on, as it is by default, what is deleted takes room for its days"

    yield look("store, unfinished uploads", uploads)
    yield look("store, versions", versions)


def _unfinished(access: UploadAccess, namespace: str) -> str:
    found = access.list_uploads(f"{namespace}/")
    return f"{len(found)} there; the next operation aborts those of a killed backup, if it may"


def check_uploads(client: S3Client, access: S3Access, namespace: str) -> str | Note:
    """Whether what a killed upload leaves can be found, or else whether a lifecycle rule takes it away."""
    try:
        return _unfinished(access, namespace)
    except DeniedError as error:
        reason = error.cause
    rules = _rules(client, access.bucket, namespace)
    if rules is None:
        return Note(
            f"{reason}; {_wanted_rule()}; whether there is one may not be looked at (s3:GetLifecycleConfiguration)"
        )
    days = [rule["AbortIncompleteMultipartUpload"].get("DaysAfterInitiation", 0) for rule in rules if _aborts(rule)]
    if days:
        return f"can't be listed, but a lifecycle rule aborts them after {min(days)} days"
    return Note(f"{reason}; {_wanted_rule()}; there is none")


def check_versions(client: S3Client, bucket: str, namespace: str) -> str | Note:
    """Whether a delete frees what it deletes."""
    try:
        status = client.get_bucket_versioning(Bucket=bucket).get("Status")
    except botocore.exceptions.ClientError:
        return Note(f"whether the bucket keeps old versions may not be looked at (s3:GetBucketVersioning){_IF_KEPT}")
    except botocore.exceptions.BotoCoreError as error:
        raise _told(error, "s3:GetBucketVersioning") from None
    if not status:
        return _NO_VERSIONS
    rules = _rules(client, bucket, namespace) or []
    if any("NoncurrentVersionExpiration" in rule for rule in rules):
        return "the bucket keeps old versions, and a lifecycle rule removes them"
    return Note(f"the bucket keeps old versions: {_UNFREED}, and none was seen")


def _wanted_rule() -> str:
    return f"give the bucket a lifecycle rule that aborts incomplete uploads after {_RULE_DAYS} days"


def _aborts(rule: Mapping[str, Any]) -> bool:
    return "AbortIncompleteMultipartUpload" in rule


def _rules(client: S3Client, bucket: str, namespace: str) -> list[Mapping[str, Any]] | None:
    """The enabled lifecycle rules that hold for the namespace's objects; None where they may not be looked at."""
    try:
        found = client.get_bucket_lifecycle_configuration(Bucket=bucket).get("Rules", [])
    except botocore.exceptions.ClientError as error:
        return [] if error.response.get("Error", {}).get("Code") == "NoSuchLifecycleConfiguration" else None
    except botocore.exceptions.BotoCoreError:
        return None
    return [rule for rule in found if rule.get("Status") == "Enabled" and f"{namespace}/".startswith(_prefix(rule))]


def _prefix(rule: Mapping[str, Any]) -> str:
    chosen = rule.get("Filter") or {}
    # A rule that asks for tags or sizes as well does not hold for all objects: none of ours has tags.
    if chosen.keys() - {"Prefix"}:
        return "\0"
    return str(chosen.get("Prefix") or rule.get("Prefix") or "")


def _told(error: Exception, permission: str) -> AthenaError:
    if isinstance(error, botocore.exceptions.ClientError):
        return DeniedError(f"refused: {error}", next_step=f"does the key have {permission}?")
    return UnavailableError(f"the store does not answer: {error}")
