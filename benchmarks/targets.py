"""The targets that the project has set itself, each with what was measured and whether it is met."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.cases import DATABASES, GROWTH_UNITS, LARGE_FILES, OURS, OURS_S3, OURS_S3_TLS, SMALL_FILES, growth_case
from benchmarks.dump_peers import CUSTOM, DIRECTORY_GZIP, DIRECTORY_ZSTD, PIPELINE
from benchmarks.physical_peers import PGBACKREST, PGBACKREST_S3
from benchmarks.results import VERBS, Results, Verb
from benchmarks.volume_peers import RESTIC, TAR_1, TAR_3

_MEMORY_MIB = 512
_FIRST_SECONDS = 8
_GROWTH = 17
_LIMIT = 1.3


@dataclass(frozen=True)
class Against:
    """A ratio of medians: ours to a peer's, at most so much."""

    case: str
    verb: Verb
    ours: str
    peer: str
    allowed: float


TARGETS = (
    Against(DATABASES, "backup", OURS, DIRECTORY_ZSTD, 1.0),
    Against(DATABASES, "backup", OURS_S3, PIPELINE, 0.75),
    Against(DATABASES, "backup", OURS, PGBACKREST, 1.0),
    Against(DATABASES, "backup", OURS_S3_TLS, PGBACKREST_S3, 1.0),
    Against(DATABASES, "backup", OURS_S3, CUSTOM, 0.3),
    Against(DATABASES, "restore", OURS, DIRECTORY_ZSTD, 0.8),
    Against(DATABASES, "restore", OURS, DIRECTORY_GZIP, 0.8),
    Against(LARGE_FILES, "backup", OURS, TAR_3, 1.0),
    Against(LARGE_FILES, "backup", OURS, TAR_1, 1.0),
    Against(SMALL_FILES, "backup", OURS, RESTIC, 1.0),
)


def target_rows(results: Results) -> Sequence[tuple[str, str, str, str]]:
    """What is asked, what was measured, what is allowed, and the verdict; only what was measured."""
    return [row for row in _rows(results) if row is not None]


def _rows(results: Results) -> Iterator[tuple[str, str, str, str] | None]:
    for one in TARGETS:
        mine, theirs = (results.seconds(one.case, name, one.verb) for name in (one.ours, one.peer))
        what = f"{one.case}, {one.verb}: {one.ours} ÷ {one.peer}".replace("|", "\\|")
        yield _row(what, mine / theirs if mine and theirs else None, one.allowed)
    for name, remote in ((OURS, False), (OURS_S3, True)):
        mine = results.seconds(DATABASES, name, "backup")
        # The form in which ours reads such tables; the other one bounds another program.
        for limit in (one for one in results.median_limits(DATABASES) if one.form == "binary"):
            what = f"{DATABASES}, backup: {name} ÷ limit with {limit.form} COPY"
            yield _row(what, mine / limit.seconds(remote=remote) if mine else None, _LIMIT)
            if remote:
                what += " and all that the S3 server does on the same cores"
                yield _row(what, mine / limit.store_seconds() if mine else None, _LIMIT)
    for verb in VERBS:
        first, last = (results.seconds(growth_case(units), OURS, verb) for units in (GROWTH_UNITS[0], GROWTH_UNITS[-1]))
        yield _row(f"16x the data ÷ 1x, {verb}", last / first if first and last else None, _GROWTH)
    mine_all = [run for run in results.runs if run.contender.startswith(OURS) and run.usage is not None]
    if mine_all:
        highest = max(mine_all, key=lambda run: run.usage.peak_bytes if run.usage else 0)
        what = f"peak memory of an operation, MiB (worst: {highest.case}, {highest.contender}, {highest.verb})"
        yield _row(what, max(run.usage.peak_bytes for run in mine_all if run.usage) / 2**20, _MEMORY_MIB)
        resident = max(run.usage.resident_bytes for run in mine_all if run.usage) / 2**20
        yield _row("the same as a sum of resident sets, shared pages counted for each process", resident, _MEMORY_MIB)
        begun = [run.usage.first_seconds for run in mine_all if run.usage and run.usage.first_seconds is not None]
        yield _row(
            f"POST to the first task, s (median {sorted(begun)[len(begun) // 2]:.1f}, worst)",
            max(begun),
            _FIRST_SECONDS,
        )


def _row(what: str, measured: float | None, allowed: float) -> tuple[str, str, str, str] | None:
    if measured is None:
        return None
    return what, f"{measured:.2f}", f"≤ {allowed:g}", "met" if measured <= allowed else "NOT met"
