"""Ports for servers of our own, on the loopback interface."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from athena_backup.errors import FinalError

_Started = TypeVar("_Started")
_TRIES = 4
_TAKEN = ("address already in use", "eaddrinuse")
"""What the C library's error and Node's name of it are in a server's log, in small letters."""


class PortTakenError(FinalError):
    """A server did not start: another process has taken its port since it was found free."""


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports of the loopback interface that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        # All are held until the last is found: the system gives out one that was closed again.
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def on_free_ports(count: int, start: Callable[[list[int]], AbstractContextManager[_Started]]) -> Iterator[_Started]:
    """What ``start`` starts on ``count`` free ports; on others where one was taken before the server had it.

    Raises what ``start`` raises, `PortTakenError` only after four tries.
    """
    for tries_left in reversed(range(_TRIES)):
        with contextlib.ExitStack() as stack:
            try:
                started = stack.enter_context(start(free_ports(count)))
            except PortTakenError:
                if not tries_left:
                    raise
                continue
            yield started
            return


def start_error(server: str, log: str) -> FinalError:
    """The error for a ``server`` that did not start, with the end of what it wrote into its ``log`` in this try."""
    kind = PortTakenError if any(sign in log.lower() for sign in _TAKEN) else FinalError
    return kind(f"{server} did not start:\n" + "\n".join(log.splitlines()[-10:]))
