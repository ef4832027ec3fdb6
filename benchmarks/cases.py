"""The cases: which data, which contenders, how often, and what is done before and after every run.

In each round every contender has its turn, in an order that is rotated: it backs up, restores what it has stored, has the
result verified, and takes all of it away.
"""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import database_data, limit, volume_data
from benchmarks.bucket import Bucket
from benchmarks.contenders import Contender, Place
from benchmarks.database_data import DATABASE, Bulk, Database, Many
from benchmarks.dump_peers import CUSTOM, DIRECTORY_GZIP, DIRECTORY_ZSTD, RESTORED, dump_peers
from benchmarks.installing import Tools
from benchmarks.measuring import Meter, Usage, size_bytes
from benchmarks.ours import JOBS, Ours, OursFailedError, Service, running_service
from benchmarks.physical_peers import encrypted_s3, physical_peers
from benchmarks.results import LIMIT, Limit, Results, Run, Verb
from benchmarks.servers import Cluster, running_cluster
from benchmarks.subjects import Subject, database_subject, local_store, s3_store, set_subject, volume_subject
from benchmarks.volume_data import LargeFiles, SmallFiles, Volume
from benchmarks.volume_peers import volume_peers
from deployments.embedded_stores import embedded_s3

OURS, OURS_S3, OURS_S3_TLS, OURS_OVER = "ours", "ours (S3)", "ours (S3, TLS)", "ours, over the living"
SLOW = (CUSTOM, DIRECTORY_GZIP)
"""Of the large database: gzip takes them minutes, and nobody is near them."""
DATABASES, LARGE_FILES, SMALL_FILES = "databases", "large files", "small files"
SET = "five databases and five volumes"
GROWTH_UNITS = (1, 4, 16)
ALL_JOBS = (1, 2, 4, 8)
_REST_SECONDS = 20
_INODES_SECONDS = 61
"""So long ext4 without a journal looks at every file that was deleted before it makes another one, which costs a restore of
many files after the removal of as many ten times its own time (`recently_deleted` in Linux's fs/ext4/ialloc.c).
"""
_READ_BYTES = 1 << 20
_PARTS = 5
"""Databases, and volumes, of a whole set, as a platform has them."""


def growth_case(units: int) -> str:
    """The case of a database of so many units; the largest is the one of `DATABASES`."""
    return DATABASES if units == GROWTH_UNITS[-1] else f"growth {units}x"


def tables_case(tables: int) -> str:
    """The case of so many tables."""
    return f"{tables:,} tables"


def jobs_name(jobs: int) -> str:
    """Ours with so many jobs, in the case ``jobs``."""
    return f"ours, {jobs} jobs"


@dataclass(frozen=True)
class Size:
    """How much data."""

    rows: int
    """Events a unit; see `Bulk`."""
    tables: tuple[int, ...]
    large: LargeFiles
    small: SmallFiles


SIZES = {
    "large": Size(1_000_000, (10, 1_000, 10_000), LargeFiles(8, 512), SmallFiles(20_000)),
    "small": Size(20_000, (10, 100, 1_000), LargeFiles(8, 8), SmallFiles(2_000)),
}


def remembered(memory: Path, fingerprint: dict[str, str]) -> bool:
    """Whether a data set is as it was when it was made: a benchmark that was killed may have left it half restored."""
    if memory.exists():
        return bool(json.loads(memory.read_text()) == fingerprint)
    memory.write_text(json.dumps(fingerprint))
    return True


@dataclass(frozen=True)
class Bench:
    """One benchmark: what it measures, where, how often."""

    size: Size
    cache: Path
    """Where data sets stay."""
    work: Path
    """Where everything else is; emptied at the start and the end."""
    tools: Tools
    results: Results
    rounds: int
    cold: bool
    wanted: Sequence[str]
    """Parts of contenders' names; none: all."""

    def compete(
        self,
        case: str,
        contenders: Sequence[Contender],
        settle: Callable[[], None],
        *,
        limits: Callable[[], list[Limit]] = list,
        once: Sequence[str] = (),
        rest_seconds: float = 0,
        rest_before_restore_seconds: float = 0,
    ) -> None:
        """All rounds of a case, the limits measured anew in each; ``once``: who has a turn in the first one only.

        ``rest_seconds`` is how long the machine is left alone before every turn, the other before every restore.
        """
        self.results.begin(case, self.rounds)
        contenders = [one for one in contenders if not self.wanted or any(part in one.name for part in self.wanted)]
        for number in range(self.rounds):
            self._measure_limits(case, number, limits)
            start = number % max(1, len(contenders))
            for contender in [*contenders[start:], *contenders[:start]]:
                if number > 0 and contender.name in once:
                    continue
                time.sleep(rest_seconds)
                self._turn(case, contender, number, settle, rest_before_restore_seconds)

    def _measure_limits(self, case: str, number: int, limits: Callable[[], list[Limit]]) -> None:
        try:
            self.results.limits.setdefault(case, []).extend(limits())
        except Exception as error:  # noqa: BLE001 - as of a turn
            self._keep(Run(case, LIMIT, "backup", number, None, failure=f"{type(error).__name__}: {error}"))

    def _turn(
        self, case: str, contender: Contender, number: int, settle: Callable[[], None], rest_seconds: float
    ) -> None:
        """One contender's turn; a failure is a result too, and the next one has its turn."""
        verb: Verb = "backup"
        try:
            with contender.standing():
                settle()
                usage = contender.back_up()
                stored = contender.stored_bytes()
                self._keep(Run(case, contender.name, verb, number, usage, stored))
                verb = "restore"
                contender.prepare_restore()
                time.sleep(rest_seconds)
                settle()
                usage = contender.restore()
                contender.verify()
                self._keep(Run(case, contender.name, verb, number, usage, stored))
                verb = "cleaning"
            contender.forget()
        except Exception as error:  # noqa: BLE001 - whatever it is, hours of other runs must not be lost by it
            self._keep(Run(case, contender.name, verb, number, None, failure=f"{type(error).__name__}: {error}"))
            if verb == "cleaning":
                return
            try:
                contender.forget()
            except Exception as again:  # noqa: BLE001 - the same
                failure = f"{type(again).__name__}: {again}"
                self._keep(Run(case, contender.name, "cleaning", number, None, failure=failure))

    def _keep(self, run: Run) -> None:
        self.results.add(run)
        usage = run.usage
        told = run.failure if usage is None else _told(usage, run.stored_bytes)
        print(f"  {run.case:12} round {run.round + 1} {run.verb:7} {run.contender:50} {told}", flush=True)

    def settled(self, cluster: Cluster) -> None:
        """Before a run: checkpoint, all written, the files of the database and of its backup in the page cache.

        Whoever wrote past the cache, as ours does, would else read from the disk what the others find there. With ``cold``
        nothing is there for anybody.
        """
        cluster.settle()
        self._fill_cache([cluster.directory / "base", self.work])

    def settled_files(self, directory: Path) -> None:
        """The same for a volume."""
        os.sync()
        self._fill_cache([directory, self.work])

    def _fill_cache(self, directories: Sequence[Path]) -> None:
        if self.cold:
            Path("/proc/sys/vm/drop_caches").write_text("3")
            return
        buffer = bytearray(_READ_BYTES)
        folders = [folder for directory in directories for folder in os.walk(directory)]
        for path in (Path(folder, name) for folder, _, names in folders for name in names):
            if not path.is_file():
                continue
            with contextlib.suppress(FileNotFoundError), path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    @contextlib.contextmanager
    def cluster(self, asked: Database) -> Iterator[tuple[Cluster, database_data.Fingerprint]]:
        """A running server with the database, made if it isn't in the cache as it was made, and its fingerprint."""
        name = f"{asked.units}-times-{asked.rows}" if isinstance(asked, Bulk) else f"{asked.tables}-tables"
        directory = self.cache / "postgres" / name
        with running_cluster(directory) as cluster:
            for leftover in (RESTORED, *database_data.leftovers(cluster)):
                cluster.drop(leftover)
            database_data.build(cluster, asked)
            before = database_data.fingerprint(cluster)
            if not remembered(directory.with_suffix(".json"), before):
                cluster.drop(DATABASE)
                database_data.build(cluster, asked)
                before = database_data.fingerprint(cluster)
            yield cluster, before

    @contextlib.contextmanager
    def place(self) -> Iterator[Place]:
        """A work folder with an S3 server of its own."""
        with embedded_s3(self.work / "s3") as server:
            yield Place(self.work, self.tools, Bucket(server))
        shutil.rmtree(self.work / "s3", ignore_errors=True)


def _told(usage: Usage, stored_bytes: int) -> str:
    cpu = f"CPU {usage.client_cpu_seconds:.1f} + {usage.server_cpu_seconds:.1f} + {usage.other_cpu_seconds:.1f} s"
    sizes = f"peak {usage.peak_bytes / 2**20:.0f} MiB, stored {stored_bytes / 1e6:.1f} MB"
    return f"{usage.seconds:7.2f} s, {cpu}, disk {usage.disk_busy_seconds:.1f} s, {sizes}"


def ours(bench: Bench, name: str, subject: Subject, bucket: Bucket | None, jobs: int = JOBS) -> Ours:
    """Our service with a store of its own, as a contender of that name."""
    home = bench.work / f"service {name}"
    store = bench.work / f"store {name}"
    sets = store / "app"

    @contextlib.contextmanager
    def start() -> Iterator[Service]:
        for leftover in (home, store):
            shutil.rmtree(leftover, ignore_errors=True)
        variables = local_store(store) if bucket is None else s3_store(bucket)
        try:
            with running_service(
                home, databases=subject.databases, volumes=subject.volumes, store=variables, jobs=jobs
            ) as service:
                yield service
        finally:
            shutil.rmtree(store, ignore_errors=True)
            shutil.rmtree(home, ignore_errors=True)

    return Ours(
        name,
        start,
        Meter(subject.server_pid, () if bucket is None else (bucket.server.pid,)),
        subject.damage,
        subject.check,
        stored=partial(size_bytes, sets) if bucket is None else bucket.size_bytes,
        clean=partial(shutil.rmtree, sets, ignore_errors=True) if bucket is None else bucket.empty,
        repair=subject.repair,
    )


def databases(bench: Bench) -> None:
    """The large database, everybody, to local disk and to S3."""
    asked = Bulk(GROWTH_UNITS[-1], bench.size.rows)
    with contextlib.ExitStack() as stack:
        cluster, before = stack.enter_context(bench.cluster(asked))
        _describe_database(bench, cluster)
        place = stack.enter_context(bench.place())
        encrypted = stack.enter_context(encrypted_s3(bench.work / "s3-tls"))
        subject = database_subject(cluster, asked, before)
        local = ours(bench, OURS, subject, None)
        remote = [ours(bench, OURS_S3, subject, place.bucket), ours(bench, OURS_S3_TLS, subject, encrypted)]
        over = ours(bench, OURS_OVER, database_subject(cluster, asked, before, is_lost=False), None)
        # A service that does not start is told of in its turns.
        with contextlib.suppress(OursFailedError), local.standing():
            bench.results.rest = local.at_rest(_REST_SECONDS)
        peers = [*dump_peers(place, cluster, before), *physical_peers(place, cluster, before, encrypted)]
        bench.compete(
            DATABASES,
            [local, *peers, *remote, over],
            partial(bench.settled, cluster),
            limits=partial(
                limit.database_limits,
                *(cluster, bench.tools.clients / "psql", place.bucket, partial(bench.settled, cluster)),
            ),
            once=SLOW,
        )


def _describe_database(bench: Bench, cluster: Cluster) -> None:
    sizes = database_data.table_bytes(cluster)
    ratios = database_data.compression(cluster, bench.tools.clients / "psql")
    biggest = sorted(sizes, key=lambda name: -sizes[name])[:6]
    tables = ", ".join(f"{name} {sizes[name] / 1e6:.0f} MB ({ratios[name]:.1f} to 1)" for name in biggest)
    bench.results.data["database"] = (
        f"{len(sizes)} tables of {sum(sizes.values()) / 1e9:.2f} GB by pg_table_size, in them by zstd 1 of COPY's text:"
        f" {tables}; of all tables the best ratio is {max(ratios.values()):.1f} to 1"
    )
    print(f"  {bench.results.data['database']}", flush=True)


def growth(bench: Bench) -> None:
    """The smaller databases of the same make; the largest is measured with the peers."""
    for units in GROWTH_UNITS[:-1]:
        _against_zstd(bench, growth_case(units), Bulk(units, bench.size.rows), rest_seconds=0)


def tables(bench: Bench) -> None:
    """Databases of few and of many tables."""
    for count in bench.size.tables:
        _against_zstd(bench, tables_case(count), Many(count), rest_seconds=_INODES_SECONDS)


def _against_zstd(bench: Bench, case: str, asked: Database, rest_seconds: float) -> None:
    with bench.cluster(asked) as (cluster, before), bench.place() as place:
        subject = database_subject(cluster, asked, before)
        peers = [one for one in dump_peers(place, cluster, before) if one.name == DIRECTORY_ZSTD]
        bench.compete(
            case,
            [ours(bench, OURS, subject, None), *peers],
            partial(bench.settled, cluster),
            rest_before_restore_seconds=rest_seconds,
        )


def jobs(bench: Bench) -> None:
    """Ours alone, with more and more jobs."""
    asked = Bulk(GROWTH_UNITS[-1], bench.size.rows)
    with bench.cluster(asked) as (cluster, before):
        subject = database_subject(cluster, asked, before)
        all_ours = [ours(bench, jobs_name(one), subject, None, one) for one in ALL_JOBS]
        bench.compete("jobs", all_ours, partial(bench.settled, cluster))


def whole_set(bench: Bench) -> None:
    """Five databases and five volumes in one set: they share the cores, the memory and the connections of one operation."""
    asked = Bulk(1, bench.size.rows)
    large, small = LargeFiles(4, max(1, bench.size.large.size_mib // 8)), SmallFiles(bench.size.small.files // 5)
    with contextlib.ExitStack() as stack:
        cluster, before = stack.enter_context(bench.cluster(asked))
        place = stack.enter_context(bench.place())
        folder = place.fresh("volumes")
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        volumes = {folder / f"volume{number}": large if number < 2 else small for number in range(_PARTS)}
        databases = [f"{DATABASE}{number}" for number in range(_PARTS)]

        def make() -> None:
            for volume, contents in volumes.items():
                shutil.rmtree(volume, ignore_errors=True)
                volume_data.build(volume, contents)
            for name in [*database_data.leftovers(cluster), *databases]:
                cluster.drop(name)
            for name in databases:
                cluster.copy(DATABASE, name)

        for name in databases:
            stack.callback(cluster.drop, name)
        make()
        files = {volume: volume_data.fingerprint(volume) for volume in volumes}
        subject = set_subject(cluster, dict.fromkeys(databases, before), files, make)
        bench.compete(
            SET,
            [ours(bench, OURS, subject, None), ours(bench, OURS_S3, subject, place.bucket)],
            partial(bench.settled, cluster),
        )


def volumes(bench: Bench) -> None:
    """Few large files, and many small ones."""
    for case, asked in ((LARGE_FILES, bench.size.large), (SMALL_FILES, bench.size.small)):
        _volume(bench, case, asked)


def _volume(bench: Bench, case: str, asked: Volume) -> None:
    sizes = f"{asked.files}x{asked.size_mib}" if isinstance(asked, LargeFiles) else f"{asked.files}"
    volume = bench.cache / "volumes" / sizes / case.replace(" ", "-")
    volume_data.build(volume, asked)
    before = volume_data.fingerprint(volume)
    if not remembered(volume.with_suffix(".json"), before):
        shutil.rmtree(volume)
        volume_data.build(volume, asked)
        before = volume_data.fingerprint(volume)
    with bench.place() as place:

        def limits() -> list[Limit]:
            bench.settled_files(volume)
            found = limit.volume_limit(volume, place.bucket)
            sizes = f"{found.raw_bytes / 1e9:.2f} GB, by zstd 1: {found.compressed_bytes / 1e9:.2f} GB"
            bench.results.data[case] = f"{len(before):,} files, {sizes}"
            return [found]

        subject = volume_subject(volume, asked, before)
        bench.compete(
            case,
            [
                ours(bench, OURS, subject, None),
                *volume_peers(place, volume, before),
                ours(bench, OURS_S3, subject, place.bucket),
            ],
            partial(bench.settled_files, volume),
            limits=limits,
            rest_seconds=_INODES_SECONDS if isinstance(asked, SmallFiles) else 0,
        )


CASES: dict[str, Callable[[Bench], None]] = {
    "databases": databases,
    "volumes": volumes,
    "growth": growth,
    "tables": tables,
    "jobs": jobs,
    "set": whole_set,
}
