"""What one run costs: wall seconds, CPU seconds of client, server and bystanders, and the client's peak of memory.

Everything is read from /proc, alike for every contender. Memory is proportional (PSS), so that what processes share counts
once; it is read whenever the cheaper resident sum reaches a new height, looked at 10 times a second.
"""

import ctypes
import os
import platform
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

LOOK_SECONDS = 0.1
_NEW_HEIGHT = 1.01
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_LIBC = ctypes.CDLL(None)
_KCMP = {"x86_64": 312, "aarch64": 272}
_KCMP_VM = 1


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
    """Of the client's whole process tree (PSS)."""
    resident_bytes: int
    """The same as a sum of resident sets, in which shared pages count for each process."""
    disk_busy_seconds: float
    """How long the disk below the work folder had something to do."""
    start_cpu_seconds: float = 0.0
    """Ours: of the client's CPU, what its process took before the run was Running."""
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


def _with_own_memory(pids: list[int]) -> list[int]:
    """Those that are not between vfork(2) and exec(3), in the memory of their parent, where it would count twice."""
    fields = {pid: stat_of(pid) for pid in pids}
    return [
        pid for pid, of in fields.items() if of is not None and not (int(of[1]) in fields and _same(pid, int(of[1])))
    ]


def _same(pid: int, other: int) -> bool:
    """Whether two processes have one memory (kcmp(2)); False where the kernel doesn't say."""
    number = _KCMP.get(platform.machine())
    return number is not None and _LIBC.syscall(number, pid, other, _KCMP_VM, 0, 0) == 0


@dataclass
class Watched:
    """What a `watching` block has seen of a process tree."""

    peak_bytes: int = 0
    resident_bytes: int = 0
    cpu: list[tuple[float, float]] = field(default_factory=list)
    """Instants, and the tree's CPU seconds until then."""

    def cpu_seconds_at(self, instant: float) -> float:
        """What the tree had used up by then."""
        return max((spent for at, spent in self.cpu if at <= instant), default=0.0)


@contextmanager
def watching(roots: Callable[[], list[int]]) -> Iterator[Watched]:
    """Look at the trees below ``roots()`` while the block lasts."""
    seen = Watched()
    done = threading.Event()

    def look() -> None:
        height = 0
        while not done.is_set():
            pids = list(tree_of(roots()))
            seen.cpu.append((time.time(), cpu_seconds(pids)))
            if sum(_resident_bytes(pid) for pid in pids) > height * _NEW_HEIGHT:
                pids = _with_own_memory(pids)
            resident = sum(_resident_bytes(pid) for pid in pids)
            if resident > height * _NEW_HEIGHT:
                height = seen.resident_bytes = resident
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
class Spent:
    """What a `Meter` reads: sums since the machine's or the process' start."""

    server_cpu_seconds: float
    other_cpu_seconds: float
    disk_busy_seconds: float

    def since(self, before: "Spent") -> "Spent":
        """What was spent in between."""
        return Spent(
            self.server_cpu_seconds - before.server_cpu_seconds,
            self.other_cpu_seconds - before.other_cpu_seconds,
            self.disk_busy_seconds - before.disk_busy_seconds,
        )


@dataclass(frozen=True)
class Meter:
    """Whose CPU is counted beside the client's."""

    server_pid: int | None = None
    other_pids: tuple[int, ...] = ()

    def read(self) -> Spent:
        """The sums until now."""
        server = tree_cpu_seconds([self.server_pid]) if self.server_pid is not None else 0.0
        return Spent(server, tree_cpu_seconds(self.other_pids), _disk_busy_seconds())


def _disk_busy_seconds() -> float:
    """Of the disk that the current directory is on (Documentation/block/stat.rst, io_ticks); 0 where it has none."""
    device = Path.cwd().stat().st_dev
    try:
        return int(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat").read_text().split()[9]) / 1000
    except (OSError, IndexError):
        return 0.0


def measured(
    command: str, meter: Meter, environment: Mapping[str, str], log: Path, allowed: str | None = None
) -> Usage:
    """Run a command line in bash, failing if any part of a pipe fails, and say what it cost.

    Its output goes to ``log``. A failure is none if every error that it tells has ``allowed`` in it. Raises `RunFailedError`.
    """
    before = meter.read()
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
        try:
            with watching(lambda: [process.pid]) as seen:
                _, status, usage = os.wait4(process.pid, 0)
                seconds = time.perf_counter() - began
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    spent = meter.read().since(before)
    if process.returncode != 0:
        said = log.read_text(errors="replace")
        errors = [line for line in said.splitlines() if "error:" in line]
        if allowed is None or not errors or any(allowed not in line for line in errors):
            raise RunFailedError(f"{command}\nended with {process.returncode}: {said[-2000:]}")
    return Usage(
        seconds=seconds,
        client_cpu_seconds=usage.ru_utime + usage.ru_stime,
        server_cpu_seconds=spent.server_cpu_seconds,
        other_cpu_seconds=spent.other_cpu_seconds,
        peak_bytes=seen.peak_bytes,
        resident_bytes=seen.resident_bytes,
        disk_busy_seconds=spent.disk_busy_seconds,
    )


def size_bytes(directory: Path) -> int:
    """What all files below it, or the file itself, hold."""
    if directory.is_file():
        return directory.stat().st_size
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())
