"""The documents of a set as types: what component.json, manifest.json and failure.json hold, and how they are read.

All are frozen pydantic models, so that the JSON Schema that is published beside the documentation is theirs. A reader
takes any minor version of its own major one, ignoring members that it does not know, and refuses a newer major version.
"""

import json
from typing import Annotated, Literal, TypeVar

import pydantic
import pydantic_core
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from athena_backup.errors import DamagedError, Fault, FinalError
from athena_backup.names import SetId, Timestamp, parse_component_name, parse_namespace

SCHEMA_VERSION = "2.0"
MANIFEST = "manifest.json"
FAILURE = "failure.json"
COMPONENT = "component.json"
INSTRUCTIONS = "RESTORE.md"

Kind = Literal["database", "volume"]
FOLDERS: dict[Kind, str] = {"database": "databases", "volume": "volumes"}


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


_Model = TypeVar("_Model", bound=BaseModel)


class Part(_Document):
    """One numbered object of a component: a whole number of zstd frames."""

    key: str = Field(description="Key of the object in the store, from the store's root.")
    size_bytes: int = Field(ge=0, description="Size of the object as stored (compressed).")
    raw_size_bytes: int = Field(ge=0, description="Size of what is inside, decompressed.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the object as stored.")


class TableData(_Document):
    """Which rows a stream of COPY's bytes holds; ``COPY schema.name (columns) FROM STDIN (FORMAT …)`` loads them."""

    schema_name: str
    name: str
    columns: tuple[str, ...]
    format: Literal["binary", "text"]
    rows: int = Field(ge=0, description="Of this stream; a table that is split has several.")


class Stream(_Document):
    """One stream of a component, a dump, a table's rows or an archive: its parts joined in order."""

    name: str = Field(description="File name of the stream inside the component's folder, without the part's number.")
    parts: tuple[Part, ...]
    table: TableData | None = Field(default=None, description="Of a table's rows, which are not in the dump.")


class Setting(_Document):
    """One ``ALTER DATABASE … SET``, or with a role ``ALTER ROLE … IN DATABASE … SET``."""

    role: str | None
    name: str
    value: str


class Label(_Document):
    """A security label of a database."""

    provider: str
    label: str


class Role(_Document):
    """A role that the database refers to; data only, a restore never runs SQL from a set for it."""

    name: str
    can_login: bool
    inherit: bool
    create_database: bool
    connection_limit: int
    member_of: tuple[str, ...] = ()


class TableCount(_Document):
    """How many rows a table had inside the snapshot; of a partitioned table, its partitions count for themselves."""

    schema_name: str
    name: str
    rows: int


class SequenceState(_Document):
    """Where a sequence stood according to the dump's own entry for it."""

    schema_name: str
    name: str
    last_value: int
    is_called: bool


class Extension(_Document):
    """An extension of the database with its version."""

    name: str
    version: str


class Collation(_Document):
    """A collation by which indexes of the database are sorted, with the version that the server had of it."""

    schema_name: str
    name: str
    version: str


class DatabaseFacts(_Document):
    """What is kept beside a dump, because no dump of one database holds it ("PostgreSQL", section 3)."""

    server: int = Field(description="Number of the server in the manifest.")
    database: str = Field(description="The database's own name; the component's may differ.")
    oid: int
    owner: str
    acl: tuple[str, ...] | None = Field(description="pg_database.datacl as aclitem texts; null: the default.")
    comment: str | None
    labels: tuple[Label, ...]
    settings: tuple[Setting, ...]
    connection_limit: int
    is_template: bool = Field(default=False, description="Whether others may clone it (datistemplate).")
    tablespace: str = Field(description="The database's own.")
    tablespaces: tuple[str, ...] = Field(default=(), description="Those that tables and indexes are in by name.")
    encoding: str
    locale_provider: str = Field(description="'c' libc, 'i' ICU, 'b' builtin, as in pg_database.")
    collate: str
    ctype: str
    locale: str | None = Field(description="The ICU or builtin locale.")
    icu_rules: str | None
    collation_version: str | None
    collations: tuple[Collation, ...] = ()
    roles: tuple[Role, ...]
    tables: tuple[TableCount, ...]
    sequences: tuple[SequenceState, ...]
    extensions: tuple[Extension, ...]
    large_objects: int
    omitted: tuple[str, ...] = Field(description="Known warnings of pg_dump: what it left out, and said so.")
    dump_version: str = Field(description="Version of the pg_dump that wrote the dump.")
    size_bytes: int = Field(description="pg_database_size at the time of the backup: the room that a restore needs.")


class VolumeFacts(_Document):
    """What a restore of a volume must find again, and what the reading of a live tree could not give."""

    members: int = Field(description="Members of all archives.")
    files: int = Field(description="Regular files among them, each inode once.")
    content_bytes: int = Field(description="Sum of the sizes of those files.")
    torn: tuple[str, ...] = Field(description="Files that kept changing while being read.")
    vanished: tuple[str, ...] = Field(description="Entries that were listed and then gone.")
    sockets: int = Field(description="Sockets, which are left out.")
    other_file_systems: tuple[str, ...] = Field(description="Mount points inside, which are not entered.")
    alternates: tuple[str, ...] = Field(description="Git repositories whose alternates leave the volume.")
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    special_modes: bool = Field(description="Whether any member is setuid, setgid or sticky.")
    devices: int
    xattr_classes: tuple[str, ...] = Field(
        description="Such as 'user', 'security', 'system'; of class system but for ACLs the whole name."
    )


class Server(_Document):
    """One PostgreSQL server whose databases are in the set, and the instant at which they were read."""

    number: int
    host: str
    port: int
    version: int = Field(description="server_version_num, such as 150018.")
    system_identifier: str | None = Field(description="null where the role may not read pg_control_system().")
    in_recovery: bool
    consistent_at: AwareDatetime
    exact: bool = Field(description="Whether all its databases were proven to be read at one instant.")
    spread_seconds: float = Field(description="Time between the first and the last snapshot; 0 where exact.")


class Component(_Document):
    """One component of a set, complete or failed; the very value of its component.json."""

    name: str
    kind: Kind
    attempt: str = Field(pattern="^[0-9a-f]{12}$")
    run_id: str = Field(description="The Prefect flow run that wrote it.")
    state: Literal["complete", "failed"]
    began: AwareDatetime
    ended: AwareDatetime
    streams: tuple[Stream, ...] = ()
    server: Server | None = Field(default=None, description="Of a database: the server it was read from.")
    database: DatabaseFacts | None = None
    volume: VolumeFacts | None = None
    fault: Fault | None = None

    @pydantic.field_validator("name")
    @classmethod
    def _name_is_safe(cls, value: str) -> str:
        return parse_component_name(value)

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts of all streams."""
        return tuple(part for stream in self.streams for part in stream.parts)

    @property
    def raw_size_bytes(self) -> int:
        """Bytes of the component before compression."""
        return sum(part.raw_size_bytes for part in self.parts)


def _has_instant(fault: Fault) -> Fault:
    if fault.at.utcoffset() is None:
        raise ValueError("a fault's instant has no time zone")
    return fault


def component_folder(set_id: SetId, kind: Kind, name: str, attempt: str) -> str:
    """The folder of one attempt at a component, with the closing slash."""
    return f"{set_id.prefix}{FOLDERS[kind]}/{name}/{attempt}/"


class _SetDocument(_Document):
    """Whatever stands in it that can't be true makes it unreadable here: one such document would break a whole list later."""

    schema_version: str = SCHEMA_VERSION
    namespace: str
    timestamp: str
    run_id: str
    software: str = Field(description="Name and version of the program that wrote the set.")
    began: AwareDatetime
    ended: AwareDatetime

    @pydantic.field_validator("namespace")
    @classmethod
    def _namespace_is_safe(cls, value: str) -> str:
        return parse_namespace(value)

    @pydantic.field_validator("timestamp")
    @classmethod
    def _timestamp_is_one(cls, value: str) -> str:
        return str(Timestamp.parse(value))

    @property
    def set_id(self) -> SetId:
        """Which set the document belongs to."""
        return SetId(self.namespace, Timestamp.parse(self.timestamp))


class ManifestHead(_SetDocument):
    """What a list needs of a manifest. These members stand first in it: of a large one no more than its beginning is read."""

    state: Literal["complete", "abandoned"] = "complete"


class Manifest(ManifestHead):
    """A set's table of contents, written last: a set exists when its manifest does."""

    proved_by: str = Field(description="How the parts are known to be in the store, such as 'fsync+size' or 'digest'.")
    only_databases: bool = Field(default=False, description="Whether volumes were left out by request.")
    servers: tuple[Server, ...]
    components: tuple[Component, ...] = Field(description="In the order of the configuration.")
    spread_seconds: float = Field(default=0, description="Time between the servers' instants.")

    @pydantic.model_validator(mode="after")
    def _holds_only_its_own(self) -> "Manifest":
        """Every component once, whole, and with parts of its own attempt: another set's would go when that one is deleted."""
        names = [component.name for component in self.components]
        if len(set(names)) < len(names):
            raise ValueError("a component stands twice in the manifest")
        for one in self.components:
            folder = component_folder(self.set_id, one.kind, one.name, one.attempt)
            if one.state != "complete" or not one.parts:
                raise ValueError(f"the component {one.name} is not complete")
            if any(not part.key.startswith(folder) for part in one.parts):
                raise ValueError(f"a part of {one.name} lies outside of its folder")
        return self

    def component(self, name: str) -> Component | None:
        """The component of that name, None if the set has none."""
        return next((component for component in self.components if component.name == name), None)


class Failure(_SetDocument):
    """What is left of a failed set, so that the list can show it: what failed, where, why."""

    cancelled: bool = False
    faults: tuple[Annotated[Fault, pydantic.AfterValidator(_has_instant)], ...]

    @property
    def status(self) -> str:
        """The record's ``status``: every fault in the order in which they happened (contract, section 2)."""
        if self.cancelled:
            return "Cancelled"
        return "; ".join(str(fault) for fault in sorted(self.faults, key=lambda fault: fault.at))


class _Version(_Document):
    schema_version: Annotated[str, Field(pattern=r"^[0-9]{1,4}\.[0-9]{1,4}$")] = SCHEMA_VERSION


def to_json(document: BaseModel) -> bytes:
    """A document as the bytes that are stored."""
    return (document.model_dump_json(indent=1) + "\n").encode()


def read_manifest(data: bytes, key: str) -> Manifest:
    """Parse manifest.json; raises `DamagedError`, and `FinalError` for a newer major schema version."""
    return _read(Manifest, data, key)


def read_manifest_head(beginning: bytes, key: str) -> ManifestHead | None:
    """The head from the first bytes of a manifest.json; None where they don't hold all of it. Raises like `read_manifest`.

    What comes after them is not looked at: a manifest is put in one piece, so it is whole or not there.
    """
    try:
        # Cut at a line's end, so that no character is cut in two.
        found = pydantic_core.from_json(beginning[: beginning.rfind(b"\n") + 1], allow_partial=True)
    except ValueError:
        return None
    if not isinstance(found, dict) or not ManifestHead.model_fields.keys() <= found.keys():
        return None
    return _read(ManifestHead, json.dumps({name: found[name] for name in ManifestHead.model_fields}).encode(), key)


def read_failure(data: bytes, key: str) -> Failure:
    """Parse failure.json; raises like `read_manifest`."""
    return _read(Failure, data, key)


def read_component(data: bytes, key: str) -> Component:
    """Parse component.json; raises like `read_manifest`."""
    return _read(Component, data, key)


def json_schema() -> str:
    """The JSON Schema of manifest.json."""
    return json.dumps(Manifest.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


def _read(model: type[_Model], data: bytes, key: str) -> _Model:
    try:
        version = _Version.model_validate_json(data).schema_version
        if int(version.partition(".")[0]) > int(SCHEMA_VERSION.partition(".")[0]):
            raise FinalError(
                f"{key} has schema version {version}, this program reads {SCHEMA_VERSION}",
                next_step="use a newer version of athena-backup to read this set",
            )
        return model.model_validate_json(data)
    except pydantic.ValidationError as error:
        places = ", ".join(".".join(str(step) for step in issue["loc"]) or issue["msg"] for issue in error.errors()[:5])
        raise DamagedError(
            f"{key} is not a document of ours: {places}", next_step="the set is damaged: use another one"
        ) from None
