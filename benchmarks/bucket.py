"""The S3 server's one bucket, as the benchmark itself looks at it: how much lies there, and how it is emptied."""

import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from athena_backup.store.sweep import S3Access
from deployments.embedded_stores import EmbeddedS3

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_PAGE_KEYS = 1000


@dataclass(frozen=True)
class Bucket:
    """A running server's bucket; ``certificate`` if the server speaks TLS."""

    server: EmbeddedS3
    certificate: Path | None = None

    def size_bytes(self) -> int:
        """The sum of all objects."""
        return sum(size for _, size in self._objects())

    def empty(self) -> None:
        """Delete every object but those that mark it as a store, and have the server give the disk back."""
        keys = [key for key, _ in self._objects() if not key.startswith(".")]
        for first in range(0, len(keys), _PAGE_KEYS):
            self._client().delete_objects(
                Bucket=self.server.bucket,
                Delete={"Objects": [{"Key": key} for key in keys[first : first + _PAGE_KEYS]], "Quiet": True},
            )
        self._vacuum()

    def _client(self) -> "S3Client":
        server = self.server
        access = S3Access(server.bucket, server.endpoint, server.region, server.keys, ca_bundle=self.certificate)
        return access.client()

    def _objects(self) -> list[tuple[str, int]]:
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=self.server.bucket)
        return [(one["Key"], one["Size"]) for page in pages for one in page.get("Contents", ())]

    def _vacuum(self) -> None:
        """SeaweedFS keeps what was deleted until it is told; its own timer is slower than a benchmark fills the disk."""
        arguments = Path(f"/proc/{self.server.pid}/cmdline").read_text().split("\0")
        ports = [one.partition("=")[2] for one in arguments if one.startswith("-master.port=")]
        query = urllib.parse.urlencode({"garbageThreshold": "0.001"})
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/vol/vacuum?{query}", timeout=600) as answer:
            answer.read()
