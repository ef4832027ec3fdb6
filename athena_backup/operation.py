"""What an operation in flight carries with it: the cancel token, the deadline, and how far each component has come.

Every blocking call of the engine takes an `Operation` and looks at it at least once a second, or is ended by it
(design.md, section 6: cancel and time-outs are the engine's own).
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from athena_backup.errors import CancelledError, DeadlineError

LOOK_SECONDS = 0.5
"""How long a blocking call may go without a look at its operation."""


@dataclass(frozen=True)
class Progress:
    """How far one component has come: raw bytes read (or restored) and, where known, how many there will be."""

    component: str
    done_bytes: int
    total_bytes: int | None


@dataclass
class Operation:
    """The token, the deadline and the progress of one operation; shared by all its threads."""

    deadline: float | None = None
    """On the clock of `time.monotonic`; None: as long as it takes."""
    bytes_per_second: float | None = None
    """How fast all its sources together may be read; None: as fast as they go."""
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _reason: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _done: dict[str, int] = field(default_factory=dict)
    _totals: dict[str, int] = field(default_factory=dict)
    _next_read: float = 0
    _on_cancel: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def lasting(cls, seconds: float | None, *, bytes_per_second: float | None = None) -> "Operation":
        """An operation that has to end within ``seconds`` from now."""
        return cls(None if seconds is None else time.monotonic() + seconds, bytes_per_second)

    def cancel(self, reason: str) -> None:
        """Tell every thread of the operation to stop; the first reason is the one that is reported."""
        with self._lock:
            if self._cancelled.is_set():
                return
            self._reason = reason
            self._cancelled.set()
            callbacks = list(self._on_cancel)
        for callback in callbacks:
            callback()

    @property
    def cancelled(self) -> bool:
        """Whether someone cancelled the operation."""
        return self._cancelled.is_set()

    def when_cancelled(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` once at cancellation (at once where it has happened already); returns how to forget it.

        For calls that can't look by themselves: a query is cancelled in the server, a child is ended by its group.
        """
        with self._lock:
            if not self._cancelled.is_set():
                self._on_cancel.append(callback)
                return lambda: self._forget(callback)
        callback()
        return lambda: None

    def _forget(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if callback in self._on_cancel:
                self._on_cancel.remove(callback)

    def check(self) -> None:
        """Raise `CancelledError` or `DeadlineError` when the operation has to stop."""
        if self._cancelled.is_set():
            raise CancelledError(self._reason, step="stopping")
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise DeadlineError(
                "the operation took longer than it was allowed to",
                next_step="raise ATHENA_OPERATION_TIMEOUT_SECONDS if it has to take that long",
            )

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than the operation lives; raises like `check`."""
        self.check()
        if self.deadline is not None:
            seconds = min(seconds, max(0.0, self.deadline - time.monotonic()))
        self._cancelled.wait(seconds)
        self.check()

    def pace(self, raw_bytes: int) -> None:
        """Wait until ``raw_bytes`` more may be read at the rate that is allowed; raises like `check`."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            now = time.monotonic()
            self._next_read = max(self._next_read, now) + raw_bytes / self.bytes_per_second
            wait_seconds = self._next_read - now
        self.pause(wait_seconds)

    def expect(self, component: str, total_bytes: int) -> None:
        """Say how many raw bytes a component will have, as far as one can know."""
        with self._lock:
            self._totals[component] = total_bytes

    def advance(self, component: str, raw_bytes: int) -> None:
        """Count raw bytes that went through."""
        with self._lock:
            self._done[component] = self._done.get(component, 0) + raw_bytes

    def progress(self) -> list[Progress]:
        """The progress of every component that has begun, in the order of their beginnings."""
        with self._lock:
            names = list(dict.fromkeys([*self._totals, *self._done]))
            return [Progress(name, self._done.get(name, 0), self._totals.get(name)) for name in names]
