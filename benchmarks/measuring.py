"""What one run costs: wall seconds, CPU seconds of client, server and bystanders, and the client's peak of memory.

Everything is read from /proc, alike for every contender. Memory is proportional (PSS), so that what processes share counts
once; it is read whenever the cheaper resident sum reaches a new height, looked at 20 times a second.
"""

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LOOK_SECONDS = 0.05
_NEW_HEIGHT = 1.01
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Usage:
    """What one run cost."""

    seconds: float
    client_cpu_seconds: float
    server_cpu_seconds: float
    """Of PostgreSQL: its tree, the backends that have ended included."""
    other_cpu_seconds: float
    """Of the S3 server, and of the part of our service that stands all the time."""
    peak_bytes: int
    """Of the client's whole process tree."""
    first_seconds: float | None = None
    """Ours: from the POST to the start of the run's first task."""
    whole_seconds: float | None = None
    """Ours: from the POST to the run's end."""


class RunFailedError(Exception):
    """A contender's command failed; the message has the end of what it said."""


def stat_of(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third on (proc(5)); None if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def children_of(pid: int) -> list[int]:
    """Its living children, whichever thread started them."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    except OSError:
        pass
    return found


def tree_of(pids: Iterable[int]) -> Iterator[int]:
    """The processes and all their living descendants."""
    for pid in pids:
        yield pid
        yield from tree_of(children_of(pid))


def cpu_seconds(pids: Iterable[int]) -> float:
    """Of the living processes, without their living children, but with those that they have waited for."""
    total = 0
    for pid in pids:
        if fields := stat_of(pid):
            total += sum(int(one) for one in fields[11:15])
    return total / _TICKS


def tree_cpu_seconds(pids: Iterable[int]) -> float:
    """Of whole trees, the dead included whose parents live."""
    return cpu_seconds(tree_of(pids))


def waited_cpu_seconds(pid: int) -> float:
    """Of the children, and theirs, that the process has waited for."""
    fields = stat_of(pid)
    return sum(int(one) for one in fields[13:15]) / _TICKS if fields else 0.0


def pss_bytes(pid: int) -> int:
    """Proportional set size of one process; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _resident_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


@dataclass
class Watched:
    """What a `watching` block has seen of a process tree."""

    peak_bytes: int = 0
    cpu_seconds: float = 0.0
    """The highest sum seen: what ends between two looks and is waited for by nobody in the tree is missed."""
    pids: set[int] = field(default_factory=set)


@contextmanager
def watching(roots: Callable[[], list[int]]) -> Iterator[Watched]:
    """Look at the trees below ``roots()`` while the block lasts."""
    seen = Watched()
    done = threading.Event()

    def look() -> None:
        height = 0.0
        while not done.is_set():
            pids = list(tree_of(roots()))
            seen.pids.update(pids)
            seen.cpu_seconds = max(seen.cpu_seconds, cpu_seconds(pids))
            resident = sum(_resident_bytes(pid) for pid in pids)
            if resident > height * _NEW_HEIGHT:
                height = resident
                seen.peak_bytes = max(seen.peak_bytes, sum(pss_bytes(pid) for pid in pids))
            done.wait(LOOK_SECONDS)

    thread = threading.Thread(target=look, name="watching", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True)
class Meter:
    """Whose CPU is counted beside the client's."""

    server_pid: int | None = None
    other_pids: tuple[int, ...] = ()

    def read(self) -> tuple[float, float]:
        """CPU seconds so far of the server and of the others."""
        server = tree_cpu_seconds([self.server_pid]) if self.server_pid is not None else 0.0
        return server, tree_cpu_seconds(self.other_pids)


def measured(
    command: str, meter: Meter, environment: Mapping[str, str], log: Path, allowed: str | None = None
) -> Usage:
    """Run a command line in bash, failing if any part of a pipe fails, and say what it cost.

    Its output goes to ``log``. A failure is none if every error that it tells has ``allowed`` in it. Raises `RunFailedError`.
    """
    server, other = meter.read()
    with log.open("wb") as sink:
        began = time.perf_counter()
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            env=dict(environment),
            start_new_session=True,
        )
        with watching(lambda: [process.pid]) as seen:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    server_after, other_after = meter.read()
    if process.returncode != 0:
        said = log.read_text(errors="replace")
        errors = [line for line in said.splitlines() if "error:" in line]
        if allowed is None or not errors or any(allowed not in line for line in errors):
            raise RunFailedError(f"{command}\nended with {process.returncode}: {said[-2000:]}")
    return Usage(
        seconds=seconds,
        client_cpu_seconds=usage.ru_utime + usage.ru_stime,
        server_cpu_seconds=server_after - server,
        other_cpu_seconds=other_after - other,
        peak_bytes=seen.peak_bytes,
    )


def size_bytes(directory: Path) -> int:
    """What all files below it, or the file itself, hold."""
    if directory.is_file():
        return directory.stat().st_size
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
