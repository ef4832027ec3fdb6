"""What our service is pointed at in a case: the data, its store, and how a restore that does nothing would be seen."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql

from benchmarks import database_data, volume_data
from benchmarks.bucket import Bucket
from benchmarks.contenders import compare
from benchmarks.database_data import DATABASE, Database
from benchmarks.servers import Cluster
from benchmarks.volume_data import Volume


def local_store(directory: Path) -> dict[str, str]:
    """The service's variables for a store in a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    return {"OBJECT_STORE_LOCATION_TYPE": "local", "OBJECT_STORE_LOCATION_LOCAL": str(directory)}


def s3_store(bucket: Bucket) -> dict[str, str]:
    """The same for S3."""
    server = bucket.server
    authority = {} if bucket.certificate is None else {"ATHENA_CA_BUNDLE": str(bucket.certificate)}
    return {
        "OBJECT_STORE_LOCATION_TYPE": "s3",
        "AWS_S3_BUCKET_NAME": server.bucket,
        "AWS_S3_ENDPOINT": server.endpoint,
        "AWS_S3_REGION": server.region,
        "AWS_ACCESS_KEY": server.keys.access_key,
        "AWS_SECRET_KEY": server.keys.secret_key,
        **authority,
    }


@dataclass(frozen=True)
class Subject:
    """What ours backs up in a case, and what a restore of ours is proven by."""

    databases: dict[str, str]
    volumes: dict[str, Path]
    damage: Callable[[], None]
    check: Callable[[], None]
    repair: Callable[[], None]
    server_pid: int | None = None


def database_subject(
    cluster: Cluster, asked: Database, before: database_data.Fingerprint, *, is_lost: bool = True
) -> Subject:
    """The database of a cluster, which is gone when it is restored, as the peers' is, or else lives on, changed."""
    changed = database_data.tables_of(cluster)[-1]

    def damage() -> None:
        if is_lost:
            cluster.drop(DATABASE)
        else:
            cluster.execute(sql.SQL("DROP TABLE {} CASCADE").format(sql.Identifier(changed)), DATABASE)
            cluster.execute("CREATE TABLE newcomer (id int)", DATABASE)

    def check() -> None:
        compare("ours", before, database_data.fingerprint(cluster))
        # As every other run finds it: with its visibility map, and nothing of the load to be tidied up.
        cluster.execute("VACUUM (FREEZE, ANALYZE)", DATABASE)

    def repair() -> None:
        for name in (*database_data.leftovers(cluster), DATABASE):
            cluster.drop(name)
        database_data.build(cluster, asked)

    return Subject({DATABASE: cluster.url(DATABASE)}, {}, damage, check, repair, cluster.pid)


def set_subject(
    cluster: Cluster,
    databases: dict[str, database_data.Fingerprint],
    volumes: dict[Path, volume_data.Fingerprint],
    repair: Callable[[], None],
) -> Subject:
    """Several databases of a cluster, copies of one another, all of them lost, and several volumes that live on, changed."""

    def damage() -> None:
        for name in databases:
            cluster.drop(name)
        for volume, before in volumes.items():
            (volume / min(before)).unlink()
            (volume / "newcomer").write_text("was not there")

    def check() -> None:
        for name, before in databases.items():
            compare(f"ours, {name}", before, database_data.fingerprint(cluster, name))
        for volume, files in volumes.items():
            compare(f"ours, {volume.name}", files, volume_data.fingerprint(volume))

    urls = {name: cluster.url(name) for name in databases}
    return Subject(urls, {volume.name: volume for volume in volumes}, damage, check, repair, cluster.pid)


def volume_subject(volume: Path, asked: Volume, before: volume_data.Fingerprint) -> Subject:
    """A volume."""

    def damage() -> None:
        (volume / min(before)).unlink()
        (volume / "newcomer").write_text("was not there")

    def repair() -> None:
        shutil.rmtree(volume)
        volume_data.build(volume, asked)

    def check() -> None:
        compare("ours", before, volume_data.fingerprint(volume))

    return Subject({}, {volume.name: volume}, damage, check, repair)
