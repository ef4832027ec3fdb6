"""Memory does not grow with what goes through a store: a process stays under 400 MB, for one big object or many streams."""

import json
import subprocess
import sys

import pytest

from deployments.embedded_stores import EmbeddedAzure, EmbeddedS3

LIMIT_BYTES = 400 << 20
GIB = 1 << 30
# The child gets its store by standard input, and tells its peak and what it read.
CHILD = """
import hashlib, json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from athena_backup.store.clients import Keys, Way, open_azure, open_s3

place = json.load(sys.stdin)
streams, size_bytes = place["streams"], place["size_bytes"]
way = Way(streams=streams, allow_http=True)
if "account" in place:
    store = open_azure(place["account"], place["url"], place["bucket"], place["secret"], way=way)
else:
    store = open_s3(place["bucket"], place["url"], place["region"], Keys(place["access"], place["secret"]), way=way)


def block(number, stream):
    return b"%08d%08d" % (number, stream) * (1 << 16)


def stream(number):
    key = f"memory/{number}"
    written, read = hashlib.sha256(), hashlib.sha256()

    def chunks():
        for one in range(size_bytes // streams >> 20):
            chunk = block(one, number)
            written.update(chunk)
            yield chunk

    store.write(key, chunks())
    for chunk in store.read(key):
        read.update(chunk)
    store.delete([key])
    return written.digest() == read.digest()


with ThreadPoolExecutor(streams) as pool:
    is_equal = all(pool.map(stream, range(streams)))
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({"peak_bytes": int(peak.split()[1]) * 1024, "is_equal": is_equal}))
"""


def peak_bytes(place: dict[str, object], size_bytes: int, streams: int) -> int:
    asked = json.dumps({**place, "size_bytes": size_bytes, "streams": streams})
    done = subprocess.run([sys.executable, "-c", CHILD], input=asked, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["is_equal"]
    return int(told["peak_bytes"])


def in_s3(server: EmbeddedS3) -> dict[str, object]:
    return {"bucket": server.bucket, "url": server.endpoint, "region": server.region,
            "access": server.keys.access_key, "secret": server.keys.secret_key}  # fmt: skip


def in_azure(server: EmbeddedAzure) -> dict[str, object]:
    return {"account": server.account, "url": server.service_url, "bucket": server.container, "secret": server.key}


def test_an_object_of_a_gibibyte_in_s3(seaweed: EmbeddedS3) -> None:
    assert peak_bytes(in_s3(seaweed), GIB, 1) < LIMIT_BYTES


@pytest.mark.parametrize("streams", [16])
def test_many_streams_share_one_budget(seaweed: EmbeddedS3, streams: int) -> None:
    assert peak_bytes(in_s3(seaweed), GIB, streams) < LIMIT_BYTES


def test_an_object_in_azure(azurite: EmbeddedAzure) -> None:
    assert peak_bytes(in_azure(azurite), GIB // 4, 1) < LIMIT_BYTES
