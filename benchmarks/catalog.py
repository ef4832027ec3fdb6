"""How long a list of 1,000 sets of 1,000 parts each takes, against a real S3 server on this machine.

One command: ``python -m benchmarks.catalog``. Fills a SeaweedFS with sets, foreign things beside them, and prints seconds.
Every manifest names ``--parts`` parts; as many small objects really lie in each set (a million take some ten minutes to
make: ``--objects`` makes fewer).
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
from obstore.store import S3Store

from athena_backup.catalog import GLANCE_BYTES, SetState, list_sets
from athena_backup.manifest import MANIFEST, Component, Manifest, Part, Stream, component_folder, to_json
from athena_backup.names import SetId, Timestamp
from athena_backup.store.clients import open_s3
from deployments.embedded_stores import embedded_s3

FIRST = datetime(2023, 2, 2, 16, tzinfo=UTC)
ATTEMPT = "0123456789ab"
TOGETHER = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=1_000)
    parser.add_argument("--parts", type=int, default=1_000, help="parts that each manifest names")
    parser.add_argument("--objects", type=int, help="parts that really lie in each set; default: all")
    parser.add_argument("--lists", type=int, default=5, help="how often the list is taken")
    asked = parser.parse_args()
    objects = asked.parts if asked.objects is None else asked.objects
    with tempfile.TemporaryDirectory(prefix="athena-bench-") as directory, embedded_s3(Path(directory)) as server:
        client = S3Store(
            server.bucket,
            endpoint=server.endpoint,
            region=server.region,
            access_key_id=server.keys.access_key,
            secret_access_key=server.keys.secret_key,
            client_options={"allow_http": True},
        )
        began = time.perf_counter()
        sizes = asyncio.run(_fill(client, asked.sets, asked.parts, objects))
        print(
            f"made {asked.sets} sets of {objects} objects in {time.perf_counter() - began:.0f} s; a manifest of"
            f" {asked.parts} parts has {sizes // 1024} KiB, a list reads {min(sizes, GLANCE_BYTES) // 1024} KiB of it"
        )
        seconds = []
        for _ in range(asked.lists):
            # A new client each time: a command line has no open connections either.
            fresh = open_s3(server.bucket, server.endpoint, server.region, server.keys)
            began = time.perf_counter()
            found = list(list_sets(fresh, "app"))
            seconds.append(time.perf_counter() - began)
            assert len(found) == asked.sets
            assert all(one.state is SetState.SUCCESS for one in found)
    print(
        f"list of {asked.sets} sets: median {statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s"
        f" of {len(seconds)} (goal: under 2 s)"
    )


async def _fill(client: S3Store, sets: int, parts: int, objects: int) -> int:
    """Make the sets, through the client directly: how it is done is not what is measured. Returns a manifest's size."""
    size = 0

    def things() -> Iterator[tuple[str, bytes]]:
        nonlocal size
        for number in range(20):
            yield f"app/audit/2023/{number}.log", b"not ours"
            yield f"app/photos-{number}/2023-02-02.jpg", b"not ours"
        for number in range(sets):
            set_id = SetId("app", Timestamp.of(FIRST + timedelta(hours=number)))
            manifest = _manifest(set_id, parts)
            for part in manifest.components[0].parts[:objects]:
                yield part.key, b"x"
            document = to_json(manifest)
            size = len(document)
            yield set_id.prefix + MANIFEST, document

    waiting = things()

    async def put() -> None:
        for key, data in waiting:
            await obstore.put_async(client, key, data, use_multipart=False)

    await asyncio.gather(*(put() for _ in range(TOGETHER)))
    return size


def _manifest(set_id: SetId, parts: int) -> Manifest:
    folder = component_folder(set_id, "volume", "gitserver", ATTEMPT)
    stream = Stream(
        name="0000.tar.zst",
        parts=tuple(
            Part(key=f"{folder}0000.tar.zst.{number:04}", size_bytes=1, raw_size_bytes=1, sha256="0" * 64)
            for number in range(parts)
        ),
    )
    component = Component(
        name="gitserver",
        kind="volume",
        attempt=ATTEMPT,
        run_id="benchmark",
        state="complete",
        began=FIRST,
        ended=FIRST,
        streams=(stream,),
    )
    return Manifest(
        namespace=set_id.namespace,
        timestamp=str(set_id.timestamp),
        run_id="benchmark",
        software="benchmark",
        began=FIRST,
        ended=FIRST,
        proved_by="digest",
        servers=(),
        components=(component,),
    )


if __name__ == "__main__":
    main()
