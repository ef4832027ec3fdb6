"""What a client's error means: the client's types say less than its text, and only here is that text looked into.

`objects` decides what is tried again; the errors that are born here say what an operator has to do.
"""

import re

from obstore.exceptions import AlreadyExistsError, PermissionDeniedError, PreconditionError, UnauthenticatedError

from athena_backup.errors import AbsentError, AthenaError, DeniedError, FinalError, FullError, UnavailableError
from athena_backup.store import StoreLocation

_CAUSE_LIMIT = 300
_DENIED = re.compile(r"status code: 40[13]\b|AuthenticationFailed|AuthorizationFailure|ExpiredToken|code: AccessDenied")
# S3 answers 400 to a token that expired, and to a look without saying why.
_EXPIRED = re.compile(r"performing HEAD .*status code: 400\b")
_LOOK = re.compile(r"performing HEAD ")
_ARCHIVED = re.compile(r"<Code>InvalidObjectState<")
# Of a key that was disabled or is to be deleted; where its use alone is withdrawn, S3 says AccessDenied.
_LOCKED = re.compile(r"<Code>KMS\.(?:Disabled|KMSInvalidState|NotFound)Exception<")
# Azure tells it by its code or by the sentence alone.
_KEPT = re.compile(r"RetentionPolicyNotMet|BlobImmutableDueTo|blob is immutable due to", re.IGNORECASE)
_NO_BUCKET = re.compile(r"NoSuchBucket|ContainerNotFound|The specified bucket does not exist")
_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(?:Other\(\s*OtherError\(\s*)?(\w+)")
_RENEW = "have the store's certificate renewed; if it isn't due, one of the two clocks is wrong"
_NAME = "address the store by a name that its certificate holds, or have that name put into it"
# What rustls calls it (its manual, `CertificateError`), with or without its context: what is wrong, and what to do.
_CERTIFICATES = {
    "UnknownIssuer": ("is not trusted", "if the store has an own authority, name its bundle by ATHENA_CA_BUNDLE"),
    "Expired": ("has expired", _RENEW),
    "NotValidYet": ("is not valid yet", _RENEW),
    "NotValidForName": ("is for another name", _NAME),
    "CaUsedAsEndEntity": (
        "is an authority's (CA:TRUE, as `openssl req -x509` makes it), which no server may show",
        "give it one with basicConstraints=CA:FALSE, by itself or by an own authority, and name that by ATHENA_CA_BUNDLE",
    ),
}
# Why nothing was sent, which the client's first sentence leaves out: who refused, or that the name is unknown.
_UNSENT = re.compile(
    r'(?:([\w.:\[\]%]+:\d+),\s+)?Os \{\s+code: \d+,\s+kind: \w+,\s+message: "([^"]+)"|"(failed to lookup [^"]+)"'
)
_NO_IDENTITY = re.compile(r"credential provider: (Denied|Unavailable)Error: ([^\n]+)")
# Ceph answers 403 to who has no quota left.
_FULL = re.compile(r"status code: 507\b|InsufficientStorage|QuotaExceeded|StorageFull")
_SKEWED = re.compile(r"RequestTimeTooSkewed")
_MISCONFIGURED = re.compile(r"Invalid Access Key|Unable to decode service account")
_PAST_THE_END = re.compile(r"416 Range Not Satisfiable|status code: 416\b|InvalidRange")
_TIMED_OUT = re.compile(r"operation timed out|TimedOut|kind: Timeout")
_ADVICE = "check the store's keys, and that they may read, write and list there"
# The answer to a HEAD has no body: keys, region and clock can't be told apart.
_ADVICE_OF_A_LOOK = (
    "check the store's keys and region, that they may read, write and list there, and this machine's clock"
)


class ChangedError(FinalError):
    """The object is not the one that was looked at."""


def told(location: StoreLocation, key: str, error: Exception) -> AthenaError:
    """What the client says, in an operator's words; the client's types say less than its text."""
    text = str(error)
    what = f"{location.type} store {location.place}: {key or 'listing'}: {cause_of(error)}"
    if isinstance(error, AthenaError):
        return error
    if isinstance(error, PreconditionError):
        return ChangedError(what)
    if _NO_BUCKET.search(text):
        return FinalError(
            f"there is no bucket or container {location.place}",
            next_step="create it, or correct its name; this service never makes one",
            step="storing",
        )
    if _SKEWED.search(text):
        return DeniedError(what, next_step="the clocks of this machine and the store differ: set this one's")
    found = _NO_IDENTITY.search(text)
    if found is not None and found.group(1) == "Unavailable":
        return UnavailableError(found.group(2))
    if found is not None:
        return DeniedError(found.group(2))
    if _FULL.search(text):
        return FullError(what, next_step="make room in the store, or raise its quota")
    if _ARCHIVED.search(text):
        return FinalError(
            f"{location.type} store {location.place}: {key} lies in an archive class of the store",
            next_step="restore it from the archive first (S3's restore-object), then try again",
        )
    if _LOCKED.search(text):
        return FinalError(what, next_step="have the key enabled that the store encrypts it with")
    if _KEPT.search(text):
        return DeniedError(what, next_step="a rule of the store keeps it (retention, legal hold) until that has ended")
    if is_denied(error):
        return DeniedError(what, next_step=_ADVICE_OF_A_LOOK if _LOOK.search(text) else _ADVICE)
    refused = _CERTIFICATE.search(text)
    if refused is not None:
        kind = refused.group(1).removesuffix("Context")
        wrong, next_step = _CERTIFICATES.get(kind, (f"is refused: {kind}", "give the store another certificate"))
        return FinalError(f"{what}: its certificate {wrong}", next_step=next_step)
    if isinstance(error, FileNotFoundError):
        return AbsentError(what)
    if isinstance(error, AlreadyExistsError):
        return FinalError(what)
    if isinstance(error, ValueError) or _MISCONFIGURED.search(text):
        return FinalError(what, next_step="check the store's settings")
    return UnavailableError(what, next_step="check the store's address and the way to it, then try again")


def is_denied(error: Exception) -> bool:
    """Whether credentials were refused, so that renewed ones may help."""
    text = str(error)
    if any(pattern.search(text) for pattern in (_FULL, _ARCHIVED, _LOCKED, _KEPT)):
        return False
    no_identity = _NO_IDENTITY.search(text)
    if no_identity is not None and no_identity.group(1) == "Unavailable":
        # Renewed, it would have forgotten that it was given some before.
        return False
    return isinstance(error, PermissionDeniedError | UnauthenticatedError) or any(
        pattern.search(text) for pattern in (_DENIED, _EXPIRED)
    )


def cause_of(error: Exception) -> str:
    """The first sentence of what the client says, with the answer's own code, or why there is no answer, where that is known."""
    text = str(error)
    code = re.search(r"<Code>([\w.]+)</Code>(?:.*?<Message>([^<]*))?", text, re.DOTALL)
    line = text.partition("\n\nDebug source")[0].partition("<?xml")[0].partition("\n")[0].rstrip(": ")
    message = (code.group(2) or "").strip() if code else ""
    said = f" ({': '.join(filter(None, (code.group(1), message)))})" if code else ""
    unsent = _UNSENT.search(text) if not said else None
    if unsent is not None:
        said = ": " + ": ".join(filter(None, unsent.groups()))
    return line[:_CAUSE_LIMIT] + said[:_CAUSE_LIMIT]


def is_timeout(error: Exception) -> bool:
    """Whether a request took longer than it was given."""
    return _TIMED_OUT.search(str(error)) is not None


def is_past_the_end(error: Exception) -> bool:
    """Whether a range began where the object had ended."""
    return _PAST_THE_END.search(str(error)) is not None
