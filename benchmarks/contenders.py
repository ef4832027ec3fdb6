"""What a contender is, and the place that all of one case share. Peers are command lines; ours is in `benchmarks.ours`.

Every contender backs up, restores what it has stored, has the result verified, and takes everything away again. Only
`back_up` and `restore` are measured.
"""

import contextlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks.bucket import Bucket
from benchmarks.installing import Tools
from benchmarks.measuring import Meter, Usage, measured, size_bytes


class DifferentError(Exception):
    """What was restored is not what was backed up."""


class Contender(Protocol):
    """One program with its options, in one case."""

    @property
    def name(self) -> str:
        """As in the results."""

    def standing(self) -> contextlib.AbstractContextManager[None]:
        """What has to run before anything is asked of it; while others have their turns it does not."""

    def back_up(self) -> Usage:
        """Take one full backup."""

    def stored_bytes(self) -> int:
        """What the backup takes where it lies."""

    def prepare_restore(self) -> None:
        """Make the place into which it is brought back."""

    def restore(self) -> Usage:
        """Bring the backup back."""

    def verify(self) -> None:
        """Raise `DifferentError` unless what came back is what was there."""

    def forget(self) -> None:
        """Take away the backup and what came back."""


@dataclass(frozen=True)
class Place:
    """What the contenders of a case share."""

    work: Path
    tools: Tools
    bucket: Bucket

    @property
    def environment(self) -> dict[str, str]:
        """Of every peer: nothing of the person's own configuration."""
        home = self.work / "home"
        home.mkdir(parents=True, exist_ok=True)
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LC_ALL": "C.UTF-8",
            "RCLONE_CONFIG": os.devnull,
            "RCLONE_S3_ACCESS_KEY_ID": self.bucket.server.keys.access_key,
            "RCLONE_S3_SECRET_ACCESS_KEY": self.bucket.server.keys.secret_key,
            "RCLONE_S3_REGION": self.bucket.server.region,
            "RESTIC_PASSWORD": "bench",
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }

    @property
    def log(self) -> Path:
        """Where the peers' words go; the newest only."""
        return self.work / "peer.log"

    def fresh(self, name: str) -> Path:
        """An empty directory of that name below the work folder."""
        directory = self.work / name
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        return directory

    def remote(self, key: str) -> str:
        """A place in the bucket, as rclone names it."""
        return f"\":s3,provider=Other,endpoint='{self.bucket.server.endpoint}':{self.bucket.server.bucket}/{key}\""


def nothing() -> None:
    """What a peer does that has nothing to prepare or to take away."""


@dataclass(frozen=True)
class ShellPeer:
    """A contender made of two command lines."""

    name: str
    place: Place
    meter: Meter
    backup_command: str
    restore_command: str
    output: Path | None
    """What holds its backup; None: the bucket does."""
    check: Callable[[], None]
    before_backup: Callable[[], None] = nothing
    before_restore: Callable[[], None] = nothing
    clean: Callable[[], None] = nothing
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    """What the server needs while a backup is taken."""
    allowed: str | None = None
    """A failure of the restore that is none."""
    bucket: Bucket | None = None
    """The bucket, if it is not the place's."""

    def standing(self) -> contextlib.AbstractContextManager[None]:
        """See `Contender`: a command runs when it is measured."""
        return contextlib.nullcontext()

    def back_up(self) -> Usage:
        """See `Contender`."""
        self.before_backup()
        with self.around():
            return measured(self.backup_command, self.meter, self.place.environment, self.place.log)

    def stored_bytes(self) -> int:
        """See `Contender`."""
        return size_bytes(self.output) if self.output is not None else (self.bucket or self.place.bucket).size_bytes()

    def prepare_restore(self) -> None:
        """See `Contender`."""
        self.before_restore()

    def restore(self) -> Usage:
        """See `Contender`."""
        return measured(self.restore_command, self.meter, self.place.environment, self.place.log, self.allowed)

    def verify(self) -> None:
        """See `Contender`."""
        self.check()

    def forget(self) -> None:
        """See `Contender`."""
        self.clean()
        if self.output is not None:
            shutil.rmtree(self.output, ignore_errors=True)
        else:
            (self.bucket or self.place.bucket).empty()


def compare(what: str, before: dict[str, str], after: dict[str, str]) -> None:
    """Raise `DifferentError` that names some differences."""
    wrong = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if wrong:
        raise DifferentError(f"{what}: {len(wrong)} of {len(before)} differ, among them {wrong[:5]}")
