"""Request bodies: read leniently where the document's own curl lines need it, checked strictly in what they say.

A GET may carry a body, a trailing comma is taken (the document prints one), and whatever is wrong is named all at once.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from athena_backup.names import InvalidNameError, SetId, Timestamp, parse_namespace, shortened
from flows.requests import BackupRequest, RestoreRequest

BODY_LIMIT_BYTES = 64 << 10

# A JSON string, or a comma before a closing bracket: strings are matched first so that a comma inside one stays.
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])')
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")


class BodyError(Exception):
    """A body that can't be accepted; the message names every fault."""


@dataclass
class Body:
    """A JSON object whose members are taken out one by one; what is left at the end nobody knows."""

    members: dict[str, object]
    faults: list[str] = field(default_factory=list)

    def take(self, name: str) -> object:
        """A member's value, None where it is absent or null."""
        return self.members.pop(name, None)

    def text(self, name: str, check: Callable[[str], object]) -> str | None:
        """A member that is a text which ``check`` accepts."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.faults.append(f"{name} has to be a text")
            return None
        if _PLACEHOLDER.search(value):
            self.faults.append(
                f"{name} still holds the placeholder {shortened(repr(value))}: put the real value in its place"
            )
            return None
        try:
            check(value)
        except InvalidNameError as error:
            self.faults.append(f"{name}: {error}")
            return None
        return value

    def flag(self, name: str) -> bool:
        """A member that is true or false; false where it is absent."""
        value = self.take(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            self.faults.append(f"{name} has to be true or false")
            return False
        return value

    def finish(self) -> None:
        """Raise `BodyError` with every fault, members that nobody knows included."""
        if self.members:
            self.faults.append("unknown members: " + shortened(", ".join(sorted(self.members))))
        if self.faults:
            raise BodyError("; ".join(self.faults))


def parse_body(raw: bytes) -> Body:
    """The body as an object; none at all counts as ``{}``. Raises `BodyError`."""
    if len(raw) > BODY_LIMIT_BYTES:
        raise BodyError(f"the body is longer than {BODY_LIMIT_BYTES} bytes")
    try:
        text = raw.decode("utf-8").strip()
        document = _loads(text) if text else {}
    except UnicodeDecodeError:
        raise BodyError("the body is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise BodyError(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except ValueError:
        raise BodyError("the body holds a number of too many digits") from None
    except RecursionError:
        raise BodyError("the body is nested too deeply") from None
    if not isinstance(document, dict):
        raise BodyError("the body has to be a JSON object")
    return Body(document)


def _loads(text: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise BodyError("a member stands twice in the body")
        return members

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError:
        return json.loads(_TRAILING_COMMA.sub(lambda match: match.group(1) or "", text), object_pairs_hook=once)


def backup_request(body: Body) -> BackupRequest:
    """The body of ``POST /ondemandbackup``."""
    request = BackupRequest(only_databases=body.flag("onlyConfig"))
    body.finish()
    return request


@dataclass(frozen=True)
class StatusRequest:
    """The body of a status or delete call."""

    timestamp: Timestamp | None
    source_namespace: str | None = None


def status_request(body: Body, query_timestamp: str | None, *, with_source: bool = False) -> StatusRequest:
    """The body of a status or delete call; ``?timestamp=`` counts where the body has none."""
    if body.members.get("timestamp") is None and query_timestamp is not None:
        body.members["timestamp"] = query_timestamp
    timestamp = body.text("timestamp", Timestamp.parse)
    source = body.text("sourceNamespace", parse_namespace) if with_source else None
    body.finish()
    return StatusRequest(Timestamp.parse(timestamp) if timestamp else None, source)


@dataclass(frozen=True)
class RestoreBody:
    """The body of ``POST /ondemandrestore`` before its ``svcs`` were held against the set."""

    request: RestoreRequest
    disabled: tuple[str, ...]
    named: tuple[str, ...]


def restore_body(body: Body, own_namespace: str) -> RestoreBody:
    """The body of ``POST /ondemandrestore``."""
    if body.members.get("timestamp") is None:
        body.faults.append("timestamp is missing: which backup set is to be restored?")
    timestamp = body.text("timestamp", Timestamp.parse)
    source = body.text("sourceNamespace", parse_namespace)
    services = body.take("svcs")
    disabled, named = _services(services, body.faults)
    skip_before, skip_after = body.flag("disablePreRestoreChecks"), body.flag("disablePostRestoreChecks")
    report = body.flag("enableReportGeneration")
    accepts_loss, allows_devices = body.flag("acceptMetadataLoss"), body.flag("allowDevices")
    body.finish()
    request = RestoreRequest(
        timestamp=timestamp or "",
        source_namespace=source or own_namespace,
        skip=list(disabled),
        skip_health_check_before=skip_before,
        skip_health_check_after=skip_after,
        accept_metadata_loss=accepts_loss,
        allow_devices=allows_devices,
        report=report,
    )
    return RestoreBody(request, disabled, named)


def _services(services: object, faults: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if services is None:
        return (), ()
    if not isinstance(services, Mapping):
        faults.append('svcs has to be an object, such as {"gitserver": {"disable": true}}')
        return (), ()
    disabled = []
    for name, switches in services.items():
        shown = f"svcs.{shortened(str(name))}"
        if not isinstance(switches, Mapping) or not set(switches) <= {"disable", "disabled"}:
            faults.append(f'{shown} has to be {{"disable": true}} or {{"disable": false}}')
            continue
        values = list(switches.values())
        if not all(isinstance(value, bool) for value in values) or len(set(values)) > 1:
            faults.append(f"{shown}: disable has to be true or false, and disabled the same")
            continue
        if True in values:
            disabled.append(str(name))
    return tuple(disabled), tuple(str(name) for name in services)


def set_id_of(request: StatusRequest, namespace: str) -> SetId | None:
    """The set of the own namespace that a status or delete call is about."""
    return SetId(namespace, request.timestamp) if request.timestamp else None
