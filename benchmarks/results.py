"""What was measured, as one JSON file that is written after every run: a broken benchmark loses nothing of what it has."""

import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from benchmarks.measuring import Usage

METHOD = 4
"""Of measuring: what was measured by another one can't stand beside what is measured now."""
LIMIT = "limit"
"""Stands for a contender where the limits could not be measured."""
Verb = Literal["backup", "restore", "cleaning"]
VERBS: tuple[Verb, ...] = ("backup", "restore")
"""Those that are measured."""


@dataclass(frozen=True)
class Run:
    """One measured run of one contender; ``failure`` says why it is none."""

    case: str
    contender: str
    verb: Verb
    round: int
    usage: Usage | None
    stored_bytes: int = 0
    failure: str = ""


@dataclass(frozen=True)
class Limit:
    """What a backup can't do without, measured piece by piece, in CPU seconds."""

    form: str
    raw_bytes: float
    compressed_bytes: float
    server_cpu_seconds: float
    """Of PostgreSQL for COPY (of files: of reading them)."""
    zstd_cpu_seconds: float
    receive_cpu_seconds: float
    """Of taking the raw bytes from a socket."""
    loopback_cpu_seconds: float
    """Of sending the compressed bytes to a store on this machine, and of receiving them there."""
    sha256_cpu_seconds: float
    """Of what a set needs besides its bytes."""
    store_cpu_seconds: float
    """Instead of the loopback's: of sending the compressed bytes, and of all that the S3 server on this machine does with them."""

    def seconds(self, *, remote: bool) -> float:
        """The wall time at which every core would be busy with nothing else."""
        needed = self.server_cpu_seconds + self.zstd_cpu_seconds + self.receive_cpu_seconds
        return (needed + (self.loopback_cpu_seconds if remote else 0.0)) / cores()

    def store_seconds(self) -> float:
        """The same with an S3 server on these cores, which does more with the bytes than take them from loopback."""
        return self.seconds(remote=False) + self.store_cpu_seconds / cores()

    def whole_seconds(self, *, remote: bool) -> float:
        """The same with what a set needs besides, and the S3 server."""
        return (self.store_seconds() if remote else self.seconds(remote=False)) + self.sha256_cpu_seconds / cores()


@dataclass
class Results:
    """Everything that the report needs."""

    size: str
    path: Path
    machine: dict[str, str] = field(default_factory=dict)
    data: dict[str, str] = field(default_factory=dict)
    """What the data sets are, measured."""
    rounds: dict[str, int] = field(default_factory=dict)
    began: dict[str, str] = field(default_factory=dict)
    """When each case was begun."""
    method: int = METHOD
    rest: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Each standing process of our service: memory in bytes, share of a core."""
    limits: dict[str, list[Limit]] = field(default_factory=dict)
    """Of each case, in each round one for each form."""
    runs: list[Run] = field(default_factory=list)

    def begin(self, case: str, rounds: int) -> None:
        """Forget what an earlier benchmark has measured in this case."""
        self.runs = [one for one in self.runs if one.case != case]
        self.limits.pop(case, None)
        self.rounds[case], self.began[case] = rounds, f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        self.machine |= machine()

    def add(self, run: Run) -> None:
        """Keep a run, on the disk too."""
        self.runs.append(run)
        self.save()

    def save(self) -> None:
        """Write all of it."""
        document = {name: value for name, value in asdict(self).items() if name != "path"}
        half = self.path.with_suffix(".half")
        half.write_text(json.dumps(document, indent=1))
        half.replace(self.path)

    def of(self, case: str, contender: str, verb: Verb) -> list[Run]:
        """The runs that count: of rounds in which what came back was what was backed up."""
        found = [one for one in self.runs if (one.case, one.contender) == (case, contender) and one.usage is not None]
        proven = {one.round for one in found if one.verb == "restore"}
        return [one for one in found if one.verb == verb and one.round in proven]

    def median(self, case: str, contender: str, verb: Verb, what: Callable[[Usage], float]) -> float | None:
        """The median of one figure; None where nothing was measured."""
        return median(what(one.usage) for one in self.of(case, contender, verb) if one.usage is not None)

    def median_limits(self, case: str) -> list[Limit]:
        """One for each form: of every piece the median of all rounds."""
        forms = dict.fromkeys(one.form for one in self.limits.get(case, []))
        return [self._median_limit(case, form) for form in forms]

    def _median_limit(self, case: str, form: str) -> Limit:
        found = [asdict(one) for one in self.limits[case] if one.form == form]
        pieces = {name: statistics.median(one[name] for one in found) for name in found[0] if name != "form"}
        return Limit(form, **pieces)

    def seconds(self, case: str, contender: str, verb: Verb) -> float | None:
        """The median of the wall time."""
        return self.median(case, contender, verb, lambda usage: usage.seconds)


def median(values: Iterable[float]) -> float | None:
    """Of nothing: None."""
    found = list(values)
    return statistics.median(found) if found else None


def load(size: str, path: Path) -> Results:
    """What is on the disk, or nothing yet; what was measured by another method is set aside, and that is said."""
    results = Results(size, path)
    read = json.loads(path.read_text()) if path.exists() else {}
    if read and read.get("method") != METHOD:
        aside = path.with_suffix(f".{datetime.now(UTC):%Y%m%d%H%M%S}.json")
        path.rename(aside)
        print(f"{path.name} was measured in another way than now: set aside as {aside.name}")
    elif read:
        results.machine, results.data = read["machine"], read["data"]
        results.rounds, results.began = read["rounds"], read["began"]
        results.rest = {name: (int(memory), float(share)) for name, (memory, share) in read["rest"].items()}
        results.limits = {name: [Limit(**one) for one in limits] for name, limits in read["limits"].items()}
        results.runs = [Run(**{**one, "usage": one["usage"] and Usage(**one["usage"])}) for one in read["runs"]]
    return results


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> dict[str, str]:
    """What it was measured on."""
    information = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in information if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": f"{cores()} ({models[0] if models else platform.machine()})",
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": platform.release(),
    }
