"""Which `pg_dump` and `pg_restore` to run: none older than the server, and the closest of those that are not."""

import functools
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from athena_backup.errors import FinalError

_INSTALLATIONS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/local/pgsql/bin",
    "/opt/homebrew/opt/postgresql*/bin",
)
_VERSION_SECONDS = 20
# What libpq itself says of a server that went away, in the words of all versions, and what a server says last.
_LOST_CONNECTION = re.compile(
    r"FATAL:  terminating connection|server closed the connection|SSL connection has been closed|SSL SYSCALL error"
    r"|could not (?:receive|send) data|no connection to the server|^pg_\w+: .*connection to (?:server|database)"
)
# What a server that is there says of another one, as where a view asks a foreign server, or of a row. What pg_dump calls a detail
# may be the server's own last word.
_OF_A_STATEMENT = re.compile(
    r"ERROR:  |^(?:pg_\w+: )?(?:DETAIL|CONTEXT|HINT|hint|detail):(?! Error message from server: )"
)


def lost_connection(stderr: Sequence[str]) -> bool:
    """Whether a client program ended because its own connection was lost, by what it wrote in English: another try may help."""
    return any(_LOST_CONNECTION.search(line) and not _OF_A_STATEMENT.search(line) for line in stderr)


def find_client(name: str, server_version: int, directories: Sequence[Path] = ()) -> Path:
    """The program ``name`` whose major version is the server's, else the next newer one that is installed.

    Looked for in ``directories``, where distributions put their versions, and in PATH. Raises `FinalError` naming what
    there is: an older `pg_dump` refuses a newer server (PostgreSQL manual, pg_dump, "Notes").
    """
    wanted = server_version // 10_000
    found: dict[Path, int] = {}
    for path in _candidates(name, directories):
        found[path] = client_version(path)
        if found[path] // 10_000 == wanted:
            return path
    fitting = [path for path, version in found.items() if version // 10_000 >= wanted]
    if fitting:
        return min(fitting, key=lambda path: found[path] // 10_000)
    there = ", ".join(f"{path} is {version // 10_000}" for path, version in found.items()) or "none is installed"
    raise FinalError(
        f"{name} of version {wanted} or newer is needed: {there}",
        next_step=f"install the PostgreSQL {wanted} client programs, or name their folder in ATHENA_PG_BIN",
    )


@functools.cache
def client_version(path: Path) -> int:
    """The version of a client program as a number, such as 180006."""
    try:
        said = subprocess.run(
            [str(path), "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_VERSION_SECONDS
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r"\(PostgreSQL\) (\d+)(?:\.(\d+))?", said)
    return int(match.group(1)) * 10_000 + int(match.group(2) or 0) if match else 0


def _candidates(name: str, directories: Sequence[Path]) -> Iterator[Path]:
    places = list(directories)
    for pattern in _INSTALLATIONS:
        places += sorted(Path("/").glob(pattern.lstrip("/")))
    # PATH last: Debian's /usr/bin/pg_dump is a script that picks a version by rules of its own.
    places += [Path(place) for place in os.environ.get("PATH", "").split(os.pathsep) if place]
    seen = set()
    for place in places:
        path = place / name
        if path not in seen and os.access(path, os.X_OK) and path.is_file():
            seen.add(path)
            yield path
