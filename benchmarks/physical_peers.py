"""The physical peers: they copy the whole cluster, indexes included, and need no more than the log to bring it back.

What they restore is proven by a server that starts on it. pgBackRest speaks to object stores by TLS only, so its S3 is a
SeaweedFS of its own with a certificate.
"""

import contextlib
import getpass
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import database_data
from benchmarks.bucket import Bucket
from benchmarks.contenders import Contender, Place, ShellPeer, compare
from benchmarks.measuring import Meter
from benchmarks.servers import BINARIES, Cluster, own, running_cluster
from deployments.embedded_stores import Certificate, embedded_s3

BASEBACKUP, BARMAN = "pg_basebackup zstd:1", "Barman zstd:1"
PGBACKREST, PGBACKREST_S3 = "pgBackRest zst:1", "pgBackRest zst:1 (S3)"


def physical_peers(
    place: Place, cluster: Cluster, before: database_data.Fingerprint, encrypted: Bucket
) -> Sequence[Contender]:
    """Those whose programs are there; ``encrypted`` is of a server that speaks TLS."""
    found: list[Contender] = [_basebackup(place, cluster, before)]
    if place.tools.has("pgbackrest"):
        found += [_pgbackrest(place, cluster, before, bucket) for bucket in (None, encrypted)]
    if place.tools.has("barman"):
        found.append(_barman(place, cluster, before))
    return found


def _basebackup(place: Place, cluster: Cluster, before: database_data.Fingerprint) -> ShellPeer:
    output, target = place.work / "basebackup", place.work / "restored"
    program = f"{place.tools.clients}/pg_basebackup -h 127.0.0.1 -p {cluster.port} -U postgres"
    return ShellPeer(
        BASEBACKUP,
        place,
        Meter(cluster.pid),
        f"{program} -D {output} -Ft -X fetch --checkpoint=fast --compress=client-zstd:level=1,workers=2",
        f"zstd -dc -q {output}/base.tar.zst | tar -x -C {target}",
        output,
        check=partial(_check, BASEBACKUP, target, before),
        before_backup=partial(shutil.rmtree, output, ignore_errors=True),
        before_restore=partial(_make_target, target),
        clean=partial(shutil.rmtree, target, ignore_errors=True),
    )


def _pgbackrest(place: Place, cluster: Cluster, before: database_data.Fingerprint, bucket: Bucket | None) -> ShellPeer:
    name = PGBACKREST if bucket is None else PGBACKREST_S3
    repository, target = place.work / "pgbackrest", place.work / "restored"
    configuration = place.work / f"pgbackrest-{'local' if bucket is None else 's3'}.conf"
    lines = [
        "[global]",
        *_repository(repository, bucket),
        *(f"{what}-path={place.work}/pgbackrest-{what}" for what in ("lock", "spool", "log")),
        *("log-level-file=off", "log-level-console=warn", "compress-type=zst", "compress-level=1", "process-max=2"),
        *("start-fast=y", "[bench]", f"pg1-path={cluster.directory}", f"pg1-port={cluster.port}", "pg1-user=postgres"),
        f"pg1-socket-path={cluster.sockets}",
    ]
    configuration.write_text("\n".join(lines) + "\n")
    command = f"pgbackrest --config={configuration} --stanza=bench"

    def make_repository() -> None:
        if bucket is not None:
            bucket.empty()
        place.fresh(repository.name)
        subprocess.run([*command.split(), "stanza-create"], check=True, env=place.environment)

    return ShellPeer(
        name,
        place,
        Meter(cluster.pid, () if bucket is None else (bucket.server.pid,)),
        f"{command} --type=full backup",
        f"{command} --pg1-path={target} --type=immediate --target-action=promote restore",
        repository if bucket is None else None,
        check=partial(_check, name, target, before),
        before_backup=make_repository,
        before_restore=partial(_make_target, target),
        clean=partial(shutil.rmtree, target, ignore_errors=True),
        around=partial(cluster.archiving, f"{command} archive-push %p"),
        bucket=bucket,
    )


def _repository(directory: Path, bucket: Bucket | None) -> list[str]:
    if bucket is None:
        return [f"repo1-path={directory}"]
    server = bucket.server
    return [
        *("repo1-type=s3", "repo1-path=/pgbackrest", f"repo1-s3-bucket={server.bucket}"),
        *(f"repo1-s3-region={server.region}", "repo1-s3-uri-style=path", "repo1-s3-endpoint=127.0.0.1"),
        *(f"repo1-s3-key={server.keys.access_key}", f"repo1-s3-key-secret={server.keys.secret_key}"),
        *(f"repo1-storage-port={server.endpoint.rpartition(':')[2]}", "repo1-storage-verify-tls=n"),
    ]


def _barman(place: Place, cluster: Cluster, before: database_data.Fingerprint) -> ShellPeer:
    """Streaming, for rsync wants a way in by SSH; compressed by the `pg_basebackup` that it runs, as above."""
    home, target, staging = place.work / "barman", place.work / "restored", place.work / "barman-staging"
    configuration = place.work / "barman.conf"
    conninfo = f"host=127.0.0.1 port={cluster.port} user=postgres dbname=postgres"
    lines = [
        *(
            "[barman]",
            f"barman_user = {getpass.getuser()}",
            f"barman_home = {home}",
            f"log_file = {place.work}/barman.log",
        ),
        *(
            "log_level = WARNING",
            f"configuration_files_directory = {place.work}/none",
            "[bench]",
            "description = bench",
        ),
        *(f"conninfo = {conninfo}", f"streaming_conninfo = {conninfo}", "backup_method = postgres", "archiver = on"),
        *("backup_compression = zstd", "backup_compression_level = 1", "backup_compression_workers = 2"),
        *("immediate_checkpoint = true", f"path_prefix = {BINARIES}", f"recovery_staging_path = {staging}"),
    ]
    configuration.write_text("\n".join(lines) + "\n")
    command = f"barman -q -c {configuration}"

    def prepare() -> None:
        place.fresh(home.name)
        (home / "bench" / "incoming").mkdir(parents=True)
        own(home / "bench" / "incoming")
        # It takes no backup before it has seen a piece of the log.
        with cluster.archiving(f"cp %p {home}/bench/incoming/%f"):
            subprocess.run([*command.split(), "switch-wal", "--force", "--archive", "bench"], env=place.environment)

    def before_restore() -> None:
        place.fresh(staging.name)
        _make_target(target)

    def clean() -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.rmtree(staging, ignore_errors=True)

    return ShellPeer(
        BARMAN,
        place,
        Meter(cluster.pid),
        f"{command} backup --wait bench",
        f"{command} recover --target-immediate --target-action promote bench latest {target}",
        home,
        check=partial(_check, BARMAN, target, before),
        before_backup=prepare,
        before_restore=before_restore,
        clean=clean,
        around=partial(cluster.archiving, f"cp %p {home}/bench/incoming/%f"),
    )


def _make_target(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(mode=0o700)
    own(directory)


def _check(name: str, directory: Path, before: database_data.Fingerprint) -> None:
    """Start a server on what came back, all of it handed to who may run it, and compare."""
    for path in [directory, *directory.rglob("*")]:
        own(path)
    directory.chmod(0o700)
    with running_cluster(directory, restored=True) as restored:
        compare(name, before, database_data.fingerprint(restored))


@contextlib.contextmanager
def encrypted_s3(directory: Path) -> Iterator[Bucket]:
    """A SeaweedFS that speaks TLS, by a certificate that signs itself and is no authority's: ours takes no other as a server's."""
    directory.mkdir(parents=True, exist_ok=True)
    certificate = Certificate(directory / "certificate.pem", directory / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"]
    command += ["-keyout", str(certificate.key), "-out", str(certificate.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with embedded_s3(directory / "data", certificate) as server:
        yield Bucket(server, certificate.certificate)
