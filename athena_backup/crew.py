"""The one budget of an operation: so many units of work at once, the biggest first, whichever component they belong to.

Every component hands its units (a dump, a range of a table, an archive) to the same crew and waits for them. So a last big
table is not read alone while nine others wait for nobody, and five databases don't start five times as many connections. What
holds nothing back at a server, the archives of volumes, ranks behind everything that does.
"""

import contextvars
import heapq
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from athena_backup.errors import FinalError
from athena_backup.operation import LOOK_SECONDS

WAITING_LIMIT = 1
"""Each one holds upload parts in memory for as long as it waits."""
_GRACE_SECONDS = 60
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Turn:
    """What a unit is given when its turn comes."""

    slots: int
    """How many threads, connections or child processes it may use; 1 unless it said that it can use more."""
    check: Callable[[], None]
    """Raises when another unit of the same call has failed: nobody will use this one's result."""
    give_back: Callable[[], None] = lambda: None
    """Says that all that is left is to wait for somebody else, such as a store: the next unit may begin.

    Of all units `WAITING_LIMIT` at most wait so without a slot; any further one keeps one.
    """
    slots_now: Callable[[], int] = lambda: 1
    """How many it may use from now on instead of `slots`, at least 1; for an elastic unit that can change it at any time.

    Each call may take one more that nobody uses, or give all but one back to those that wait: it is to be asked often.
    """
    others: int = 0
    """How many were at work beside it when its turn came, or waited for a slot, as far as there are slots for them.

    Of those at work only what is at least half as big counts: the others have soon ended.
    """


@dataclass(frozen=True)
class Unit(Generic[_Result]):
    """A piece of work that one thread does from beginning to end."""

    size_bytes: int
    """About how many bytes it has to move: of one rank the bigger goes first."""
    work: Callable[[Turn], _Result]
    is_elastic: bool = False
    """Whether it can use every slot that nobody else waits for when its turn comes."""
    after: Sequence[int] = ()
    """Which units of the same call have to be done first, by their positions, all before its own."""
    rank: int = 0
    """One of a higher rank waits for all of a lower one that wait for a slot, whatever their sizes."""
    needs_slot: bool = True
    """False: it is soon done, and must not wait until others are."""


@dataclass
class _Batch:
    left: int
    results: list[Any]
    behind: list["_Waiting"] = field(default_factory=list)
    """Those that others of the batch have to be done before."""
    error: BaseException | None = None

    def check(self) -> None:
        if self.error is not None:
            raise FinalError("another part of the component failed")


@dataclass(order=True)
class _Waiting:
    order: tuple[int, int, int]
    unit: Unit[Any] = field(compare=False)
    batch: _Batch = field(compare=False)
    index: int = field(compare=False)
    context: contextvars.Context = field(compare=False)
    before: set[int] = field(compare=False)
    """What it still waits for."""


@dataclass
class _Held:
    """What a unit at work has of the budget."""

    slots: int
    """0: it gave them back, and waits for somebody else."""


class Crew:
    """At most ``jobs`` slots' worth of units at work at any moment, over all threads that call `run`."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._free = jobs
        self._without_slot = 0
        self._waiting: list[_Waiting] = []
        self._at_work: list[_Waiting] = []
        self._count = 0
        self._changed = threading.Condition()

    def run(self, units: Sequence[Unit[_Result]], check: Callable[[], None] = lambda: None) -> list[_Result]:
        """Do all ``units`` and return their results in their order; raises what the first one that fails raises.

        Returns or raises when none of them is at work any more. A thread that is interrupted from outside, or is told to stop
        by ``check``, which raises, waits for that `_GRACE_SECONDS` at most: a unit may hang in a read of a mount whose server
        is gone. Must not be called from within a unit.
        """
        batch = _Batch(len(units), [None] * len(units))
        with self._changed:
            for index, unit in enumerate(units):
                if any(not 0 <= position < index for position in unit.after):
                    raise ValueError(f"unit {index} waits for {unit.after}")
                self._count += 1
                order = (unit.rank, -unit.size_bytes, self._count)
                batch.behind.append(_Waiting(order, unit, batch, index, contextvars.copy_context(), set(unit.after)))
            try:
                self._queue(batch)
                self._start()
                while batch.left:
                    self._changed.wait(LOOK_SECONDS)
                    if batch.left:
                        check()
            except BaseException as error:
                # Whoever waits is told to stop (Prefect throws into its threads): so are they, and then waited for.
                self._fail(batch, error)
                self._changed.wait_for(lambda: not batch.left, _GRACE_SECONDS)
                raise
        if batch.error is not None:
            raise batch.error
        return batch.results

    def _queue(self, batch: _Batch) -> None:
        """Let those wait for a slot that wait for nothing else any more; the lock is held."""
        for one in [one for one in batch.behind if not one.before]:
            if batch.error is not None:
                return
            batch.behind.remove(one)
            if one.unit.needs_slot:
                heapq.heappush(self._waiting, one)
            else:
                self._launch(one, 0, 0)

    def _fail(self, batch: _Batch, error: BaseException) -> None:
        """Note the error, and drop what the batch has not begun: nobody waits until its turn has come; the lock is held."""
        batch.error = batch.error or error
        dropped = [one for one in self._waiting if one.batch is batch] + batch.behind
        batch.behind.clear()
        self._waiting = [one for one in self._waiting if one.batch is not batch]
        heapq.heapify(self._waiting)
        batch.left -= len(dropped)
        self._changed.notify_all()

    def _end(self, one: _Waiting) -> None:
        """Count one that has ended; the lock is held."""
        self._at_work.remove(one)
        one.batch.left -= 1
        for other in one.batch.behind:
            other.before.discard(one.index)
        self._queue(one.batch)
        self._changed.notify_all()

    def _start(self) -> None:
        """Start whatever there is a slot for; the lock is held."""
        while self._free and self._waiting:
            one = heapq.heappop(self._waiting)
            large = sum(2 * other.unit.size_bytes >= one.unit.size_bytes for other in self._at_work)
            others = min(large + len(self._waiting), self.jobs - 1)
            self._launch(one, self._free if one.unit.is_elastic and not self._waiting else 1, others)

    def _launch(self, one: _Waiting, slots: int, others: int) -> None:
        """Start one in a thread of its own; the lock is held."""
        self._free -= slots
        self._at_work.append(one)
        try:
            threading.Thread(target=self._do, args=(one, _Held(slots), others), name="crew", daemon=True).start()
        except (RuntimeError, MemoryError) as error:  # the system has no room for another thread
            self._free += slots
            self._fail(one.batch, error)
            self._end(one)

    def _do(self, one: _Waiting, held: _Held, others: int) -> None:
        turn = Turn(
            *(
                max(1, held.slots),
                one.batch.check,
                lambda: self._give_back(held),
                lambda: self._slots_now(one.unit, held),
            ),
            others,
        )
        try:
            one.batch.results[one.index] = one.context.run(one.unit.work, turn)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for the result
            with self._changed:
                self._fail(one.batch, error)
        finally:
            with self._changed:
                self._free += held.slots
                self._without_slot -= held.slots == 0 and one.unit.needs_slot
                held.slots = 0  # a thread of the unit's that outlives it gets no more
                self._end(one)
                self._start()

    def _give_back(self, held: _Held) -> None:
        with self._changed:
            keeps = int(self._without_slot >= WAITING_LIMIT)
            if held.slots > keeps:
                self._free += held.slots - keeps
                held.slots = keeps
                self._without_slot += keeps == 0
                self._start()

    def _slots_now(self, unit: Unit[Any], held: _Held) -> int:
        with self._changed:
            if not held.slots:  # it gave them back, and only waits
                return 1
            if self._waiting:
                self._free += held.slots - 1
                held.slots = 1
                self._start()
            elif self._free and unit.is_elastic:
                # One at a time, so that several that grow share what is free.
                self._free -= 1
                held.slots += 1
            return held.slots
