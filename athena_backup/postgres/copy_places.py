"""The one budget of connections that read: those of COPY and `pg_dump`, over all databases of an operation."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Protocol


class Closing(Protocol):
    """Something that is closed when nobody needs it any more; that raises nothing."""

    def close(self) -> None:
        """End it."""


class CopyPlaces:
    """Places for connections: never more taken than units are at work, and sessions kept for later only in those that are left.

    Without, each database would keep as many as ever read it at once until its last byte. Of each one is kept in any case: it has
    locked the tables that are still to be read, and DDL that has queued for one of them would come in between.
    """

    def __init__(self, limit: int) -> None:
        """``limit``: as many as units are at work at once."""
        self._limit = limit
        self._in_use = 0
        self._idle: list[tuple[object, Closing]] = []
        """Whose session, the one that is idle for the longest time first."""
        self._closed: set[object] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """A place for another connection, such as that of a `pg_dump`, for the length of the block."""
        self._enter()
        try:
            yield
        finally:
            with self._lock:
                self._in_use -= 1

    def take(self, owner: object) -> Closing | None:
        """The session that ``owner`` gave back last, if it is still kept; a place for one in any case."""
        with self._lock:
            kept = next((number for number in reversed(range(len(self._idle))) if self._idle[number][0] is owner), None)
            if kept is not None:
                self._in_use += 1
                return self._idle.pop(kept)[1]
        self._enter()
        return None

    def give_back(self, owner: object, session: Closing | None, *, is_whole: bool) -> None:
        """End what `take` began, and keep the session for later if it is whole; None: it was never opened."""
        with self._lock:
            self._in_use -= 1
            if session is None:
                return
            if is_whole and owner not in self._closed:
                self._idle.append((owner, session))
                return
        session.close()

    def close(self, owner: object) -> None:
        """End what is kept for ``owner``, and keep nothing for it any more."""
        with self._lock:
            self._closed.add(owner)
            ended = [session for whose, session in self._idle if whose is owner]
            self._idle = [one for one in self._idle if one[0] is not owner]
        for session in ended:
            session.close()

    def _enter(self) -> None:
        with self._lock:
            self._in_use += 1
            surplus = max(0, self._in_use + len(self._idle) - self._limit)
            newest = {id(owner): number for number, (owner, _) in enumerate(self._idle)}
            spare = [number for number, (owner, _) in enumerate(self._idle) if newest[id(owner)] != number][:surplus]
            ended = [self._idle[number][1] for number in spare]
            self._idle = [one for number, one in enumerate(self._idle) if number not in spare]
        for session in ended:
            session.close()
