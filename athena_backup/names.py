"""Names that come from outside, and the one place where each is parsed.

Timestamps, namespaces, component names and set ids arrive in URLs, bodies, settings and store listings. Everything else
in the project receives them as the values below and never looks at the text again.
"""

import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NewType

Attempt = NewType("Attempt", str)
"""One try at writing a component: 12 hex digits, new for every try, a folder in the key of everything that it writes."""

RESERVED_COMPONENT_NAME = "postgres"
"""Means *all databases* in the ``svcs`` of a restore (contract, section 2), so no component may bear it."""

_QUOTED_CHARACTERS = 100
_TIMESTAMP = re.compile(r"\d{4}-\d{2}-\d{2}t\d{2}-\d{2}-\d{2}", re.ASCII)
_TIMESTAMP_FORMAT = "%Y-%m-%dt%H-%M-%S"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_ATTEMPT = re.compile(r"[0-9a-f]{12}", re.ASCII)


def shortened(text: str) -> str:
    """A text from outside as an error may quote it: a longer one than 100 characters is cut there, with its length behind."""
    if len(text) <= _QUOTED_CHARACTERS:
        return text
    return f"{text[:_QUOTED_CHARACTERS]}... ({len(text)} characters)"


class InvalidNameError(ValueError):
    """A name from outside that can't be one; the message names it, says why, and shows a right one."""


@dataclass(frozen=True, order=True)
class Timestamp:
    """The key of a backup set: an instant in UTC, to the second, written ``2023-02-02t16-00-00`` (contract, section 2)."""

    instant: datetime

    def __post_init__(self) -> None:
        if self.instant.utcoffset() is None or self.instant.microsecond:
            raise InvalidNameError(f"{self.instant!r} is not an aware instant on a whole second")

    @classmethod
    def parse(cls, text: str) -> "Timestamp":
        """Read ``YYYY-MM-DDthh-mm-ss``; raises `InvalidNameError` for anything else, dates that don't exist included."""
        if not isinstance(text, str) or not _TIMESTAMP.fullmatch(text):
            raise InvalidNameError(
                f"timestamp {shortened(repr(text))} is not of the form YYYY-MM-DDthh-mm-ss (UTC, a lower-case t), "
                "such as 2023-02-02t16-00-00"
            )
        try:
            return cls(datetime.strptime(text, _TIMESTAMP_FORMAT).replace(tzinfo=UTC))
        except ValueError as error:
            raise InvalidNameError(f"timestamp {text!r} names no existing date and time: {error}") from None

    @classmethod
    def of(cls, instant: datetime) -> "Timestamp":
        """The timestamp of an aware instant, cut to the second."""
        return cls(instant.astimezone(UTC).replace(microsecond=0))

    def __str__(self) -> str:
        # strftime writes a year before 1000 without its zeros.
        return self.instant.strftime(_TIMESTAMP_FORMAT).rjust(19, "0")


def parse_namespace(text: str) -> str:
    """Check a namespace; it becomes the first folder of every key. Raises `InvalidNameError`."""
    return _parse_name(text, "namespace", "app")


def parse_component_name(text: str) -> str:
    """Check a component's name; it becomes a folder of keys and a word of the ongoing line. Raises `InvalidNameError`."""
    name = _parse_name(text, "component name", "gitserver")
    if name == RESERVED_COMPONENT_NAME:
        raise InvalidNameError(
            f"component name {name!r} is reserved: it means all databases in a restore's svcs. Give the component "
            "another name; the database itself may keep its own"
        )
    return name


def _parse_name(text: str, what: str, example: str) -> str:
    if not isinstance(text, str) or not _NAME.fullmatch(text):
        raise InvalidNameError(
            f"{what} {shortened(repr(text))} is not allowed: 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit, "
            f"such as {example!r}"
        )
    return text


def new_attempt() -> Attempt:
    """A fresh `Attempt`."""
    return Attempt(secrets.token_hex(6))


def is_attempt(text: str) -> bool:
    """Whether a folder's name is that of an attempt."""
    return bool(_ATTEMPT.fullmatch(text))


@dataclass(frozen=True, order=True)
class SetId:
    """Which backup set: ``namespace`` and ``timestamp``; written ``NAMESPACE/TIMESTAMP`` on the command line."""

    namespace: str
    timestamp: Timestamp

    def __post_init__(self) -> None:
        parse_namespace(self.namespace)

    @classmethod
    def parse(cls, text: str, own_namespace: str) -> "SetId":
        """Read ``TIMESTAMP`` (of the own namespace) or ``NAMESPACE/TIMESTAMP``; raises `InvalidNameError`."""
        namespace, slash, timestamp = text.rpartition("/")
        return cls(namespace if slash else own_namespace, Timestamp.parse(timestamp))

    @property
    def prefix(self) -> str:
        """The folder of the set in its store, with the closing slash."""
        return f"{self.namespace}/{self.timestamp}/"

    def __str__(self) -> str:
        return f"{self.namespace}/{self.timestamp}"
