"""A tree of child processes with one owner: started one after the other, watched together, and stopped to the last one.

The owner becomes the reaper of all its descendants (prctl(2), PR_SET_CHILD_SUBREAPER), so that a process whose parent was
killed still has somebody who ends it; and every child dies with the owner, however the owner dies.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from athena_backup.errors import FinalError
from athena_backup.process import die_with_parent

_SUBREAPER = 36
_LOOK_SECONDS = 0.1


@dataclass
class ProcessTree:
    """The children of one foreground command. Use as a context manager; leaving it leaves no process behind."""

    grace_seconds: float = 45.0
    is_stopped: Callable[[], bool] = lambda: False
    """Whether somebody wants the tree to stop: then no further child is waited for."""
    _children: "dict[str, subprocess.Popen[bytes]]" = field(default_factory=dict)
    _others: set[int] = field(default_factory=set)
    """Children that the owner had before: not ours to end."""

    def __enter__(self) -> "ProcessTree":
        self._others = _child_pids()
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        is_ready: Callable[[], bool],
        ready_seconds: float = 120.0,
    ) -> None:
        """Start a child and wait until it is ready; raises `FinalError` if it ends or takes too long before that.

        The child gets a session of its own, so that Ctrl-C reaches only the owner, which stops all in the right order.
        """
        process = subprocess.Popen(
            die_with_parent(command), env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._children[name] = process
        deadline = time.monotonic() + ready_seconds
        while not is_ready():
            if self.is_stopped():
                raise FinalError("stopped while starting")
            if process.poll() is not None:
                raise FinalError(f"{name} ended with exit code {process.returncode} while starting; its log is above")
            if time.monotonic() > deadline:
                raise FinalError(f"{name} was not ready within {ready_seconds:.0f} s; its log is above")
            time.sleep(_LOOK_SECONDS)

    def ended(self) -> tuple[str, int] | None:
        """The name and exit code of a child that has ended; None while all live."""
        for name, process in self._children.items():
            code = process.poll()
            if code is not None:
                return name, code
        return None

    def pids(self) -> dict[str, int]:
        """The children by name."""
        return {name: process.pid for name, process in self._children.items()}

    def stop(self) -> None:
        """Stop the children, the last started first, each within its grace; then whatever they left behind."""
        for name, process in reversed(self._children.items()):
            process.terminate()
            try:
                process.wait(self.grace_seconds)
            except subprocess.TimeoutExpired:
                print(f"{name} did not stop in {self.grace_seconds:.0f} s and is killed", file=sys.stderr)
                process.kill()
                process.wait()
        self._children.clear()
        _end_orphans(self._others)


def _end_orphans(spared: set[int]) -> None:
    """End every process that was handed to us by its parent's death; those that are spared were ours before."""
    for sig, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        deadline = time.monotonic() + seconds
        signalled: set[int] = set()
        while orphans := _child_pids() - spared:
            for pid in orphans - signalled:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sig)
                signalled.add(pid)
            for pid in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                break
            time.sleep(_LOOK_SECONDS)
        else:
            return


def _child_pids() -> set[int]:
    pids: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            pids.update(int(pid) for pid in (task / "children").read_text().split())
    return pids
