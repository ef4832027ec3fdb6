"""What a backup or restore is asked for: the typed parameters of the flows, which Prefect's UI shows as forms."""

from collections.abc import Collection, Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from athena_backup.names import RESERVED_COMPONENT_NAME, SetId, Timestamp, parse_namespace, shortened


def _timestamp_text(text: str) -> str:
    return str(Timestamp.parse(text))


class BackupRequest(BaseModel):
    """A backup of everything that is configured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    only_databases: bool = Field(default=False, title="Only databases", description="Leave the volumes out of the set.")


class RestoreRequest(BaseModel):
    """A restore of one backup set into this service's own databases and volumes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestamp: Annotated[str, AfterValidator(_timestamp_text)] = Field(
        description="Timestamp of the backup set, such as 2023-02-02t16-00-00. What is live is overwritten."
    )
    source_namespace: Annotated[str, AfterValidator(parse_namespace)] | None = Field(
        default=None,
        title="Source namespace",
        description="The namespace that the set was taken in; none: this service's own.",
    )
    skip: list[str] = Field(
        default=[], description="Components that are left alone, by name; `postgres` stands for all databases."
    )
    skip_health_check_before: bool = Field(
        default=False, description="Don't ask ATHENA_HEALTH_URLS before the restore."
    )
    skip_health_check_after: bool = Field(default=False, description="Don't ask ATHENA_HEALTH_URLS after the restore.")
    accept_metadata_loss: bool = Field(
        default=False,
        description="Restore volumes even where owners, modes or attributes can't be set; what was lost is told.",
    )
    allow_devices: bool = Field(default=False, description="Make the device nodes that the set's volumes hold.")
    report: bool = Field(
        default=False, description="Write a report with the time that each component took, as an artifact."
    )

    def set_id(self, own_namespace: str) -> SetId:
        """Which set is to be restored."""
        return SetId(self.source_namespace or own_namespace, Timestamp.parse(self.timestamp))

    def skips(self, name: str, *, is_database: bool) -> bool:
        """Whether a component is left alone."""
        return name in self.skip or (is_database and RESERVED_COMPONENT_NAME in self.skip)


class CopyRequest(BaseModel):
    """A copy of one backup set into another store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestamp: Annotated[str, AfterValidator(_timestamp_text)] = Field(
        description="Timestamp of the backup set, such as 2023-02-02t16-00-00."
    )
    source_namespace: Annotated[str, AfterValidator(parse_namespace)] | None = Field(
        default=None,
        title="Source namespace",
        description="The namespace that the set was taken in; none: this service's own.",
    )
    to: str = Field(min_length=1, description="Name of the block of the store that gets the copy.")

    def set_id(self, own_namespace: str) -> SetId:
        """Which set is to be copied."""
        return SetId(self.source_namespace or own_namespace, Timestamp.parse(self.timestamp))


def unknown_names(named: Iterable[str], known: Collection[str]) -> str | None:
    """What to say of names to be left alone that neither the set nor the destination has; None if there are none.

    They are refused, not ignored: a typo would overwrite what was to be kept.
    """
    unknown = [name for name in named if name != RESERVED_COMPONENT_NAME and name not in known]
    if not unknown:
        return None
    return (
        f"neither the set nor this service has {shortened(', '.join(unknown))}; there are: {', '.join(sorted(known))}"
    )
