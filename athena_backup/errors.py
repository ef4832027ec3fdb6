"""The family of errors. Each says component, step, cause and next step in an operator's words, and is passing or final.

An error is born where the knowledge is; nobody above parses its text. *Passing* means that the same call may succeed
later (network, throttling, a lock), so a task may be retried; *final* means that it can't without someone's help.
"""

from dataclasses import dataclass
from datetime import UTC, datetime


@dataclass(frozen=True)
class Fault:
    """What went wrong, as data: it travels in component.json and failure.json and becomes a record's ``status``."""

    at: datetime
    component: str | None
    step: str
    cause: str
    next_step: str
    passing: bool

    def __str__(self) -> str:
        subject = f"{self.component}: " if self.component else ""
        advice = f" ({self.next_step})" if self.next_step else ""
        return f"{subject}error {self.step}: {self.cause}{advice}"


class AthenaError(Exception):
    """Base of all errors that a user may see.

    ``cause`` says what happened, ``next_step`` what to do about it (may be empty). ``component`` and ``step`` are filled
    in by whoever knows them, at the latest where the task of the component ends.
    """

    passing = False

    def __init__(self, cause: str, *, next_step: str = "", component: str | None = None, step: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.next_step = next_step
        self.component = component
        self.step = step

    def fault(self, *, component: str | None = None, step: str = "working", at: datetime | None = None) -> Fault:
        """This error as a `Fault`; ``component`` and ``step`` are used where the error knows none of its own."""
        return Fault(
            at=at or datetime.now(UTC),
            component=self.component or component,
            step=self.step or step,
            cause=self.cause,
            next_step=self.next_step,
            passing=self.passing,
        )

    def __str__(self) -> str:
        return f"{self.cause} ({self.next_step})" if self.next_step else self.cause


class FinalError(AthenaError):
    """Trying again can't help: bad credentials, a missing table, damaged data, a wrong setting."""


class PassingError(AthenaError):
    """Trying again may help: a cut connection, throttling, a lock held by someone else."""

    passing = True


class AbsentError(FinalError):
    """A store has no object of that key."""


class DeniedError(FinalError):
    """A store or server refuses our credentials or their permissions."""


class UnavailableError(PassingError):
    """A store or server can't be reached or is overloaded; the outcome of the call is unknown."""


class FullError(FinalError):
    """No space or quota is left where bytes had to go."""


class UnusableSetError(FinalError):
    """A backup set that is there can't be restored: it is unfinished, failed or being deleted, or its manifest is damaged."""


class DamagedError(FinalError):
    """Stored bytes are not the ones that were written, or end too early."""


class CancelledError(FinalError):
    """Somebody cancelled the operation, or it lost the right to run."""


class DeadlineError(FinalError):
    """The operation or a step of it took longer than it was allowed to."""


def fault_of(error: BaseException, *, component: str | None = None, step: str = "working") -> Fault:
    """Any exception as a `Fault`; one that is not of the family is named with its type, since nobody foresaw it."""
    if isinstance(error, AthenaError):
        return error.fault(component=component, step=step)
    return Fault(
        at=datetime.now(UTC),
        component=component,
        step=step,
        cause=f"{type(error).__name__}: {error}".strip(": "),
        next_step="an unforeseen error: the log has its trace; please report it",
        passing=False,
    )
