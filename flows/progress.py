"""How far an operation is, as one Prefect artifact per run that is rewritten in place: bytes, percent, rate, time left."""

import logging
import time
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.exceptions import PrefectHTTPStatusError

from athena_backup.operation import Operation, Progress

PUBLISH_SECONDS = 3.0

logger = logging.getLogger("athena_backup.progress")


class ProgressArtifact:
    """The progress of one run; `publish` may be called as often as one likes."""

    def __init__(self, operation: Operation, run_id: UUID) -> None:
        self._operation = operation
        self._run_id = run_id
        self._artifact_id: UUID | None = None
        self._began = time.monotonic()
        self._next = self._began + PUBLISH_SECONDS

    def publish(self, *, last: bool = False) -> None:
        """Write the artifact if its time has come. Progress is a courtesy: a server that fails it fails nothing."""
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + PUBLISH_SECONDS
        text = table(self._operation.progress(), now - self._began)
        try:
            with get_client(sync_client=True) as client:
                if self._artifact_id is None:
                    created = client.create_artifact(
                        ArtifactCreate(
                            type="markdown", description="How far the operation is", data=text, flow_run_id=self._run_id
                        )
                    )
                    self._artifact_id = created.id
                else:
                    client.update_artifact(self._artifact_id, ArtifactUpdate(data=text))
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            logger.info("the progress could not be written: %s", error)


def table(progress: list[Progress], seconds: float) -> str:
    """The progress as a table in Markdown; ``seconds`` is how long the operation has been working."""
    lines = ["| component | done | of | percent |", "| --- | ---: | ---: | ---: |"]
    for one in progress:
        of = "?" if one.total_bytes is None else in_units(one.total_bytes)
        lines.append(
            f"| {one.component} | {in_units(one.done_bytes)} | {of} | {_percent(one.done_bytes, one.total_bytes)} |"
        )
    done = sum(one.done_bytes for one in progress)
    known = [one.total_bytes for one in progress if one.total_bytes is not None]
    total = sum(known) if progress and len(known) == len(progress) else None
    rate = done / seconds if seconds > 0 else 0.0
    left = f", about {max(0.0, total - done) / rate:.0f} s left" if total and rate else ""
    return "\n".join([*lines, "", f"{in_units(done)} in {seconds:.0f} s, {in_units(int(rate))}/s{left}"])


def _percent(done: int, total: int | None) -> str:
    return "" if not total else f"{min(100.0, 100 * done / total):.0f} %"


def in_units(size_bytes: float) -> str:
    """A size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"
