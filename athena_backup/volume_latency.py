"""Where a file system answers slowly, as over a network: many questions at once instead of one after the other.

On a disk of this machine a small file is read or made in some microseconds, and threads would only be in each other's way. Over
a network each takes some round trips, during which nobody works: a million files, one after the other, are hours. `Slowness`
tells which it is, `Helpers` are the threads. Who uses them: `volume_ahead` in a backup, `volume_extract` in a restore.
"""

import contextlib
import enum
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from athena_backup.operation import LOOK_SECONDS

HELPERS = 8
"""For each archive that is read or written; of those there are as many at once as jobs."""
_WAITING_LIMIT = 256
_WAITING_LIMIT_BYTES = 8 << 20
_GRACE_SECONDS = 60
_SLOW_SECONDS = 0.0003
"""For one file. A disk needs less, with what Python and the waiting for its lock cost; a round trip on a network more."""
_SAMPLES = 4
"""So many in a row have to be slow: one alone may have waited for Python's lock."""
_BETWEEN_SAMPLES = 32
_STINT = 4_096
"""So many files are left to helpers before it is looked at again whether that is still needed."""
_Tool = TypeVar("_Tool")


class Way(enum.Enum):
    """What to do with the next file."""

    ALONE = "without helpers"
    TIMED = "without helpers, and tell how long it took"
    HELPED = "with helpers"


class Slowness:
    """Whether files are waited for more than worked on, judged by samples. Not for several threads."""

    def __init__(self) -> None:
        self._slow = 0
        self._alone = 0
        self._helped = 0

    def next(self) -> Way:
        """What to do with the next file; asked once for each."""
        if self._helped:
            self._helped -= 1
            return Way.HELPED
        if self._alone:
            self._alone -= 1
            return Way.ALONE
        return Way.TIMED

    def note(self, seconds: float) -> None:
        """How long one that was to be timed took; one that tells nothing need not be noted, the next is timed then."""
        if seconds < _SLOW_SECONDS:
            self._slow, self._alone = 0, _BETWEEN_SAMPLES
            return
        self._slow += 1
        if self._slow == _SAMPLES:
            self._slow, self._helped = 0, _STINT


class Helpers(Generic[_Tool]):
    """Threads that do what they are given, several things at once and in any order; they begin when there is something to do.

    Each works with a tool of its own. The first error is raised by whoever gives more, or waits for the end; what was given and
    not begun is dropped then. One that hangs, in a mount whose server is gone, is left behind after `_GRACE_SECONDS`.
    """

    def __init__(
        self, tools: Callable[[], AbstractContextManager[_Tool]], check: Callable[[], None], most: int = HELPERS
    ) -> None:
        self._tools = tools
        self._check = check
        self._most = most
        self._threads = 0
        self._idle = 0
        self._waiting: deque[tuple[Callable[[_Tool], object], int]] = deque()
        self._bytes = 0
        """Of all that is waiting or at work."""
        self._left = 0
        self._error: BaseException | None = None
        self._has_ended = False
        self._changed = threading.Condition()

    def __enter__(self) -> "Helpers[_Tool]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let those at work come to an end, drop what is waiting; `finish` first where all has to be done."""
        with self._changed:
            self._has_ended = True
            self._drop()
            self._changed.wait_for(lambda: not self._threads, _GRACE_SECONDS)

    def offer(self, work: Callable[[_Tool], object]) -> bool:
        """Have it done unless enough is waiting; returns whether."""
        with self._changed:
            return len(self._waiting) < _WAITING_LIMIT and not self._has_ended and self._add(work, 0)

    def give(self, work: Callable[[_Tool], object], size_bytes: int = 0) -> bool:
        """Have it done, as soon as there is room for ``size_bytes`` that it keeps in memory; raises what another has raised.

        Returns False where the system has no room for a single thread more: whoever gives it has to do it.
        """
        with self._changed:
            while self._bytes >= _WAITING_LIMIT_BYTES or len(self._waiting) >= _WAITING_LIMIT:
                self._look()
            self._raise()
            return self._add(work, size_bytes)

    def finish(self) -> None:
        """Wait until all is done; raises what one has raised."""
        with self._changed:
            while self._left:
                self._look()
            self._raise()

    def _look(self) -> None:
        self._raise()
        self._changed.wait(LOOK_SECONDS)
        self._check()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _add(self, work: Callable[[_Tool], object], size_bytes: int) -> bool:
        """The lock is held."""
        if len(self._waiting) >= self._idle and self._threads < self._most:
            with contextlib.suppress(RuntimeError, MemoryError):  # no room for another thread
                threading.Thread(target=self._run, name="helper", daemon=True).start()
                self._threads += 1
        if not self._threads:
            return False
        self._waiting.append((work, size_bytes))
        self._left += 1
        self._bytes += size_bytes
        self._changed.notify_all()
        return True

    def _fail(self, error: BaseException) -> None:
        """The lock is held."""
        self._error = self._error or error
        self._drop()

    def _drop(self) -> None:
        """The lock is held."""
        self._left -= len(self._waiting)
        self._bytes -= sum(size_bytes for _, size_bytes in self._waiting)
        self._waiting.clear()
        self._changed.notify_all()

    def _next(self) -> tuple[Callable[[_Tool], object], int] | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._waiting or self._has_ended)
            self._idle -= 1
            return self._waiting.popleft() if self._waiting else None

    def _run(self) -> None:
        try:
            with self._tools() as tool:
                while self._do_next(tool):
                    pass
        except BaseException as error:  # noqa: BLE001 - raised in the thread that gives the work
            with self._changed:
                self._fail(error)
        finally:
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()

    def _do_next(self, tool: _Tool) -> bool:
        """Returns whether there was something; what it was is let go before anybody hears that it is done."""
        one = self._next()
        if one is None:
            return False
        work, size_bytes = one
        error: BaseException | None = None
        try:
            work(tool)
        except BaseException as found:  # noqa: BLE001 - raised in the thread that gives the work
            error = found
        del one, work
        with self._changed:
            # Known before it counts as done: who waits for the end looks at both at once.
            if error is not None:
                self._fail(error)
            self._left -= 1
            self._bytes -= size_bytes
            self._changed.notify_all()
        return error is None
