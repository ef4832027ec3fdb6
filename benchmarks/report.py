"""RESULTS.md, written from what was measured; no number in it is put there by hand."""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from benchmarks.cases import (
    ALL_JOBS,
    DATABASES,
    GROWTH_UNITS,
    LARGE_FILES,
    OURS,
    OURS_S3,
    SET,
    SMALL_FILES,
    growth_case,
    jobs_name,
)
from benchmarks.dump_peers import DIRECTORY_ZSTD
from benchmarks.measuring import Usage
from benchmarks.results import LIMIT, VERBS, Results, Run, Verb, cores, median
from benchmarks.targets import target_rows

_BUSY = 0.85


def report(results: Results) -> str:
    """The whole document."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    yield "# Benchmark"
    yield ""
    command = f"make bench{'' if results.size == 'large' else ' SIZE=' + results.size}"
    yield f"Written by `{command}`, which repeats it; some cases only: `{command} OPTIONS='--only databases --rounds 1'`. Medians."
    yield ""
    yield from (f"- {name}: {told}" for name, told in results.machine.items())
    yield from (f"- data, {name}: {told}" for name, told in results.data.items())
    rounds = (f"{case} {rounds} ({results.began[case]})" for case, rounds in results.rounds.items())
    yield f"- rounds, and when the first began: {', '.join(rounds)}"
    yield ""
    yield from _HOW
    yield ""
    yield from _table("Targets", ("what", "measured", "allowed", ""), target_rows(results))
    for case in (DATABASES, LARGE_FILES, SMALL_FILES):
        for verb in VERBS:
            yield from _contenders(results, case, verb)
    yield from _table("Growth", _GROWTH_HEAD, _growth(results))
    yield from _table(
        "Jobs", ("ATHENA_JOBS", "backup s", "restore s", "backup peak MiB", "restore peak MiB"), _jobs(results)
    )
    for verb in VERBS:
        yield from _contenders(results, SET, verb)
    yield from _bounds(results)
    yield from _rest(results)
    yield from _failures(results)


_HOW = [
    (
        "In each round every contender has its turn, in rotated order, on the large database the two with gzip in the "
        "first round only: checkpoint, sync, backup, checkpoint, sync, restore, comparison of what came back (every row "
        "or file by hash); a backup counts where that found no difference. A time of ours is that of Prefect's flow run, "
        "from Running to its end, by the API of the service; a peer's is that of its command. CPU: of the client's "
        "processes, of the PostgreSQL server (log archiver included), and of others: the S3 server, and our standing "
        "service. Memory is the peak of the client's process tree (PSS); of ours, that of the flow run's process and its "
        "children. Ours uses the first fitting `pg_dump` that it finds, the server's own version; its restores include "
        "making the database, ANALYZE and the switch. The peers' database is restored into an empty one that was made "
        "before; ours where there is none, and once more over the living one, which it then removes. A volume of ours "
        "always is restored over the living one, which it then removes; the peers' into an empty folder. What is read, "
        "the backup included, lies in the page cache before, unless it is emptied. Backups of ours and of pg_dump are "
        "synced, and restores of ours; those of `tar | zstd` are not. Physical peers copy the whole cluster, indexes "
        "included. What S3 is: SeaweedFS by plain http, and with TLS for pgBackRest, which speaks nothing else, and for "
        "ours beside it. Our service runs in its own turns only, each time started anew on an empty home and left alone "
        "for some seconds. The limits are measured in each round; of every piece the median counts. Before each turn with "
        "the small files, and each restore of many tables, the machine rests for 61 s: for so long after files were "
        "deleted ext4 without a journal is slow to make others, by whomever."
    )
]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        yield f"## {title}"
        yield ""
        yield "| " + " | ".join(head) + " |"
        yield "| " + " | ".join(["---", *["---:"] * (len(head) - 1)]) + " |"
        yield from ("| " + " | ".join(row) + " |" for row in rows)
        yield ""


def _contenders(results: Results, case: str, verb: Verb) -> Iterator[str]:
    names = list(dict.fromkeys(run.contender for run in results.runs if run.case == case and run.contender != LIMIT))
    rows = []
    for name in sorted(names, key=lambda name: results.seconds(case, name, verb) or float("inf")):
        seconds = results.seconds(case, name, verb)
        ratios = [_ratio(results.seconds(case, one, verb), seconds) for one in (OURS, OURS_S3)]
        figures: list[Callable[[Usage], float]] = [
            lambda usage: usage.client_cpu_seconds,
            lambda usage: usage.server_cpu_seconds,
            lambda usage: usage.other_cpu_seconds,
        ]
        cpu = [_number(results.median(case, name, verb, one)) for one in figures]
        peak = results.median(case, name, verb, lambda usage: usage.peak_bytes / 2**20)
        resident = results.median(case, name, verb, lambda usage: usage.resident_bytes / 2**20)
        stored = median(run.stored_bytes / 1e6 for run in results.of(case, name, verb))
        every = " ".join(f"{run.usage.seconds:.1f}" for run in results.of(case, name, verb) if run.usage)
        rows.append(
            (
                name.replace("|", "\\|"),
                _number(seconds, 2),
                *ratios,
                *cpu,
                f"{_number(peak, 0)} / {_number(resident, 0)}",
                _number(stored, 0),
                every,
            )
        )
    head = (
        "",
        "s",
        "ours ÷",
        "ours (S3) ÷",
        "client CPU s",
        "server CPU s",
        "other CPU s",
        "peak MiB: PSS / RSS",
        "stored MB",
        "runs",
    )
    yield from _table(f"{case[0].upper()}{case[1:]}: {verb}", head, rows)


_GROWTH_HEAD = (
    *("what", "backup s", "restore s", "zstd peer: backup s", "restore s"),
    *("backup, all CPU s", "restore", "backup peak MiB", "restore"),
)


def _all_cpu(usage: Usage) -> float:
    return sum(one(usage) for _, one in _CPU)


def _growth(results: Results) -> list[tuple[str, ...]]:
    cases = [(f"{units}x data", growth_case(units)) for units in GROWTH_UNITS]
    counted = sorted(
        {run.case for run in results.runs if run.case.endswith(" tables")},
        key=lambda case: int(case.removesuffix(" tables").replace(",", "")),
    )
    rows = []
    for name, case in [*cases, *((case, case) for case in counted)]:
        found = [results.seconds(case, who, verb) for who in (OURS, DIRECTORY_ZSTD) for verb in VERBS]
        cpu = [results.median(case, OURS, verb, _all_cpu) for verb in VERBS]
        peaks = [results.median(case, OURS, verb, lambda usage: usage.peak_bytes / 2**20) for verb in VERBS]
        if any(found):
            all_cpu, memory = [_number(one, 1) for one in cpu], [_number(one, 0) for one in peaks]
            rows.append((name, *(_number(one, 2) for one in found), *all_cpu, *memory))
    for verb in VERBS:
        seconds = [results.seconds(case, OURS, verb) for _, case in cases]
        steps = [f"{later / earlier:.1f}" for earlier, later in itertools.pairwise(seconds) if earlier and later]
        if steps:
            rows.append(
                (
                    f"{verb}: each four times the data ÷ the one before",
                    ", ".join(steps),
                    *[""] * (len(_GROWTH_HEAD) - 2),
                )
            )
    return rows


def _jobs(results: Results) -> list[tuple[str, ...]]:
    rows = []
    for jobs in ALL_JOBS:
        name = jobs_name(jobs)
        seconds = [results.seconds("jobs", name, verb) for verb in VERBS]
        peaks = [results.median("jobs", name, verb, lambda usage: usage.peak_bytes / 2**20) for verb in VERBS]
        if any(seconds):
            rows.append((str(jobs), *(_number(one, 2) for one in seconds), *(_number(one, 0) for one in peaks)))
    return rows


def _bounds(results: Results) -> Iterator[str]:
    rows = []
    for case in results.limits:
        for one in results.median_limits(case):
            for name, remote in ((OURS, False), (OURS_S3, True)):
                floor, ours = one.seconds(remote=remote), results.seconds(case, name, "backup")
                whole = one.whole_seconds(remote=remote)
                parts = (one.server_cpu_seconds, one.zstd_cpu_seconds, one.receive_cpu_seconds)
                distant = (one.loopback_cpu_seconds, one.store_cpu_seconds)
                rows.append(
                    (
                        f"{case}, {one.form}, {name}",
                        f"{one.raw_bytes / 1e9:.2f}",
                        f"{one.compressed_bytes / 1e9:.2f}",
                        *(_number(part, 2) for part in parts),
                        _number(distant[0], 2) if remote else "-",
                        _number(floor, 2),
                        _number(ours, 2),
                        _ratio(ours, floor),
                        _number(one.sha256_cpu_seconds, 2),
                        _number(distant[1], 2) if remote else "-",
                        _ratio(ours, whole),
                    )
                )
    head = (
        *("backup of", "raw GB", "zstd 1 GB", "COPY's (or reading's) server CPU s", "zstd CPU s", "receiving CPU s"),
        *("loopback CPU s", f"limit: sum ÷ {cores()} cores, s", "ours s", "ours ÷ limit"),
        *("besides: SHA-256, CPU s", "sending and S3 server, CPU s", "ours ÷ limit with these"),
    )
    yield from _table("What bounds it", head, rows)
    busy = list(_busy(results))
    yield from _table(
        "How busy the cores are while ours works",
        ("", "s", *(f"{name} CPU, of all cores" for name, _ in _CPU), "disk busy", "bound by"),
        busy,
    )


def _busy(results: Results) -> Iterator[tuple[str, ...]]:
    for case in dict.fromkeys(run.case for run in results.runs):
        for name in dict.fromkeys(run.contender for run in results.runs if run.case == case):
            for verb in VERBS:
                seconds = results.seconds(case, name, verb)
                if name.startswith(OURS) and seconds:
                    parts = [results.median(case, name, verb, one) or 0.0 for _, one in _CPU]
                    share = sum(parts) / (seconds * cores())
                    disk = results.median(case, name, verb, lambda usage: usage.disk_busy_seconds) or 0.0
                    shares = [f"{part / (seconds * cores()):.0%}" for part in parts]
                    yield (
                        f"{case}, {name}, {verb}",
                        _number(seconds, 2),
                        *shares,
                        f"{disk / seconds:.0%}",
                        _bound(share, disk / seconds, parts),
                    )


def _bound(share: float, disk: float, parts: Sequence[float]) -> str:
    if share > _BUSY:
        return f"CPU, most of it {_CPU[parts.index(max(parts))][0]}"
    if disk > _BUSY:
        return "the disk"
    return f"neither: {max(0.0, 1 - share):.0%} of the cores idle"


# Of ours without the start of its process, which is no part of its time.
_CPU: Sequence[tuple[str, Callable[[Usage], float]]] = (
    ("ours", lambda usage: usage.client_cpu_seconds - usage.start_cpu_seconds),
    ("PostgreSQL's", lambda usage: usage.server_cpu_seconds),
    ("the S3 server's and the standing service's", lambda usage: usage.other_cpu_seconds),
)


def _rest(results: Results) -> Iterator[str]:
    rows = [(name, f"{memory / 2**20:.0f}", f"{share:.1%}") for name, (memory, share) in results.rest.items()]
    if rows:
        total = sum(memory for memory, _ in results.rest.values()) / 2**20
        rows.append(("all", f"{total:.0f}", f"{sum(share for _, share in results.rest.values()):.1%}"))
    yield from _table("Our service at rest", ("process", "PSS MiB", "of one core"), rows)


def _failures(results: Results) -> Iterator[str]:
    failed: list[Run] = [run for run in results.runs if run.usage is None]
    if failed:
        yield "## Failed"
        yield ""
        for run in failed:
            # Where this machine has its files is nobody's business.
            said = re.sub(r"(/[\w.+-]+)+/", "", run.failure.splitlines()[-1])[:300]
            yield f"- {run.case}, {run.contender}, {run.verb}, round {run.round + 1}: {said}"
        yield ""


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _ratio(ours: float | None, peer: float | None) -> str:
    return "-" if not ours or not peer else f"{ours / peer:.2f}"
