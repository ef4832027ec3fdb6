"""A store in a directory as a Prefect block."""

from prefect.blocks.core import Block
from pydantic import Field


class AthenaLocalStore(Block):
    """Backup sets in a mounted directory."""

    _block_type_name = "Athena local store"
    _block_type_slug = "athena-local-store"

    directory: str = Field(description="The mounted directory, an absolute path.")
