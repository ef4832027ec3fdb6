"""The one PostgreSQL server of all database cases: Debian's 15, a cluster for each data set, settings as in production.

The physical peers of Debian 12 know no newer server. PostgreSQL refuses to run as root, so there it runs as `nobody`, which
keeps only the capability to pass through directories that aren't its own.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from athena_backup.ports import free_ports

BINARIES = Path("/usr/lib/postgresql/15/bin")
SETTINGS = {
    "shared_buffers": "512MB",
    "maintenance_work_mem": "256MB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "wal_level": "replica",
    "max_wal_senders": "10",
    "max_locks_per_transaction": "512",  # ten thousand tables in one transaction
    "archive_mode": "on",
    "archive_command": "/bin/true",  # the physical peers put theirs in for their own backups
    "autovacuum": "off",  # no run pays for what another one left; every data set is vacuumed when it is made
}
_CONFIGURATION = "bench.conf"
_START_SECONDS = 600
"""A restored cluster replays its log before it answers."""


def as_server_user(command: Sequence[str]) -> list[str]:
    """The command line that runs it as who owns the clusters (`nobody` where we are root), and ends it with us (SIGINT)."""
    change: list[str] = []
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        change = [f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        change += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"]
    return ["setpriv", "--pdeathsig=INT", *change, *command]


def own(path: Path) -> None:
    """Hand a path over to the server's user."""
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(path, nobody.pw_uid, nobody.pw_gid)


@dataclass(frozen=True)
class Cluster:
    """A running server on one directory; its superuser is ``postgres``, and nobody needs a password."""

    directory: Path
    port: int
    sockets: Path
    pid: int

    def url(self, database: str) -> str:
        """The URL of one of its databases."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def connect(self, database: str = "postgres") -> "psycopg.Connection[tuple[Any, ...]]":
        """A session in autocommit mode."""
        return psycopg.connect(self.url(database), autocommit=True)

    def execute(self, statement: LiteralString | sql.Composed, database: str = "postgres") -> None:
        """Run one statement in a session of its own."""
        with self.connect(database) as session:
            session.execute(statement)

    def create(self, database: str) -> None:
        """Make an empty database."""
        self.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(database)))

    def copy(self, database: str, to: str) -> None:
        """Make a copy of a database that nobody is connected to."""
        self.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*map(sql.Identifier, (to, database))))

    def drop(self, database: str) -> None:
        """Take a database away, if there is one."""
        self.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(database)))

    def settle(self) -> None:
        """Let no run pay for what the one before it left to be written."""
        self.execute("CHECKPOINT")
        os.sync()

    @contextlib.contextmanager
    def archiving(self, command: str) -> Iterator[None]:
        """Archive the log by the command while the block lasts."""
        self._archive_by(command)
        try:
            yield
        finally:
            self._archive_by("/bin/true")

    def _archive_by(self, command: str) -> None:
        self.execute(sql.SQL("ALTER SYSTEM SET archive_command = {}").format(sql.Literal(command)))
        self.execute("SELECT pg_reload_conf()")
        time.sleep(0.5)


@contextlib.contextmanager
def running_cluster(directory: Path, *, restored: bool = False) -> Iterator[Cluster]:
    """Start a server on ``directory``, made where it is missing, and stop it at the end of the block.

    ``restored``: what a physical peer brought back; it archives nothing.
    """
    if not restored:
        _initialize(directory)
    (directory / _CONFIGURATION).write_text("".join(f"{name} = '{value}'\n" for name, value in SETTINGS.items()))
    # Of a socket's path only some hundred bytes are allowed.
    sockets = Path(tempfile.mkdtemp(prefix="athena-bench-"))
    own(sockets)
    [port] = free_ports(1)
    command = [str(BINARIES / "postgres"), "-D", str(directory), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    command += ["-c", f"unix_socket_directories={sockets}", *(["-c", "archive_mode=off"] if restored else [])]
    log_path = directory.with_name(f"{directory.name}.log")
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            as_server_user(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        cluster = Cluster(directory, port, sockets, process.pid)
        _await_start(cluster, process, log_path)
        yield cluster
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGQUIT)
            process.wait(60)
        shutil.rmtree(sockets, ignore_errors=True)


def _initialize(directory: Path) -> None:
    if (directory / "PG_VERSION").exists():
        return
    directory.mkdir(parents=True, mode=0o700)
    own(directory)
    options = ["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "--no-instructions"]
    subprocess.run(
        as_server_user([str(BINARIES / "initdb"), "-D", str(directory), *options]), check=True, capture_output=True
    )
    with (directory / "postgresql.conf").open("a") as file:
        file.write(f"include = '{_CONFIGURATION}'\n")


def _await_start(cluster: Cluster, process: "subprocess.Popen[bytes]", log_path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with cluster.connect() as session:
                (recovering,) = session.execute("SELECT pg_is_in_recovery()").fetchone() or (True,)
            if not recovering:
                return
        except psycopg.OperationalError:
            pass
        time.sleep(0.1)
    said = "\n".join(log_path.read_text(errors="replace").splitlines()[-15:])
    raise RuntimeError(f"PostgreSQL did not start on {cluster.directory}:\n{said}")
