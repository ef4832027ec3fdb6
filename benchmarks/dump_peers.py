"""The logical peers: `pg_dump` and `pg_restore` of PostgreSQL 18, built with zstd, in the ways that people use them."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import database_data
from benchmarks.contenders import Contender, Place, ShellPeer, compare
from benchmarks.database_data import DATABASE
from benchmarks.measuring import Meter
from benchmarks.servers import Cluster

RESTORED = "restored"
CUSTOM, DIRECTORY_GZIP, DIRECTORY_ZSTD = "pg_dump -Fc", "pg_dump -Fd -j2 gzip", "pg_dump -Fd -j2 zstd:1"
PIPELINE = "pg_dump -Fc -Z0 | zstd -T0 -1 | rclone rcat (S3)"
# pg_restore of 17 and newer sets what a server of 15 doesn't know, says so, goes on and ends with 1.
_UNKNOWN_SETTING = 'unrecognized configuration parameter "transaction_timeout"'


def dump_peers(place: Place, cluster: Cluster, before: database_data.Fingerprint) -> Sequence[Contender]:
    """To a local file or directory, and streamed to S3."""
    output = place.work / "dump"
    dump, restore = place.tools.clients / "pg_dump", place.tools.clients / "pg_restore"
    source, target = cluster.url(DATABASE), cluster.url(RESTORED)
    remote = place.remote("dump.zst")

    def peer(name: str, backup: str, back: str, where: Path | None = output) -> ShellPeer:
        def make_output() -> None:
            place.fresh(output.name)

        return ShellPeer(
            name,
            place,
            Meter(cluster.pid, () if where else (place.bucket.server.pid,)),
            backup,
            back,
            where,
            check=partial(_check, cluster, name, before),
            before_backup=make_output,
            before_restore=partial(_make_target, cluster),
            clean=partial(cluster.drop, RESTORED),
            allowed=_UNKNOWN_SETTING,
        )

    parallel = f"{restore} -j2 -d {target} {output}/it"
    return [
        peer(CUSTOM, f"{dump} -Fc -f {output}/it {source}", parallel),
        peer(DIRECTORY_GZIP, f"{dump} -Fd -j2 --compress=gzip -f {output}/it {source}", parallel),
        peer(DIRECTORY_ZSTD, f"{dump} -Fd -j2 --compress=zstd:1 -f {output}/it {source}", parallel),
        peer(
            PIPELINE,
            f"{dump} -Fc -Z0 {source} | zstd -T0 -1 -q -c | {place.tools.rclone} rcat {remote}",
            f"{place.tools.rclone} cat {remote} | zstd -dc -q | {restore} -d {target}",
            None,
        ),
    ]


def _make_target(cluster: Cluster) -> None:
    cluster.drop(RESTORED)
    cluster.create(RESTORED)


def _check(cluster: Cluster, name: str, before: database_data.Fingerprint) -> None:
    compare(name, before, database_data.fingerprint(cluster, RESTORED))
