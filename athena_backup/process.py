"""Child processes: each in a process group of its own, on pipes of its own, with an owner and an end.

A child never inherits our stdout or stderr (with them open the Prefect runner waits for it even after our death), dies
with us (parent-death signal), and is ended by its group when the operation is cancelled.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from athena_backup.errors import FinalError
from athena_backup.operation import LOOK_SECONDS, Operation

STDERR_LIMIT_LINES = 2_000
"""Lines of stderr that are kept (the newest); a child that floods it must not take our memory."""
_LINE_LIMIT_BYTES = 8_192
_GRACE_SECONDS = 5.0
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_KEPT_BYTES = 8 << 20
_KEPT_LIMIT_BYTES = 24 << 20
ARENAS = 2
"""Heaps of the C library in each of the service's processes. Each thread would have one of its own (mallopt(3)), and each heap
keeps what is freed in it. A process has to be started with MALLOC_ARENA_MAX: a run that limited their number only once Prefect's
threads had theirs held 344 MB instead of 243 (tried).
"""

# Run between fork and exec in an interpreter of its own: `preexec_fn` may deadlock in a process with threads
# (Python manual, subprocess), and prctl(2)'s PR_SET_PDEATHSIG (1) has to be set by the child itself. The look at the
# parent closes the gap in which we could die before the signal is armed.
_DIE_WITH_PARENT = (
    "import ctypes,os,sys;ctypes.CDLL(None).prctl(1,9);"
    "os.getppid()==int(sys.argv[1]) or sys.exit(137);os.execvp(sys.argv[2],sys.argv[2:])"
)


def die_with_parent(command: Sequence[str]) -> list[str]:
    """The command line that runs ``command`` so that it is killed when the thread that started it ends by any death."""
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]


@dataclass(frozen=True)
class Ended:
    """How a child ended: ``exit_code`` as in `subprocess` (negative: by that signal), and the end of its stderr."""

    program: str
    exit_code: int
    stderr: tuple[str, ...]

    def how(self) -> str:
        """In words: what ended it, with the last lines that it wrote."""
        if self.exit_code < 0:
            try:
                ending = f"was killed by {signal.Signals(-self.exit_code).name}"
            except ValueError:
                ending = f"was killed by signal {-self.exit_code}"
        else:
            ending = f"ended with exit code {self.exit_code}"
        # PostgreSQL's programs begin their own lines so; what follows one is the row or the statement that failed, and these hold
        # data and passwords (CREATE SUBSCRIPTION, CREATE USER MAPPING).
        own = [line for line in self.stderr if line.startswith(f"{self.program}: ")]
        if not own and len(self.stderr) < STDERR_LIMIT_LINES:
            # Of a wrapper or the loader: nothing of the program's came before them.
            own = [line for line in self.stderr if line]
        said = " | ".join(own[-5:])
        return f"{self.program} {ending}" + (f": {said}" if said else "")


class Child:
    """A running child with its pipes; made by `running` only."""

    def __init__(self, program: str, process: "subprocess.Popen[bytes]") -> None:
        self._program = program
        self._process = process
        self._lines: deque[str] = deque(maxlen=STDERR_LIMIT_LINES)
        self._stderr_reader = threading.Thread(target=self._drain_stderr, name=f"stderr-{program}", daemon=True)
        self._stderr_reader.start()

    @property
    def stdout(self) -> IO[bytes]:
        """What the child writes; unbuffered."""
        if self._process.stdout is None:
            raise RuntimeError("the child was started without a stdout pipe")
        return self._process.stdout

    @property
    def stdin(self) -> IO[bytes]:
        """What the child reads; unbuffered; the caller closes it to say that there is no more."""
        if self._process.stdin is None:
            raise RuntimeError("the child was started without a stdin pipe")
        return self._process.stdin

    @property
    def pid(self) -> int:
        """The child's process id, which is also that of its group."""
        return self._process.pid

    def wait(self, operation: Operation, check: Callable[[], None] = lambda: None) -> Ended:
        """Wait for the end and return it; raises as `Operation.check` or ``check`` (leaving the block then ends the child)."""
        while True:
            try:
                exit_code = self._process.wait(LOOK_SECONDS)
                break
            except subprocess.TimeoutExpired:
                operation.check()
                check()
        self._stderr_reader.join(_GRACE_SECONDS)
        return Ended(self._program, exit_code, tuple(self._lines))

    def kill_group(self, sig: int = signal.SIGKILL) -> None:
        """Signal the child and whatever it started; harmless once it is gone."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, sig)

    def forget_stderr(self) -> None:
        """Let go of the stderr pipe once the child is gone; a grandchild that still holds it is not waited for."""
        self._stderr_reader.join(_GRACE_SECONDS)
        if not self._stderr_reader.is_alive() and self._process.stderr is not None:
            self._process.stderr.close()

    def _drain_stderr(self) -> None:
        stream = self._process.stderr
        if stream is None:
            return
        while line := stream.readline(_LINE_LIMIT_BYTES):
            self._lines.append(line.decode("utf-8", "replace").rstrip("\r\n"))


def give_memory_back() -> None:
    """Have the C library return every freed buffer of 8 MiB and more to the system at once, and keep smaller ones (mallopt(3)).

    The large ones are upload parts. Left alone, glibc keeps them for later in each thread's heap after the first was freed, and
    a backup into an object store holds a quarter more. The smaller ones are blocks on their way through: returning these costs
    a page fault for every page of every block, a tenth of a backup's processor time (tried); so up to 24 MiB of them are kept in
    each of two heaps, which leaves a third of the faults that 8 MiB left. With 32 MiB in four the process of a backup into S3
    held 455 MB; 400 are allowed (design.md, section 7).
    Other C libraries have no such call, and no such habit.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_LIMIT_BYTES)
        if "MALLOC_ARENA_MAX" not in os.environ:
            mallopt(_M_ARENA_MAX, ARENAS)


@contextlib.contextmanager
def running(
    command: Sequence[str],
    operation: Operation,
    *,
    environment: Mapping[str, str],
    reads: bool = False,
    writes: bool = False,
) -> Iterator[Child]:
    """Start ``command`` with exactly ``environment``; leaving the block ends it, whatever way the block is left.

    ``writes``: the child's stdout is a pipe for us; ``reads``: its stdin is one. Raises `FinalError` if the program can't
    be started. Secrets belong into the environment, never into the command (other users see command lines).
    """
    operation.check()
    program = os.path.basename(command[0])
    if not os.access(command[0], os.X_OK):
        raise FinalError(f"{command[0]} can't be run", next_step=f"install {program}, or say where it is")
    process = subprocess.Popen(
        die_with_parent(command),
        stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
        stdout=subprocess.PIPE if writes else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=dict(environment),
        start_new_session=True,
    )
    child = Child(program, process)
    # A cancel must end a child on whose pipe some thread is blocked: its death is what wakes that thread.
    forget = operation.when_cancelled(child.kill_group)
    try:
        yield child
    finally:
        forget()
        child.kill_group(signal.SIGTERM)
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill_group()
            process.wait()
        child.forget_stderr()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
